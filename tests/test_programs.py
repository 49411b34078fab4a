"""The compile cache, and programs that are compiled in the background."""

import os
import pwd
import threading
import types
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src import compilation_cache

from gpt_jax import files, programs


@pytest.fixture
def cache_dir():
    """The folder that JAX uses; set back after the test."""
    before = jax.config.jax_compilation_cache_dir
    yield lambda: jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", before)


def program(function, told, ready=lambda: None, **options):
    return programs.Program(jax.jit(function, **options), "it", told.append, ready)


def test_a_program_gives_what_the_function_gives():
    run = program(lambda x, y: (x @ y, x.sum()), [])
    x, y = np.arange(6.0).reshape(2, 3), np.ones((3, 2))
    for scale in (1, 2):
        got, total = run(x * scale, y)
        np.testing.assert_allclose(got, x @ y * scale)
        assert total == 15 * scale


def test_compiling_begins_before_the_call_and_beside_the_caller():
    tracing = []
    run = program(lambda x: tracing.append(threading.current_thread()) or x + 1, [])
    run.begin(jnp.ones(3))
    assert tracing == [threading.main_thread()]  # JAX traces where the state lives
    assert run(jnp.ones(3)).tolist() == [2, 2, 2]
    assert len(tracing) == 1
    assert not [t for t in threading.enumerate() if t.name == "compile"]


def test_other_shapes_run_too_and_the_first_ones_go_on():
    tracing = []
    run = program(lambda x: tracing.append(x.shape) or x + 1, [])
    for width in (3, 5, 3, 5):
        assert run(jnp.ones(width)).tolist() == [2] * width
    assert tracing == [(3,), (5,)]


def test_donation_is_kept():
    run = program(lambda x: x + 1, [], donate_argnums=0)
    x = jnp.zeros(5)
    run.begin(x)
    assert not x.is_deleted()
    assert run(x).tolist() == [1] * 5
    assert x.is_deleted()


def test_a_program_tells_once_whether_the_cache_had_it():
    """The cache is that of the tests: a number never used before is not in it."""
    number = int.from_bytes(os.urandom(3), "little")
    told = []
    for _ in range(2):
        run = program(lambda x: x * number, told)
        assert [run(jnp.float32(x)) for x in (1, 2)] == [number, 2 * number]
        jax.clear_caches()
    assert told[0::2] == ["compiling it"] * 2
    first, second = told[1::2]
    folder = jax.config.jax_compilation_cache_dir
    assert first.startswith("compiled it in ") and first.endswith(f"kept in {folder}")
    assert second.startswith("loaded it in ") and folder in second


def test_what_the_cache_does_not_keep_is_not_said_to_be_kept():
    number = int.from_bytes(os.urandom(3), "little")
    told, name = [], "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 1000.0)
    program(lambda x: x - number, told)(jnp.ones(()))
    jax.config.update(name, before)
    assert len(told) == 2 and told[1].startswith("compiled it in ")
    assert "kept" not in told[1]


def test_an_error_of_the_compiler_reaches_the_caller():
    run = program(lambda x: x, [], compiler_options={"no_such_option": 1})
    run.begin(jnp.ones(()))
    with pytest.raises(Exception, match="no_such_option"):
        run(jnp.ones(()))


def test_programs_compile_while_others_run_over_several_devices():
    """Compilers and collectives share the cores; neither waits for ever."""
    mesh = jax.make_mesh((8,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("d"))
    x = jax.device_put(jnp.arange(64.0), rows)
    total = jax.jit(lambda x: x.sum())
    for salt in range(5):
        run = program(partial(lambda x, s: jnp.sort(jnp.sin(x + s)), s=salt), [])
        run.begin(x)
        for _ in range(20):
            assert jax.block_until_ready(total(x)) == 2016
        assert run(x).shape == (64,)


def test_a_program_is_ready_once_and_before_it_runs():
    seen = []
    run = program(lambda x: x + 1, seen, ready=lambda: seen.append("ready"))
    run(jnp.ones(3)), run(jnp.ones(3))
    assert seen[0] == "compiling it" and seen[2:] == ["ready"]


def test_what_a_first_call_compiles_is_announced_once():
    told = []
    run = programs.announced(lambda x: told.append(x) or x, "compiling", told.append)
    assert [run(1), run(2)] == [1, 2] and told == ["compiling", 1, 2]


# ---- entries of the cache ----


@pytest.fixture
def cache(tmp_path, cache_dir):
    """A cache of its own; `run` compiles a function anew and calls it."""

    def open_at(folder):
        compilation_cache.reset_cache()
        programs.use_cache(str(folder))

    def run(x):
        jax.clear_caches()
        return float(jax.jit(lambda x: 3 * jnp.sin(x) + 1)(x))

    was = cache_dir(), compilation_cache.get_file_cache
    open_at(tmp_path / "cache")
    yield types.SimpleNamespace(run=run, folder=tmp_path / "cache", open_at=open_at)
    jax.config.update("jax_compilation_cache_dir", was[0])
    compilation_cache.get_file_cache = was[1]
    compilation_cache.reset_cache()


def of_one(cache):
    """The entry of the function that `cache` runs."""
    (entry,) = cache.folder.glob("jit__lambda*-cache")
    return entry


def cut(entry):
    entry.write_bytes(entry.read_bytes()[:-100])


def emptied(entry):
    entry.write_bytes(b"")


def flipped(entry):
    data = bytearray(entry.read_bytes())
    data[len(data) // 2] ^= 1
    entry.write_bytes(data)


def swapped(entry):
    """Another program's, whole, under this one's name."""
    other = next(path for path in entry.parent.iterdir() if path != entry)
    entry.write_bytes(other.read_bytes())


@pytest.mark.fault(39)
@pytest.mark.parametrize("damage", [cut, emptied, flipped, swapped])
def test_a_damaged_entry_is_removed_compiled_again_once_and_told_once(
    cache, caplog, damage
):
    wanted = cache.run(2.0)
    entry = of_one(cache)
    jax.jit(lambda x: x * 7)(1.0)  # some other program
    damage(entry)
    assert cache.run(2.0) == wanted
    assert caplog.text.count("is not as it was written: it was removed") == 1
    caplog.clear()
    assert cache.run(2.0) == wanted and not caplog.records


@pytest.mark.fault(39)
def test_programs_of_another_cpu_are_not_run_and_stay_for_it(
    cache, caplog, monkeypatch
):
    cache.run(2.0)
    entry = of_one(cache)
    before = entry.read_bytes()
    monkeypatch.setattr(programs.files, "cpu", lambda: "another, with fewer features")
    cache.open_at(cache.folder)
    cache.run(2.0)
    (other,) = set(cache.folder.glob("jit__lambda*-cache")) - {entry}
    assert entry.read_bytes() == before and not caplog.records
    other.write_bytes(before)  # renamed by hand: not run all the same
    cache.run(2.0)
    assert "is not as it was written" in caplog.text


@pytest.mark.fault(35)
def test_a_cache_that_cannot_be_written_is_told_once(cache, caplog, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(programs.files, "write", full)
    assert cache.run(1.0) == cache.run(1.0)
    told = f"compiled programs are not kept in {cache.folder}: [Errno 28] No space left"
    assert caplog.text.count(told) == 1


# ---- the folder of the cache ----


def test_a_new_folder_is_made_for_its_user_alone(tmp_path, cache_dir):
    os.umask(os.umask(0))  # whatever the mask is
    programs.use_cache(str(tmp_path / "a" / "b"))
    assert cache_dir() == str(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").stat().st_mode & 0o777 == 0o700


def test_no_folder_leaves_the_cache_as_it_is(cache_dir):
    before = cache_dir()
    programs.use_cache("")
    assert cache_dir() == before


@pytest.mark.fault(30)
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o720, 0o702])
def test_a_folder_that_others_can_write_to_is_not_used(
    tmp_path, cache_dir, caplog, mode
):
    before = cache_dir()
    tmp_path.chmod(mode)
    programs.use_cache(str(tmp_path))
    assert cache_dir() == before
    (record,) = caplog.records
    wanted = f"{tmp_path} can be written to by others (mode {mode:o})"
    assert wanted in record.getMessage()


def test_a_folder_that_others_can_only_read_is_used(tmp_path, cache_dir, caplog):
    tmp_path.chmod(0o755)
    programs.use_cache(str(tmp_path))
    assert cache_dir() == str(tmp_path) and not caplog.records


@pytest.mark.fault(30)
def test_a_folder_of_another_user_is_not_used(tmp_path, cache_dir, caplog, monkeypatch):
    before = cache_dir()
    owner = tmp_path.stat().st_uid
    monkeypatch.setattr(files.os, "getuid", lambda: owner + 1)
    programs.use_cache(str(tmp_path))
    assert cache_dir() == before
    assert f"belongs to another user (id {owner})" in caplog.text


def test_a_folder_that_cannot_be_made_costs_the_cache_only(tmp_path, cache_dir, caplog):
    before = cache_dir()
    (tmp_path / "file").write_text("")
    programs.use_cache(str(tmp_path / "file" / "cache"))
    assert cache_dir() == before
    assert "cannot be made (Not a directory)" in caplog.text


def test_only_small_programs_that_run_once_are_left_unoptimised():
    assert programs.options_for_one_run(10**6) == {"xla_backend_optimization_level": 0}
    assert programs.options_for_one_run(10**9) is None


@pytest.mark.fault(35)
@pytest.mark.parametrize("folder", ["~/cache", "~nobody-of-that-name/cache"])
def test_no_home_costs_the_cache_only_and_one_warning(
    cache_dir, caplog, monkeypatch, folder
):
    before = cache_dir()
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", {}.__getitem__)
    programs.use_cache(folder)
    assert cache_dir() == before
    (record,) = caplog.records
    assert f"compile_cache {folder} needs a home folder" in record.getMessage()
