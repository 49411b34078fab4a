"""What failing screens and Ctrl-C do to real runs, started through their doors.

Run by `make test-faults`; the file's name keeps it out of `make test`.
"""

import os
import random
import subprocess
import sys

import pytest

from gpt_jax import files, metrics
from tests import forks

pytestmark = pytest.mark.timeout(900)
SHOWN = {"steps": 6, "eval_every": 2, "sample_every": 3, "checkpoint_every": 2}

GONE = "r, w = os.pipe(); os.close(r); os.dup2(w, 1)\n"
SCREENS = {
    "its reader is gone": GONE,
    "the readers of both streams are gone": GONE + "os.dup2(w, 2)\n",
    "its disk is full": "os.dup2(os.open('/dev/full', os.O_WRONLY), 1)\n",
    "it is closed": "import sys; os.close(1); sys.stdout = None\n",
    "stderr is closed": "import sys; os.close(2); sys.stderr = None\n",
    "it is Chinese": "import sys; sys.stdout.reconfigure(encoding='gbk')\n",
    "it is ASCII": "import sys; sys.stdout.reconfigure(encoding='ascii')\n",
    "its terminal hangs up": """
import fcntl, sys, termios
os.setsid()
ours, theirs = os.openpty()
fcntl.ioctl(theirs, termios.TIOCSCTTY, 0)
for number in (1, 2):
    os.dup2(theirs, number)
os.close(theirs)
threading.Thread(target=lambda: [0 for _ in iter(lambda: os.read(ours, 9), b"")],
                 daemon=True).start()
write = metrics.Writer.write
def hang_up(*args, **numbers):
    write(*args, **numbers)
    if args[1] == 2 and "val_loss" in numbers: os.close(ours)
metrics.Writer.write = hang_up
""",
}


@pytest.fixture(scope="module")
def live():
    with forks.forks() as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def control(live, home):
    code, said = go(live, home, home / "control")
    assert code == 0, said
    return home / "control"


def go(live, home, run, *, before="", **config):
    words = [*forks.flags(home, **{**SHOWN, **config}), f"--workdir={run}"]
    return live.run("train", *words, before=before)


@pytest.mark.fault(31)
@pytest.mark.parametrize("screen", SCREENS)
def test_a_run_goes_on_to_its_end_when_nobody_can_see_it(
    live, home, control, tmp_path, screen
):
    code, said = go(live, home, tmp_path / "run", before=SCREENS[screen])
    assert code == 0, said
    assert forks.digest(tmp_path / "run") == forks.digest(control)
    rows = metrics.read(tmp_path / "run")
    assert [row["step"] for row in rows] == [r["step"] for r in metrics.read(control)]
    assert (tmp_path / "run" / "samples.md").read_text(encoding="utf-8")


@pytest.mark.fault(31)
def test_an_unseen_run_that_is_stopped_says_so_with_its_exit_code(live, home, tmp_path):
    stop = "train.save = at(1, term, train.save)"
    code, _ = go(live, home, tmp_path / "run", before=GONE + stop)
    assert code == 143 and forks.sound(tmp_path / "run")
    code, _ = go(live, home, tmp_path / "run", before=GONE)
    assert code == 0 and forks.sound(tmp_path / "run")[-1] == 6


SWEEP = """
config = "configs/quickstart.py:size=tiny"
fixed = {fixed}
def points():
    for lr in (1e-3, 1e-2):
        yield {{"hyper.lr": lr}}
"""


@pytest.mark.fault(31)
def test_an_unseen_sweep_goes_on_to_its_report(live, home, tmp_path):
    chosen = (word.removeprefix("--config.") for word in forks.flags(home)[1:])
    pairs = dict(word.split("=", 1) for word in chosen)
    fixed = {"data.folder": pairs["data.folder"], "compile_cache": ""}
    fixed |= {"steps": 2, "eval_every": 2, "sample_every": 0, "tensorboard": False}
    files.write(tmp_path / "two.py", SWEEP.format(fixed=fixed))
    flags = [f"--sweep={tmp_path / 'two.py'}", f"--out={tmp_path / 'out'}"]
    code, said = live.run("sweep", *flags, "--engine=vmap", before=GONE)
    assert code == 0, said
    assert (tmp_path / "out" / "report.html").is_file()


SERVER = """
import urllib.request
from gpt_jax.serve import server
def ask(url):
    found = urllib.request.urlopen(url + "/healthz", timeout=20).status
    open({path!r}, "w").write(str(found))
    term()
def serve(*args, tell, **named):
    def told(line):
        tell(line)
        if line.startswith("serving"):
            url = line.split(" at ")[1].split()[0]
            threading.Thread(target=ask, args=[url]).start()
    return real(*args, tell=told, **named)
real, server.serve = server.serve, serve
"""


@pytest.mark.fault(31)
def test_an_unseen_server_answers_and_leaves_in_good_order(live, control, tmp_path):
    before = GONE + SERVER.format(path=str(tmp_path / "status"))
    flags = [f"--runs={control}", "--port=0", "--batches=1"]
    code, said = live.run("serve", *flags, before=before)
    assert code == 0, said
    assert (tmp_path / "status").read_text() == "200"


@pytest.mark.fault(33, injections=0)
def test_ctrl_c_at_any_time_ends_a_run_or_has_it_save(
    live, home, tmp_path, record_property
):
    rng = random.Random(7)
    moments = [rng.random() * 3 for _ in range(12)]
    for number, moment in enumerate(moments):
        before = f"threading.Timer({moment}, interrupt).start()"
        run = tmp_path / str(number)
        code, said = go(live, home, run, steps=10_000, eval_every=0, before=before)
        assert code == 130, said
        assert not list(run.glob("*.tmp")), moment
        assert forks.sound(run) or forks.reached(run) == 0
    record_property("injections", len(moments))


PREPARE = """
import random, sys
from gpt_jax import tokenizers
from gpt_jax.tokenizers import train as real
def told(*args, **named):
    threading.Timer(0.3, interrupt).start()
    made = real(*args, **named)
    print("trained to the end", flush=True)
    return made
tokenizers.train = told
"""


@pytest.mark.fault(33)
def test_ctrl_c_ends_the_training_of_a_tokenizer(live, tmp_path):
    rng = random.Random(0)
    words = ("".join(rng.choices("abcdefgh", k=9)) for _ in range(300_000))
    (tmp_path / "text.txt").write_text(" ".join(words))
    flags = [f"--config.data.source={tmp_path}/text.txt"]
    flags += [
        f"--config.data.folder={tmp_path}/data",
        "--config.data.tokenizer=bpe:8000",
    ]
    code, said = live.run("prepare", *flags, before=PREPARE)
    assert code == 130 and "training the tokenizer" in said
    assert "trained to the end" not in said
    assert not list((tmp_path / "data").iterdir())


@pytest.mark.fault(35)
def test_forty_open_files_are_enough(home, tmp_path):
    words = [*forks.flags(home, **SHOWN), f"--workdir={tmp_path / 'run'}"]
    command = [sys.executable, "-m", "experiments.train", *words]
    done = subprocess.run(
        ["sh", "-c", 'ulimit -n 40; exec "$@"', "sh", *command],
        cwd=forks.ROOT,
        env={**os.environ, "XLA_FLAGS": forks.FLAGS},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and not done.stderr, done.stderr
