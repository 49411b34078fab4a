"""What every test shares: eight CPU devices, and texts from the test-data cache."""

import gc
import os
import signal
from importlib.metadata import version
from pathlib import Path

import psutil
import pytest

# JAX reads these once, at its import, so they stand before any test module.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Eight devices on few cores can deadlock in a collective; more threads cure that.
os.environ.setdefault("NPROC", "32")
DEVICES = "--xla_force_host_platform_device_count"
if DEVICES not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {DEVICES}=8".strip()

# What the code does not say is an error: no types or ranks of arrays are promoted, and
# keys of random numbers are typed. Processes that tests start are as strict.
os.environ.setdefault("JAX_NUMPY_DTYPE_PROMOTION", "strict")
os.environ.setdefault("JAX_NUMPY_RANK_PROMOTION", "raise")
os.environ.setdefault("JAX_LEGACY_PRNG_KEY", "error")

# Tests compile much and compute little: a third of the compile time, same numbers. And
# a program in one part is compiled in less time than in many.
QUICK = "--xla_backend_optimization_level"
WHOLE = "--xla_cpu_parallel_codegen_split_count"
if QUICK not in os.environ["XLA_FLAGS"]:
    os.environ["XLA_FLAGS"] += f" {QUICK}=0 {WHOLE}=1"

# Who starts the tests in the background may have turned these off, for all processes
# that come of it; the tests send them.
for number in (signal.SIGINT, getattr(signal, "SIGHUP", None)):
    if number and signal.getsignal(number) is signal.SIG_IGN:
        back = signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL
        signal.signal(number, back)

# Programs are traced by the thousand, and every one is a web of small objects.
gc.set_threshold(100_000, 20, 50)

# Tests that train the same tiny models share what was compiled, also with the processes
# that run beside them or that they start.
CACHE = Path(__file__).parent.parent / ".pytest_cache" / "jax"
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(CACHE))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")


def pytest_configure(config):
    """Takes the older emitters of jaxlib 0.10, which save a third of the quick suite.

    With them the last bits of a member depend on how many train in its program, which
    slow and fault tests compare; those compile as for users.
    """
    flag = "--xla_cpu_use_fusion_emitters"
    quick = config.option.markexpr == "not slow"
    older = version("jaxlib").startswith("0.10.")
    if quick and older and flag not in os.environ["XLA_FLAGS"]:
        os.environ["XLA_FLAGS"] += f" {flag}=false"


@pytest.fixture(scope="session", autouse=True)
def eight_devices():
    """Starts JAX with all devices: a run that came first might ask for fewer."""
    import jax

    jax.devices()


@pytest.fixture(scope="module", autouse=True)
def compiled_programs():
    """Lets go of a file's programs once they hold much: gigabytes at the end, else."""
    yield
    if psutil.Process().memory_info().rss > 2e9:
        import jax

        jax.clear_caches()


@pytest.fixture
def promotion():
    """Promotes as NumPy does, for readers' programs and for libraries that lean on it.

    A file or a test asks for it by `pytest.mark.usefixtures("promotion")`.
    """
    import jax

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.fixture
def corpus_file():
    """Returns a function from the name of a text to its Path; an absent one skips."""

    def find(name: str) -> Path:
        folder = os.environ.get("GPT_JAX_TEST_DATA")
        path = Path(folder or "absent") / name
        if not folder or not path.is_file():
            pytest.skip(f"needs {name} in the test-data cache: make test-data")
        return path

    return find
