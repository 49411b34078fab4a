"""The parts of a run, and how long it goes on; what is due after which step."""

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import (
    checkpoint,
    metrics,
    programs,
    screen,
    sharding,
    signals,
    tasks,
)
from gpt_jax.checks import Options
from gpt_jax.optimizer import Hyper
from gpt_jax.step import TrainState

EVAL_TOKENS = 16_384  # tokens in an evaluation batch, when the config does not say


class Parts(NamedTuple):
    """What runs that differ in traced numbers alone can share; see `make_parts`.

    Attributes:
      fresh: (weights, key) -> the state before the first step.
      first: jitted, key -> the state that a new run with random weights begins with.
      measured: the digest of what evaluations measure on, see `measured_on`.
    """

    task: tasks.Task
    strategy: sharding.Strategy
    join: Callable
    fresh: Callable[[Any, jax.Array], TrainState]
    first: Callable[[jax.Array], TrainState]
    step_fn: Callable
    eval_fn: Callable
    rollout_fn: Callable | None
    measured: str


class Job(NamedTuple):
    """The parts of one run, built once by `build`."""

    config: Options
    workdir: Path
    task: tasks.Task
    strategy: sharding.Strategy
    hyper: Hyper
    key: jax.Array
    step_fn: programs.Program
    eval_fn: Callable
    rollout_fn: Callable | None
    join: Callable
    saves: checkpoint.Checkpoints
    frozen: str  # the digest of what the run stores once, "" for nothing
    writer: metrics.Writer | screen.Silence
    bar: screen.Progress | screen.Silence
    rate: metrics.Throughput
    stop: signals.Stop


class Totals(NamedTuple):
    """What a run has used and reached so far; stored with every checkpoint."""

    tokens: int = 0
    seconds: float = 0.0
    best: float = math.inf
    stale: int = 0  # evaluations since the best one
    evaluated: int = -1  # the step of the last evaluation that was not interrupted
    measured: str = ""  # what the best was measured on; "" = an older run does not say
    since: int = 0  # the first step whose evaluations were measured on that


class Result(NamedTuple):
    """How a run ended: why, after which step, with which last numbers.

    `trained` is whether there was anything to do: a run at its end is left as it is.
    """

    reason: str
    step: int
    numbers: dict[str, float]
    exit_code: int
    trained: bool = True


def make_hyper(config: Options, task: tasks.Task) -> Hyper:
    """Returns the config's traced numbers as float32 scalars."""
    numbers = config.hyper._asdict()
    numbers["decay_steps"] = numbers["decay_steps"] or last_step(config, task)
    return Hyper(**{key: jnp.float32(value) for key, value in numbers.items()})


def last_step(config: Options, task: tasks.Task) -> int:
    """Returns the step at which `steps`, or a limit before it, ends the run."""
    return min(_last_steps(config, task).values())


def at_end(config: Options, task: tasks.Task, totals: Totals, step: int) -> bool:
    """Whether a run that has come to `step` has nothing left to do."""
    end = last_step(config, task)
    return step > end or (step == end and totals.evaluated >= step)


def ends_by(config: Options, task: tasks.Task) -> str:
    """Returns which key ends a run at its last step."""
    ends = _last_steps(config, task)
    return min(ends, key=lambda key: ends[key])


def _last_steps(config: Options, task: tasks.Task) -> dict[str, int]:
    """Returns the last step by each key that sets one; `steps` goes first."""
    found, each = {"steps": config.steps}, tokens_per_step(config, task)
    if config.max_tokens:
        found["max_tokens"] = math.ceil(config.max_tokens / each)
    if config.max_bytes and task.bytes_per_token:
        found["max_bytes"] = math.ceil(config.max_bytes / bytes_of(task, each))
    rounds = task.updates
    return {
        key: step if key == "steps" else math.ceil(step / rounds) * rounds
        for key, step in found.items()
    }


def bytes_of(task: tasks.Task, tokens: int) -> float:
    """Returns the bytes of training text that so many tokens stand for."""
    assert task.bytes_per_token, "checks.unread refuses max_bytes there"
    return tokens * task.bytes_per_token()


def tokens_per_step(config: Options, task: tasks.Task) -> int:
    """Returns the training tokens of one step, over all devices."""
    return config.batch_size * task.tokens


def due(step: int, every: int, early: Collection[int] = ()) -> bool:
    """Whether something that happens each `every` steps (0 = never) happens now.

    Before the first of them it also happens at the `early` steps.
    """
    return every > 0 and (step % every == 0 or (step in early and step < every))


def early_steps(config: Options, task: tasks.Task) -> list[int]:
    """Returns the steps 1, 2, 5, 10, 20, 50, ... from `early_from` (0 = none) on.

    A model learns most in its first steps, between which an even rhythm sees nothing.
    Steps amid those that share a rollout are left out: a best one would be saved there.
    """
    most = max(config.eval_every, config.sample_every)
    series = [n * 10**k for k in range(len(str(most))) for n in (1, 2, 5)]
    first = config.early_from or most
    return [n for n in series if first <= n < most and n % task.updates == 0]


class Rhythm(NamedTuple):
    """What happens after which step."""

    end: int  # the last one
    early: Collection[int]
    log: int
    evaluate: int
    sample: int
    save: int

    def logs(self, step: int) -> bool:
        """Whether numbers are written: also before all that takes long."""
        long = self.evaluates(step) or self.samples(step)
        return step == 1 or long or due(step, self.log)

    def evaluates(self, step: int) -> bool:
        """Whether the model is evaluated."""
        return step == self.end or due(step, self.evaluate, self.early)

    def samples(self, step: int) -> bool:
        """Whether the model writes, where it writes at all."""
        return step == self.end or due(step, self.sample, self.early)

    def saves(self, step: int) -> bool:
        """Whether the state is saved, whatever its loss is."""
        return step == self.end or due(step, self.save)


def rhythm_of(config: Options, task: tasks.Task) -> Rhythm:
    """Returns the rhythm of a run."""
    return Rhythm(
        end=last_step(config, task),
        early=early_steps(config, task),
        log=config.log_every,
        evaluate=config.eval_every,
        sample=config.sample_every,
        save=config.checkpoint_every,
    )


def eval_rows(config: Options, task: tasks.Task, examples: int, devices: int) -> int:
    """Returns how many of so many examples an evaluation's batch holds."""
    size = config.eval_batch_size or max(
        config.batch_size // config.accumulate, EVAL_TOKENS // task.tokens
    )
    size = min(size, config.eval_windows or examples, examples)
    return math.ceil(size / devices) * devices
