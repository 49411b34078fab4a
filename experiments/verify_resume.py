"""Prove on your own machine that an interrupted run ends as an undisturbed one.

  python -m experiments.verify_resume --config=configs/quickstart.py
  python -m experiments.verify_resume --config=configs/gpt2.py:size=tiny --kills=5
  python -m experiments.verify_resume --config=configs/quickstart.py \\
      --config.model.dtype=bfloat16 --steps=60

Trains --steps steps of your config twice, on whatever device JAX finds: once in one go,
and once killed (SIGKILL, --kills times, at random moments of training) and started
again with the same command. Then it compares the sha256 of weights, optimizer memory
and counters, and every recorded loss.

The two run folders and their logs are written into --workdir, by default a temporary
folder that is removed. Like any other training of this config, these also leave the
prepared text (--config.data.folder) and compiled programs (--config.compile_cache).

On CPUs the bits are the same. On a GPU they are if the compiler keeps to deterministic
kernels: XLA_FLAGS=--xla_gpu_deterministic_ops=true; try with and without it.

Exit codes: 0 bit-equal; 1 not equal, with what differs, or a run that failed, or that
ended before it was killed so often; 2 a mistake in the flags; 130 Ctrl-C.
"""

import contextlib
import random
import sys
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments import door
from gpt_jax import commands, signals

CONFIG = door.define_config()
STEPS = flags.DEFINE_integer("steps", 40, "Steps to train, twice.")
KILLS = flags.DEFINE_integer("kills", 3, "How often the second run is killed.")
SEED = flags.DEFINE_integer("seed", 0, "Of the moments of the kills.")
WORKDIR = door.define_path("workdir", "", "Keep the two runs here (default: nowhere).")


def main(_: list[str]) -> int:
    """Trains twice and compares; returns the exit code."""
    door.given(CONFIG.value)
    if STEPS.value < 2 or KILLS.value < 1:
        raise ValueError(
            f"--steps={STEPS.value} --kills={KILLS.value}: at least 2 steps and 1 kill "
            "are needed"
        )
    with contextlib.ExitStack() as stack:
        folder = WORKDIR.value or stack.enter_context(
            tempfile.TemporaryDirectory(prefix="verify-resume-")
        )
        whole, killed = Path(folder) / "whole", Path(folder) / "killed"
        for run in (whole, killed):
            if run.exists():
                raise ValueError(f"{run} exists already: give another --workdir")
        print(f"1 of 2: {STEPS.value} steps in one go", flush=True)
        if code := train(whole):
            return failed(whole, code)
        print(f"2 of 2: the same, killed {KILLS.value} times", flush=True)
        kills, code = kill(killed, random.Random(SEED.value), pace(whole))
        if kills == KILLS.value:
            code = train(killed)
        if code:
            return failed(killed, code)
        if kills < KILLS.value:
            print(
                f"not interrupted {KILLS.value} times while it trained, but {kills}: "
                "give more --steps"
            )
            return 1
        return compare(whole, killed)


def command(run: Path) -> list[str]:
    """Returns the command of a run: the config as given, and often saved."""
    config = CONFIG.value
    end = config.hyper.decay_steps or float(config.steps)
    changes = {
        "steps": STEPS.value,
        "checkpoint_every": interval(),
        "log_every": 1,
        "tensorboard": False,
        "wandb": "",
    }
    if config.optimizer.schedule != "constant":
        changes["hyper.decay_steps"] = end  # the schedule of the whole run
    words = [f"--config.{key}={value}" for key, value in changes.items()]
    return [
        *commands.argv("train"),
        *(*config_words(sys.argv[1:]), *words, f"--workdir={run}"),
    ]


def config_words(words: list[str]) -> list[str]:
    """Returns the words that make the config: the flags, and a value behind one."""
    kept, open_ended = [], False
    for word in words:
        is_flag = word.startswith("-")
        is_config = is_flag and word.lstrip("-").startswith(("config", "noconfig"))
        if is_config or (open_ended and not word.startswith("--")):
            kept.append(word)
        open_ended = is_config and "=" not in word
    return kept


def interval() -> int:
    """Returns the steps between two checkpoints: two of them or more for each kill."""
    unit = CONFIG.value.task.get("updates", 1)  # steps that a checkpoint cannot part
    return max(1, STEPS.value // (2 * KILLS.value + 2) // unit) * unit


def train(run: Path) -> int:
    """Trains to the end; returns the exit code."""
    with (
        log_of(run).open("ab") as log,
        signals.child(command(run), stdout=log, stderr=log) as process,
    ):
        return process.wait()


def kill(run: Path, rng: random.Random, longest_s: float) -> tuple[int, int]:
    """Trains and kills, until it was often enough or the run has ended.

    Args:
      run: the run folder.
      rng: chooses the moments.
      longest_s: from the step after which a life is to end to its end, at most.

    Returns:
      How often it was killed before its last step was recorded, and the exit code of a
      life that ended by itself, else 0.
    """
    last = max(1, STEPS.value - 2 * interval())  # time enough for the kill
    marks = sorted(rng.sample(range(1, last + 1), min(KILLS.value, last)))
    for kills, mark in enumerate(marks):
        before = changed(run)
        with (
            log_of(run).open("ab") as log,
            signals.child(command(run), stdout=log, stderr=log) as process,
        ):
            while process.poll() is None and (
                changed(run) == before or reached(run) < mark
            ):
                time.sleep(0.01)
            time.sleep(rng.random() * longest_s)  # also in the middle of a save
            ended = process.poll()
        if ended is not None:
            return kills, ended
        if reached(run) >= STEPS.value:
            return kills, 0
        print(f"  killed at step {reached(run)}", flush=True)
    return len(marks), 0


def changed(run: Path) -> int:
    """Returns when a run's record was last written to, in nanoseconds; 0 for never."""
    from gpt_jax import metrics

    path = run / metrics.FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def pace(run: Path) -> float:
    """Returns the seconds that a finished run took from a checkpoint to the next."""
    from gpt_jax import metrics

    times = [row["seconds"] for row in metrics.read(run) if "train_loss" in row]
    return interval() * (times[-1] - times[0]) / max(1, len(times) - 1)


def reached(run: Path) -> int:
    """Returns the last step that a run has recorded; 0 for none."""
    from gpt_jax import metrics

    with contextlib.suppress(FileNotFoundError):
        return max((row["step"] for row in metrics.read(run)), default=0)
    return 0


def compare(whole: Path, killed: Path) -> int:
    """Says whether two runs ended in the same bits; returns the exit code."""
    from gpt_jax import checkpoint, metrics

    digests, losses = [], []
    for run in (whole, killed):
        store = checkpoint.Checkpoints(run / "checkpoints", keep=None)
        tree, _, step = store.restore(None, step=store.latest())
        digests.append({name: checkpoint.digest({name: tree[name]}) for name in tree})
        rows = [row for row in metrics.read(run) if "train_loss" in row]
        losses.append([(row["step"], row["train_loss"]) for row in rows])
        print(f"  {run.name}: step {step}, params {digests[-1]['params'][:16]}...")
    other = [name for name in digests[0] if digests[0][name] != digests[1].get(name)]
    first = next((a for a, b in zip(*losses, strict=False) if a != b), None)
    if not other and losses[0] == losses[1]:
        print("bit-equal: an interrupted run ends here as an undisturbed one")
        return 0
    print(f"NOT equal: {', '.join(other) or 'the record'} differ")
    if first:
        print(f"  the losses differ from step {first[0]} on")
    print("  on a GPU try XLA_FLAGS=--xla_gpu_deterministic_ops=true")
    return 1


def failed(run: Path, code: int) -> int:
    """Says why a run did not come to its end; returns the exit code."""
    print(f"{run.name} ended with exit code {code}:")
    print("\n".join(log_of(run).read_text(errors="replace").splitlines()[-5:]))
    return 2 if code == 2 else 1


def log_of(run: Path) -> Path:
    """Returns the file that takes what a run prints."""
    run.parent.mkdir(parents=True, exist_ok=True)
    return run.with_name(f"{run.name}.log")


if __name__ == "__main__":
    door.run(main, __doc__)
