"""The batches that steps train on; of some tasks, what the model makes of them."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from gpt_jax import (
    data,
    sharding,
    tasks,
)
from gpt_jax.step import TrainState
from gpt_jax.train.job import Job, last_step


def train_batches(job: Job, start: int) -> data.Batches:
    """Returns the endless batches of this process from step `start` on."""
    batch_size, accumulate = job.config.batch_size, job.config.accumulate
    return data.batches(
        job.task.train,
        batch_size=batch_size,
        accumulate=accumulate,
        seed=job.config.seed,
        start=start,
        rows=job.strategy.rows(batch_size // accumulate),
        timeout_s=job.config.data_timeout_s,
    )


def rollouts(job: Job) -> Callable[[TrainState, int, tasks.Batch], tasks.Batch]:
    """Returns (state, step, batch) -> the batch that the step trains on.

    That is the batch itself or, where the task has one, its rollout, which
    `task.updates` steps share.
    """
    held: tasks.Batch = {}

    def roll(state: TrainState, step: int, batch: tasks.Batch) -> tasks.Batch:
        nonlocal held
        if job.rollout_fn is None:
            return batch
        if not held or step % job.task.updates == 0:
            number = np.uint32(step)
            held = job.rollout_fn(state.params, state.frozen, batch, job.key, number)
            sharding.wait_on_cpu(held)
        return held

    return roll


def like_rollout(job: Job, state: TrainState, batch: tasks.Batch) -> tasks.Batch:
    """Returns a batch, or the shapes of one, like those that steps train on."""
    if job.rollout_fn is None:
        return batch
    step = (state.params, state.frozen, batch, job.key, np.uint32(0))
    return jax.eval_shape(job.rollout_fn, *step)


class Feed:
    """The batches of a run from a step on, one of them ahead."""

    def __init__(self, job: Job, step: int):
        """Begins with the batch of the step after `step`."""
        self.job, self.end = job, last_step(job.config, job.task)
        self.batches, self.roll = train_batches(job, start=step), rollouts(job)
        self.batch: Any = None
        self.ahead(step)

    def ahead(self, step: int) -> None:
        """Puts the batch of the step after `step` on the devices, if there is one."""
        if step < self.end:
            self.batch = self.job.strategy.put(next(self.batches))

    def compile(self, state: TrainState) -> None:
        """Begins to compile the step for such batches."""
        if self.batch is not None:
            job, like = self.job, like_rollout(self.job, state, self.batch)
            job.step_fn.begin(state, like, job.key, job.hyper)

    def now(self, state: TrainState, step: int) -> tasks.Batch:
        """Returns what the step after `step` trains on."""
        return self.roll(state, step, self.batch)
