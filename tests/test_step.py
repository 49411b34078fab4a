"""The train step: what one update does, whatever the batch, the numbers, the vmap."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import adapters, model, optimizer, step
from gpt_jax.tasks import lm
from gpt_jax.tasks.task import DROPOUTS
from tests import tiny
from tests.cases import few

CFG = tiny.cfg(n_layers=1)
GPT = model.GPT(CFG)
KEY = jax.random.key(3)


def make_hyper(**changes):
    numbers = {**common.base().hyper, "decay_steps": 10.0, **changes}
    return optimizer.Hyper(**{k: jnp.float32(v) for k, v in numbers.items()})


def make_step(*, name="adamw", dropout=(), loss=None):
    options = common.base().optimizer.to_dict()
    ema = options.pop("ema")
    assert not ema
    tx = optimizer.make(model.declared(CFG), **{**options, "name": name})
    loss = loss or lm.make_loss(
        GPT, np.ones(CFG.vocab_size), loss_chunk=0, dropout=dropout
    )
    function = partial(
        step.train_step,
        loss=loss,
        join=adapters.full({}).join,
        tx=tx,
        reduce=lambda tree: tree,
    )
    return function, tx


def make_batch(a, b, seed=0, masked=True):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, CFG.vocab_size, (a * b, 9), dtype=np.int32)
    mask = rng.integers(0, 2, (a * b, 8)) if masked else np.ones((a * b, 8))
    batch = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:], "mask": mask * 1.0}
    return {
        k: jnp.asarray(v.reshape(a, b, 8), v.dtype if k != "mask" else jnp.float32)
        for k, v in batch.items()
    }


def begin(tx, ema=False, window=0):
    weights = model.init(CFG, KEY)
    return step.start(weights, {}, tx, ema=ema, spike_window=window)


@pytest.fixture(scope="module")
def plain():
    function, tx = make_step()
    return jax.jit(function), tx


def assert_close(a, b, rtol=1e-5, atol=1e-6):
    jax.tree.map(partial(np.testing.assert_allclose, rtol=rtol, atol=atol), a, b)


def assert_equal(a, b):
    jax.tree.map(np.testing.assert_array_equal, a, b)


@pytest.mark.fault(18)
@pytest.mark.parametrize("a, b", few([(8, 1), (2, 4)], (2, 4)))
def test_micro_batches_with_uneven_masks_give_the_gradient_of_one_batch(a, b):
    """Plain SGD moves by the gradient, so equal params are equal gradients."""
    function, tx = make_step(name="sgd")
    fn, hyper = jax.jit(function), make_hyper(momentum=0.0, clip=0.0, warmup_steps=0)
    whole, sums, _ = fn(begin(tx), make_batch(1, 8), KEY, hyper)
    parts, part_sums, _ = fn(begin(tx), make_batch(a, b), KEY, hyper)
    assert_close(whole.params, parts.params)
    assert_close(sums, part_sums)
    assert float(sums["weight"]) == float(make_batch(1, 8)["mask"].sum())


def test_the_update_follows_the_weighted_mean_of_the_loss():
    """Oracle: the gradient of the mean loss over unmasked targets, by jax.grad."""
    function, tx = make_step(name="sgd")
    batch = make_batch(1, 4)
    hyper = make_hyper(momentum=0.0, clip=0.0, warmup_steps=0, weight_decay=0.0, lr=0.5)
    state = begin(tx)

    def mean_loss(params):
        logits, _ = GPT.apply({"params": params}, batch["tokens"][0])
        logp = jax.nn.log_softmax(logits)
        nll = -jnp.take_along_axis(logp, batch["targets"][0][..., None], -1)[..., 0]
        return (nll * batch["mask"][0]).sum() / batch["mask"].sum()

    grads = jax.grad(mean_loss)(state.params)
    wanted = jax.tree.map(lambda p, g: p - 0.5 * g, state.params, grads)
    after, _, info = jax.jit(function)(state, batch, KEY, hyper)
    assert_close(after.params, wanted)
    norm = np.sqrt(sum(float((g**2).sum()) for g in jax.tree.leaves(grads)))
    assert float(info["grad_norm"]) == pytest.approx(norm, rel=1e-5)


def test_a_batch_without_any_target_changes_no_finite_number_to_nan(plain):
    fn, tx = plain
    batch = make_batch(1, 4)
    batch["mask"] = jnp.zeros_like(batch["mask"])
    after, sums, _ = fn(begin(tx), batch, KEY, make_hyper())
    assert all(bool(jnp.isfinite(x).all()) for x in jax.tree.leaves(after))
    assert float(sums["loss"]) == 0.0


@pytest.mark.fault(14)
@pytest.mark.parametrize("value", [np.nan, np.inf, 3e38])
def test_a_non_finite_update_is_skipped_and_counted(plain, value):
    fn, tx = plain
    hyper = make_hyper()
    good, _, _ = fn(begin(tx), make_batch(1, 4), KEY, hyper)
    poisoned = make_batch(1, 4, seed=1)
    poisoned["mask"] = poisoned["mask"].at[0, 0, 0].set(value)
    after, _, info = fn(good, poisoned, KEY, hyper)
    assert_equal(after.params, good.params)
    assert_equal(after.opt_state, good.opt_state)
    assert int(after.step) == 2  # the step and the data go on
    assert (int(info["skipped_in_a_row"]), int(info["skipped"])) == (1, 1)
    third, _, info = fn(after, make_batch(1, 4, seed=2), KEY, hyper)
    assert (int(info["skipped_in_a_row"]), int(info["skipped"])) == (0, 1)
    assert not np.array_equal(
        third.params["embed"]["embedding"], after.params["embed"]["embedding"]
    )


@pytest.mark.fault(14)
def test_an_update_that_makes_weights_nan_is_skipped_though_the_gradient_is_finite(
    plain,
):
    fn, tx = plain
    before = begin(tx)
    hyper = make_hyper(eps=0.0, warmup_steps=0.0, weight_decay=0.0)  # Adam's 0 / 0
    after, _, info = fn(before, make_batch(1, 1), KEY, hyper)
    assert np.isfinite(float(info["grad_norm"])) and int(info["skipped"]) == 1
    assert_equal(after.params, before.params)


@pytest.mark.fault(14)
def test_the_moving_average_follows_the_weights_and_skips_with_them():
    function, tx = make_step()
    fn, hyper = jax.jit(function), make_hyper(ema_decay=0.9, warmup_steps=0)
    before = begin(tx, ema=True)
    after, _, _ = fn(before, make_batch(1, 4), KEY, hyper)
    old, new, average = (
        np.asarray(x["embed"]["embedding"])
        for x in (before.params, after.params, after.ema)
    )
    assert not np.allclose(old, new)
    assert (average >= np.minimum(old, new) - 1e-7).all()
    assert (average <= np.maximum(old, new) + 1e-7).all()
    assert not np.allclose(average, old, atol=1e-9)
    poisoned = make_batch(1, 4, seed=1)
    poisoned["mask"] = poisoned["mask"].at[0, 0, 0].set(np.nan)
    skipped, _, _ = fn(after, poisoned, KEY, hyper)
    assert_equal(skipped.ema, after.ema)


@pytest.mark.fault(16, injections=2)
def test_a_spike_is_skipped_once_there_are_losses_to_compare_it_with():
    """Oracle: mean and standard deviation by numpy."""
    plain_loss = lm.make_loss(GPT, np.ones(CFG.vocab_size), loss_chunk=0, dropout=())

    def loss(weights, frozen, batch, key, hyper):
        sums = plain_loss(weights, frozen, batch, key, hyper)
        return {**sums, "loss": sums["loss"] * batch["scale"][0]}

    function, tx = make_step(loss=loss)
    fn, hyper = jax.jit(function), make_hyper(warmup_steps=0, spike_sigma=6.0)

    def go(state, seed, scale):
        batch = make_batch(1, 4, seed) | {"scale": jnp.full((1, 4), scale)}
        state, sums, info = fn(state, batch, KEY, hyper)
        return state, float(sums["loss"] / sums["weight"]), bool(info["spike"])

    state, seen = begin(tx, window=4), []
    for seed in range(4):  # the first ones may be as high as they like
        state, mean, spike = go(state, seed, 1e3 if seed == 0 else 1.0)
        seen.append(mean)
        assert not spike
    state, mean, spike = go(state, 4, 1.0)
    seen = [*seen[1:], mean]
    assert not spike
    np.testing.assert_allclose(state.guard.losses, seen, rtol=1e-6)
    for scale in (1e3, 2.0):
        after, mean, spike = go(state, 5, scale)
        assert spike and mean > np.mean(seen) + 6 * np.std(seen)
        assert_equal(after.params, state.params)
        assert_equal(after.opt_state, state.opt_state)
        assert_equal(after.guard.losses, state.guard.losses)
        assert (int(after.step), int(after.guard.total)) == (6, 1)
    after, mean, spike = go(after, 5, 1.0)
    assert not spike and int(after.guard.in_a_row) == 0
    assert float(after.guard.losses[-1]) == pytest.approx(mean)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_members_of_a_vmap_over_hyper_equal_single_runs(name):
    """Every number that a population varies is traced: no recompilation, no branch."""
    function, tx = make_step(name=name, dropout=DROPOUTS)
    single, many = jax.jit(function), jax.jit(jax.vmap(function, (0, None, None, 0)))
    varied = [
        {"lr": 1e-3, "matrix_lr": 0.01, "dropout_attn": 0.0, "clip": 0.0},
        {"lr": 1e-2, "weight_decay": 0.5, "warmup_steps": 0.0, "dropout_embed": 0.3},
        {"lr": 1e-2, "warmup_steps": 3.0, "dropout_residual": 0.2, "z_loss": 1e-3},
    ]
    hypers = [make_hyper(**changes) for changes in varied]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *hypers)
    states = jax.tree.map(lambda x: jnp.stack([x] * 3), begin(tx))
    for seed in range(3):
        states, sums, _ = many(states, make_batch(2, 2, seed), KEY, stacked)
    for i, hyper in enumerate(hypers):
        state = begin(tx)
        for seed in range(3):
            state, single_sums, _ = single(state, make_batch(2, 2, seed), KEY, hyper)
        member = jax.tree.map(lambda x, i=i: x[i], states)
        assert_close(member.params, state.params, rtol=1e-4, atol=2e-5)
        assert float(sums["loss"][i]) == pytest.approx(
            float(single_sums["loss"]), rel=1e-4
        )


def test_dropout_masks_differ_between_steps_and_micro_batches():
    function, tx = make_step(dropout=DROPOUTS)
    fn = jax.jit(function)
    hyper = make_hyper(dropout_residual=0.5, lr=0.0, matrix_lr=0.0, weight_decay=0.0)
    state, batch = begin(tx), make_batch(1, 4, masked=False)
    state, first, _ = fn(state, batch, KEY, hyper)
    _, second, _ = fn(state, batch, KEY, hyper)
    assert float(first["loss"]) != float(second["loss"])
    twice = jax.tree.map(lambda x: jnp.concatenate([x, x]), batch)
    _, both, _ = fn(begin(tx), twice, KEY, hyper)
    assert float(both["loss"]) != pytest.approx(2 * float(first["loss"]), rel=1e-6)
