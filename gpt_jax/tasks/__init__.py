"""Tasks by name. A new one is a file in this folder and a line in this table."""

from collections.abc import Callable
from typing import Any

from gpt_jax.tasks import answers, classify, dpo, grpo, lm, sft
from gpt_jax.tasks.task import Batch, Sums, Task

__all__ = ["TABLE", "Batch", "Sums", "Task", "check", "make"]

TABLE: dict[str, Callable[..., Task]] = {
    "lm": lm.make,
    "classify": classify.make,
    "sft": sft.make,
    "dpo": dpo.make,
    "answers": answers.make,
    "grpo": grpo.make,
}


def make(*, name: str, **options: Any) -> Task:
    """Returns the task called `name`.

    Raises:
      ValueError: there is no task of that name.
    """
    check(name)
    return TABLE[name](**options)


def check(name: str) -> None:
    """Raises ValueError unless there is a task of that name."""
    if name not in TABLE:
        raise ValueError(f"task.name {name!r} is not one of: {', '.join(TABLE)}")
