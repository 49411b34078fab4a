from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.losses import classification, next_token, next_token_in_chunks

V = 7


@pytest.fixture
def case():
    rng = np.random.default_rng(0)
    return (
        rng.normal(size=(2, 5, V)).astype(np.float32) * 3,
        rng.integers(0, V, (2, 5)),
        np.array([[1, 1, 0, 2, 1], [0, 0, 0, 0.5, 1]], np.float32),
    )


def by_hand(logits, target, mask, *, smoothing, z):
    """One position at a time, in float64, from probabilities."""
    loss = nll = 0.0
    for row, right, weight in zip(logits.reshape(-1, V), target.ravel(), mask.ravel()):
        e = np.exp(row.astype(np.float64))
        p = e / e.sum()
        wanted = np.full(V, smoothing / V)
        wanted[right] += 1 - smoothing
        loss += weight * (-(wanted * np.log(p)).sum() + z * np.log(e.sum()) ** 2)
        nll += weight * -np.log(p[right])
    return {"loss": loss, "nll": nll, "weight": mask.sum()}


@pytest.mark.parametrize("smoothing, z", [(0, 0), (0.1, 0), (0, 1e-2), (0.3, 0.5)])
def test_sums_are_those_written_out_by_hand(case, smoothing, z):
    got = next_token(*case, label_smoothing=smoothing, z_loss=z)
    want = by_hand(*case, smoothing=smoothing, z=z)
    assert set(got) == set(want)
    for name in want:
        assert got[name].dtype == jnp.float32
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5)


def test_equal_logits_cost_the_log_of_the_vocabulary():
    got = next_token(
        jnp.full((1, 3, V), 4.0),
        jnp.zeros((1, 3), int),
        jnp.ones((1, 3)),
        label_smoothing=0.2,
        z_loss=0.0,
    )
    np.testing.assert_allclose(got["loss"] / got["weight"], np.log(V), rtol=1e-6)


def test_gradient_is_the_mask_times_probability_minus_target(case):
    logits, target, mask = case
    grad = jax.grad(
        lambda x: next_token(x, target, mask, label_smoothing=0.1, z_loss=0.0)["loss"]
    )(logits)
    e = np.exp(logits.astype(np.float64))
    wanted = 0.9 * np.eye(V)[target] + 0.1 / V
    want = mask[..., None] * (e / e.sum(-1, keepdims=True) - wanted)
    np.testing.assert_allclose(grad, want, atol=1e-5)


def test_gradient_agrees_with_finite_differences(case):
    logits, target, mask = case

    def total(x):
        return by_hand(x, target, mask, smoothing=0.2, z=0.3)["loss"]

    grad = jax.grad(
        lambda x: next_token(x, target, mask, label_smoothing=0.2, z_loss=0.3)["loss"]
    )(logits)
    direction = np.random.default_rng(1).normal(size=logits.shape)
    x, h = logits.astype(np.float64), 1e-6
    slope = (total(x + h * direction) - total(x - h * direction)) / (2 * h)
    np.testing.assert_allclose((grad * direction).sum(), slope, rtol=1e-4)


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf, 3e38])
def test_masked_positions_add_nothing_whatever_they_hold(case, poison):
    logits, target, mask = case
    bad, wrong = logits.copy(), target.copy()
    bad[mask == 0], wrong[mask == 0] = poison, -100

    def run(logits, target):
        return jax.value_and_grad(
            lambda x: next_token(x, target, mask, label_smoothing=0.1, z_loss=0.1)[
                "loss"
            ]
        )(logits)

    (loss, grad), (clean_loss, clean_grad) = run(bad, wrong), run(logits, target)
    assert loss == clean_loss
    np.testing.assert_array_equal(grad, clean_grad)
    assert not grad[mask == 0].any()


def test_parts_of_uneven_weight_add_up_to_the_whole(case):
    def sums(rows):
        return next_token(*(x[rows] for x in case), label_smoothing=0.1, z_loss=0.1)

    whole, a, b = sums(slice(None)), sums(slice(0, 1)), sums(slice(1, 2))
    assert a["weight"] != b["weight"]
    for name in whole:
        np.testing.assert_allclose(a[name] + b[name], whole[name], rtol=1e-6)


def test_nothing_to_learn_is_zero_and_not_nan(case):
    logits, target, mask = case
    got = next_token(logits, target, mask * 0, label_smoothing=0.1, z_loss=0.1)
    assert {k: float(v) for k, v in got.items()} == {"loss": 0, "nll": 0, "weight": 0}


def test_half_precision_logits_are_summed_in_float32():
    # 4099 is no bfloat16: a sum in that type would end at 4096.
    logits = jnp.zeros((1, 4099, V), jnp.bfloat16)
    got = next_token(
        logits,
        jnp.zeros((1, 4099), int),
        jnp.ones((1, 4099), jnp.bfloat16),
        label_smoothing=0.0,
        z_loss=0.0,
    )
    assert float(got["weight"]) == 4099
    np.testing.assert_allclose(got["loss"], 4099 * np.log(V), rtol=1e-5)


def test_huge_logits_stay_finite():
    logits = jnp.array([[[1e4, -1e4, 0.0]]])
    got = next_token(
        logits, jnp.array([[1]]), jnp.ones((1, 1)), label_smoothing=0.0, z_loss=0.0
    )
    assert got["nll"] == 2e4


def test_smoothing_and_z_weight_are_traced(case):
    traces = []

    @jax.jit
    def run(smoothing, z):
        traces.append(1)
        return next_token(*case, label_smoothing=smoothing, z_loss=z)["loss"]

    got = [run(s, z) for s, z in [(0.0, 0.0), (0.1, 0.2)]]
    assert len(traces) == 1
    members = jax.vmap(run)(jnp.array([0.0, 0.1]), jnp.array([0.0, 0.2]))
    np.testing.assert_allclose(members, got, rtol=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
def test_chunks_have_the_sums_and_gradients_of_the_whole(case, chunk):
    _, target, mask = case
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, V)).astype(np.float32)
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01}

    def whole(x, kernel):
        sums = next_token(x @ kernel, target, mask, **numbers)
        return sums["loss"], sums

    def chunks(x, kernel):
        sums = next_token_in_chunks(
            lambda x: x @ kernel, x, target, mask, chunk=chunk, **numbers
        )
        return sums["loss"], sums

    wanted, sums = jax.grad(whole, argnums=(0, 1), has_aux=True)(x, kernel)
    got, parts = jax.grad(chunks, argnums=(0, 1), has_aux=True)(x, kernel)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, (got, parts), (wanted, sums))


def test_classes_are_scored_by_hand():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [np.nan, 0.0]])
    label, mask = np.array([0, 0, 1, 0]), np.array([1.0, 2.0, 1.0, 0.0])
    got = classification(logits, label, mask, label_smoothing=0.0, z_loss=0.0)
    losses = [np.log1p(np.exp(-2)), 2 * np.log1p(np.exp(1)), np.log1p(np.exp(3))]
    assert got["loss"] == pytest.approx(sum(losses), rel=1e-6)
    assert got["accuracy"] == 1.0  # the first row alone is right
    assert got["weight"] == 4.0
