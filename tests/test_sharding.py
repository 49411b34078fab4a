"""Devices: every strategy and every number of devices trains the same run."""

from functools import cache, partial

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import adapters, model, optimizer, sharding, step
from gpt_jax.tasks import lm
from tests import test_step as one
from tests import tiny


def run(strategy, data, steps, state=None, first=0):
    """Trains `steps` steps on `data` devices; returns the losses and the state."""
    made = sharding.make(
        4, strategy=strategy, data=data, fsdp=1, tensor=1, cpu_devices=data
    )
    function, tx = one.make_step()

    def step(state, batch, key, hyper, *, reduce):
        return function(state, batch, key, hyper, reduce=reduce)

    compiled = made.compile(step)
    state = made.place(one.begin(tx) if state is None else state)
    losses = []
    for n in range(first, first + steps):
        batch = jax.tree.map(np.asarray, one.make_batch(2, 4, seed=n))
        state, sums, _ = compiled(state, made.put(batch), one.KEY, one.make_hyper())
        losses.append(float(sums["loss"]))
    return losses, made.view(state)


@pytest.fixture(scope="module")
def alone():
    return run("mesh", 1, 20)


@pytest.mark.parametrize("strategy, data", [("mesh", 2), ("pmap", 1), ("pmap", 2)])
def test_losses_equal_those_of_one_device_over_20_steps(alone, strategy, data):
    losses, state = run(strategy, data, 20)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    one.assert_close(state.params, alone[1].params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_a_state_from_two_devices_goes_on_on_one(alone, strategy):
    losses, state = run(strategy, 2, 10)
    on_host = jax.tree.map(np.asarray, state)
    rest, _ = run("mesh", 1, 10, state=on_host, first=10)
    np.testing.assert_allclose(losses + rest, alone[0], rtol=1e-5)


def test_place_copies_so_that_donation_keeps_the_original():
    made = sharding.make(4, strategy="mesh", data=1, fsdp=1, tensor=1, cpu_devices=1)
    original = jax.numpy.arange(4.0)
    placed = made.place({"norm": {"scale": original}})
    jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)(placed)
    np.testing.assert_array_equal(original, [0.0, 1.0, 2.0, 3.0])


def test_a_cpu_mesh_has_the_largest_divisor_of_the_micro_batch():
    wanted = {12: 6, 7: 7, 11: 1, 16: 8}  # of the 8 devices that the tests run on
    found = {}
    for batch in wanted:
        mesh = sharding.make_mesh(batch, data=-1, fsdp=1, tensor=1, cpu_devices=0)
        found[batch] = mesh.size
    assert found == wanted


@pytest.mark.parametrize(
    "axes, message",
    [
        ({"data": 99}, "asks for 99 devices but there are 8"),
        ({"data": 3}, "micro-batch of 4 examples does not divide over 3"),
        ({"data": 0}, "mesh.data is 0"),
        ({"data": 2, "fsdp": 2, "tensor": 4}, "asks for 16 devices but there are 8"),
        ({"fsdp": 3}, "micro-batch of 4 examples does not divide over 3"),
        ({"tensor": 0}, "mesh.tensor is 0"),
        ({"strategy": "pmap", "fsdp": 2}, "pmap splits examples alone"),
        ({"strategy": "mesch"}, "not one of: mesh, pmap"),
    ],
)
def test_axes_that_do_not_fit_are_refused_with_the_numbers(axes, message):
    options = {"strategy": "mesh", "data": 1, "fsdp": 1, "tensor": 1, "cpu_devices": 0}
    with pytest.raises(ValueError, match=message):
        sharding.make(4, **{**options, **axes})


# ---------------------------------------------------------------- split weights

BLOCKS = {
    "gpt2": {"tie_embeddings": True},
    "modern": {
        **{"position": "rope", "norm": "rmsnorm", "qk_norm": True, "gated": True},
        **{"qkv_bias": False, "attn_bias": False, "mlp_bias": False},
        **{"tie_embeddings": False, "embed_norm": True, "n_kv_heads": 2},
    },
}
ONE, EIGHT = (1, 1, 1), ((8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2))


@cache
def trained(block, axes, *, name="adamw", accumulate=1, steps=20, **fields):
    """Trains on a mesh of `axes`; returns (losses, each device's share of the state).

    The share is of the bytes of parameters and optimizer memory on the fullest device.
    """
    fields = {"d_model": 64, "n_heads": 8, "vocab_multiple": 8} | BLOCKS[block] | fields
    cfg = tiny.cfg(**fields)
    data, fsdp, tensor = axes
    axes = {"data": data, "fsdp": fsdp, "tensor": tensor, "cpu_devices": 0}
    made = sharding.make(8 // accumulate, strategy="mesh", **axes)
    options = common.base().optimizer.to_dict()
    del options["ema"]
    tx = optimizer.make(**{**options, "name": name}, spread=made.spread)
    loss = lm.make_loss(
        model.GPT(cfg), np.ones(cfg.vocab_size), loss_chunk=0, dropout=()
    )
    join = adapters.full().join
    run = made.compile(partial(step.train_step, loss=loss, join=join, tx=tx))
    weights = model.init(cfg, jax.random.key(3))
    state = made.place(step.start(weights, {}, tx, ema=False))
    kept = jax.tree.leaves((state.params, state.opt_state))
    held = sum(x.addressable_shards[0].data.nbytes for x in kept)
    losses = []
    for n in range(steps):
        rng = np.random.default_rng(n)
        shape = (accumulate, 8 // accumulate, 17)
        tokens = rng.integers(0, cfg.vocab_size, shape, dtype=np.int32)
        mask = np.ones((*shape[:2], 16), np.float32)
        batch = {"tokens": tokens[..., :-1], "targets": tokens[..., 1:], "mask": mask}
        hyper = one.make_hyper(decay_steps=20.0, warmup_steps=2.0)
        state, sums, _ = run(state, made.put(batch), jax.random.key(0), hyper)
        jax.block_until_ready(state)
        losses.append(float(sums["loss"]))
    return losses, held / sum(x.nbytes for x in kept)


@pytest.mark.parametrize("axes", EIGHT[1:])
def test_split_weights_train_like_one_device(axes):
    losses, _ = trained("modern", axes, steps=5)
    np.testing.assert_allclose(losses, trained("modern", ONE, steps=5)[0], rtol=1e-5)


def test_each_of_eight_devices_holds_an_eighth_of_the_state():
    assert trained("modern", (1, 8, 1), steps=5)[1] <= 1 / 8 + 0.05


@pytest.mark.slow
@pytest.mark.parametrize("axes", EIGHT)
@pytest.mark.parametrize("block", BLOCKS)
def test_every_mesh_has_the_losses_of_one_device_over_20_steps(block, axes):
    losses, _ = trained(block, axes)
    np.testing.assert_allclose(losses, trained(block, ONE)[0], rtol=1e-5)


PAIRS = {
    "scan, remat": {"scan_layers": True, "remat": "full"},
    "scan, accumulation": {"scan_layers": True, "accumulate": 2},
    "remat, accumulation": {"remat": "dots", "accumulate": 2},
    "muon": {"name": "muon"},
    "muon, scan": {"name": "muon", "scan_layers": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(2, 2, 2), (1, 4, 2)])
@pytest.mark.parametrize("pair", PAIRS)
@pytest.mark.parametrize("block", BLOCKS)
def test_scan_remat_and_accumulation_change_no_loss_on_a_mesh(block, pair, axes):
    losses, _ = trained(block, axes, **PAIRS[pair])
    alone = {k: v for k, v in PAIRS[pair].items() if k == "name"}
    np.testing.assert_allclose(losses, trained(block, ONE, **alone)[0], rtol=1e-5)


def mesh_of(**axes):
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "cpu_devices": 0, **axes}
    return sharding.make_mesh(8, **axes)


def test_every_weight_has_a_rule_and_optimizer_memory_follows_its_weight():
    mesh = mesh_of(fsdp=2, tensor=2)
    wanted = sharding.P("fsdp", "tensor", None)
    assert sharding.spec("block_0/attn/query/kernel", (64, 8, 8), mesh) == wanted
    path = "opt_state/weights/mu/blocks/kind_0/attn/query/kernel"
    stacked = sharding.P(None, *wanted)
    assert sharding.spec(path, (3, 64, 8, 8), mesh) == stacked
    assert sharding.spec(path, (3, 64), mesh) == sharding.P()  # row means
    with pytest.raises(ValueError, match=r"no rule .* matches block_0/x"):
        sharding.spec("block_0/x", (64,), mesh)


def test_what_does_not_divide_is_refused_and_few_kv_heads_are_copied():
    mesh = mesh_of(tensor=4)
    kernel = "block_0/attn/key/kernel"
    assert sharding.spec(kernel, (64, 2, 8), mesh) == sharding.P("fsdp", None, None)
    with pytest.raises(ValueError, match=r"6 is not a multiple"):
        sharding.spec(kernel, (64, 6, 8), mesh)
    with pytest.raises(ValueError, match=r"mesh.tensor=4: 61 .*vocab_multiple"):
        sharding.spec("embed/embedding", (61, 64), mesh)
