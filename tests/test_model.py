import itertools
from dataclasses import replace
from functools import cache, partial
from math import erf, sqrt

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from gpt_jax import model
from gpt_jax.model import GPT, Dropout
from gpt_jax.tasks import lm
from tests import test_step
from tests.cases import few
from tests.tiny import cfg, jit

KEY = jax.random.key(0)
B, T = 2, 16
TOKENS = np.random.default_rng(0).integers(0, 61, (B, T)).astype(np.int32)


def layers(*windows, base=10000.0, scaling=None):
    return tuple(
        {"window": w, "rope_base": base, "rope_scaling": scaling} for w in windows
    )


LLAMA = {
    "position": "rope",
    "norm": "rmsnorm",
    "activation": "silu",
    "gated": True,
    "n_kv_heads": 2,
    "tie_embeddings": False,
    "qkv_bias": False,
    "attn_bias": False,
    "mlp_bias": False,
}
GEMMA = {
    **LLAMA,
    "n_layers": 3,
    "head_dim": 12,
    "d_ff": 40,
    "pattern": (
        *layers(5, base=100.0),
        *layers(0, base=10000.0, scaling={"kind": "linear", "factor": 8.0}),
    ),
    "norm_offset": 1.0,
    "norm_eps": 1e-6,
    "norm_placement": "both",
    "activation": "gelu_tanh",
    "tie_embeddings": True,
    "qk_norm": True,
    "query_scale": 0.2,
    "attn_softcap": 2.0,
    "logit_softcap": 3.0,
    "embed_scale": 32**0.5,
}
MODERN = {
    **LLAMA,
    "activation": "relu2",
    "gated": False,
    "n_kv_heads": 0,
    "norm_scale": False,
    "qk_norm": True,
    "embed_norm": True,
    "head_bias": True,
    "vocab_multiple": 16,
}
NEOX = {
    **{"position": "rope", "rotary_dim": 4, "parallel": "own", "activation": "gelu"},
    **{"tie_embeddings": False, "residual_scale": 0.7, "logit_divisor": 3.0},
}
PHI = {
    **{"position": "rope", "rotary_dim": 6, "parallel": "shared", "qk_norm": True},
    **{"pattern": (*layers(0, base=100.0), *layers(4, base=0.0))},
}
OLMO2 = {
    **{**LLAMA, "norm_placement": "post", "qk_norm": True, "qk_norm_over": "heads"},
    **{"residual_scale": 0.5, "qkv_clip": 0.7},
}
FAMILIES = {"gpt2": {}, "llama": LLAMA, "gemma": GEMMA, "modern": MODERN}
FAMILIES |= {"neox": NEOX, "phi": PHI, "olmo2": OLMO2}


def shake(params, seed=0):
    """Moves every weight, so that zeros and ones cannot hide a mistake."""
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(seed)
    moved = [x + 0.2 * rng.normal(size=x.shape).astype(np.float32) for x in leaves]
    return jax.tree.unflatten(tree, moved)


@cache
def start(c):
    """Returns the first weights."""
    return jit(partial(model.init, c))(KEY)


@cache
def family(name):
    """Returns (config, moved weights, compiled forward of tokens) of a family."""
    c = cfg(**FAMILIES[name])
    params = shake(start(c))
    return c, params, forward(c)


@cache
def forward(c, **static):
    def logits(params, tokens_BT, **traced):
        return GPT(c).apply({"params": params}, tokens_BT, **traced, **static)[0]

    return jit(logits)


# ---------------------------------------------------------------- independent oracle


def np_norm(x, w, c, kind, over: int | tuple[int, ...] = -1):
    if kind == "layernorm":
        x = x - x.mean(over, keepdims=True)
    x = x / np.sqrt((x**2).mean(over, keepdims=True) + c.norm_eps)
    x = x * (w["scale"] + c.norm_offset) if "scale" in w else x
    return x + w["bias"] if "bias" in w else x


def np_rope(x, position, kind, features):
    """x [T, H, K]: pairs (i, i + R/2) as complex numbers, turned."""
    if not kind.rope_base:
        return x
    x, rest = x[..., :features], x[..., features:]
    half = features // 2
    factor = kind.rope_scaling.factor if kind.rope_scaling else 1.0
    rate = kind.rope_base ** -(np.arange(half) / half) / factor
    turned = x[..., :half] + 1j * x[..., half:]
    turned = turned * np.exp(1j * position[:, None, None] * rate)
    return np.concatenate([turned.real, turned.imag, rest], -1)


def np_dense(x, w, n_in=1):
    y = np.tensordot(x, w["kernel"], n_in)
    return y + w["bias"] if "bias" in w else y


def np_gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


NP_ACT = {
    "gelu_tanh": np_gelu,
    "gelu": np.vectorize(lambda x: x * 0.5 * (1 + erf(x / sqrt(2)))),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "relu": lambda x: np.maximum(x, 0),
}


def np_attention(x, w, c, kind):
    q, k, v = (np_dense(x, w[name]) for name in ("query", "key", "value"))
    if c.qkv_clip:
        q, k, v = (np.clip(x, -c.qkv_clip, c.qkv_clip) for x in (q, k, v))
    if c.qk_norm:
        over = (-2, -1) if c.qk_norm_over == "heads" else -1
        q = np_norm(q, w.get("query_norm", {}), c, "rmsnorm", over)
        k = np_norm(k, w.get("key_norm", {}), c, "rmsnorm", over)
    t = np.arange(len(x))
    if c.position == "rope":
        q, k = (np_rope(a, t, kind, c.rotary_dim) for a in (q, k))
    k, v = (np.repeat(a, c.n_heads // c.n_kv_heads, axis=1) for a in (k, v))
    score = np.einsum("thk,shk->hts", q, k) * c.query_scale
    if c.attn_softcap:
        score = c.attn_softcap * np.tanh(score / c.attn_softcap)
    far = t[:, None] - t[None, :]
    hidden = (far < 0) | ((far >= kind.window) if kind.window else False)
    score = np.where(hidden, -np.inf, score)
    weight = np.exp(score - score.max(-1, keepdims=True))
    weight = weight / weight.sum(-1, keepdims=True)
    return np_dense(np.einsum("hts,shk->thk", weight, v), w["out"], 2)


def np_logits(params, tokens, c):
    """One row's logits by NumPy in float64."""
    w = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
    act = NP_ACT[c.activation]
    x = w["embed"]["embedding"][tokens] * c.embed_scale
    if c.position == "learned":
        x = x + w["positions"]["embedding"][: len(tokens)]
    if c.embed_norm:
        x = np_norm(x, w.get("embed_norm", {}), c, c.norm)
    for i in range(c.n_layers):
        b = w[f"block_{i}"]
        pre = c.norm_placement != "post"
        y = first = np_norm(x, b.get("norm1", {}), c, c.norm) if pre else x
        y = np_attention(y, b["attn"], c, c.pattern[i % len(c.pattern)])
        y = y * c.residual_scale
        both = x + (np_norm(y, b["post1"], c, c.norm) if "post1" in b else y)
        y = x if c.parallel == "own" else both
        y = np_norm(y, b.get("norm2", {}), c, c.norm) if pre else y
        y = first if c.parallel == "shared" else y
        x = both
        up = np_dense(y, b["mlp"]["up"])
        gated = act(np_dense(y, b["mlp"]["gate"])) * up if c.gated else act(up)
        y = np_dense(gated, b["mlp"]["down"]) * c.residual_scale
        x = x + (np_norm(y, b["post2"], c, c.norm) if "post2" in b else y)
    x = np_norm(x, w.get("final_norm", {}), c, c.norm)
    head = {"kernel": w["embed"]["embedding"].T} if c.tie_embeddings else w["head"]
    y = np_dense(x, head)[:, : c.vocab_size] / c.logit_divisor
    return c.logit_softcap * np.tanh(y / c.logit_softcap) if c.logit_softcap else y


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_equal_a_numpy_model(name):
    c, params, run = family(name)
    got = run(params, TOKENS)
    assert got.dtype == jnp.float32 and got.shape == (B, T, 61)
    for row in range(B):
        want = np_logits(params, TOKENS[row], c)
        np.testing.assert_allclose(got[row], want, rtol=1e-4, atol=1e-4)


def test_exact_gelu_differs_from_tanh_gelu_and_equals_numpy():
    c = cfg(activation="gelu", n_layers=1)
    params = shake(start(c))
    got = forward(c)(params, TOKENS[:1])[0]
    np.testing.assert_allclose(got, np_logits(params, TOKENS[0], c), atol=1e-4)
    other = np_logits(params, TOKENS[0], replace(c, activation="gelu_tanh"))
    assert np.abs(got - other).max() > 1e-4


def test_queries_and_keys_are_rms_normed_in_a_layernorm_model_too():
    c = cfg(qk_norm=True, n_layers=1)
    params = shake(start(c))
    want = np_logits(params, TOKENS[0], c)
    np.testing.assert_allclose(forward(c)(params, TOKENS[:1])[0], want, atol=1e-4)


# ---------------------------------------------------------------- classes


def test_a_classifier_has_a_head_of_its_classes_instead_of_the_vocabulary():
    c = cfg(n_classes=3, tie_embeddings=False, init="modern")
    params = model.init(c, KEY)
    assert params["classifier"]["kernel"].shape == (32, 3)
    assert params["classifier"]["bias"].shape == (3,)
    assert "head" not in params
    logits, _ = GPT(c).apply({"params": params}, TOKENS)
    assert logits.shape == (B, T, 3) and logits.dtype == jnp.float32
    assert np.abs(logits).max() < 0.1  # begins undecided
    lm = cfg(tie_embeddings=False, init="modern")
    assert model.count(c) == model.count(lm) - 32 * 61 + 32 * 3 + 3


@pytest.mark.parametrize("classes", [-1, 1])
def test_a_number_of_classes_that_sorts_nothing_is_refused(classes):
    with pytest.raises(ValueError, match=f"n_classes is {classes}"):
        cfg(n_classes=classes)


# ---------------------------------------------------------------- exact counts

SIZES = {"small": (12, 768, 12), "medium": (24, 1024, 16), "large": (36, 1280, 20)}
SIZES["xl"] = (48, 1600, 25)


@pytest.mark.parametrize(
    ("size", "untied", "tied_bias", "tied"),
    [
        ("small", 163_009_536, 124_439_808, 124_412_160),
        ("medium", 406_212_608, 354_823_168, 354_749_440),
        ("large", 838_220_800, 774_030_080, 773_891_840),
        ("xl", 1_637_792_000, 1_557_611_200, 1_557_380_800),
    ],
)
def test_gpt2_has_its_published_number_of_parameters(size, untied, tied_bias, tied):
    depth, width, heads = SIZES[size]
    shape = {"n_layers": depth, "d_model": width, "n_heads": heads, "d_ff": 0}
    shape |= {"vocab_size": 50257, "context_length": 1024, "vocab_multiple": 128}

    def number(**switches):
        return model.count(cfg(**shape, **switches))

    assert number(tie_embeddings=False, qkv_bias=False) == untied
    assert number() == tied_bias
    assert number(qkv_bias=False) == tied


def test_count_of_weights_includes_padding_and_count_of_a_config_does_not():
    c = cfg(**MODERN)
    shapes = jax.eval_shape(partial(model.init, c), KEY)
    padding = 3 * (2 * 32 + 1)  # 61 -> 64 rows of the embedding, the head, its bias
    assert model.count(shapes) == model.count(c) + padding


# ---------------------------------------------------------------- who sees whom


@pytest.mark.parametrize("name", FAMILIES)
def test_future_tokens_do_not_change_past_logits(name):
    _, params, run = family(name)
    changed = TOKENS.copy()
    changed[:, 9:] = (changed[:, 9:] + 7) % 61
    a, b = run(params, TOKENS), run(params, changed)
    np.testing.assert_allclose(a[:, :9], b[:, :9], atol=1e-5)
    assert np.abs(a[:, 9:] - b[:, 9:]).max() > 1e-2


def test_without_causal_the_past_sees_the_future():
    c, params, run = family("gpt2")
    changed = TOKENS.copy()
    changed[:, -1] = (changed[:, -1] + 7) % 61
    both_ways = forward(c, causal=False)
    before, after = both_ways(params, TOKENS), both_ways(params, changed)
    assert np.abs(before[:, 0] - after[:, 0]).max() > 1e-4
    np.testing.assert_allclose(
        both_ways(params, TOKENS[:, :1]), run(params, TOKENS[:, :1]), atol=1e-5
    )


def test_window_forgets_tokens_beyond_its_reach():
    c = cfg(position="rope", pattern=layers(4), n_layers=2)
    params = shake(start(c))
    changed = TOKENS.copy()
    changed[:, 3] = (changed[:, 3] + 7) % 61
    a, b = (forward(c)(params, x) for x in (TOKENS, changed))
    reach = 3 + 2 * (4 - 1)  # two layers, each three back
    assert np.abs(a[:, reach] - b[:, reach]).max() > 1e-6
    np.testing.assert_allclose(a[:, reach + 1 :], b[:, reach + 1 :], atol=1e-5)


@pytest.mark.fault(19)
@pytest.mark.parametrize("attention", ["plain", "blocked", "xla"])
def test_packed_documents_do_not_see_each_other(attention):
    c, params, _ = family("llama")
    run = forward(replace(c, attention=attention))
    segments = np.repeat([[0] * 6 + [1] * 10], B, axis=0)
    positions = np.repeat([[*range(6), *range(10)]], B, axis=0)
    packed = run(params, TOKENS, positions_BT=positions, segments_BT=segments)
    alone = [family("llama")[2](params, x) for x in (TOKENS[:, :6], TOKENS[:, 6:])]
    np.testing.assert_allclose(packed, np.concatenate(alone, 1), atol=2e-5)


@pytest.mark.parametrize("attention", ["blocked", "xla"])
@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_attention_implementations_agree_in_the_model(name, attention):
    c, params, run = family(name)
    got = forward(replace(c, attention=attention))(params, TOKENS)
    np.testing.assert_allclose(got, run(params, TOKENS), atol=5e-5)


# ---------------------------------------------------------------- cache


@cache
def stepper(name, length):
    """Compiled: `length` new tokens into the cache of a family."""
    c = family(name)[0]

    def step(params, tokens_BT, cache):
        return GPT(c).apply({"params": params}, tokens_BT, cache=cache)

    return jit(step)


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", FAMILIES)
def test_one_token_at_a_time_equals_all_at_once(name):
    c, params, run = family(name)
    cache_ = model.init_cache(c, B, T, jnp.float32)
    first, cache_ = stepper(name, 5)(params, TOKENS[:, :5], cache_)
    got = [first]
    for t in range(5, T):
        one, cache_ = stepper(name, 1)(params, TOKENS[:, t : t + 1], cache_)
        got.append(one)
    want = run(params, TOKENS)
    np.testing.assert_allclose(np.concatenate(got, 1), want, atol=5e-5)
    assert cache_.length_B.tolist() == [T, T]


@pytest.mark.fault(20)
@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_rows_of_different_length_do_not_disturb_each_other(name):
    c, params, run = family(name)
    lengths = jnp.array([3, 5])
    cache_ = model.init_cache(c, B, T, jnp.float32)
    _, cache_ = stepper(name, 5)(params, TOKENS[:, :5], cache_)  # row 0: 2 are padding
    cache_ = cache_._replace(length_B=lengths)
    want = run(params, TOKENS)
    for step in range(4):
        new = np.array([[TOKENS[b, n + step]] for b, n in enumerate([3, 5])])
        got, cache_ = stepper(name, 1)(params, new, cache_)
        np.testing.assert_allclose(got[0, 0], want[0, 3 + step], atol=5e-5)
        np.testing.assert_allclose(got[1, 0], want[1, 5 + step], atol=5e-5)


@pytest.mark.parametrize("name", ["gpt2", "gemma"])
def test_kernels_transposed_for_one_row_give_the_same_logits(name):
    c, params, run = family(name)
    turned = model.for_one_row(params, model.declared(c))
    paths = flatten_dict(turned, sep="/")
    assert not [path for path in paths if path.endswith("kernel")]
    np.testing.assert_allclose(run(turned, TOKENS), run(params, TOKENS), atol=5e-5)
    again = model.for_one_row(turned, model.declared(c))
    assert jax.tree.all(jax.tree.map(lambda a, b: a is b, turned, again))


@pytest.mark.fault(20)
def test_a_row_put_into_a_used_slot_continues_as_if_alone():
    c, params, run = family("gpt2")
    full = model.init_cache(c, B, T, jnp.float32)
    _, full = stepper("gpt2", 5)(params, TOKENS[:, :5], full)
    row = model.init_cache(c, 1, T, jnp.float32)
    _, row = stepper("gpt2", 5)(params, TOKENS[:1, 2:7], row)
    full = model.insert(model.free(full, 1), row, 1)
    got, _ = stepper("gpt2", 1)(params, np.array([[TOKENS[0, 5]], [3]]), full)
    want = run(params, TOKENS)[0, 5]
    np.testing.assert_allclose(got[0, 0], want, atol=5e-5)
    other = np.concatenate([TOKENS[:, 2:7], [[3], [3]]], 1)
    np.testing.assert_allclose(got[1, 0], run(params, other)[0, 5], atol=5e-5)


def test_a_cache_refuses_what_it_cannot_do():
    c, params, _ = family("gpt2")
    cache_ = model.init_cache(c, B, T, jnp.float32)

    def call(c, **options):
        jax.eval_shape(
            lambda p: GPT(c).apply({"params": p}, TOKENS, cache=cache_, **options),
            params,
        )

    with pytest.raises(ValueError, match="unstack"):
        call(replace(c, scan_layers=True))
    with pytest.raises(ValueError, match="segments"):
        call(c, segments_BT=TOKENS)
    with pytest.raises(ValueError, match="causal"):
        call(c, causal=False)


def test_more_tokens_than_the_context_are_refused():
    c, params, _ = family("gpt2")
    with pytest.raises(ValueError, match="17 tokens are more than context_length 16"):
        forward(c)(params, np.zeros((1, 17), np.int32))
    with pytest.raises(ValueError, match="context_length 16"):
        model.init_cache(c, 1, 17, jnp.float32)


# ---------------------------------------------------------------- layouts

DEEP = {
    "n_layers": 5,
    "d_model": 16,
    "position": "rope",
    "pattern": layers(3, 0),
    "qk_norm": True,
}


@cache
def loss_and_grads(c):
    def loss(params, tokens_BT, dropout):
        y, _ = GPT(c).apply({"params": params}, tokens_BT, dropout=dropout)
        return jnp.square(y).mean(), y

    return jit(jax.value_and_grad(loss, has_aux=True))


def assert_trees_close(a, b, **how):
    jax.tree.map(partial(np.testing.assert_allclose, **how), a, b)


def test_stack_and_unstack_lose_nothing():
    c = cfg(**DEEP)
    params = start(c)
    stacked = model.stack(params, c)
    assert sorted(stacked["blocks"]) == ["kind_0", "kind_1"]
    assert "block_4" in stacked and "block_3" not in stacked
    assert stacked["blocks"]["kind_1"]["attn"]["out"]["kernel"].shape == (2, 4, 4, 16)
    back = model.unstack(stacked, c)
    assert jax.tree.structure(back) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, back, params)
    scanned = start(replace(c, scan_layers=True))
    assert_trees_close(scanned, stacked, rtol=1e-6, atol=0)


@pytest.mark.fault(18)
@pytest.mark.parametrize(
    "scan_layers, remat",
    few(itertools.product((True, False), ("none", *model.REMAT)), (True, "dots")),
)
def test_scan_and_remat_change_neither_logits_nor_gradients(scan_layers, remat):
    c = cfg(**DEEP)
    other = replace(c, scan_layers=scan_layers, remat=remat)
    params = shake(start(c))
    dropout = Dropout(KEY, 0.1, 0.2, 0.3)
    (_, want), grads = loss_and_grads(c)(params, TOKENS, dropout)
    given = model.stack(params, c) if scan_layers else params
    (_, got), other_grads = loss_and_grads(other)(given, TOKENS, dropout)
    np.testing.assert_allclose(got, want, atol=2e-5)
    assert_trees_close(model.unstack(other_grads, c), grads, rtol=2e-3, atol=2e-5)
    if not scan_layers:  # the same sums in the same order
        assert_trees_close(other_grads, grads, rtol=1e-5, atol=1e-6)


def saved_for_backward(remat, scan_layers):
    """Returns (bytes that JAX saves, bytes that XLA allocates) for a gradient."""
    c = cfg(n_layers=4, context_length=128, attention="plain")
    c = replace(c, remat=remat, scan_layers=scan_layers)
    shapes = jax.eval_shape(partial(model.init, c), KEY)
    tokens_BT = jnp.zeros((4, 128), jnp.int32)

    def loss(params):
        return jnp.square(GPT(c).apply({"params": params}, tokens_BT)[0]).mean()

    residuals = jax.eval_shape(lambda params: jax.vjp(loss, params)[1], shapes)
    saved = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(residuals))
    if not scan_layers:
        return saved, None
    compiled = jit(jax.grad(loss)).lower(shapes).compile()
    return saved, compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("scan_layers", few([True, False], True))
def test_each_remat_saves_less_than_the_one_before(scan_layers):
    """Of unrolled layers XLA:CPU undoes it, so there only JAX's part is looked at."""
    kinds = ("none", *model.REMAT)
    saved, held = zip(*(saved_for_backward(kind, scan_layers) for kind in kinds))
    layers, stream = 4, 4 * 128 * 32 * 4  # the bytes of a layer's input
    assert saved[0] > 2 * saved[1]
    assert saved[1] - saved[2] > layers * 5 * stream  # q k v, and 4 wide in the MLP
    assert saved[2] - saved[3] == layers * stream  # what attention gave
    if scan_layers:
        assert held[0] > 2 * held[1] and held[1] > held[2] > held[3]


# ---------------------------------------------------------------- dropout


def test_rate_0_is_no_dropout_and_rates_can_be_vmapped():
    c, params, run = family("gpt2")

    def at(rate):
        dropout = Dropout(KEY, rate, rate, rate)
        return GPT(c).apply({"params": params}, TOKENS, dropout=dropout)[0]

    off, on, on_again = jit(jax.vmap(at))(jnp.array([0.0, 0.5, 0.5]))
    np.testing.assert_allclose(off, run(params, TOKENS), atol=1e-5)
    assert np.abs(on - off).max() > 0.1
    np.testing.assert_array_equal(on, on_again)


@pytest.mark.parametrize("which", ["embed", "attn", "residual"])
def test_each_dropout_rate_reaches_its_place(which):
    _, params, run = family("gpt2")
    rates = {"embed": None, "attn": None, "residual": None, which: 0.5}
    got = run(params, TOKENS, dropout=Dropout(KEY, **rates))
    assert np.abs(got - run(params, TOKENS)).max() > 1e-2


@pytest.mark.fault(19)
@pytest.mark.parametrize("scan_layers", [False, True])
def test_dropout_masks_differ_between_layers(scan_layers):
    # Each layer adds its MLP's bias of ones, through its own mask.
    c = cfg(n_layers=2, position="none", scan_layers=scan_layers)
    dropout = Dropout(KEY, None, None, 0.5)
    keys = [dropout.layer(i).key for i in range(3)]
    drawn = {tuple(jax.random.key_data(k).tolist()) for k in keys}
    assert len(drawn) == 3
    params = model.unstack(start(c), c)
    first = params["block_0"]
    silent = jax.tree.map(jnp.zeros_like, first)
    bias = silent | {
        "mlp": silent["mlp"]
        | {"down": {"kernel": silent["mlp"]["down"]["kernel"], "bias": jnp.ones(32)}}
    }
    params |= {"block_0": bias, "block_1": bias}
    params["embed"] = {"embedding": jnp.zeros((61, 32))}
    given = model.stack(params, c) if scan_layers else params

    def stream(p):
        net = GPT(replace(c, norm_eps=1e-5))
        return net.apply({"params": p}, TOKENS, dropout=dropout, method="features")[0]

    x_BTD = jit(stream)(given)
    # The stream is 2 * (mask_0 + mask_1): three values appear only if masks differ.
    assert len(np.unique(np.round(x_BTD[0, 0], 3))) == 3


# ---------------------------------------------------------------- first weights


def test_gpt2_start_has_its_deviations():
    params = start(cfg(d_model=64, n_layers=2))
    block = params["block_1"]
    assert np.std(block["attn"]["query"]["kernel"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(0.01, rel=0.05)
    assert np.std(block["attn"]["out"]["kernel"]) == pytest.approx(0.01, rel=0.05)
    assert np.std(params["embed"]["embedding"]) == pytest.approx(0.02, rel=0.05)
    assert np.std(params["positions"]["embedding"]) == pytest.approx(0.02, rel=0.1)
    for norm in (block["norm1"], params["final_norm"]):
        assert (norm["scale"] == 1).all() and (norm["bias"] == 0).all()
    assert not block["mlp"]["up"]["bias"].any()


def test_torch_start_has_torchs_bounds():
    params = start(cfg(init="torch_default", tie_embeddings=False))
    block = params["block_0"]
    for weights, fan_in in [
        (block["attn"]["query"]["kernel"], 32),
        (block["attn"]["query"]["bias"], 32),
        (block["attn"]["out"]["kernel"], 32),
        (block["mlp"]["up"]["kernel"], 32),
        (block["mlp"]["down"]["kernel"], 128),
        (block["mlp"]["down"]["bias"], 128),
        (params["head"]["kernel"], 32),
    ]:
        edge = fan_in**-0.5
        assert 0.8 * edge < np.abs(weights).max() <= edge
    assert np.std(params["embed"]["embedding"]) == pytest.approx(1, rel=0.05)
    assert (block["norm1"]["scale"] == 1).all()
    assert not block["norm1"]["bias"].any()


def test_modern_start_keeps_variance_and_a_quiet_head():
    params = start(cfg(**MODERN, init="modern"))
    block = params["block_0"]
    assert np.std(block["mlp"]["down"]["kernel"]) == pytest.approx(128**-0.5, rel=0.05)
    assert np.std(block["attn"]["key"]["kernel"]) == pytest.approx(32**-0.5, rel=0.05)
    assert np.std(params["head"]["kernel"][:, :61]) == pytest.approx(0.001, rel=0.05)
    assert np.std(params["embed"]["embedding"][:61]) == pytest.approx(1, rel=0.05)


@pytest.mark.parametrize("init", ["gpt2", "torch_default", "modern"])
def test_zero_init_makes_every_block_the_identity(init):
    c = cfg(init=init, zero_init=True, norm_placement="both")
    params = start(c)
    shallow = {k: v for k, v in params.items() if not k.startswith("block_1")}
    got = forward(c)(params, TOKENS)
    want = forward(replace(c, n_layers=1))(shallow, TOKENS)
    np.testing.assert_array_equal(got, want)
    table_VD, places_TD = (
        np.asarray(params[name]["embedding"]) for name in ("embed", "positions")
    )
    x = np_norm(table_VD[TOKENS] + places_TD[:T], {}, c, "layernorm")
    want = x @ table_VD.T
    np.testing.assert_allclose(got, want, rtol=1e-3, atol=1e-3)


def test_padding_the_vocabulary_changes_no_logit():
    c = cfg(tie_embeddings=False)
    padded = replace(c, vocab_multiple=32)
    small, large = (start(x) for x in (c, padded))
    assert large["embed"]["embedding"].shape == (64, 32)
    assert large["head"]["kernel"].shape == (32, 64)
    a, b = forward(c)(small, TOKENS), forward(padded)(large, TOKENS)
    assert b.shape[-1] == 61
    np.testing.assert_allclose(a, b, atol=1e-5)


def test_a_norm_offset_starts_with_a_scale_of_one():
    params = start(cfg(**GEMMA))
    assert not params["final_norm"]["scale"].any()


def test_parameter_paths_are_the_public_format():
    paths = {
        "/".join(step.key for step in path): leaf.shape
        for path, leaf in jax.tree.leaves_with_path(
            jax.eval_shape(partial(model.init, cfg(**{**GEMMA, "n_layers": 1})), KEY)
        )
    }
    assert paths == {
        "embed/embedding": (61, 32),
        "block_0/norm1/scale": (32,),
        "block_0/norm2/scale": (32,),
        "block_0/post1/scale": (32,),
        "block_0/post2/scale": (32,),
        "block_0/attn/query/kernel": (32, 4, 12),
        "block_0/attn/key/kernel": (32, 2, 12),
        "block_0/attn/value/kernel": (32, 2, 12),
        "block_0/attn/out/kernel": (4, 12, 32),
        "block_0/attn/query_norm/scale": (12,),
        "block_0/attn/key_norm/scale": (12,),
        "block_0/mlp/up/kernel": (32, 40),
        "block_0/mlp/gate/kernel": (32, 40),
        "block_0/mlp/down/kernel": (40, 32),
        "final_norm/scale": (32,),
    }


# ---------------------------------------------------------------- precision, config


@pytest.mark.parametrize("name", ["gpt2", "llama"])
def test_bfloat16_stays_close_to_float32(name):
    c, _, run = family(name)
    params = start(c)
    got = forward(replace(c, dtype="bfloat16"))(params, TOKENS)
    want = run(params, TOKENS)
    assert got.dtype == jnp.float32
    error = np.abs(got - want).max() / np.abs(want).max()
    assert 1e-5 < error < 0.03


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"n_layers": 0}, "n_layers is 0"),
        ({"d_model": 30}, "d_model 30 is not a multiple of n_heads 4"),
        ({"n_kv_heads": 3}, "n_heads 4 is not a multiple of n_kv_heads 3"),
        ({"head_dim": 7, "position": "rope"}, "head_dim 7 is odd"),
        ({"norm": "batchnorm"}, "norm 'batchnorm' is not one of: layernorm, rmsnorm"),
        ({"attention": "flash"}, "attention 'flash'"),
        ({"dtype": "float16"}, "dtype 'float16'"),
        ({"pattern": ()}, "pattern is empty"),
        ({"pattern": layers(-1)}, "window -1"),
        ({"pattern": layers(0, base=-1.0)}, "rope_base"),
        ({"head_bias": True}, "tie_embeddings=False"),
        ({"attn_softcap": -1.0}, "attn_softcap is -1.0"),
    ],
)
def test_a_config_that_makes_no_model_is_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        cfg(**overrides)


def test_config_resolves_zeros_and_is_hashable():
    c = cfg(**GEMMA)
    assert (cfg().n_kv_heads, cfg().head_dim, cfg().d_ff) == (4, 8, 128)
    assert cfg().query_scale == 8**-0.5
    assert hash(c) == hash(cfg(**GEMMA)) and c == cfg(**GEMMA)
    assert [c.kind(i).window for i in range(3)] == [5, 0, 5]
    assert replace(c, n_layers=2).n_layers == 2


@pytest.mark.parametrize("kv_heads, gigabytes", [(32, 17.18), (8, 4.29)])
def test_the_cache_of_32k_tokens_takes_the_known_memory(kv_heads, gigabytes):
    """2 * tokens * layers * kv heads * head dim * 2 bytes, without allocating it."""
    shape = {"d_model": 4096, "n_heads": 32, "n_kv_heads": kv_heads, "n_layers": 32}
    config = cfg(**shape, context_length=32_768, position="rope")
    make = partial(model.init_cache, config, 1, 32_768, jnp.bfloat16)
    made = jax.eval_shape(make)
    held = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.layers))
    assert round(held / 1e9, 2) == gigabytes


# ---- losses of a layer's own ----


class Balanced(model.MLP):
    """An MLP that minds the mean square of its input."""

    def __call__(self, x_BTD, dropout):
        self.sow("sums", "balance", jnp.square(x_BTD).mean(-1).sum())
        return super().__call__(x_BTD, dropout)


@pytest.mark.parametrize(
    "scan, remat",
    few(
        itertools.product((False, True), ("none", "full")),
        (False, "none"),
        (True, "full"),
    ),
)
def test_what_layers_sow_is_added_up_and_part_of_the_training_loss(
    monkeypatch, scan, remat
):
    monkeypatch.setattr(model, "MLP", Balanced)
    c = cfg(scan_layers=scan, remat=remat, n_layers=3)
    params = model.init(c, jax.random.key(1))
    found = jit(lambda p: model.hidden(GPT(c), p, TOKENS))(params)
    # A normed vector has mean square 1 (less, by norm_eps, where it was short).
    assert float(found.sums["balance"]) == pytest.approx(3 * TOKENS.size, rel=0.03)

    loss = lm.make_loss(GPT(c), np.ones(61), loss_chunk=0, dropout=())
    batch = {"tokens": TOKENS, "targets": TOKENS, "mask": np.ones(TOKENS.shape)}
    hyper = test_step.make_hyper()
    training = jit(lambda p: loss(p, {}, batch, jax.random.key(0), hyper))(params)
    judged = jit(lambda p: loss(p, {}, batch, None, hyper))(params)
    assert float(training["balance"]) == float(found.sums["balance"])
    extra = float(training["loss"]) - float(judged["loss"])
    assert extra == pytest.approx(float(found.sums["balance"]), rel=1e-3)
