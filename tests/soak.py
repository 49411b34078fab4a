"""Kills a run again and again, at random moments, and looks what is left.

`make soak` (or python -m tests.soak --kills=200 --seed=0): the same run is started and
killed 200 times, anywhere between its first line of Python and its last checkpoint.
After each kill every checkpoint that it lists is read and checked, none of the newest
may be gone that was there, and no more than two intervals may be lost. Then the run is
let to its end, and so is another that nobody disturbs: state and losses must be the
same bits.

Exit code 0: nothing was lost; 1: something was, and what.
"""

import argparse
import contextlib
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

EVERY = 5  # steps between two checkpoints
LONGEST_S = 2.0  # from the first finished step of a life to its kill, at most
DEADLINE_S = 300.0  # for a life to open its record
KEEP = 3  # checkpoints, besides the best
NEVER = 10**6


def main() -> int:
    """Returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="soak-") as home:
        share_compilations(Path(home))
        from tests import forks

        with forks.forks() as live:
            return soak(live, Path(home), chosen.kills, random.Random(chosen.seed))


def share_compilations(home: Path) -> None:
    """Lets all lives use what the first one compiled, in a folder of their own."""
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(home / "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
    os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"


def soak(live, home: Path, kills: int, rng: random.Random) -> int:
    """Kills so often, then compares; returns the exit code."""
    from tests import forks

    def words(name: str, steps: int) -> list[str]:
        config = {"checkpoint_every": EVERY, "eval_every": 4 * EVERY, "keep": KEEP}
        return [*forks.flags(home, steps=steps, **config), f"--workdir={home / name}"]

    code, said = live.run("train", *words("first", EVERY))  # prepares, compiles
    assert code == 0, said
    run, newest, lost, began = home / "killed", 0, 0, time.monotonic()
    before: list[int] = []
    for n in range(1, kills + 1):
        pid = live.start("train", *words("killed", NEVER))
        try:
            alive = wait(rng, run, pid)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        code = live.wait()
        if code != -signal.SIGKILL:
            print(f"kill {n}: the run had ended by itself, with {code}")
            print(live.said)
            return 1
        steps = forks.sound(run) if (run / "checkpoints").is_dir() else []
        newest, reached = max(steps, default=0), forks.reached(run)
        gone = {*sorted({*before, *steps})[-KEEP:]} - {*steps}
        lost += bool(gone) or reached - newest > 2 * EVERY
        before = steps
        left = (time.monotonic() - began) / n * (kills - n)
        print(
            f"kill {n} of {kills} after {alive:.2f} s: at step {reached}, checkpoint "
            f"{newest}, lost {lost}; {left:.0f} s left",
            flush=True,
        )
    print(f"letting it end at step {newest + EVERY}, and one that is not disturbed")
    for name in ("killed", "whole"):
        code, said = live.run("train", *words(name, newest + EVERY))
        assert code == 0, said
    same = forks.digest(run) == forks.digest(home / "whole")
    same &= forks.losses(run) == forks.losses(home / "whole")
    print(
        f"{kills} kills, {newest + EVERY} steps, checkpoints lost: {lost}; the end is "
        f"{'bit-equal to' if same else 'NOT THAT OF'} the undisturbed run"
    )
    return int(lost > 0 or not same)


def wait(rng: random.Random, run: Path, pid: int) -> float:
    """Lets a life go on for a random time; returns how long it was, in seconds.

    A third of them ends while the process is starting; the others have that long, and
    a random time more, counted from when the record is opened. It returns at once when
    the process has ended by itself.

    Raises:
      TimeoutError: it lives, but does not open its record.
    """
    from gpt_jax import metrics

    began = time.monotonic()
    record = run / metrics.FILE
    if rng.random() < 1 / 3:
        time.sleep(rng.random() * LONGEST_S)
        return time.monotonic() - began
    before = record.stat().st_mtime_ns if record.exists() else 0
    while not record.exists() or record.stat().st_mtime_ns == before:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return time.monotonic() - began
        if time.monotonic() - began > DEADLINE_S:
            raise TimeoutError(f"process {pid} has not opened {record} yet")
        time.sleep(0.01)
    time.sleep(rng.random() * LONGEST_S)
    return time.monotonic() - began


if __name__ == "__main__":
    sys.exit(main())
