"""Bytes of one device, by part, from shapes and the layout alone."""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import attention
from gpt_jax.estimate import residuals
from gpt_jax.estimate.plan import Plan, loss_chunk, trained
from gpt_jax.estimate.residuals import Saved
from gpt_jax.model import GPT, Dropout, GPTConfig, hidden
from gpt_jax.tasks.scores import fitting_chunk
from gpt_jax.tasks.task import DROPOUTS

LOGITS = 3  # copies at once: logits, probabilities, gradient; all float32
MOST_ROWS = 2**24  # of one device, where the search for the largest batch ends


class Memory(NamedTuple):
    """Bytes of one device.

    The first six are there throughout; the others come and go, and `moments` says how
    they meet.

    Attributes:
      parameters: that train, as they are stored.
      frozen: weights that do not train.
      optimizer: its memory.
      average: the moving average of the parameters.
      batch: token ids, targets, masks of one step.
      carried: gradients added up so far, with several micro-batches.
      gradients: of one micro-batch, float32.
      activations: kept of the forward pass for the backward pass.
      casts: weights kept as well: in the dtype of the activations, or gathered.
      logits: and what their gradient needs, of `loss_chunk` positions.
      working: one layer computed again, and weights gathered from other devices.
      update: new parameters and optimizer memory, until all are known to be finite.
      looped: scan_layers: gradients fill one array from the backward pass's start on.
    """

    parameters: int
    frozen: int
    optimizer: int
    average: int
    batch: int
    carried: int
    gradients: int
    activations: int
    casts: int
    logits: int
    working: int
    update: int
    looped: bool

    @property
    def fixed(self) -> int:
        """What is there throughout a step."""
        return sum(self[:6])

    @property
    def moments(self) -> dict[str, int]:
        """The step's fullest moments, in bytes."""
        kept = self.activations + self.casts
        grads = self.gradients if self.looped else 0
        return {
            "loss": self.fixed + kept + grads + self.logits,
            "backward": self.fixed + max(kept, self.gradients) + grads + self.working,
            "update": self.fixed - self.carried + self.update,
        }

    @property
    def peak(self) -> int:
        """The most bytes at once."""
        return max(self.moments.values())


class PerRow(NamedTuple):
    """What one row (example) of a device's micro-batch needs.

    Attributes:
      whole: kept by the whole model.
      layer: kept by one layer that is computed again, if any is.
    """

    whole: Saved
    layer: Saved


def measure(plan: Plan, per_row: PerRow, rows: int) -> Memory:
    """Returns the memory of one device for `rows` examples in its micro-batch."""
    state, mesh, cfg = plan.state, plan.mesh, plan.cfg
    held = plan.strategy.held
    gradients = held(state.params, itemsize=4)
    optimizer, average = held(state.opt_state), held(state.ema)
    parameters = held(state.params)
    batch = sum(x.dtype.itemsize for x in plan.batch().values())
    return Memory(
        parameters=parameters,
        frozen=held(state.frozen),
        optimizer=optimizer,
        average=average,
        batch=plan.accumulate * rows * plan.task.tokens * batch,
        carried=gradients if plan.accumulate > 1 else 0,
        gradients=gradients,
        activations=round(per_row.whole.activations * rows),
        casts=round(per_row.whole.casts / mesh.shape["fsdp"]) + kept_whole(plan),
        logits=logits(plan, rows),
        working=round(per_row.layer.activations * rows) + gathered(plan),
        # One byte for each number that was looked at.
        update=parameters + optimizer + average + gradients // 4,
        looped=cfg.scan_layers and cfg.n_periods > 1,
    )


def logits(plan: Plan, rows: int) -> int:
    """Returns the bytes of the logits that exist at once on one device."""
    cfg, chunk = plan.cfg, loss_chunk(plan.config)
    chunk = min(chunk or fitting_chunk(rows, cfg), plan.task.tokens)
    parts = math.ceil(plan.task.tokens / chunk)
    positions = math.ceil(plan.task.tokens / parts)
    columns = cfg.vocab_rows // plan.mesh.shape["tensor"]
    return LOGITS * 4 * rows * positions * columns


def kept_whole(plan: Plan) -> int:
    """Returns the bytes of gathered weights that wait for the backward pass.

    Of unrolled layers XLA gathers each weight once and keeps it; a scan gathers again.
    """
    cfg, mesh = plan.cfg, plan.mesh.shape
    if mesh["fsdp"] == 1 or cfg.scan_layers:
        return 0
    layers = [
        x
        for tree in (plan.state.params, plan.state.frozen.get("base", {}))
        for name, block in tree.items()
        if name.startswith("block_")
        for x in jax.tree.leaves(block)
    ]
    size = jnp.dtype(cfg.dtype).itemsize
    return sum(math.prod(x.shape) for x in layers) * size // mesh["tensor"]


def gathered(plan: Plan) -> int:
    """Returns what of the largest layer's weights other devices lend, and its gradient.

    Weights that `fsdp` splits are gathered before they are used; their gradient exists
    whole before it is added up over the devices.
    """
    cfg, mesh = plan.cfg, plan.mesh.shape
    if mesh["fsdp"] == 1:
        return 0
    weights = trained(plan, replace(cfg, n_layers=1, scan_layers=False))
    block = {k: v for tree in weights for k, v in tree.items() if k == "block_0"}
    numbers = sum(math.prod(x.shape) for x in jax.tree.leaves(block))
    table = cfg.vocab_rows * cfg.d_model
    sizes = (numbers * (jnp.dtype(cfg.dtype).itemsize + 4), table * 2 * 4)
    return max(sizes) // mesh["tensor"]


def per_row(plan: Plan, platform: str) -> PerRow:
    """Returns what one row needs, traced at the shapes of one device.

    A model of one and of two periods of its layers are traced: all others are alike.
    """
    cfg = on_its_own(plan.cfg, plan.mesh.shape["tensor"])
    if platform == "cpu" and not cfg.scan_layers:
        # XLA:CPU finds that unrolled layers are computed twice, and keeps them.
        cfg = replace(cfg, remat="none")
    whole = _whole(plan, cfg, platform)
    nothing = Saved(0.0, 0.0)
    if cfg.remat == "none":
        return PerRow(whole, nothing)
    again = replace(cfg, remat="none", scan_layers=False)
    one, two = (_traced(plan, again, n, platform) for n in (1, 2))
    return PerRow(whole, Saved(two.activations - one.activations, 0.0))


def on_its_own(cfg: GPTConfig, tensor: int) -> GPTConfig:
    """Returns the model whose activations are those of one of `tensor` devices."""
    heads = cfg.n_heads // tensor
    return replace(
        cfg,
        n_heads=heads,
        n_kv_heads=max(1, min(cfg.n_kv_heads // tensor, heads)),
        d_ff=cfg.d_ff // tensor,
        vocab_size=cfg.vocab_rows // tensor,
        vocab_multiple=1,
    )


def _whole(plan: Plan, cfg: GPTConfig, platform: str) -> Saved:
    period = len(cfg.pattern)
    # An adapter may name layers: then they are all there.
    if "base" in plan.state.frozen or cfg.n_layers <= 2 * period:
        return _traced(plan, cfg, cfg.n_layers, platform)
    one, two = (_traced(plan, cfg, n * period, platform) for n in (1, 2))
    more = cfg.n_layers / period - 1
    return Saved(*(a + more * (b - a) for a, b in zip(one, two, strict=True)))


def _traced(plan: Plan, cfg: GPTConfig, n_layers: int, platform: str) -> Saved:
    """Returns what the hidden layers of a model of so many layers keep of one row."""
    T = plan.task.tokens
    cfg, fused = with_attention(replace(cfg, n_layers=n_layers), plan, platform)
    gpt = GPT(cfg)

    def forward(params, frozen, tokens_BT, segments_BT, key, rates) -> Any:
        return hidden(
            gpt,
            plan.parts.join(params, frozen),
            tokens_BT,
            None,
            segments_BT if plan.packed else None,
            dropout=Dropout(key, **rates) if plan.dropout else None,
        ).x_BTD

    ids_BT = jax.ShapeDtypeStruct((1, T), jnp.int32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    rate = jax.ShapeDtypeStruct((), jnp.float32)
    rates = {
        name.removeprefix("dropout_"): rate if name in plan.dropout else None
        for name in DROPOUTS
    }
    return residuals.saved(
        forward,
        *trained(plan, cfg),
        *(ids_BT, ids_BT, key, rates),
        fuses=not cfg.scan_layers and cfg.remat == "none",
        scores=T if fused else 0,
    )


def with_attention(cfg: GPTConfig, plan: Plan, platform: str) -> tuple[GPTConfig, bool]:
    """Returns the model with the attention that `platform` would take, and whether
    that keeps no scores; see `attention.choose`."""
    name, dropout = cfg.attention, "dropout_attn" in plan.dropout
    if name == "auto":
        name = attention.best(
            platform,
            tokens=plan.task.tokens,
            halves=jnp.dtype(cfg.dtype).itemsize == 2,
            softcap=bool(cfg.attn_softcap),
            dropout=dropout,
            cudnn=lambda: True,
        )
    fused = name in ("cudnn", "splash", "streamed") and not dropout
    return replace(cfg, attention="plain" if fused else name), fused


def largest(plan: Plan, per_row: PerRow, memory: int) -> int:
    """Returns the most examples of one device's micro-batch that fit; 0 = none."""
    low, high = 0, 1
    while high < MOST_ROWS and measure(plan, per_row, high).peak <= memory:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if measure(plan, per_row, middle).peak <= memory:
            low = middle
        else:
            high = middle
    return low


def kv_bytes(
    cfg: GPTConfig, *, rows: int, length: int, mesh: dict[str, int] | None = None
) -> int:
    """Returns the bytes of a key-value cache, on each device where `mesh` splits it.

    Heads are split over `tensor` where they divide; rows are not.
    """
    tensor = (mesh or {}).get("tensor", 1)
    heads = cfg.n_kv_heads // (tensor if cfg.n_kv_heads % tensor == 0 else 1)
    numbers = rows * heads * length * cfg.head_dim
    return 2 * cfg.n_layers * numbers * jnp.dtype(cfg.dtype).itemsize
