"""Whether a GPU computes what a CPU does. Each returns (go, facts) as the sides do.

On a CPU alone both sides are the CPU, or XLA's attention stands in for cuDNN's.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches import ours
from gpt_jax import attention, model, sample
from gpt_jax.attention import Sight
from gpt_jax.model import GPT, GPTConfig

STEPS = 20


def losses_apart(
    *, recipe: Mapping[str, Any], seq_len: int, batch: int
) -> tuple[ours.Go, dict]:
    """The largest relative difference of the losses of 20 steps in float32."""

    def go() -> dict:
        found = [
            _losses(recipe, seq_len, batch, device) for device in (_cpu(), _device())
        ]
        apart = np.abs(found[1] - found[0]) / np.abs(found[0])
        return {"value": float(apart.max()), "losses": found[1].tolist()}

    return go, {}


def ids_apart(
    *, recipe: Mapping[str, Any], batch: int, prompt: int, new: int
) -> tuple[ours.Go, dict]:
    """How many ids of greedy texts in float32 differ from those that the CPU writes."""
    cfg = GPTConfig(**recipe["model"])

    def written(device):
        with jax.default_device(device):
            params = jax.device_put(_weights(cfg), device)
            gpt, params = sample.laid_out(GPT(cfg), params, rows=batch)
            texts = ours.random_batches(
                cfg.vocab_size, prompt, batch=batch, accumulate=1
            )
            return ours.writer(gpt, params, new)(texts[0]["tokens"][0])

    def go() -> dict:
        with jax.default_matmul_precision("highest"):
            one, other = written(_cpu()), written(_device())
        return {"value": int((one != other).sum()), "of": batch * new}

    return go, {}


def resume_apart(
    *, recipe: Mapping[str, Any], seq_len: int, batch: int
) -> tuple[ours.Go, dict]:
    """How many weights differ after 20 steps from 10, a copy on the host, and 10."""

    def go() -> dict:
        job = ours.trainer(recipe, batch=batch, accumulate=1, device=_device())
        batches = _batches(job.cfg, seq_len, batch)
        first = jax.tree.map(np.array, job.state)
        whole = ours.run_steps(job, job.state, batches, STEPS)
        half = ours.run_steps(job, job.strategy.place(first), batches, STEPS // 2)
        saved = jax.tree.map(np.array, half)
        rest = (
            batches[STEPS // 2 % len(batches) :] + batches[: STEPS // 2 % len(batches)]
        )
        again = ours.run_steps(job, job.strategy.place(saved), rest, STEPS // 2)
        pairs = zip(*map(jax.tree.leaves, (whole.params, again.params)), strict=True)
        apart = sum(int((np.array(x) != np.array(y)).sum()) for x, y in pairs)
        return {"value": apart, "of": model.count(job.cfg)}

    return go, {}


def attention_apart(*, tokens: int, heads: int, groups: int) -> tuple[ours.Go, dict]:
    """The largest difference of cuDNN's attention, and of its gradients, from XLA's.

    Queries, keys and values are of bfloat16; over the largest value of each result.
    """
    name = "cudnn" if jax.default_backend() == "gpu" else "streamed"

    def all_of(name, q_BTHK, k_BSGK, v_BSGK):
        def total(*qkv):
            how = {"scale": 0.125, "softcap": 0.0, "dropout": None}
            y = attention.IMPLEMENTATIONS[name](*qkv, Sight(True, 0, None, None), **how)
            return jnp.square(y.astype(jnp.float32)).sum(), y

        with_y = jax.value_and_grad(total, argnums=(0, 1, 2), has_aux=True)
        (_, y), slopes = jax.jit(with_y)(q_BTHK, k_BSGK, v_BSGK)
        return [np.asarray(x, np.float32) for x in (y, *slopes)]

    def go() -> dict:
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = [(2, tokens, n, 64) for n in (heads, groups, groups)]
        qkv = [
            jax.random.normal(key, shape, jnp.bfloat16)
            for key, shape in zip(keys, shapes, strict=True)
        ]
        pairs = zip(all_of("xla", *qkv), all_of(name, *qkv), strict=True)
        apart = [np.abs(x - y).max() / np.abs(x).max() for x, y in pairs]
        return {"value": float(max(apart)), "which": name}

    return go, {}


def _losses(recipe, seq_len: int, batch: int, device: Any) -> np.ndarray:
    with jax.default_matmul_precision("highest"):
        job = ours.trainer(recipe, batch=batch, accumulate=1, device=device)
        batches, state, found = _batches(job.cfg, seq_len, batch), job.state, []
        for i in range(STEPS):
            put = job.strategy.put(batches[i % len(batches)])
            state, sums, _ = job.step_fn(state, put, job.key, job.hyper)
            found.append(float(sums["loss"]) / float(sums["weight"]))
    return np.array(found)


def _batches(cfg: GPTConfig, seq_len: int, batch: int) -> list:
    return ours.random_batches(cfg.vocab_size, seq_len, batch=batch, accumulate=1)


def _weights(cfg: GPTConfig) -> Any:
    """Returns first weights, drawn on the CPU and wide enough to have an opinion."""
    with jax.default_device(_cpu()):
        params = jax.jit(partial(model.init, cfg))(jax.random.key(0))
        return jax.tree.map(lambda x: np.asarray(x) * 3, params)


def _cpu() -> Any:
    return jax.devices("cpu")[0]


def _device() -> Any:
    return jax.devices()[0]
