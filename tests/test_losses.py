from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax.losses import (
    PREFERENCES,
    Head,
    classification,
    cross_entropy,
    next_token,
    preference,
    scores,
    scores_in_chunks,
    sequence_logp,
)

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


@pytest.mark.fault(18)
@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 5, 100])
@pytest.mark.parametrize("turned, softcap", [(True, 0.0), (False, 2.0)])
def test_chunks_have_the_sums_and_gradients_of_the_whole(case, chunk, turned, softcap):
    """With two columns that only pad, and with a bias where the head has one."""
    _, target, mask = case
    rng = np.random.default_rng(1)
    x = rng.normal(size=(2, 5, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, V + 2)).astype(np.float32)
    bias = rng.normal(size=V + 2).astype(np.float32)
    numbers = {"label_smoothing": 0.1, "z_loss": 0.01}
    if turned:
        bias = 0 * bias

    def whole(x, kernel, bias):
        logits = (x @ kernel + bias[None, None])[..., :V]
        capped = softcap * jnp.tanh(logits / softcap) if softcap else logits
        sums = next_token(capped, target, mask, **numbers)
        return sums["loss"], sums

    def chunks(x, kernel, bias):
        matrix, bias = (kernel.T, None) if turned else (kernel, bias)
        head = Head(matrix, bias, turned, V, softcap)
        found = scores_in_chunks(head, x, target, mask, chunk)
        sums = cross_entropy(found, mask, **numbers)
        return sums["loss"], sums

    which = (0, 1) if turned else (0, 1, 2)
    wanted, sums = jax.grad(whole, argnums=which, has_aux=True)(x, kernel, bias)
    got, parts = jax.grad(chunks, argnums=which, has_aux=True)(x, kernel, bias)
    same = partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
    jax.tree.map(same, (got, parts), (wanted, sums))


def test_a_chunked_position_under_mask_0_may_hold_anything(case):
    _, target, mask = case
    x = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    kernel = jnp.ones((3, V))
    huge = np.where(mask[..., None] > 0, x, 1e30)

    def loss(x):
        head = Head(kernel, None, False, V, 0.0)
        found = scores_in_chunks(head, x, target, mask, 2)
        return cross_entropy(found, mask, 0.0, 0.0)["loss"]

    np.testing.assert_allclose(loss(huge), loss(x), rtol=1e-6)
    slope = jax.grad(loss)(huge)
    assert np.isfinite(slope).all() and not slope[mask == 0].any()


def test_classes_are_scored_by_hand():
    logits = np.array([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0], [np.nan, 0.0]])
    label, mask = np.array([0, 0, 1, 0]), np.array([1.0, 2.0, 1.0, 0.0])
    arrays = map(jnp.asarray, (logits, label, mask))
    got = classification(*arrays, label_smoothing=0.0, z_loss=0.0)
    losses = [np.log1p(np.exp(-2)), 2 * np.log1p(np.exp(1)), np.log1p(np.exp(3))]
    assert got["loss"] == pytest.approx(sum(losses), rel=1e-6)
    assert got["accuracy"] == 1.0  # the first row alone is right
    assert got["weight"] == 4.0


def test_the_log_probability_of_a_row_is_the_sum_over_its_targets(case):
    """Oracle: `by_hand`, a row at a time. Nan under mask 0 has no say."""
    logits, target, mask = case
    mask = (mask > 0).astype(np.float32)
    wanted = [
        -by_hand(*(x[i : i + 1] for x in (logits, target, mask)), smoothing=0, z=0)[
            "nll"
        ]
        for i in range(2)
    ]
    logits[mask == 0] = np.nan
    got = sequence_logp(scores(logits, target, mask), mask)
    np.testing.assert_allclose(got, wanted, rtol=1e-5)
    nothing = sequence_logp(scores(logits, target, 0 * mask), 0 * mask)
    np.testing.assert_array_equal(nothing, [0, 0])


@pytest.fixture
def pairs():
    """Log-probabilities of 5 pairs of answers under two models; their lengths."""
    rng = np.random.default_rng(3)
    length = rng.integers(2, 9, (5, 2)).astype(np.float32)
    policy, reference = (-length * rng.uniform(0.2, 2.0, (5, 2)) for _ in range(2))
    return policy.astype(np.float32), reference.astype(np.float32), length


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def test_dpo_is_minus_log_sigmoid_of_the_scaled_log_ratios(pairs):
    """Oracle: equation 7 of Rafailov et al. 2023, in float64."""
    policy, reference = (np.asarray(x, np.float64) for x in pairs[:2])
    chosen, rejected = (0.3 * (policy - reference)).T
    options = {"variant": "dpo", "logp": "sum", "beta": 0.3}
    got = preference(*pairs, **options, label_smoothing=0.0)
    wanted = {
        "loss": -np.log(sigmoid(chosen - rejected)).sum(),
        "weight": 5,
        "chosen_reward": chosen.sum(),
        "rejected_reward": rejected.sum(),
        "margin": (chosen - rejected).sum(),
        "accuracy": (chosen > rejected).sum(),
    }
    assert got.keys() == wanted.keys()
    for name, value in wanted.items():
        assert float(got[name]) == pytest.approx(value, rel=1e-5), name
    noisy = preference(*pairs, **options, label_smoothing=0.25)
    other_way = -np.log(sigmoid(rejected - chosen)).sum()
    wanted_loss = 0.75 * wanted["loss"] + 0.25 * other_way
    assert float(noisy["loss"]) == pytest.approx(wanted_loss, rel=1e-5)


def test_means_divide_every_log_probability_by_its_length(pairs):
    policy, reference, length = pairs
    options = {"variant": "dpo", "beta": 0.3, "label_smoothing": 0.0}
    got = preference(*pairs, logp="mean", **options)
    means = (policy / length, reference / length, length)
    wanted = preference(*means, logp="sum", **options)
    jax.tree.map(partial(np.testing.assert_allclose, rtol=1e-5), got, wanted)


def test_ipo_pulls_the_log_ratio_to_half_the_inverse_of_beta(pairs):
    """Oracle: equation 17 of Azar et al. 2024."""
    policy, reference, length = (np.asarray(x, np.float64) for x in pairs)
    ratio = (policy - reference) / length
    wanted = ((ratio[:, 0] - ratio[:, 1] - 1 / 0.6) ** 2).sum()
    options = {"variant": "ipo", "logp": "mean", "beta": 0.3}
    got = preference(*pairs, **options, label_smoothing=0.0)
    assert float(got["loss"]) == pytest.approx(wanted, rel=1e-5)


def test_orpo_adds_the_odds_ratio_to_the_likelihood_of_the_chosen(pairs):
    """Oracle: equations 3 to 7 of Hong et al. 2024, from probabilities."""
    policy, _, length = (np.asarray(x, np.float64) for x in pairs)
    p = np.exp(policy / length)
    odds = p / (1 - p)
    ratio = np.log(odds[:, 0] / odds[:, 1])
    wanted = (-np.log(p[:, 0]) - 0.3 * np.log(sigmoid(ratio))).sum()
    options = {"variant": "orpo", "logp": "mean", "beta": 0.3}
    got = preference(pairs[0], None, pairs[2], **options, label_smoothing=0.0)
    assert float(got["loss"]) == pytest.approx(wanted, rel=1e-5)


@pytest.mark.parametrize("variant", PREFERENCES)
def test_a_pair_without_an_answer_counts_for_nothing(pairs, variant):
    """Filling of a short batch has length 0 and log-probability 0."""
    options = {"variant": variant, "logp": "mean", "beta": 0.1, "label_smoothing": 0.0}

    def loss(policy, reference, length):
        sums = preference(policy, reference, length, **options)
        return sums["loss"], sums

    gradient = jax.grad(loss, has_aux=True)
    if variant == "orpo":
        pairs = (pairs[0], 0 * pairs[1], pairs[2])  # it has no reference
    filled = [np.concatenate([x, np.zeros((2, 2), np.float32)]) for x in pairs]
    slope, sums = gradient(*pairs)
    filled_slope, filled_sums = gradient(*filled)
    jax.tree.map(np.testing.assert_array_equal, filled_sums, sums)
    np.testing.assert_array_equal(filled_slope[:5], slope)
    np.testing.assert_array_equal(filled_slope[5:], 0)
    # The gradient asks for more of the chosen and less of the rejected answer.
    assert (np.asarray(slope) * [1, -1] < 0).all()


def test_a_policy_that_is_its_reference_has_the_loss_log_2(pairs):
    policy, _, length = pairs
    options = {"variant": "dpo", "logp": "sum", "beta": 0.1, "label_smoothing": 0.0}
    sums = preference(policy, policy, length, **options)
    assert float(sums["loss"] / sums["weight"]) == pytest.approx(np.log(2), abs=1e-6)
    assert float(sums["margin"]) == 0.0  # neither is preferred: each pair counts half
    assert float(sums["accuracy"]) == len(policy) / 2
