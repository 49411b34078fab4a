"""What kills, signals, full disks and changed files do to a training run.

Every fault happens to a real process that trains through the door. Run by
`make test-faults`; the file's name keeps it out of `make test`.
"""

import json
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from gpt_jax import checkpoint, metrics, runs
from tests import forks

pytestmark = pytest.mark.timeout(900)
EVERY = 3  # steps between two checkpoints
LEAST_UNFINISHED = 3  # of 20 kills, those that have to leave half a save behind


@pytest.fixture(scope="module")
def live():
    with forks.forks() as found:
        yield found


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def control(live, home):
    """Returns a function from a number of steps to an undisturbed run of so many."""

    def run(steps: int) -> Path:
        folder = home / f"control-{steps}"
        if not folder.exists():
            code, said = go(live, home, folder, steps=steps)
            assert code == 0, said
        return folder

    return run


def words(home, run, steps, **config):
    """Returns the flags of a run that saves often."""
    config = {"checkpoint_every": EVERY, "eval_every": 6, **config}
    return [*forks.flags(home, steps=steps, **config), f"--workdir={run}"]


def go(live, home, run, *, steps, before="", flags=(), **config):
    """Trains; returns the exit code and what was said."""
    return live.run("train", *words(home, run, steps, **config), *flags, before=before)


def same(run, other):
    """Whether two runs ended with the same state by the same losses."""
    assert forks.losses(run) == forks.losses(other)
    return forks.digest(run) == forks.digest(other)


# --- 1, 2: SIGKILL --------------------------------------------------------------------

# Kills at a share of the time that the save before took; the first takes longer.
IN_SAVE = """
import time
finish, took = checkpoint.Checkpoints._finish, []
def killed(self, target, write, note):
    if len(took) > 1:
        threading.Timer({share} * took[-1], die).start()
    began = time.monotonic()
    finish(self, target, write, note)
    took.append(time.monotonic() - began)
checkpoint.Checkpoints._finish = killed
"""


@pytest.mark.fault(1, injections=20)
def test_20_kills_while_a_checkpoint_is_written(
    live, home, tmp_path, control, record_property
):
    run, rng, newest, left = tmp_path / "run", random.Random(1), 0, 0
    for share in range(20):
        before = IN_SAVE.format(share=(share + rng.random()) / 20)
        code, said = go(live, home, run, steps=10**6, before=before)
        assert code == -9, said
        steps = forks.sound(run)
        assert steps[-1] > newest  # the save before was finished
        newest = steps[-1]
        left += unfinished(run, newest)
        assert forks.reached(run) - newest <= 2 * EVERY
    record_property("unfinished", left)
    print(f"{left} of 20 kills left an unfinished save")
    assert left >= LEAST_UNFINISHED
    end = newest + 4
    code, said = go(live, home, run, steps=end)
    assert code == 0 and f"resuming after step {newest}" in said
    assert same(run, control(end))


def unfinished(run, newest):
    """Whether there is part of a save that is newer than the newest finished one."""
    names = [path.name.partition(".") for path in (run / "checkpoints").iterdir()]
    return any(step.isdecimal() and int(step) > newest for step, _, _ in names)


PHASES = {
    "in a step": "train.sharding.wait_on_cpu = at(9, die, train.sharding.wait_on_cpu)",
    "while waiting for data": "data.Windows.take = at(20, die, data.Windows.take)",
    "in an evaluation": """
train.events.evaluate.evaluate = at(2, die, train.events.evaluate.evaluate)
""",
    "in a line of the record": """
def half(self, step, write=metrics.Writer.write, **numbers):
    if step % 10 == 8:
        self._file.write('{"step": ' + str(step)); self._file.flush(); die()
    write(self, step, **numbers)
metrics.Writer.write = half
""",
}


@pytest.mark.fault(2, injections=4)
def test_a_kill_in_any_phase_costs_no_more_than_two_intervals(
    live, home, tmp_path, control
):
    run = tmp_path / "run"
    for phase, before in PHASES.items():
        newest = max(forks.sound(run), default=0)
        code, said = go(live, home, run, steps=40, before=before)
        assert code == -9, f"{phase}: {said}"
        assert max(forks.sound(run)) >= newest, phase
        assert forks.reached(run) - max(forks.sound(run)) <= 2 * EVERY, phase
    assert go(live, home, run, steps=40)[0] == 0
    steps = [step for step, _ in forks.losses(run)]
    assert steps == list(range(1, 41))
    assert same(run, control(40))


# --- 3: SIGTERM, Ctrl-C ---------------------------------------------------------------

# In what the signal comes, in which call of it, and which signal.
SIGNALS = {
    "compile": ("train.parts.programs.Program.begin", 1, "term"),
    "train": ("train.sharding.wait_on_cpu", 5, "term"),
    "train, Ctrl-C": ("train.sharding.wait_on_cpu", 5, "interrupt"),
    "evaluate": ("train.events.evaluate.evaluate", 2, "term"),
    "sample": ("train.events.sample.texts", 2, "term"),
}


@pytest.mark.fault(3)
@pytest.mark.parametrize("phase", SIGNALS)
def test_a_signal_saves_the_step_that_it_came_in(live, home, tmp_path, control, phase):
    run = tmp_path / "run"
    settings: dict[str, Any] = {"sample_every": 6, "sample.max_new_tokens": 4}
    function, count, send = SIGNALS[phase]
    before = f"{function} = at({count}, {send}, {function})"
    code, said = go(live, home, run, steps=12, before=before, **settings)
    assert code == (130 if send == "interrupt" else 143), said
    assert "the same command resumes" in said
    saved = forks.sound(run) if (run / "checkpoints").exists() else []
    if phase == "compile":
        assert saved == []
    else:
        assert saved[-1] == forks.reached(run) and 0 < saved[-1] < 12
    code, said = go(live, home, run, steps=12, **settings)
    assert code == 0, said
    assert same(run, control(12))


# The save hangs, so that only force ends the process.
STUCK = """
import time
train.sharding.wait_on_cpu = at(5, term, train.sharding.wait_on_cpu)
def stuck(self, target, write, note, finish=checkpoint.Checkpoints._finish):
    if int(target.name) > 3:
        time.sleep(1000)
    finish(self, target, write, note)
checkpoint.Checkpoints._finish = stuck
"""


@pytest.mark.fault(3, injections=2)
@pytest.mark.parametrize("second", [True, False], ids=["second signal", "grace"])
def test_a_run_that_cannot_save_leaves_at_once_or_after_its_grace(
    live, home, tmp_path, control, second
):
    run = tmp_path / "run"
    before = STUCK
    if second:
        before = before.replace("(5, term", "(5, twice")
        before = "def twice(): term(); threading.Timer(1.0, term).start()\n" + before
    grace = 600 if second else 1
    code, said = go(live, home, run, steps=12, before=before, grace_s=grace)
    assert code == 143 and ("not done within" in said) is not second, said
    assert forks.sound(run) == [3]
    assert go(live, home, run, steps=12)[0] == 0
    assert same(run, control(12))


# --- 4: no room, no right to write ----------------------------------------------------

# The first save is finished before anything happens to the second.
FIRST = """
def save(self, step, *args, save=checkpoint.Checkpoints.save, **named):
    done = save(self, step, *args, **named)
    if step == 3: self._thread.join()
    return done
checkpoint.Checkpoints.save = save
"""

# From step 4 on no file may grow to the size of the weights.
LIMIT = (
    FIRST
    + """
import resource
def limited(self, step, write=metrics.Writer.write, **numbers):
    if step == 4: resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1))
    write(self, step, **numbers)
metrics.Writer.write = limited
"""
)


@pytest.mark.fault(4)
def test_over_its_quota_a_run_stops_with_a_sentence_and_goes_on_later(
    live, home, tmp_path, control
):
    run = tmp_path / "run"
    code, said = go(live, home, run, steps=12, before=LIMIT)
    last = said.strip().splitlines()[-1]
    assert code == 1 and last.startswith("error: checkpoint"), said
    assert f"{run}/checkpoints/6 was not saved" in last
    assert "bytes are free there" in last
    assert forks.sound(run) == [3]
    code, said = go(live, home, run, steps=12)
    assert code == 0 and "resuming after step 3" in said
    assert same(run, control(12))


@pytest.mark.fault(4)
def test_what_cannot_save_its_last_checkpoint_does_not_end_well(live, home, tmp_path):
    go_on = {"on_save_error": "continue"}
    code, said = go(live, home, tmp_path / "run", steps=12, before=LIMIT, **go_on)
    assert code == 1 and "training goes on, though" in said, said
    assert forks.reached(tmp_path / "run") == 12
    assert said.strip().splitlines()[-1].startswith("error: checkpoint")


@pytest.fixture
def small_disk(tmp_path):
    """A file system of four megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(disk)],
        capture_output=True,
        text=True,
    )
    if made.returncode:
        pytest.skip(f"no file system can be mounted here: {made.stderr.strip()}")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


# Another file takes all the room from step 4 to `until`.
FILL = (
    FIRST
    + """
def fill(self, step, write=metrics.Writer.write, **numbers):
    if step == 4:
        with open("{filler}", "wb", 0) as file:
            try:
                while True: file.write(bytes(4096))
            except OSError: pass
    if step == {until}: os.unlink("{filler}")
    write(self, step, **numbers)
metrics.Writer.write = fill
"""
)


@pytest.mark.fault(4)
@pytest.mark.parametrize("tensorboard", [False, True])
def test_on_a_full_disk_a_run_stops_and_goes_on_later(
    live, home, small_disk, control, tensorboard
):
    run, filler = small_disk / "run", small_disk / "filler"
    before, board = FILL.format(filler=filler, until=99), {"tensorboard": tensorboard}
    code, said = go(live, home, run, steps=12, before=before, **board)
    assert code == 1 and "No space left on device" in said, said
    assert forks.sound(run) == [3]
    filler.unlink()
    assert go(live, home, run, steps=12, **board)[0] == 0
    assert same(run, control(12))


@pytest.mark.fault(4)
@pytest.mark.parametrize("tensorboard", [False, True])
def test_on_a_full_disk_a_run_may_go_on_and_save_when_there_is_room(
    live, home, small_disk, control, tensorboard
):
    run = small_disk / "run"
    before = FILL.format(filler=small_disk / "filler", until=32)
    config = {"on_save_error": "continue", "tensorboard": tensorboard}
    code, said = go(live, home, run, steps=36, before=before, **config)
    assert code == 0 and "training goes on, though" in said, said
    assert f"checkpoint {run}/checkpoints/6 was not saved" in said
    assert "bytes are free there" in said
    assert forks.sound(run)[-1] == 36
    assert same(run, control(36))  # no line of the record is lost either


# Root may write anywhere: give that right up.
NO_RIGHTS = """
import ctypes
nothing = (ctypes.c_uint32 * 6)()
assert not ctypes.CDLL(None).capset((ctypes.c_uint32 * 2)(0x20080522, 0), nothing)
"""


@pytest.mark.fault(4)
def test_a_folder_that_may_not_be_written_to(live, home, tmp_path, control):
    run = tmp_path / "run"
    assert go(live, home, run, steps=EVERY)[0] == 0
    saved = run / "checkpoints"
    saved.chmod(0o555)
    before = NO_RIGHTS if os.geteuid() == 0 else ""
    code, said = go(live, home, run, steps=12, before=before)
    assert code == 1 and f"{saved}/6 was not saved" in said, said
    assert "bytes are free there" in said
    assert forks.sound(run) == [3]
    saved.chmod(0o755)
    assert go(live, home, run, steps=12)[0] == 0
    assert same(run, control(12))


# --- 5, 6, 7: checkpoints -------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.fault(5, injections=4)
def test_damage_costs_one_checkpoint_and_only_all_of_them_the_run(
    live, home, tmp_path, control
):
    run = tmp_path / "run"
    assert go(live, home, run, steps=9)[0] == 0
    saved = run / "checkpoints"
    files = [path for path in (saved / "9/params").rglob("*") if path.is_file()]
    array = max(files, key=lambda path: path.stat().st_size)
    flip(array)
    code, said = live.run("sample", f"--run={run}", "--prompt=a", "--step=9")
    assert code == 2 and f"{array} does not match its sha256" in said
    shutil.rmtree(saved / "6")
    (saved / "6").mkdir()  # what is empty is unfinished
    code, said = go(live, home, run, steps=12)
    assert code == 0 and f"{array} does not match its sha256; moved to" in said
    assert "resuming after step 3" in said and (saved / "damaged-9").is_dir()
    assert same(run, control(12))
    for step in forks.sound(run):
        flip(saved / str(step) / checkpoint.MANIFEST)
    for _ in range(2):  # the second time they have been set aside
        code, said = go(live, home, run, steps=15)
        assert code == 2 and "is sound" in said, said
    assert forks.reached(run) == 12  # the record stays


RAISES = """
def broken(target, note, seal=checkpoint.sealing.seal):
    if int(target.name) == 6: raise RuntimeError("the disk caught fire")
    seal(target, note)
checkpoint.sealing.seal = broken
def waits(self, check=checkpoint.Checkpoints.check):  # so that steps are comparable
    if self._thread: self._thread.join()
    check(self)
checkpoint.Checkpoints.check = waits
"""


@pytest.mark.fault(6)
def test_a_failed_save_ends_the_run_at_the_next_step(live, home, tmp_path):
    run = tmp_path / "run"
    code, said = go(live, home, run, steps=40, before=RAISES)
    assert code == 1 and "the disk caught fire" in said, said
    assert forks.reached(run) in (6, 7) and forks.sound(run) == [3]


@pytest.mark.fault(7, injections=3)
def test_leftovers_go_and_newer_steps_move_aside(live, home, tmp_path, control):
    run, saved = tmp_path / "run", tmp_path / "run" / "checkpoints"
    often: dict[str, Any] = {"checkpoint_every": 1, "keep": 9}
    assert go(live, home, run, steps=8, **often)[0] == 0
    with checkpoint.Checkpoints(saved, keep=9) as store:
        assert store.rewind(4) == [5, 6, 7, 8]
    for step in (8, 99):
        (saved / f"{step}.orbax-checkpoint-tmp").mkdir()
    code, said = go(live, home, run, steps=8, **often)
    assert code == 0 and "resuming after step 4" in said
    assert "removed the unfinished checkpoint" in said
    names = {path.name for path in saved.iterdir()}
    assert names == {*map(str, range(1, 9)), "aside-5"}
    assert forks.sound(run) == list(range(1, 9))
    assert same(run, control(8))


# --- 11, 12, 13: what belongs to a run ------------------------------------------------

CHANGES = {
    "edited": lambda text: (text / "b.txt").write_text("other words. " * 400),
    "added": lambda text: (text / "c.txt").write_text("more. " * 500),
    "removed": lambda text: (text / "b.txt").unlink(),
    "reordered": lambda text: (text / "a.txt").rename(text / "z.txt"),
}


@pytest.fixture(scope="module")
def on_files(live, home):
    """A run of three steps on two files."""
    text = home / "text"
    text.mkdir()
    for name in ("a", "b"):
        (text / f"{name}.txt").write_text(f"{name} quick brown fox. " * 200)
    source = {"data.source": f"{text}/*.txt"}
    assert go(live, home, home / "on-files", steps=3, **source)[0] == 0
    return home / "on-files"


@pytest.mark.fault(11)
@pytest.mark.parametrize("change", CHANGES)
def test_data_that_changed_stops_a_run_unless_it_may(
    live, home, tmp_path, on_files, change
):
    run, text = shutil.copytree(on_files, tmp_path / "run"), tmp_path / "text"
    shutil.copytree(home / "text", text)
    config = json.loads((run / "config.json").read_text())
    config["data"]["source"] = f"{text}/*.txt"
    (run / "config.json").write_text(json.dumps(config))
    source = {"data.source": f"{text}/*.txt"}
    CHANGES[change](text)
    code, said = go(live, home, run, steps=6, **source)
    assert code == 2 and "other training data" in said, said
    assert forks.reached(run) == 3
    flags = ["--allow-data-change"]
    code, said = go(live, home, run, steps=6, flags=flags, **source)
    assert code == 0 and "goes on with other training data" in said, said


@pytest.mark.fault(11)
def test_a_shard_that_was_edited_is_never_trained_on(live, tmp_path):
    run = tmp_path / "run"
    assert go(live, tmp_path, run, steps=3)[0] == 0
    (shard,) = tmp_path.glob("data/*/train/shard-00000.bin")
    flip(shard)
    code, said = go(live, tmp_path, run, steps=6, flags=["--allow-data-change"])
    assert code == 2 and f"{shard} was changed after it was written" in said


@pytest.mark.fault(12)
@pytest.mark.parametrize("change", ["merges", "one less", "one more", "special"])
@pytest.mark.parametrize("door", ["train", "sample", "evaluate", "serve"])
def test_no_door_takes_weights_with_another_tokenizer(
    live, home, tmp_path, with_merges, door, change
):
    run = Path(shutil.copytree(with_merges, tmp_path / "run"))
    other = json.loads((run / "tokenizer.json").read_text())
    merges, vocab = other["model"]["merges"], other["model"]["vocab"]
    last = max((i, token) for token, i in vocab.items())[1]
    if change == "merges":
        merges[0], merges[1] = merges[1], merges[0]
    elif change == "one less":
        merges.pop()
        del vocab[last]
    elif change == "one more":
        vocab["never seen"] = max(vocab.values()) + 1
    else:
        other["added_tokens"] = []
    (run / "tokenizer.json").write_text(json.dumps(other))
    flags = {
        "sample": [f"--run={run}", "--prompt=a"],
        "evaluate": [f"--run={run}", "--text=val"],
        "serve": [f"--runs={run}", "--port=0"],
        "train": words(home, run, 6, **MERGES),
    }
    code, said = live.run(door, *flags[door])
    assert code == 2 and "tokenizer" in said, said
    assert "Traceback" not in said


MERGES = {"data.tokenizer": "bpe:300"}


@pytest.fixture(scope="module")
def with_merges(live, home):
    run = home / "with-merges"
    code, said = go(live, home, run, steps=3, **MERGES)
    assert code == 0, said
    return run


@pytest.mark.fault(13, injections=2)
def test_a_second_process_is_sent_away_and_a_dead_one_gives_way(
    live, home, tmp_path, control
):
    run, other = tmp_path / "run", forks.Forks()
    hang = "train.sharding.wait_on_cpu = at(5, lambda: os.read(r, 1), "
    hang = f"r, w = os.pipe()\n{hang}train.sharding.wait_on_cpu)\n"
    holder = other.start("train", *words(home, run, 12), before=hang)
    try:
        while not (run / "checkpoints" / "3" / checkpoint.MANIFEST).exists():
            pass
        code, said = go(live, home, run, steps=12)
        assert code == 2 and f"is in use by process {holder} on" in said, said
    finally:
        os.kill(holder, 9)
        assert other.wait() == -9
        other.close()
    code, said = go(live, home, run, steps=12)
    assert code == 0 and f"from process {holder} on" in said
    assert same(run, control(12))
    assert runs.open(run).step == 12 and metrics.read(run)[-1]["step"] == 12


# --- what a user can try --------------------------------------------------------------

OTHER_RATE = """
import sys
from configs import quickstart
def get_config(arg=None):
    config = quickstart.get_config("size=tiny")
    if sys.argv[-1].endswith("killed"): config.hyper.lr = 0.1
    return config
"""


@pytest.mark.fault(2, injections=3)
def test_verify_resume_tells_equal_runs_from_others(live, home, tmp_path):
    settings = forks.flags(home, steps=50)
    kills = ["--steps", "40", "--kills=2", f"--workdir={tmp_path / 'a'}"]
    code, said = live.run("verify_resume", *settings, *kills)
    assert code == 0 and "bit-equal" in said, said
    assert said.count("killed at step") == 2
    assert forks.reached(tmp_path / "a" / "killed") == 40
    code, said = live.run("verify_resume", *settings, *kills)
    assert code == 2 and "exists already" in said
    config = tmp_path / "other_rate.py"
    config.write_text(OTHER_RATE)
    kills = ["--steps=20", "--kills=1", f"--workdir={tmp_path / 'b'}"]
    code, said = live.run("verify_resume", f"--config={config}", *settings[1:], *kills)
    assert code == 1 and "NOT equal: " in said and "params" in said, said
    kills = ["--steps=2", "--kills=3", f"--workdir={tmp_path / 'c'}"]
    code, said = live.run("verify_resume", *settings, *kills)
    assert code == 1 and "give more --steps" in said, said
    assert "not interrupted 3 times" in said and "bit-equal" not in said
