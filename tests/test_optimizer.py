import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import pytest

from configs import common
from gpt_jax import model, optimizer
from gpt_jax.optimizer import Hyper, muon
from tests import tiny
from tests.cases import few

NAMES = ["adamw", "muon", "lion", "adafactor", "sgd"]
TABLES = {
    "schedule": "constant",
    "decay": common.base().optimizer.decay,
    "rates": (),
    "freeze": (),
    "muon": common.base().optimizer.muon,
    "moment_dtype": "float32",
}
PLAIN = {**common.base().hyper.to_dict(), "warmup_steps": 0.0, "clip": 0.0}


CFG = tiny.cfg(d_model=8, n_heads=2, d_ff=16, vocab_size=11, n_layers=2)
DECLARED = {
    **model.declared(CFG),
    **model.declared(dataclasses.replace(CFG, scan_layers=True)),
    "blocks/kernel": tiny.weight((2, 130, 140), ("layers", "embed", "mlp"), inputs=1),
    "block_0/kernel": tiny.weight((130, 140), ("embed", "mlp"), inputs=1),
    "w": tiny.weight((130, 140), ("embed", "mlp"), inputs=1),
}


def make(name="adamw", **changes):
    return optimizer.make(DECLARED, **{**TABLES, "name": name, **changes})


by_path = optimizer._by_path


def hyper(**changes):
    return Hyper(**{**PLAIN, **changes})


def layer(draw):
    """The weights of a layer of width 8 with 2 heads of 4 and 16 hidden units."""
    return {
        "norm1": {"scale": draw(8)},
        "attn": {
            "query": {"kernel": draw(8, 2, 4), "bias": draw(2, 4)},
            "out": {"kernel": draw(2, 4, 8), "bias": draw(8)},
        },
        "mlp": {"up": {"kernel": draw(8, 16)}, "down": {"kernel": draw(16, 8)}},
    }


def tree(seed, layers=2):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    blocks = {f"block_{i}": layer(draw) for i in range(layers)}
    return {"embed": {"embedding": draw(11, 8)}, **blocks}


def stacked(tree):
    """The same weights with layers stacked, as a scanned model holds them."""
    names = [name for name in tree if name.startswith("block_")]
    rest = {name: part for name, part in tree.items() if name not in names}
    layers = jax.tree.map(lambda *x: jnp.stack(x), *(tree[name] for name in names))
    return {**rest, "blocks": {"kind_0": layers}}


def run(tx, params, steps: int = 3, **numbers):
    """Returns the weights after some steps on gradients of fixed seeds, and info."""
    state, info, update = tx.init(params), {}, jax.jit(tx.update)
    for step in range(steps):
        grads = grads_like(params, step)
        params, state, info = update(grads, state, params, step, hyper(**numbers))
    return params, state, info


def grads_like(params, step):
    grads = tree(100 + step)
    return stacked(grads) if "blocks" in params else grads


def close(a, b, **limits):
    limits = {"rtol": 1e-5, "atol": 1e-6, **limits}
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **limits), a, b)


# ---- numbers ----


def test_hyper_has_exactly_the_keys_of_the_config():
    assert set(Hyper._fields) == set(common.base().hyper)


def test_every_key_of_the_config_but_ema_is_an_option():
    options = common.base().optimizer.to_dict()
    del options["ema"]
    optimizer.make(DECLARED, **options)


# ---- schedules ----


def factors(name, steps, **numbers):
    return np.array([optimizer.SCHEDULES[name](s, hyper(**numbers)) for s in steps])


def test_cosine_reproduces_nanogpt():
    warm, last, low = 20, 100, 0.1

    def wanted(it):
        if it < warm:
            return (it + 1) / (warm + 1)
        if it > last:
            return low
        return low + (1 - low) * 0.5 * (1 + np.cos(np.pi * (it - warm) / (last - warm)))

    got = factors(
        "cosine",
        range(130),
        warmup_steps=20.0,
        initial_lr_ratio=1 / 21,
        decay_steps=100.0,
        final_lr_ratio=low,
    )
    np.testing.assert_allclose(got, [wanted(it) for it in range(130)], atol=2e-6)


def test_cosine_reproduces_the_schedule_of_raschkas_appendix_d():
    start, peak, low, total, warm = 3e-5, 1e-2, 1e-6, 135, 27
    rates = []
    for step in range(total):
        if step < warm:
            rates.append(start + step * (peak - start) / warm)
        else:
            progress = (step - warm) / (total - warm)
            rates.append(low + (peak - low) * 0.5 * (1 + np.cos(np.pi * progress)))
    got = factors(
        "cosine",
        range(total),
        warmup_steps=27.0,
        initial_lr_ratio=start / peak,
        decay_steps=135.0,
        final_lr_ratio=low / peak,
    )
    np.testing.assert_allclose(got * peak, rates, rtol=2e-4, atol=1e-9)


def test_linear_falls_in_a_line_to_the_final_ratio():
    got = factors(
        "linear", [0, 5, 10, 60, 110, 500], warmup_steps=10.0, decay_steps=110.0
    )
    np.testing.assert_allclose(got, [0, 0.5, 1, 0.55, 0.1, 0.1], atol=1e-6)


def test_wsd_stays_at_the_peak_until_its_last_fraction():
    numbers = {"warmup_steps": 10.0, "decay_steps": 100.0, "decay_fraction": 0.2}
    got = factors("wsd", [5, 10, 50, 80, 90, 100, 200], **numbers)
    np.testing.assert_allclose(got, [0.5, 1, 1, 1, 0.55, 0.1, 0.1], atol=1e-6)


def test_wsd_decays_from_the_end_of_a_warmup_that_reaches_into_the_decay():
    numbers = {"warmup_steps": 90.0, "decay_steps": 100.0, "decay_fraction": 0.5}
    got = factors("wsd", [45, 90, 95, 100], **numbers)
    np.testing.assert_allclose(got, [0.5, 1, 0.55, 0.1], atol=1e-6)


def test_constant_stays_at_the_peak():
    got = factors("constant", [0, 5, 10, 10_000], warmup_steps=10.0, decay_steps=100.0)
    np.testing.assert_allclose(got, [0, 0.5, 1, 1])


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
@pytest.mark.parametrize("warmup, fraction", [(0.0, 0.2), (0.0, 0.0), (100.0, 1.0)])
def test_edges_of_a_schedule_are_finite_and_bounded(name, warmup, fraction):
    numbers = {"warmup_steps": warmup, "decay_fraction": fraction}
    got = factors(name, range(0, 140, 10), decay_steps=100.0, **numbers)
    assert np.all((got >= 0) & (got <= 1 + 1e-6)), got
    assert got[0] == (0 if warmup else 1)
    assert got[-1] == (1 if name == "constant" else np.float32(0.1))


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_schedules_take_traced_numbers_in_a_batch(name):
    warm, last = jnp.array([0.0, 5.0, 20.0]), jnp.array([10.0, 20.0, 20.0])

    def factor(step, warm, last):
        return optimizer.SCHEDULES[name](
            step, hyper(warmup_steps=warm, decay_steps=last)
        )

    got = jax.jit(jax.vmap(factor, in_axes=(None, 0, 0)))(7, warm, last)
    want = [factor(7, *pair) for pair in zip(warm.tolist(), last.tolist())]
    np.testing.assert_allclose(got, want, rtol=1e-6)


# ---- rules ----


def reference(rule, params, steps, numbers):
    """AdamW, Lion and SGD in NumPy float64, decoupled decay on everything but 1-D."""
    h = hyper(**numbers)
    p = {k: np.float64(v) for k, v in by_path(params).items()}
    m = {k: np.zeros_like(v) for k, v in p.items()}
    v = {k: np.zeros_like(w) for k, w in p.items()}
    for t in range(steps):
        grads = by_path(grads_like(params, t))
        for k in p:
            g = np.float64(grads[k])
            if rule == "adamw":
                m[k] = h.beta1 * m[k] + (1 - h.beta1) * g
                v[k] = h.beta2 * v[k] + (1 - h.beta2) * g * g
                m_hat, v_hat = (
                    m[k] / (1 - h.beta1 ** (t + 1)),
                    v[k] / (1 - h.beta2 ** (t + 1)),
                )
                d = m_hat / (np.sqrt(v_hat) + h.eps)
            elif rule == "lion":
                d = np.sign(h.beta1 * m[k] + (1 - h.beta1) * g)
                m[k] = h.beta2 * m[k] + (1 - h.beta2) * g
            else:
                d = m[k] = h.momentum * m[k] + g
            decays = not k.endswith(("bias", "scale"))
            p[k] = p[k] - h.lr * (d + decays * h.weight_decay * p[k])
    return p


@pytest.mark.parametrize("name", ["adamw", "lion", "sgd"])
def test_rule_is_the_one_written_in_numpy(name):
    numbers = {"lr": 0.03, "weight_decay": 0.2, "beta1": 0.8, "beta2": 0.9, "eps": 1e-3}
    got, _, _ = run(make(name), tree(0), 4, **numbers)
    want = reference(name, tree(0), 4, numbers)
    close(by_path(got), want)


@pytest.mark.usefixtures("promotion")  # which Optax leans on
def test_adamw_equals_optax():
    params, h = tree(0), hyper(lr=0.01, weight_decay=0.3)
    tx = optax.adamw(0.01, b1=h.beta1, b2=h.beta2, eps=h.eps, weight_decay=0.3)
    want, state = params, tx.init(params)
    for step in range(3):
        moves, state = tx.update(tree(100 + step), state, want)
        want = optax.apply_updates(want, moves)
    got, _, _ = run(make(decay=((".*", True),)), params, lr=0.01, weight_decay=0.3)
    close(got, want)


def test_adafactor_equals_optax():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(130, 140)), jnp.float32)}
    grads = {"w": jnp.asarray(rng.normal(size=(130, 140)), jnp.float32)}
    tx = optax.adafactor(0.01, multiply_by_parameter_scale=False, momentum=None)
    moves, _ = tx.update(grads, tx.init(params), params)
    ours = make("adafactor")
    state = ours.init(params)
    numbers = hyper(lr=0.01, weight_decay=0.0)
    got, _, _ = ours.update(grads, state, params, 0, numbers)
    close(got, optax.apply_updates(params, moves))
    assert sum(x.size for x in jax.tree.leaves(state)) < 130 * 140 / 10


def test_muon_is_keller_jordans_rule_in_numpy():
    def newton_schulz(x):
        x = x / np.linalg.norm(x)
        for _ in range(5):
            a = x @ x.T
            x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
        return x

    path = ("block_1", "mlp", "up", "kernel")

    def leaf(tree):
        for name in path:
            tree = tree[name]
        return np.float64(tree)

    numbers = {"matrix_lr": 0.1, "weight_decay": 0.2, "momentum": 0.7}
    got, _, _ = run(make("muon"), tree(0), 3, **numbers)
    w, m = leaf(tree(0)), 0.0
    for step in range(3):
        g = leaf(tree(100 + step))
        m = 0.7 * m + 0.3 * g
        o = newton_schulz(0.7 * m + 0.3 * g) * np.sqrt(16 / 8)
        w = w - 0.1 * (o + 0.2 * w)
    np.testing.assert_allclose(leaf(got), w, atol=1e-5)


@pytest.mark.usefixtures("promotion")
def test_muon_starts_as_optax_muon_does():
    """Later steps differ: Optax corrects its momentum for the start."""
    numbers = optax.contrib.MuonDimensionNumbers
    params = tree(0)
    dims = {
        "attn": {
            "query": {"kernel": numbers(0, (1, 2)), "bias": None},
            "out": {"kernel": numbers((0, 1), 2), "bias": None},
        },
        "mlp": {"up": {"kernel": numbers()}, "down": {"kernel": numbers()}},
        "norm1": {"scale": None},
    }
    table = {"embed": None, "block_0": dims, "block_1": dims}
    tx = optax.contrib.muon(1.0, muon_weight_dimension_numbers=table)
    moves, _ = jax.jit(tx.update)(tree(100), tx.init(params), params)
    got, _, _ = run(make("muon"), params, 1, matrix_lr=1.0, weight_decay=0.0)
    matrices = [path for path in by_path(params) if path.endswith("kernel")]
    assert len(matrices) == 8
    for path in matrices:
        moved = by_path(got)[path] - by_path(params)[path]
        np.testing.assert_allclose(moved, by_path(moves)[path], atol=5e-5)


def test_muon_moves_each_matrix_by_singular_values_near_one():
    params = tree(0)
    got, _, _ = run(make("muon"), params, 1, matrix_lr=1.0, weight_decay=0.0)
    for path, shape, scale in [
        ("attn/query", (8, 8), 1),
        ("attn/out", (8, 8), 1),
        ("mlp/up", (8, 16), 2**0.5),
        ("mlp/down", (16, 8), 1),
    ]:
        path = f"block_0/{path}/kernel"
        moved = np.asarray(by_path(got)[path] - by_path(params)[path])
        values = np.linalg.svd(moved.reshape(shape) / scale, compute_uv=False)
        assert np.all((values > 0.3) & (values < 1.3)), (path, values)


def test_muon_leaves_embeddings_biases_and_scales_to_adamw():
    got = by_path(run(make("muon"), tree(0), 2, matrix_lr=0.5)[0])
    adam = by_path(run(make("adamw"), tree(0), 2)[0])
    same = {path for path in got if np.allclose(got[path], adam[path], atol=1e-6)}
    assert same == {path for path in got if not path.endswith("kernel")}


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 8, 12), (2, 8, 32)])
def test_orthogonalise_keeps_singular_spaces_and_brings_values_near_one(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = np.asarray(jax.jit(optimizer.orthogonalise)(x), np.float64)
    for before, after in zip(x.astype(np.float64), y):
        u, s, vh = np.linalg.svd(before, full_matrices=False)
        inner = u.T @ after @ vh.T
        np.testing.assert_allclose(inner, np.diag(np.diag(inner)), atol=1e-4)
        assert np.all(np.diag(inner)[s > 0.02 * np.linalg.norm(s)] > 0.5)
        assert np.all(np.diag(inner) < 1.3)


@pytest.mark.parametrize("condition", [1e1, 1e3, 1e6])
def test_short_and_long_newton_schulz_agree(condition):
    rng = np.random.default_rng(0)
    u, v = (np.linalg.qr(rng.normal(size=(n, 16)))[0] for n in (16, 64))
    x = (u * np.geomspace(1, 1 / condition, 16)) @ v.T
    x = jnp.asarray(x / np.linalg.norm(x), jnp.float32)[None]
    got, want = muon._gram(x), muon._newton_schulz(x)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_orthogonalise_keeps_a_zero_matrix_and_its_neighbours():
    x = jnp.zeros((2, 4, 4)).at[1].set(jnp.eye(4))
    y = optimizer.orthogonalise(x)
    assert not y[0].any()
    assert np.all(np.abs(np.diag(y[1]) - 1) < 0.3)


def test_muon_gives_the_same_with_matrices_too_large_to_stack(monkeypatch):
    together, _, _ = run(make("muon"), tree(0))
    monkeypatch.setattr(muon, "STACK_LIMIT", 0)
    close(run(make("muon"), tree(0))[0], together)


def test_muon_hands_its_stacks_to_spread():
    seen = []

    def spread(x_NRC):
        seen.append(x_NRC.shape)
        return x_NRC

    run(make("muon", spread=spread), tree(0), 1)
    assert sorted(seen) == [(4, 8, 8), (4, 8, 16)]


# ---- layouts, batches of numbers, precision ----


@pytest.mark.parametrize("name", few(NAMES, "muon"))
def test_stacked_layers_move_as_separate_ones_do(name):
    got, _, _ = run(make(name), stacked(tree(0)), lr=0.1)
    want, _, _ = run(make(name), tree(0), lr=0.1)
    close(got, stacked(want), atol=2e-5)


def test_adafactor_keeps_row_and_column_means_per_layer():
    rng = np.random.default_rng(0)
    w, g = (jnp.asarray(rng.normal(size=(3, 128, 128)), jnp.float32) for _ in range(2))
    tx = make("adafactor")
    params, grads = {"blocks": {"kernel": w}}, {"blocks": {"kernel": g}}
    got, _, _ = tx.update(grads, tx.init(params), params, 0, hyper())
    for i in range(3):
        one = {"block_0": {"kernel": w[i]}}
        want, _, _ = tx.update(
            {"block_0": {"kernel": g[i]}}, tx.init(one), one, 0, hyper()
        )
        close(got["blocks"]["kernel"][i], want["block_0"]["kernel"])


@pytest.mark.parametrize("name", few(NAMES, "muon"))
def test_members_of_a_batch_of_numbers_equal_single_runs(name):
    """Every number that an optimizer reads differs between the three members."""
    rng = np.random.default_rng(3)
    fields = {k: v * rng.uniform(0.5, 1.0, 3) for k, v in PLAIN.items()}
    fields |= {"warmup_steps": [0.0, 2.0, 4.0], "clip": [0.0, 0.5, 100.0]}
    fields |= {"decay_steps": [3.0, 5.0, 9.0], "lr": [0.1, 0.2, 0.3]}
    members = Hyper(**{k: jnp.asarray(v, jnp.float32) for k, v in fields.items()})
    tx = make(name, schedule="wsd")

    def train(numbers):
        params, info = tree(0, layers=1), {}
        state = tx.init(params)
        for step in range(3):
            grads = tree(100 + step, layers=1)
            params, state, info = tx.update(grads, state, params, step, numbers)
        return params, info

    together = jax.jit(jax.vmap(train))(members)
    single = jax.jit(train)
    for i in range(3):
        alone = single(jax.tree.map(lambda x, i=i: x[i], members))
        close(jax.tree.map(lambda x, i=i: x[i], together), alone, atol=2e-5)


@pytest.mark.parametrize("name", NAMES)
def test_new_numbers_do_not_compile_again(name):
    tx, params, traces = make(name, schedule="cosine"), tree(0, layers=1), []

    @jax.jit
    def update(params, state, step, numbers):
        traces.append(1)
        return tx.update(params, state, params, step, numbers)

    state = tx.init(params)
    for step in range(3):
        numbers = Hyper(*(jnp.float32(x * (1 + step)) for x in hyper()))
        params, state, _ = update(params, state, jnp.int32(step), numbers)
    assert len(traces) == 1


@pytest.mark.parametrize("name", NAMES)
def test_memory_is_float32_and_weights_keep_their_type(name):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), tree(0))
    tx = make(name)
    state = tx.init(params)
    new, state, _ = tx.update(params, state, params, 0, hyper())
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype("bfloat16")}
    kinds = {x.dtype for x in jax.tree.leaves(state)}
    assert kinds <= {jnp.dtype("float32"), jnp.dtype("int32")}


@pytest.mark.parametrize("name", NAMES)
def test_trees_keep_their_structure(name):
    params = {**tree(0), "empty": {}}
    tx = make(name)
    state = tx.init(params)
    new, after, _ = tx.update(tree(1), state, params, 0, hyper())
    assert jax.tree.structure(new) == jax.tree.structure(params)
    assert jax.tree.structure(after) == jax.tree.structure(state)


# ---- clipping ----


def test_clipping_shrinks_the_whole_gradient_to_the_limit():
    params, grads = tree(0), tree(1)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    tx = make("sgd", decay=((".*", False),))
    for clip, share in [(0.0, 1.0), (0.5, 0.5 / norm), (norm * 2, 1.0)]:
        new, _, info = tx.update(
            grads, tx.init(params), params, 0, hyper(clip=clip, lr=1.0)
        )
        moved = jax.tree.map(jnp.subtract, params, new)
        close(moved, jax.tree.map(functools.partial(jnp.multiply, share), grads))
        np.testing.assert_allclose(info["grad_norm"], norm, rtol=1e-5)


def test_clipping_leaves_a_zero_gradient_zero():
    params = tree(0)
    tx = make("sgd", decay=((".*", False),))
    zeros = jax.tree.map(jnp.zeros_like, params)
    with jax.debug_nans(True):
        for clip in (0.0, 1.0):
            new, _, info = tx.update(
                zeros, tx.init(params), params, 0, hyper(clip=clip)
            )
            close(new, params, atol=0, rtol=0)
            assert info["grad_norm"] == 0


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_gradient_that_is_not_finite_shows_in_the_norm(bad):
    params, grads = tree(0), tree(1)
    grads["embed"]["embedding"] = grads["embed"]["embedding"].at[0, 0].set(bad)
    tx = make("adamw")
    _, _, info = tx.update(grads, tx.init(params), params, 0, hyper(clip=1.0))
    assert not np.isfinite(info["grad_norm"])


def test_info_holds_the_rate_of_this_step():
    _, _, info = run(make(), tree(0), 3, lr=0.4, warmup_steps=8.0)
    np.testing.assert_allclose(info["lr"], 0.4 * 2 / 8)


# ---- tables ----


def test_first_decay_rule_that_matches_wins():
    zeros = jax.tree.map(jnp.zeros_like, tree(0))
    params = tree(0)
    tx = make("sgd", decay=((r"scale$", False), (r"embed", 0.5), (r".*", True)))
    numbers = hyper(lr=0.1, weight_decay=0.2)
    new, _, _ = tx.update(zeros, tx.init(params), params, 0, numbers)
    shrunk = jax.tree.map(lambda a, b: float((a / b).mean()), new, params)
    assert shrunk["embed"]["embedding"] == pytest.approx(1 - 0.1 * 0.2 * 0.5)
    assert shrunk["block_0"]["norm1"]["scale"] == 1
    assert shrunk["block_0"]["attn"]["out"]["bias"] == pytest.approx(1 - 0.1 * 0.2)


def test_a_group_moves_at_its_own_rate():
    def moved(**tables):
        tx, params = make("sgd", **tables), tree(0)
        new, _, _ = tx.update(tree(1), tx.init(params), params, 0, hyper())
        return jax.tree.map(jnp.subtract, new, params)

    plain = moved()
    got = moved(rates=((r"block_0", 0.5), (r"kernel", 3.0)))
    want = dict(plain, block_0=jax.tree.map(lambda x: 0.5 * x, plain["block_0"]))
    for names in (("attn", "query"), ("attn", "out"), ("mlp", "up"), ("mlp", "down")):
        a, b = want["block_1"], got["block_1"]
        for name in (*names, "kernel"):
            a, b = a[name], b[name]
        close(b, 3.0 * a)
    close(got["block_0"], want["block_0"])
    close(got["embed"], want["embed"])


@pytest.mark.parametrize("name", NAMES)
def test_frozen_weights_do_not_move_and_take_no_memory(name):
    tx = make(name, freeze=(r"^block_0/", r"embedding$"))
    params = tree(0)
    new, state, info = run(tx, params)
    for part in ("block_0", "embed"):
        jax.tree.map(np.testing.assert_array_equal, new[part], params[part])
    changed = jax.tree.map(
        lambda a, b: bool((a != b).any()), new["block_1"], params["block_1"]
    )
    assert all(jax.tree.leaves(changed))
    paths = by_path(state)
    assert not [path for path in paths if "block_0" in path or "embedding" in path]
    norm = optax.tree.norm(tree(102)["block_1"])
    np.testing.assert_allclose(info["grad_norm"], norm, rtol=1e-5)


def test_frozen_weights_stay_when_their_gradient_is_not_finite():
    params, grads = tree(0), tree(1)
    grads["embed"]["embedding"] *= jnp.nan
    tx = make(freeze=("embed",))
    new, _, info = tx.update(grads, tx.init(params), params, 0, hyper(clip=1.0))
    np.testing.assert_array_equal(
        new["embed"]["embedding"], params["embed"]["embedding"]
    )
    assert np.isfinite(info["grad_norm"])


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"name": "adam"}, "optimizer.name 'adam' is not one of: adamw"),
        ({"schedule": "step"}, "optimizer.schedule 'step' is not one of: constant"),
    ],
)
def test_unknown_names_are_refused_with_the_choices(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"decay": (("kernel", True),)}, "matches the weight block_0/attn/out/bias"),
        ({"freeze": ("head",)}, "freeze has the pattern 'head', which matches none"),
        ({"rates": (("blokc", 2.0),)}, "rates has the pattern 'blokc'"),
        ({"freeze": (".*",)}, "nothing would train"),
        ({"name": "muon", "muon": ("h_0",)}, "muon has the pattern 'h_0'"),
        (
            {"name": "muon", "muon": (".*",)},
            r"picks block_0/attn/out/bias of shape \(8,\)",
        ),
        ({"name": "muon", "muon": ("embed",)}, "picks embed/embedding of shape"),
    ],
)
def test_tables_that_do_not_fit_the_weights_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        make(**changes).init(tree(0))


# ---- the moving average ----


def test_the_average_of_constant_weights_is_the_weights():
    close(optimizer.ema_update(tree(0), tree(0), 0.9, 5), tree(0))


def test_the_average_follows_its_formula():
    ema, params = {"w": jnp.float32(1.0)}, {"w": jnp.float32(3.0)}
    early = optimizer.ema_update(ema, params, 0.99, 0)
    late = optimizer.ema_update(ema, params, 0.99, 10_000)
    np.testing.assert_allclose(early["w"], 0.1 * 1 + 0.9 * 3, rtol=1e-6)
    np.testing.assert_allclose(late["w"], 0.99 * 1 + 0.01 * 3, rtol=1e-6)


@pytest.mark.parametrize(
    "name, bytes_each", [("adamw", 6), ("lion", 2), ("sgd", 2), ("muon", 2)]
)
def test_moments_in_bfloat16_take_half_the_memory_and_move_weights_alike(
    name, bytes_each
):
    params = tree(0)
    whole, half = (make(name, moment_dtype=d) for d in ("float32", "bfloat16"))
    numbers = sum(x.size for x in jax.tree.leaves(params) if x.ndim == 3)
    ends = [run(tx, params, 5) for tx in (whole, half)]
    for state in (half.init(params), ends[1][1]):
        matrices = [x for x in jax.tree.leaves(state) if x.ndim == 3]
        assert sum(x.nbytes for x in matrices) == bytes_each * numbers
    moved = [params for params, _, _ in ends]
    steps = [jax.tree.map(jnp.subtract, end, params) for end in moved]
    gap = optax.tree.norm(jax.tree.map(jnp.subtract, *steps))
    assert 0 < gap < 0.05 * optax.tree.norm(steps[0])


def test_a_moment_dtype_that_is_none_is_refused():
    with pytest.raises(ValueError, match="moment_dtype 'int8' is not one of: float32"):
        make(moment_dtype="int8")
