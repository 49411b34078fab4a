"""Train one trial of a sweep: what experiments.sweep starts, once per trial.

  python -m experiments.sweep --sweep=experiments/sweeps/lr.py --out=runs/sweep_lr

People start sweeps, not trials: to train one configuration use experiments.train.
A trial is described by a line of JSON on standard input. It trains as long as that
stays open, then saves and leaves: a trial does not outlive its sweep.
"""

import json
import signal
import sys
import threading

from experiments import door
from gpt_jax import commands


def main(_: list[str]) -> int:
    """Reads what to train, trains it, and returns the exit code."""
    order = "" if sys.stdin.isatty() else sys.stdin.readline()
    if not order:
        raise ValueError(
            f"a trial is started by {commands.typed('sweep')}; to train one "
            f"configuration use {commands.typed('train')}"
        )
    threading.Thread(target=_leave_with_the_sweep, daemon=True).start()

    from gpt_jax.sweep import trial

    return trial.run(json.loads(order))


def _leave_with_the_sweep() -> None:
    """Stops this process, as SIGTERM does, when nobody holds its standard input."""
    sys.stdin.read()
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    door.run(main, __doc__)
