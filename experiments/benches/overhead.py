"""What a sweep costs over a plain loop that starts the same runs.

  python -m experiments.benches.overhead
  python -m experiments.benches.overhead --trials=16 --steps=2000 --workers=2

Both train the same learning rates of the tiny quickstart model, as many processes at
once, on as many threads each, from nothing to the end of the last; the sweep also
checks, records, and writes its report. They take turns; the ratio of the medians and
the seconds between them are printed. Run it on a quiet machine.
"""

import os
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from absl import flags

from experiments import door
from gpt_jax import commands

TRIALS = flags.DEFINE_integer("trials", 8, "Runs of each side.")
STEPS = flags.DEFINE_integer("steps", 1000, "Steps of a run.")
WORKERS = flags.DEFINE_integer("workers", 1, "Processes at once, on both sides.")
REPEATS = flags.DEFINE_integer("repeats", 3, "Measurements of each side.")

FILE = """
config = "configs/quickstart.py:size=tiny"
fixed = {fixed!r}

def points():
    return [{{"hyper.lr": 1e-3 * 1.3**i}} for i in range({trials})]
"""


def main(_: list[str]) -> None:
    """Measures both sides in turn and prints the ratio."""
    seconds: dict[str, list[float]] = {"loop": [], "sweep": []}
    fixed = {"steps": STEPS.value, "eval_every": STEPS.value, "early_from": 0}
    fixed |= {"sample_every": 0}
    fixed |= {"checkpoint_every": STEPS.value, "optimizer.name": "adamw"}
    with tempfile.TemporaryDirectory() as folder:
        # Once for both: the text is prepared, the program compiled.
        _loop(Path(folder) / "warm", fixed, trials=1)
        for turn in range(REPEATS.value):
            for name, side in (("loop", _loop), ("sweep", _sweep)):
                began = time.monotonic()
                side(Path(folder) / f"{name}{turn}", fixed, trials=TRIALS.value)
                seconds[name].append(time.monotonic() - began)
                print(f"{name:5s} {seconds[name][-1]:.1f} s", flush=True)
    loop, sweep = (statistics.median(seconds[name]) for name in ("loop", "sweep"))
    print(f"a sweep takes {sweep / loop:.3f} of a loop ({sweep - loop:+.1f} s)")


def _sweep(out: Path, fixed: dict, *, trials: int) -> None:
    file = out.with_suffix(".py")
    file.write_text(FILE.format(fixed=fixed, trials=trials), "utf-8")
    words = [f"--sweep={file}", f"--out={out}", f"--workers={WORKERS.value}"]
    _python("sweep", *words).wait()
    if not (out / "report.html").is_file():
        raise ValueError(f"the sweep failed: {' '.join(words)}")


def _loop(out: Path, fixed: dict, *, trials: int) -> None:
    settings = {**fixed, "mesh.cpu_devices": 1}
    given = [f"--config.{key}={value}" for key, value in settings.items()]
    running: list[subprocess.Popen] = []
    for i in range(trials):
        running.append(
            _python(
                "train",
                "--config=configs/quickstart.py:size=tiny",
                *given,
                f"--config.hyper.lr={1e-3 * 1.3**i}",
                f"--workdir={out / str(i)}",
            )
        )
        while sum(process.poll() is None for process in running) >= WORKERS.value:
            time.sleep(0.02)
    if any(process.wait() for process in running):
        raise ValueError("a run of the loop failed")


def _python(door: str, *words: str) -> subprocess.Popen:
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS.value))
    return subprocess.Popen(
        [*commands.argv(door), *words],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "NPROC": threads, "OMP_NUM_THREADS": threads},
    )


if __name__ == "__main__":
    door.run(main, __doc__)
