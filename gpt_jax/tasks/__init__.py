"""Tasks by name. A new one is a file in this folder and a line in this table."""

from collections.abc import Collection, Mapping
from typing import Any, NamedTuple

from gpt_jax import names, settings
from gpt_jax.model import GPTConfig
from gpt_jax.options import Data
from gpt_jax.tasks import answers, classify, dpo, grpo, lm, sft
from gpt_jax.tasks.task import Batch, Kind, Sums, Task

__all__ = ["TABLE", "Batch", "Chosen", "Kind", "Sums", "Task", "chosen", "make"]

TABLE: dict[str, Kind] = {
    "lm": lm.KIND,
    "classify": classify.KIND,
    "sft": sft.KIND,
    "dpo": dpo.KIND,
    "answers": answers.KIND,
    "grpo": grpo.KIND,
}


class Chosen(NamedTuple):
    """The task of a config.

    Attributes:
      name: one of TABLE.
      options: its own keys, as the type that its Kind says.
    """

    name: str
    options: Any

    @property
    def kind(self) -> Kind:
        """What is known of such tasks."""
        return TABLE[self.name]


def chosen(task: Mapping[str, Any]) -> Chosen:
    """Returns the task that `config.task` is.

    Raises:
      ValueError: there is no task of that name, or its keys are others.
    """
    own = {key: value for key, value in task.items() if key != "name"}
    name = task["name"]
    kind = names.choose("task.name", name, TABLE)
    advice = (
        f": a task's keys come with its config: begin with --config={kind.config} (in "
        f"Python, config.task = configs.common.task_{name}())"
    )
    settings.fit("task", own, settings.declared(kind.options), advice)
    return Chosen(name, kind.options(**own))


def make(
    task: Chosen,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Returns a task, its examples prepared or found prepared.

    Args:
      task: what is to be learnt.
      model: the architecture; vocab_size 0 takes the tokenizer's.
      text: what it is learnt from.
      dropout: which of task.DROPOUTS may be above zero.
      progress: show how far it is.

    Raises:
      ValueError: the options cannot be, or what is read does not fit.
    """
    task.kind.check(task.options, text)
    fixed = {"dropout": dropout, "progress": progress}
    return task.kind.make(task.options, model=model, text=text, **fixed)
