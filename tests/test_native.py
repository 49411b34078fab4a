"""Kernels in C++ against NumPy, and that no row depends on another to the bit."""

import shutil
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import model, native, sample
from gpt_jax.model import GPT
from tests import tiny

pytestmark = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler"
)


def drawn(*shape: int, seed: int = 0) -> np.ndarray:
    return np.array(tiny.draw(*shape, seed=seed))


def by_hand(q, keys, values, place, *, window, scale, softcap):
    """softmax(q k scale) v over what each query sees, in float64."""
    B, T, H, _ = q.shape
    G, S = keys.shape[1:3]
    y = np.zeros(q.shape)
    for b, t, h in np.ndindex(B, T, H):
        k, v = (x[b, h // (H // G)].astype(np.float64) for x in (keys, values))
        score = k @ q[b, t, h].astype(np.float64) * scale
        if softcap:
            score = softcap * np.tanh(score / softcap)
        at = np.arange(S)
        seen = at <= place[b, t]
        if window:
            seen &= at > place[b, t] - window
        weight = np.where(seen, np.exp(score - score[seen].max()), 0)
        y[b, t, h] = weight @ v / weight.sum()
    return y


@jax.jit
def run(q, keys, values, place):
    return native.attention(
        *(q, (keys, values, None, None), place), window=0, scale=0.25, softcap=0.0
    )


@pytest.mark.parametrize(
    ("T", "S", "H", "G", "K"),
    [(1, 1, 1, 1, 16), (1, 200, 9, 3, 64), (70, 150, 4, 4, 16), (33, 64, 4, 1, 80)],
)
@pytest.mark.parametrize(("window", "softcap"), [(0, 0.0), (5, 0.0), (90, 3.0)])
def test_attention_is_the_formula(T, S, H, G, K, window, softcap):
    q, keys, values = drawn(2, T, H, K), drawn(2, G, S, K, seed=1), drawn(2, G, S, K)
    last = np.array([[S - T], [max(0, S - T - 7)]])
    place = last + np.arange(T)[None]
    how = {"window": window, "scale": K**-0.5, "softcap": softcap}
    assert native.ready(), native.missing()
    past = (keys, values, None, None)
    found = native.attention(q, past, jnp.asarray(place), **how)
    wanted = by_hand(q, keys, values, place, **how)
    assert np.abs(np.asarray(found) - wanted).max() <= 3e-6


@pytest.mark.parametrize("kept", ["bfloat16", "int8"])
def test_attention_over_few_bits_is_the_formula_of_what_they_say(kept):
    q, keys = drawn(2, 33, 6, 64), drawn(2, 2, 150, 64, seed=1)
    values = drawn(2, 2, 150, 64)
    keys[:, 1], values[:, :, 9] = keys[:, 1] * 3, 0
    past = [jnp.asarray(x).astype(kept) for x in (keys, values)] + [None, None]
    if kept == "int8":
        scales = [np.abs(x).max(-1, keepdims=True) / 127 for x in (keys, values)]
        pairs = zip((keys, values), scales, strict=True)
        codes = [np.round(x / np.where(scale > 0, scale, 1)) for x, scale in pairs]
        past = [*(code.astype(np.int8) for code in codes), *scales]
    place = np.array([[117], [60]]) + np.arange(33)[None]
    how = {"window": 90, "scale": 0.125, "softcap": 0.0}
    found = native.attention(q, past, jnp.asarray(place), **how)
    told = [np.asarray(x, np.float64) for x in past[:2]]
    if kept == "int8":
        told = [x * scale for x, scale in zip(told, past[2:], strict=True)]
    wanted = by_hand(q, *told, place, **how)
    assert np.abs(np.asarray(found) - wanted).max() <= 1e-5
    plain = by_hand(q, keys, values, place, **how)
    assert 1e-3 < np.abs(wanted - plain).max() < 0.2  # few bits indeed


def test_what_lies_behind_a_query_is_not_read():
    q, keys, values = drawn(1, 3, 2, 16), drawn(1, 2, 100, 16), drawn(1, 2, 100, 16)
    place = np.array([[40, 41, 42]])
    wanted = np.asarray(run(q, keys, values, place))
    keys[:, :, 43:], values[:, :, 43:] = np.nan, np.nan
    assert np.array_equal(np.asarray(run(q, keys, values, place)), wanted)


def test_scores_far_apart_leave_one_key():
    q, keys, values = drawn(1, 1, 1, 16), drawn(1, 1, 80, 16), drawn(1, 1, 80, 16)
    keys[0, 0, 3] = 400 * q[0, 0, 0]
    found = np.asarray(run(q, keys, values, np.array([[79]])))
    assert np.allclose(found[0, 0, 0], values[0, 0, 3], rtol=1e-6)


def test_no_query_depends_on_another_to_the_bit():
    q, keys, values = drawn(3, 75, 4, 32), drawn(3, 2, 160, 32), drawn(3, 2, 160, 32)
    place = np.array([[5], [80], [20]]) + np.arange(75)[None]
    together = np.asarray(run(q, keys, values, place))
    for b in range(3):
        for first, count in ((0, 1), (3, 20), (40, 35), (74, 1)):
            part = slice(first, first + count)
            own = (x[b : b + 1] for x in (q[:, part], keys, values, place[:, part]))
            assert np.array_equal(np.asarray(run(*own))[0], together[b, part])


def test_other_heads_are_left_to_xla():
    assert native.attends(tiny.cfg(head_dim=16))
    assert not native.attends(tiny.cfg(head_dim=24))
    assert not native.attends(tiny.cfg(head_dim=16, dtype="bfloat16"))


def built(**changes):
    cfg = tiny.cfg(context_length=1024, head_dim=16, n_kv_heads=2, **changes)
    return GPT(cfg), jax.tree.map(lambda x: 5 * x, model.init(cfg, jax.random.key(3)))


def test_long_contexts_on_one_cpu_are_read_natively():
    made = built()
    assert sample.laid_out(*made, rows=2)[0].cfg.attention == "native"
    short = GPT(replace(made[0].cfg, context_length=512))
    assert sample.laid_out(short, made[1], rows=2)[0].cfg.attention == "auto"
    inside = []
    jax.eval_shape(
        lambda p: inside.append(sample.laid_out(made[0], p, rows=2)), made[1]
    )
    assert inside[0][0].cfg.attention == "auto"


@pytest.mark.parametrize(
    "kind",
    [
        *({}, {"pattern": "local"}, {"attn_softcap": 5.0}),
        *({"cache_dtype": "bfloat16"}, {"cache_dtype": "int8"}),
    ],
)
def test_a_cache_read_natively_is_the_cache_read_by_xla(kind):
    if "pattern" in kind:
        local = {"window": 7, "rope_base": 500.0, "rope_scaling": None}
        kind = {"pattern": (local,), "position": "rope"}
    gpt, params = built(**kind)
    ids_BT = np.random.default_rng(0).integers(0, 61, (2, 90))
    lengths = np.array([90, 70])

    def steps(attention):
        own = GPT(replace(gpt.cfg, attention=attention))
        kw = {"model": own, "max_length": 128}
        found = [sample.prefill(params, ids_BT, lengths, **kw)]
        cache = found[0][1]
        for token in (5, 9):
            x, cache, _ = model.hidden(own, params, np.full((2, 1), token), cache=cache)
            found.append((model.logits(own, params, x[:, 0]), None))
        return [np.asarray(logits) for logits, _ in found]

    for found, wanted in zip(steps("native"), steps("auto"), strict=True):
        assert np.abs(found - wanted).max() <= 2e-5 * np.abs(wanted).max()
        assert not np.array_equal(found, wanted)  # they are two ways indeed
