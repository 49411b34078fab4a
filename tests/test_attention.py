import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import attention
from gpt_jax.attention import Sight
from tests.tiny import draw, jit

B, T, H, G, K = 2, 13, 4, 2, 8


def reference(q, k, v, sees, *, scale, softcap=0.0):
    """Attention with loops; sees(b, t, s) -> bool."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    rows, time, heads, _ = q.shape
    y = np.zeros(q.shape)
    for b in range(rows):
        for h in range(heads):
            g = h // (heads // k.shape[2])
            for t in range(time):
                keys = [s for s in range(k.shape[1]) if sees(b, t, s)]
                score = np.array([q[b, t, h] @ k[b, s, g] for s in keys]) * scale
                if softcap:
                    score = softcap * np.tanh(score / softcap)
                weight = np.exp(score - score.max())
                weight /= weight.sum()
                y[b, t, h] = sum(w * v[b, s, g] for w, s in zip(weight, keys))
    return y


def attend(name, q_BTHK, k_BSGK, v_BSGK, sight, *, scale=0.3, softcap=0.0):
    def compiled(q_BTHK, k_BSGK, v_BSGK):
        how = {"scale": scale, "softcap": softcap, "dropout": None}
        return attention.IMPLEMENTATIONS[name](q_BTHK, k_BSGK, v_BSGK, sight, **how)

    return jit(compiled)(q_BTHK, k_BSGK, v_BSGK)


def inputs(length=T):
    q_BTHK = draw(B, length, H, K, seed=0)
    return q_BTHK, draw(B, length, G, K, seed=1), draw(B, length, G, K, seed=2)


SEGMENTS = jnp.asarray(np.sort(np.random.default_rng(3).integers(0, 3, (B, T)), axis=1))


@pytest.mark.fault(19)
@pytest.mark.parametrize("name", ["plain", "blocked", "xla", "streamed"])
@pytest.mark.parametrize(
    ("causal", "window", "packed"),
    [(True, 0, False), (True, 4, True), (False, 0, True), (False, 3, False)],
)
def test_every_implementation_equals_the_loops(name, causal, window, packed):
    q_BTHK, k_BSGK, v_BSGK = inputs()
    sight = Sight(causal, window, None, SEGMENTS if packed else None)

    def sees(b, t, s):
        near = not window or abs(t - s) < window
        same = not packed or SEGMENTS[b, t] == SEGMENTS[b, s]
        return (s <= t or not causal) and near and same

    y_BTHK = attend(name, q_BTHK, k_BSGK, v_BSGK, sight)
    want = reference(q_BTHK, k_BSGK, v_BSGK, sees, scale=0.3)
    np.testing.assert_allclose(y_BTHK, want, atol=2e-6)


@pytest.mark.parametrize("name", ["plain", "blocked", "streamed"])
def test_softcap_bounds_the_scores(name):
    q_BTHK, k_BSGK, v_BSGK = inputs()
    sight = Sight(True, 0, None, None)
    y_BTHK = attend(name, q_BTHK, k_BSGK, v_BSGK, sight, scale=1.0, softcap=1.5)
    want = reference(
        q_BTHK, k_BSGK, v_BSGK, lambda b, t, s: s <= t, scale=1.0, softcap=1.5
    )
    np.testing.assert_allclose(y_BTHK, want, atol=2e-6)


def test_slots_place_queries_among_the_keys():
    q_BTHK, k_BSGK, v_BSGK = inputs()
    slot_BT = jnp.array([[4, 5], [9, 10]])
    sight = Sight(True, 3, slot_BT, None)
    y_BTHK = attend("plain", q_BTHK[:, :2], k_BSGK, v_BSGK, sight)

    def sees(b, t, s):
        return s <= slot_BT[b, t] and s > slot_BT[b, t] - 3

    want = reference(q_BTHK[:, :2], k_BSGK, v_BSGK, sees, scale=0.3)
    np.testing.assert_allclose(y_BTHK, want, atol=2e-6)


@pytest.mark.parametrize("length", [1, 3, 5, 600])
def test_blocks_equal_plain_at_ragged_lengths(length):
    q_BTHK, k_BSGK, v_BSGK = inputs(length)
    sight = Sight(True, 0, None, None)
    y_BTHK = attend("blocked", q_BTHK, k_BSGK, v_BSGK, sight)
    want = attend("plain", q_BTHK, k_BSGK, v_BSGK, sight)
    np.testing.assert_allclose(y_BTHK, want, atol=2e-6)


def chosen(asked="auto", length=256, dtype="float32", sight=None, **changes):
    q_BTHK = jax.ShapeDtypeStruct((1, length, H, K), jnp.dtype(dtype))
    k_BTGK = jax.ShapeDtypeStruct((1, length, G, K), jnp.dtype(dtype))
    sight = sight or Sight(True, 0, None, None)
    options = {"cached": False, "softcap": 0.0, "dropout": False, **changes}
    return attention.choose(asked, q_BTHK, k_BTGK, sight, **options).__name__


def test_choose_follows_platform_and_ability(monkeypatch):
    monkeypatch.setattr(attention, "cudnn_works", lambda *_: pytest.fail("probed"))
    monkeypatch.setattr(jax, "default_backend", lambda: "cpu")
    for dtype in ("float32", "bfloat16"):
        assert chosen(dtype=dtype) == "blocked"
        assert chosen(length=16, dtype=dtype) == "plain"
        assert chosen(cached=True, dtype=dtype) == "plain"
        assert chosen(length=4096, dtype=dtype) == "streamed"
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    for dtype in ("float32", "bfloat16"):
        assert chosen(dtype=dtype) == chosen(dtype=dtype, softcap=5.0) == "splash"
        assert chosen(dtype=dtype, length=100) == "xla"
        assert chosen(dtype=dtype, dropout=True) == "plain"
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert chosen() == "xla"  # cuDNN's is for 16-bit floats
    assert chosen(length=4096) == "streamed"
    assert chosen(softcap=5.0) == "plain"
    assert chosen(dropout=True) == "plain"
    assert chosen("cudnn") == "cudnn"
    assert chosen("cudnn", dropout=True) == "plain"
    assert chosen("cudnn", sight=Sight(False, 3, None, None)) == "xla"
    monkeypatch.setattr(attention, "cudnn_works", lambda *_: True)
    packed = Sight(True, 0, None, SEGMENTS)
    assert chosen(dtype="bfloat16") == chosen(dtype="bfloat16", sight=packed) == "cudnn"


def test_without_cudnn_one_warning_names_the_error(monkeypatch, caplog):
    """The probe is the real one: this machine's CPU is asked for cuDNN."""
    attention.cudnn_works.cache_clear()
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    names = []

    def traced(x):  # as in a model: while something is traced
        names.append(chosen(dtype="bfloat16"))
        return x

    jax.eval_shape(traced, 1.0)
    jax.vmap(traced)(jnp.ones(3))
    attention.cudnn_works.cache_clear()
    assert names == ["xla", "xla"]
    (record,) = caplog.records
    assert (
        "cuDNN attention does not run here (bfloat16, tokens x heads x head_dim 256x4x8"
        in record.message
    )
    assert "cuDNN" in record.message.partition(": ")[2]


def test_the_probe_runs_what_it_compiles(monkeypatch, caplog):
    """XLA's attention stands in for cuDNN's, inside of a trace."""
    attention.cudnn_works.cache_clear()
    monkeypatch.setattr(attention.fused, "cudnn", attention.xla)
    works = []

    def traced(x):
        works.append(attention.cudnn_works("bfloat16", (7, 4, 16), 2, True, 0, True))
        return x.sum()

    jax.jit(jax.grad(traced))(jnp.ones(2))
    works.append(attention.cudnn_works("bfloat16", (128, 4, 16), 4, True, 64, False))
    attention.cudnn_works.cache_clear()
    assert works == [True, True] and not caplog.records


def gradients(run, qkv, sight, pull, **how):
    """Returns the weighed sum of an implementation's output, and its gradients."""

    def weighed(q_BTHK, k_BSGK, v_BSGK):
        options = {"scale": 0.1, "softcap": 0.0, "dropout": None, **how}
        return (run(q_BTHK, k_BSGK, v_BSGK, sight, **options) * pull).sum()

    return jit(jax.value_and_grad(weighed, argnums=(0, 1, 2)))(*qkv)


def alike(got, want, near=1e-5):
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, rtol=near, atol=near)


@pytest.mark.parametrize("name", ["plain", "blocked", "xla", "cudnn"])
@pytest.mark.parametrize(("window", "groups"), [(0, 4), (0, 2), (40, 2)])
def test_every_implementation_has_the_gradients_of_plain(name, window, groups):
    dtype = jnp.bfloat16 if name == "cudnn" else jnp.float32
    if name == "cudnn" and jax.default_backend() != "gpu":
        pytest.skip("cuDNN needs an NVIDIA GPU and there is none")
    sight, length, width = Sight(True, window, None, None), 128, 64
    shapes = [(B, length, heads, width) for heads in (4, groups, groups)]
    qkv = [draw(*shape, seed=i).astype(dtype) for i, shape in enumerate(shapes)]
    pull = draw(B, length, 4, width, seed=9)
    got = gradients(attention.IMPLEMENTATIONS[name], qkv, sight, pull)
    exact = [x.astype(jnp.float32) for x in qkv]
    want = gradients(attention.plain, exact, sight, pull)
    alike(got, want, near=1e-5 if dtype == jnp.float32 else 0.05)


SIGHTS = {  # tokens, causal, window, documents
    "causal": (32, True, 0, False),
    "window": (32, True, 11, False),
    "packed": (32, True, 0, True),
    "ragged": (29, True, 5, True),
    "both ways": (32, False, 0, False),
    "both ways, ragged, window": (27, False, 6, False),
}


def seen(name):
    T, causal, window, packed = SIGHTS[name]
    ids = np.sort(np.random.default_rng(3).integers(0, 3, (B, T)), axis=1)
    return T, Sight(causal, window, None, jnp.asarray(ids) if packed else None)


@pytest.mark.parametrize("softcap", [0.0, 2.0])
@pytest.mark.parametrize("name", SIGHTS)
def test_a_stream_of_blocks_has_the_values_and_gradients_of_plain(
    monkeypatch, name, softcap
):
    monkeypatch.setattr(attention.stream, "BLOCK", 8)
    T, sight = seen(name)
    qkv = [draw(B, T, heads, K, seed=i) for i, heads in enumerate((H, G, G))]
    pull = draw(B, T, H, K, seed=9)
    got = gradients(attention.streamed, qkv, sight, pull, softcap=softcap, scale=0.5)
    want = gradients(attention.plain, qkv, sight, pull, softcap=softcap, scale=0.5)
    alike(got, want)


def test_a_stream_of_blocks_keeps_nothing_that_grows_with_the_square():
    def memory(T):
        like = jax.ShapeDtypeStruct((1, T, 1, K), jnp.float32)
        how = {"scale": 1.0, "softcap": 0.0, "dropout": None}
        sight = Sight(True, 0, None, None)

        def loss(*qkv):
            return attention.streamed(*qkv, sight=sight, **how).sum()

        run = jit(jax.grad(loss, argnums=(0, 1, 2)))
        return run.lower(*[like] * 3).compile().memory_analysis().temp_size_in_bytes

    assert memory(16384) < 3 * memory(8192)


@pytest.mark.slow  # the kernel's steps, one by one
@pytest.mark.parametrize("name", ["causal", "ragged", "both ways, ragged, window"])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_splash_has_the_values_and_gradients_of_plain(name, softcap):
    T, sight = seen(name)
    qkv = [draw(B, T, heads, 64, seed=i) for i, heads in enumerate((H, G, G))]
    pull = draw(B, T, H, 64, seed=9)
    run = partial(attention.splash, interpret=True)
    got = gradients(run, qkv, sight, pull, softcap=softcap)
    want = gradients(attention.plain, qkv, sight, pull, softcap=softcap)
    alike(got, want, near=2e-5)


def test_extend_writes_each_row_at_its_own_slot_and_drops_overflow():
    old_BGSK, new_BTGK = draw(2, G, 5, K, seed=12), draw(2, 2, G, K, seed=13)
    slot_BT = jnp.array([[1, 2], [4, 5]])
    got = attention.extend(old_BGSK, new_BTGK, slot_BT)
    want = np.array(old_BGSK)
    want[0, :, 1] = new_BTGK[0, 0]
    want[0, :, 2] = new_BTGK[0, 1]
    want[1, :, 4] = new_BTGK[1, 0]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_is_read_and_written_without_copying_it(rows):
    """Oracle: the program that XLA made. A copy costs more the longer the cache is."""
    slots = 64
    shapes = [(rows, G, slots, K), (rows, G, slots, K), (rows, 1, G, K), (rows, 1)]
    old_BGSK, _, new_BTGK, slot_BT = (
        jax.ShapeDtypeStruct(shape, jnp.int32 if i == 3 else jnp.float32)
        for i, shape in enumerate(shapes)
    )

    def step(_, carry):
        keys_BGSK, values_BGSK, x_BTHK, slot_BT = carry
        k_BTGK = x_BTHK[:, :, ::2]
        keys_BGSK = attention.extend(keys_BGSK, k_BTGK, slot_BT)
        values_BGSK = attention.extend(values_BGSK, k_BTGK, slot_BT)
        how = {"scale": 1.0, "softcap": 0.0, "dropout": None}
        k_BSGK, v_BSGK = keys_BGSK.swapaxes(1, 2), values_BGSK.swapaxes(1, 2)
        sight = Sight(True, 0, slot_BT, None)
        y_BTHK = attention.plain(x_BTHK, k_BSGK, v_BSGK, sight, **how)
        return keys_BGSK, values_BGSK, y_BTHK, slot_BT + 1

    def steps(keys_BGSK, values_BGSK, new_BTGK, slot_BT):
        carry = (keys_BGSK, values_BGSK, jnp.repeat(new_BTGK, 2, axis=2), slot_BT)
        return jax.lax.fori_loop(0, 5, step, carry)

    run = jax.jit(steps, donate_argnums=(0, 1))
    text = run.lower(old_BGSK, old_BGSK, new_BTGK, slot_BT).compile().as_text()
    sizes = {f"{rows},{G},{slots},{K}", f"{rows},{G},{K},{slots}"}
    sizes |= {f"{rows * G},{slots},{K}", f"{rows * G},{K},{slots}"}
    copied = [
        line
        for line in text.splitlines()
        if re.search(r"\b(copy|transpose)\(", line)
        and any(f"= f32[{size}]" in line for size in sizes)
    ]
    assert not copied
