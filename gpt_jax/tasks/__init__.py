"""Tasks by name. A new one is a file in this folder and a line in this table."""

from collections.abc import Mapping
from typing import Any

from gpt_jax import names, settings
from gpt_jax.tasks import answers, classify, dpo, grpo, lm, sft
from gpt_jax.tasks.task import Batch, Kind, Sums, Task

__all__ = ["TABLE", "Batch", "Kind", "Sums", "Task", "check", "make"]

TABLE: dict[str, Kind] = {
    "lm": lm.KIND,
    "classify": classify.KIND,
    "sft": sft.KIND,
    "dpo": dpo.KIND,
    "answers": answers.KIND,
    "grpo": grpo.KIND,
}


def make(*, name: str, text: Mapping[str, Any], **options: Any) -> Task:
    """Returns the task called `name`.

    Args:
      name: one of TABLE.
      text: the keys of `config.data`.
      **options: the other keys of `config.task`, and what every task wants: `model`,
        `dropout` and `progress`, see `lm.make`.

    Raises:
      ValueError: there is no task of that name, or its options cannot be.
    """
    given = ("model", "dropout", "progress")
    own = {key: value for key, value in options.items() if key not in given}
    check(name, own, text)
    return TABLE[name].make(text=text, **options)


def check(name: str, options: Mapping[str, Any], text: Mapping[str, Any]) -> None:
    """Raises ValueError for a task that cannot be; reads no text.

    Args:
      name: see `make`.
      options: the keys of `config.task`, but for the name.
      text: the keys of `config.data`.
    """
    kind = names.choose("task.name", name, TABLE)
    advice = (
        f": a task's keys come with its config: begin with --config={kind.config} (in "
        f"Python, config.task = configs.common.task_{name}())"
    )
    settings.fit("task", options, kind.options, advice)
    kind.check(options, text)
