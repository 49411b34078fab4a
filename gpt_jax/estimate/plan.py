"""A config as what would run: its model, its state by shapes, its place on a mesh.

No data is read, no weight is made and no device is needed.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from gpt_jax import model, sharding, stores, tasks, tokenizers, train
from gpt_jax.checks import Options
from gpt_jax.model import GPT, GPTConfig
from gpt_jax.step import TrainState
from gpt_jax.tasks import lm

GPT2_TOKENS, BYTE_TOKENS = 50_257, 257
# Tasks whose step is that of next-token prediction over rows of one window each.
TASKS = ("lm", "sft", "answers")


class Plan(NamedTuple):
    """What one step of a run would be.

    Attributes:
      task: the model and its loss; no examples.
      strategy: where things live; of the mesh, which may be abstract.
      parts: what train builds a run from.
      state: the state before the first step, as shapes.
      rows: examples in a micro-batch, over all devices.
      accumulate: micro-batches of a step.
      packed: rows hold several documents, which do not see each other.
      dropout: which rates are above zero.
    """

    config: Options
    task: tasks.Task
    strategy: sharding.Strategy
    parts: train.Parts
    state: TrainState
    rows: int
    accumulate: int
    packed: bool
    dropout: tuple[str, ...]

    @property
    def cfg(self) -> GPTConfig:
        """The model."""
        return self.task.model.cfg

    @property
    def mesh(self) -> Any:
        """The devices, or what they would be."""
        return self.strategy.mesh

    @property
    def sharers(self) -> int:
        """Devices that share the examples."""
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def batch(self) -> dict[str, jax.ShapeDtypeStruct]:
        """Returns the shapes of one step's batch."""
        shape = (self.accumulate, self.rows, self.task.tokens)
        names = ("tokens", "targets", *(("positions", "segments") * self.packed))
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32) for name in names}
        return batch | {"mask": jax.ShapeDtypeStruct(shape, jnp.float32)}


def make(record: ConfigDict, mesh: Any) -> Plan:
    """Returns the plan of a config on a mesh, which may be abstract.

    Raises:
      ValueError: the config makes no run, needs more than its own words to be known
        (see `vocabulary`), or does not divide over the mesh.
    """
    train.check(record)
    config = train.unpack(record)
    if config.task.name not in TASKS:
        raise ValueError(
            f"task.name is {config.task.name}: only {', '.join(TASKS)} can be "
            "estimated; take one of them with rows as long and as many"
        )
    task = make_task(config)
    adapter = config.adapter(model.declared(task.model.cfg))
    strategy = sharding.mesh_strategy(mesh, adapter.declared)
    parts = train.make_parts(config, task, strategy)
    return Plan(
        config=config,
        task=task,
        strategy=strategy,
        parts=parts,
        state=shapes(parts, task.model.cfg),
        rows=config.batch_size // config.accumulate,
        accumulate=config.accumulate,
        packed=getattr(config.task.options, "pack", False),
        dropout=tuple(config.dropout),
    )


def make_task(config: Options) -> tasks.Task:
    """Returns the language-modelling task of a config, without its text."""
    cfg = replace(config.model, vocab_size=vocabulary(config))
    seq_len = config.data.seq_len or cfg.context_length
    lm.check_window(seq_len, cfg.context_length)
    gpt = GPT(cfg)
    return tasks.Task(
        model=gpt,
        tokenizer=None,
        loss=lm.make_loss(
            gpt,
            np.zeros(cfg.vocab_size),
            loss_chunk=loss_chunk(config),
            dropout=config.dropout,
        ),
        train=(),
        evals={},
        tokens=seq_len,
        fingerprint="",
    )


def loss_chunk(config: Options) -> int:
    """Returns the positions whose logits exist at once; 0 = as many as fit."""
    return getattr(config.task.options, "loss_chunk", 0)


def vocabulary(config: Options) -> int:
    """Returns the size of the vocabulary, as far as the config's own words tell it.

    Raises:
      ValueError: it depends on a text.
    """
    name = config.data.tokenizer
    kind, _, size = name.partition(":")
    own = stores.fetched(config.init_from) / "tokenizer.json"
    if config.model.vocab_size:
        return config.model.vocab_size
    if config.init_from and own.is_file():
        return tokenizers.load(own).vocab_size
    if kind == "bpe" and size.isdecimal():
        return int(size)
    if name in ("gpt2", "byte"):
        return GPT2_TOKENS if name == "gpt2" else BYTE_TOKENS
    if Path(name).is_file():
        return tokenizers.load(name).vocab_size
    raise ValueError(
        f"the vocabulary of data.tokenizer {name!r} is known only when its text is "
        "read: set --config.model.vocab_size (of characters, about 65 to 200)"
    )


def shapes(parts: train.Parts, cfg: GPTConfig) -> TrainState:
    """Returns the state before the first step, as shapes."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    weights = jax.eval_shape(partial(model.init, cfg), key)
    return jax.eval_shape(parts.fresh, weights, key)


def trained(plan: Plan, cfg: GPTConfig) -> tuple[Any, Any]:
    """Returns (params, frozen) of another model under the plan's adapter, as shapes."""
    adapter = plan.config.adapter(model.declared(cfg))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(lambda k: adapter.split(model.init(cfg, k), k), key)
