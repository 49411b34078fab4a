"""What looks at a step from beside it, in programs of its own.

Shapes: A micro-batches  B examples of one  N examples of a step  T time  L layers
H heads
"""

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from gpt_jax import data, model, sharding, train
from gpt_jax.microscope import taps
from gpt_jax.model import GPT
from gpt_jax.step import TrainState
from gpt_jax.tasks.scores import scores

TOKENS = ("lm", "sft", "answers")  # tasks whose examples are rows of tokens to predict
# Each instrument, and the tasks that it fits; () = all.
INSTRUMENTS: Mapping[str, Collection[str]] = {
    "grad_norms": (),
    "update_ratio": (),
    "noise_scale": (),
    "attention": TOKENS,
    "per_token_loss": TOKENS,
}


class Example(NamedTuple):
    """One example of a step.

    Attributes:
      number: of the training examples.
      where: it is stored.
      loss: its mean, per target.
      grad_norm: of its own gradient, in units of the step's; nan without noise_scale.
      tokens: the text of each of its tokens, as far as it has any.
      losses: of each target, nats, one for each token; () without per_token_loss.
    """

    number: int
    where: str
    loss: float
    grad_norm: float
    tokens: Sequence[str]
    losses: Sequence[float]


class Frame(NamedTuple):
    """What was seen of one step.

    Attributes:
      step: its number: updates made after it.
      loss: the mean over its targets.
      lr, grad_norm: as they are logged.
      skipped: whether its update was left out: not finite, or a spike.
      tables: by instrument: numbers by what they are of.
      examples: of its batch, the worst first.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    skipped: bool
    tables: Mapping[str, Mapping[str, float]]
    examples: Sequence[Example]


class Line(NamedTuple):
    """What executing a step again gave: sums and info on the host, see train_step."""

    sums: Mapping[str, float]
    info: Mapping[str, float]


class Watch(NamedTuple):
    """What was seen before a step, and the weights that it is compared with after."""

    params: Any
    tables: dict[str, dict[str, float]]
    examples: list[Example]


class Instruments:
    """Programs that look at a step from beside it, on one device."""

    def __init__(self, job: train.Job, look: Sequence[str]):
        self.job, self.look = job, look
        slopes = "noise_scale" in look
        self._examples = jax.jit(partial(_each_example, job, slopes=slopes))
        self._gradient = jax.jit(partial(_gradient, job))
        self._ratio = jax.jit(_ratio)
        self._nll = jax.jit(partial(_nll, job))
        self._entropy = jax.jit(partial(_entropy, job))

    def before(self, state: TrainState, batch: Any, step: int) -> Watch:
        """Looks at the state and the batch that step number `step` will train on."""
        job = self.job
        state, batch = job.strategy.view(state), _host(job, batch)
        params, frozen = sharding.local((state.params, state.frozen))
        key = jax.random.fold_in(job.key, np.uint32(step - 1))
        inputs = (params, frozen, batch, key, job.hyper)
        tables: dict[str, dict[str, float]] = {}
        if "grad_norms" in self.look:
            tables["grad_norms"] = _by_weight(self._gradient(*inputs))
        each = jax.device_get(self._examples(*inputs))
        norms_N = np.full(len(each["loss"]), np.nan)
        if "noise_scale" in self.look:
            noise, norms_N = noise_of(each)
            tables["noise_scale"] = noise
        nll_NT = None
        if "per_token_loss" in self.look:
            nll_NT = np.asarray(self._nll(params, frozen, batch))
            counts_NT = np.reshape(batch["mask"], nll_NT.shape) > 0
            found = nll_NT[counts_NT]
            shares = {"median": 50, "90 %": 90, "99 %": 99, "largest": 100}
            tables["per_token_loss"] = {
                name: float(np.percentile(found, share))
                for name, share in shares.items()
            }
        examples = self._told(batch, each, norms_N, nll_NT, step)
        if "attention" in self.look:
            worst = int(np.argmax(_means(each)))
            entropy_LH = np.asarray(self._entropy(params, frozen, batch, worst))
            tables["attention"] = {
                f"layer {layer} head {head}": float(entropy_LH[layer, head])
                for layer, head in np.ndindex(entropy_LH.shape)
            }
        kept = jax.tree.map(jnp.copy, params) if "update_ratio" in self.look else None
        return Watch(kept, tables, examples)

    def after(self, watch: Watch, state: TrainState, line: Line, step: int) -> Frame:
        """Returns the frame of a step, when it has been made."""
        tables = dict(watch.tables)
        if "update_ratio" in self.look:
            moved = sharding.local(self.job.strategy.view(state).params)
            tables["update_ratio"] = _by_weight(self._ratio(watch.params, moved))
        weight = float(line.sums["weight"]) or 1.0
        return Frame(
            step=step,
            loss=float(line.sums["loss"]) / weight,
            lr=float(line.info["lr"]),
            grad_norm=float(line.info["grad_norm"]),
            skipped=bool(line.info["skipped_in_a_row"]),
            tables=tables,
            examples=watch.examples,
        )

    def _told(self, batch, each, norms_N, nll_NT, step: int) -> list[Example]:
        job = self.job
        losses_N, count = _means(each), len(each["loss"])
        size, total = job.config.batch_size, len(job.task.train)
        members = data.members(total, size, job.config.seed, step - 1)
        where = getattr(job.task.train, "where", lambda number: "")
        flat = {name: x.reshape(-1, *x.shape[2:]) for name, x in batch.items()}
        found = []
        for row in np.argsort(-losses_N, kind="stable"):
            number = members[row * size // count]  # a rollout has several of each
            ids = _ids(flat, row)
            found.append(
                Example(
                    number=int(number),
                    where=str(where(number)),
                    loss=float(losses_N[row]),
                    grad_norm=float(norms_N[row]),
                    tokens=[job.task.tokenizer.decode([i]) for i in ids],
                    losses=_targets(flat, nll_NT, row),
                )
            )
        return found


def noise_of(each: Mapping[str, Any]) -> tuple[dict[str, float], np.ndarray]:
    """Returns the gradient noise scale of a step, and its examples' gradient norms.

    From the norms of the gradients of single examples and of their mean: the noise is
    the trace of the covariance of single gradients, the signal the squared norm of the
    true one, both without bias, and their ratio is about the batch, in examples, above
    which more of them teach little (McCandlish et al. 2018, appendix A.1). The ratio of
    one step is rough: average noise and signal over several first.

    Args:
      each: of every example: "weight" [N], and "square" [N], the squared norm of the
        gradient of its summed loss; "whole", that of all together.

    Returns:
      noise, signal and scale (nan where the signal is not above 0), and norms [N] of
      the examples' gradients in units of the step's.
    """
    there_N = np.asarray(each["weight"]) > 0
    n = int(there_N.sum())
    # So that the mean of the examples' gradients is the gradient of the step.
    unit = float(each["weight"].sum()) / max(n, 1)
    square_N = np.asarray(each["square"], float) / unit**2
    whole = float(each["whole"]) / (unit * max(n, 1)) ** 2
    norms_N = np.sqrt(square_N / whole) if whole > 0 else np.full(len(square_N), np.nan)
    if n < 2:
        return dict.fromkeys(("noise", "signal", "scale"), math.nan), norms_N
    small = float(square_N[there_N].mean())
    noise = (small - whole) / (1 - 1 / n)
    signal = (n * whole - small) / (n - 1)
    scale = noise / signal if signal > 0 else math.nan
    return {"noise": noise, "signal": signal, "scale": scale}, norms_N


def _host(job: train.Job, batch: Any) -> dict[str, Any]:
    """Returns a batch as arrays [A, B, ...] of the host, however it was laid out."""
    found = jax.device_get(batch)
    if job.config.mesh.strategy == "pmap":  # [devices, A, B, ...]
        found = {
            name: np.moveaxis(x, 0, 1).reshape(x.shape[1], -1, *x.shape[3:])
            for name, x in found.items()
        }
    return dict(found)


def _gradient(job: train.Job, params, frozen, batch, key, hyper):
    """Returns the gradient of a step, before clipping: see `step.train_step`."""

    def loss(params, examples, index):
        weights = job.join(params, frozen)
        fold = jax.random.fold_in(key, index)
        sums = job.task.loss(weights, frozen, examples, fold, hyper)
        return sums["loss"], sums["weight"]

    def add(total, piece):
        index, examples = piece
        grads, weight = jax.grad(loss, has_aux=True)(params, examples, index)
        return jax.tree.map(jnp.add, total, (_wide(grads), weight)), None

    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    count = len(jax.tree.leaves(batch)[0])
    start = (blank, jnp.float32(0))
    (grads, weight), _ = jax.lax.scan(add, start, (jnp.arange(count), batch))
    weight = jnp.where(weight > 0, weight, 1.0)
    return {path: _norms(path, g / weight) for path, g in _flat(grads).items()}


def _each_example(job: train.Job, params, frozen, batch, key, hyper, *, slopes: bool):
    """Returns loss [N] and weight [N] of every example alone, and see `noise_of`.

    Dropout, where there is any, is drawn for each anew.
    """

    def loss(params, example, index):
        weights = job.join(params, frozen)
        one = jax.tree.map(lambda x: x[None], example)
        fold = jax.random.fold_in(key, index)
        sums = job.task.loss(weights, frozen, one, fold, hyper)
        return sums["loss"], sums["weight"]

    def look(total, piece):
        index, example = piece
        if not slopes:
            value, weight = loss(params, example, index)
            return total, {"loss": value, "weight": weight}
        (value, weight), grads = jax.value_and_grad(loss, has_aux=True)(
            params, example, index
        )
        total = jax.tree.map(jnp.add, total, _wide(grads))
        return total, {"loss": value, "weight": weight, "square": _square(grads)}

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    count = len(jax.tree.leaves(flat)[0])
    blank = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
    total, each = jax.lax.scan(look, blank, (jnp.arange(count), flat))
    return {**each, "whole": _square(total)}


def _ratio(old, new):
    """Returns the norm of what a step added to each weight, over the weight's own."""

    def one(path, old, new):
        old, new = old.astype(jnp.float32), new.astype(jnp.float32)
        return _norms(path, new - old) / jnp.maximum(_norms(path, old), 1e-30)

    after = _flat(new)
    return {path: one(path, x, after[path]) for path, x in _flat(old).items()}


def _nll(job: train.Job, params, frozen, batch):
    """Returns the loss of every target, nats [N, T], row by row."""
    gpt, weights = job.task.model, job.join(params, frozen)

    def one(row):
        row = jax.tree.map(lambda x: x[None], row)
        found = model.hidden(
            *(gpt, weights, row["tokens"]), row.get("positions"), row.get("segments")
        )
        wanted = (row["targets"], row["mask"])
        each = scores(gpt, weights, found.x_BTD, *wanted, loss_chunk=0)
        return (each.norm_BT - each.right_BT)[0]

    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
    return jax.lax.map(one, flat)


class _Traced(taps.Row):
    """A row whose documents are not known before it runs."""

    packed = True  # type: ignore[assignment]


def _entropy(job: train.Job, params, frozen, batch, row):
    """Returns the entropy of each head's attention [L, H], nats, mean over a row."""
    cfg = replace(
        job.task.model.cfg,
        **{"dtype": "float32", "attention": "plain", "remat": "none"},
        scan_layers=False,
    )
    weights = model.unstack(job.join(params, frozen), job.task.model.cfg)
    flat = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[row], batch)
    length = len(flat["tokens"])
    place = jnp.arange(length, dtype=jnp.int32)
    seen = taps.see(
        GPT(cfg),
        weights,
        _Traced(
            flat["tokens"],
            flat.get("positions", place),
            flat.get("segments", 0 * place),
        ),
    )
    weight_LHTS = seen.weight_LHTS
    logs = jnp.log(jnp.where(weight_LHTS > 0, weight_LHTS, 1.0))
    return -(weight_LHTS * logs).sum(-1).mean(-1)


def _flat(tree) -> dict[str, Any]:
    return flatten_dict(tree, sep="/")  # type: ignore[return-value]


def _wide(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def _square(tree) -> jax.Array:
    leaves = (jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(tree))
    return jnp.stack([*leaves]).sum()


def _norms(path: str, x) -> jax.Array:
    """Returns the norm of a weight; of stacked layers [n], that of each."""
    axes = tuple(range(path.startswith("blocks/"), x.ndim))
    return jnp.sqrt(jnp.square(x).sum(axes))


def _by_weight(found: Mapping[str, Any]) -> dict[str, float]:
    named = {}
    for path, x in jax.device_get(dict(found)).items():
        each = {f"{path}[{i}]": y for i, y in enumerate(x)} if x.ndim else {path: x}
        named |= {name: float(y) for name, y in each.items()}
    return named


def _means(each: Mapping[str, Any]) -> np.ndarray:
    """Returns the mean loss of every example; of one without targets -inf."""
    weight_N = np.asarray(each["weight"], float)
    safe_N = np.where(weight_N > 0, weight_N, 1.0)
    return np.where(weight_N > 0, np.asarray(each["loss"], float) / safe_N, -math.inf)


def _ids(flat: Mapping[str, Any], row: int) -> Sequence[int]:
    """Returns the ids that a row predicts, in order; of a pair, the chosen answer's."""
    targets = flat.get("targets")
    if targets is None:
        return ()
    kept = np.asarray(targets[row])
    there = np.asarray(flat.get("mask", np.ones_like(targets))[row])
    if kept.ndim > 1:
        kept, there = kept[0], there[0]
    return kept[there > 0].tolist()


def _targets(flat: Mapping[str, Any], nll_NT, row: int) -> Sequence[float]:
    if nll_NT is None:
        return ()
    return [float(x) for x in nll_NT[row][np.asarray(flat["mask"][row]) > 0]]
