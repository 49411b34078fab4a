"""Devices: every strategy and every number of devices trains the same run."""

import itertools
from dataclasses import replace
from functools import cache, partial
from typing import Any

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import (
    adapters,
    model,
    optimizer,
    runs,
    sample,
    sampling,
    sharding,
    step,
    tokenizers,
    train,
)
from gpt_jax.tasks import lm
from tests import test_step as one
from tests import tiny
from tests.cases import few


def run(strategy, data, steps, state=None, first=0):
    """Trains `steps` steps on `data` devices; returns the losses and the state."""
    axes = {"data": data, "fsdp": 1, "tensor": 1, "cpu_devices": data}
    made = sharding.make(4, model.declared(one.CFG), strategy=strategy, **axes)
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


@pytest.mark.parametrize(
    "strategy, data",
    few([("mesh", 2), ("pmap", 1), ("pmap", 2)], ("mesh", 2), ("pmap", 2)),
)
def test_losses_equal_those_of_one_device_over_20_steps(alone, strategy, data):
    losses, state = run(strategy, data, 20)
    np.testing.assert_allclose(losses, alone[0], rtol=1e-5)
    one.assert_close(state.params, alone[1].params, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("strategy", few(["mesh", "pmap"], "mesh"))
def test_a_state_from_two_devices_goes_on_on_one(alone, strategy):
    losses, state = run(strategy, 2, 10)
    on_host = jax.tree.map(np.asarray, state)
    rest, _ = run("mesh", 1, 10, state=on_host, first=10)
    np.testing.assert_allclose(losses + rest, alone[0], rtol=1e-5)


def test_place_copies_so_that_donation_keeps_the_original():
    declared = {"norm/scale": tiny.weight((4,), ("embed",), draw="scale")}
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "cpu_devices": 1}
    made = sharding.make(4, declared, strategy="mesh", **axes)
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
        sharding.make(4, {}, **{**options, **axes})


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
def trained(
    block,
    axes,
    *,
    strategy="mesh",
    name="adamw",
    accumulate=1,
    steps=20,
    loss_chunk=0,
    moment_dtype="float32",
    **fields,
):
    """Trains on a mesh of `axes`; returns (losses, each device's share of the state).

    The share is of the bytes of parameters and optimizer memory on the fullest device.
    """
    fields = {"d_model": 64, "n_heads": 8, "vocab_multiple": 8} | BLOCKS[block] | fields
    cfg = tiny.cfg(**fields)
    data, fsdp, tensor = axes
    axes = {"data": data, "fsdp": fsdp, "tensor": tensor, "cpu_devices": 0}
    declared = model.declared(cfg)
    made = sharding.make(8 // accumulate, declared, strategy=strategy, **axes)
    options = common.base().optimizer.to_dict() | {"moment_dtype": moment_dtype}
    del options["ema"]
    tx = optimizer.make(declared, **{**options, "name": name}, spread=made.spread)
    loss = lm.make_loss(
        model.GPT(cfg), np.ones(cfg.vocab_size), loss_chunk=loss_chunk, dropout=()
    )
    join = adapters.full({}).join
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


@pytest.mark.parametrize("axes", few([(axes,) for axes in EIGHT[1:]], (EIGHT[1],)))
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


def same_as_alone(block, axes, how):
    """Compares losses with those of the plain step on one device."""
    losses, _ = trained(block, axes, **how)
    alone = {k: v for k, v in how.items() if k in ("name", "dtype")}
    np.testing.assert_allclose(losses, trained(block, ONE, **alone)[0], rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", EIGHT)
@pytest.mark.parametrize("pair", [pair for pair in PAIRS if "muon" not in pair])
@pytest.mark.parametrize("block", BLOCKS)
def test_scan_remat_and_accumulation_change_no_loss_on_a_mesh(block, pair, axes):
    if axes == (8, 1, 1) and "accumulate" in PAIRS[pair]:
        axes = (4, 1, 2)  # 4 examples a micro-batch
    if axes == (1, 8, 1) and "accumulate" in PAIRS[pair]:
        axes = (1, 4, 2)
    same_as_alone(block, axes, PAIRS[pair])


@pytest.mark.slow
@pytest.mark.parametrize("how", ["muon", "muon, scan"])
@pytest.mark.parametrize("block", BLOCKS)
def test_muon_changes_no_loss_on_a_mesh(block, how):
    same_as_alone(block, (2, 2, 2), PAIRS[how])


@pytest.mark.slow
@pytest.mark.parametrize("block", BLOCKS)
def test_pmap_on_eight_devices_has_the_losses_of_one(block):
    same_as_alone(block, (8, 1, 1), {"strategy": "pmap"})


@pytest.mark.slow
def test_the_logits_of_a_few_positions_at_a_time_change_no_loss_on_a_mesh():
    same_as_alone("modern", (2, 2, 2), {"loss_chunk": 5, "remat": "save_attn_out"})


def mesh_of(**axes):
    axes = {"data": 1, "fsdp": 1, "tensor": 1, "cpu_devices": 0, **axes}
    return sharding.make_mesh(8, **axes)


def test_optimizer_memory_follows_its_weight():
    mesh = mesh_of(fsdp=2, tensor=2)
    cfg = tiny.cfg(d_model=64, n_heads=8, n_layers=3)
    declared = model.declared(cfg) | model.declared(replace(cfg, scan_layers=True))
    spec = partial(sharding.spec, declared, mesh=mesh)
    wanted = sharding.P("fsdp", "tensor", None)
    assert spec("block_0/attn/query/kernel", (64, 8, 8)) == wanted
    path = "opt_state/weights/mu/blocks/kind_0/attn/query/kernel"
    assert spec(path, (3, 64, 8, 8)) == sharding.P(None, *wanted)
    assert spec(path, (3, 64)) == sharding.P()  # row means
    assert spec("opt_state/weights/0/v_row/block_0/mlp/up/bias", (1,)) == sharding.P()
    assert spec("opt_state/weights/0/count", ()) == sharding.P()


def test_a_weight_that_no_layer_declares_is_named():
    with pytest.raises(ValueError, match="block_0/x is no weight that a layer decl"):
        sharding.spec(model.declared(tiny.cfg()), "block_0/x", (64,), mesh_of())


def test_what_does_not_divide_is_refused_and_few_kv_heads_are_copied():
    spec = partial(sharding.spec, mesh=mesh_of(tensor=4))
    kernel = "block_0/attn/key/kernel"

    def declared(kv_heads):
        cfg = tiny.cfg(d_model=48, n_heads=6, n_kv_heads=kv_heads, n_layers=1)
        return model.declared(cfg)

    few = spec(declared(2), kernel, (48, 2, 8))
    assert few == sharding.P("fsdp", None, None)
    with pytest.raises(ValueError, match=r"6 is not a multiple"):
        spec(declared(6), kernel, (48, 6, 8))
    with pytest.raises(ValueError, match=r"mesh.tensor=4: 61 .*vocab_multiple"):
        spec(declared(6), "embed/embedding", (61, 48))
    cfg = tiny.cfg(d_ff=6)
    with pytest.raises(ValueError, match=r"6 is not a multiple of it; make it smaller"):
        spec(model.declared(cfg), "block_0/mlp/up/bias", (6,))


@pytest.mark.parametrize("scan", [False, True])
@pytest.mark.parametrize("name", ["adamw", "lion", "sgd", "adafactor", "muon"])
def test_the_memory_of_every_optimizer_has_its_place_on_a_tensor_mesh(name, scan):
    """Biases too, of which Adafactor keeps one number where matrices have a row."""
    cfg = tiny.cfg(n_heads=4, vocab_multiple=4, scan_layers=scan)
    options = {**common.base().optimizer.to_dict(), "name": name}
    del options["ema"]
    declared = model.declared(cfg)
    tx = optimizer.make(declared, **options, spread=lambda x: x)
    state = jax.eval_shape(
        lambda key: step.start(model.init(cfg, key), {}, tx, ema=False),
        jax.random.key(0),
    )
    places = sharding.layout(declared, state, mesh_of(tensor=2))
    assert len(jax.tree.leaves(places)) == len(jax.tree.leaves(state))


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(1, 1, 8), (2, 2, 2)])
def test_adafactor_with_biases_trains_on_a_tensor_mesh_as_on_one_device(axes):
    losses, _ = trained("gpt2", axes, name="adafactor", steps=8)
    alone, _ = trained("gpt2", ONE, name="adafactor", steps=8)
    np.testing.assert_allclose(losses, alone, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("axes", EIGHT)
def test_bfloat16_in_flight_and_in_moments_trains_on_every_mesh(axes):
    how = {"dtype": "bfloat16", "moment_dtype": "bfloat16", "scan_layers": True}
    losses, share = trained("modern", axes, steps=10, **how)
    alone, whole = trained("modern", ONE, steps=10, **how)
    np.testing.assert_allclose(losses, alone, rtol=5e-3)
    assert share < whole or axes == (8, 1, 1)


# ---------------------------------------------------------------- writing text


def written(model_of, params):
    """Returns what sampling and the likeliest tokens make of a prompt."""
    prompts = [[5, 3, 9, 1], [7, 7]]
    how = {"top_p": 0.9, "repetition_penalty": 1.2}
    return [
        [
            text.ids
            for text in sample.texts(
                model=model_of,
                params=params,
                tokenizer=tokenizers.train_byte([]),
                prompts=prompts,
                count=2,
                seed=3,
                stop=(),
                **sampling.settings(8, temperature=temperature, **how),
            )
        ]
        for temperature in (0.0, 1.0)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_a_tensor_mesh_writes_the_text_of_one_device(kv_heads):
    cfg = tiny.cfg(
        **{**BLOCKS["modern"], "n_kv_heads": kv_heads, "n_heads": 8},
        **{"d_model": 64, "vocab_size": 257, "vocab_multiple": 4, "context_length": 32},
    )
    params = jax.tree.map(lambda x: 5 * x, model.init(cfg, jax.random.key(3)))
    made = sharding.mesh_strategy(mesh_of(fsdp=2, tensor=4), model.declared(cfg))
    placed = sharding.for_decoding(made.place(params), made)
    assert placed["block_0"]["attn"]["query"]["kernel"].sharding.num_devices == 4
    assert written(model.GPT(cfg), placed) == written(model.GPT(cfg), params)


def test_the_heads_of_a_cache_lie_on_their_own_devices():
    cfg = tiny.cfg(n_heads=8, n_kv_heads=4, d_model=64, vocab_multiple=4)
    params = model.init(cfg, jax.random.key(3))
    made = sharding.mesh_strategy(mesh_of(tensor=4), model.declared(cfg))
    placed = sharding.for_decoding(made.place(params), made)
    prefill = jax.jit(partial(sample.prefill, model=model.GPT(cfg), max_length=16))
    with sharding.in_sight(placed):
        _, cache = prefill(placed, np.ones((3, 4), np.int32), np.full(3, 4))
    assert cache.reach == 16
    for kept in jax.tree.leaves(cache.layers):
        assert kept.shape == (3, 4, 16, 8)
        assert kept.addressable_shards[0].data.shape == (3, 1, 16, 8)


@pytest.mark.slow
def test_a_run_from_another_begins_with_its_weights_split(tmp_path):
    config = common.tiny(common.base())
    config.data.update(folder=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    config.update(steps=1, compile_cache="", tensorboard=False)
    config.model.vocab_multiple = 2
    train.train(config, tmp_path / "first")
    first = runs.open(tmp_path / "first").params
    config.init_from = str(tmp_path / "first")
    for adapter in (common.adapter_full(), common.adapter_lora()):
        config.adapter = adapter
        task = train.make_task(train.unpack(config), tmp_path / "second")
        own = adapters.make(model.declared(task.model.cfg), **adapter)
        made = sharding.mesh_strategy(mesh_of(fsdp=2, tensor=2), own.declared)
        parts = train.make_parts(train.unpack(config), task, made)
        state, _ = train.begin(config, parts, jax.random.key(0))
        weights = parts.join(state.params, state.frozen)
        for tree in (state.params, state.frozen, state.opt_state):
            for x, where in zip(
                *map(jax.tree.leaves, (tree, parts.strategy.layout(tree)))
            ):
                assert x.sharding == where
        for path, x in jax.tree_util.tree_leaves_with_path(first):
            found = weights
            for key in path:
                found = found[key.key]
            np.testing.assert_array_equal(found, x)


class Chip:
    """What JAX tells of a TPU's chip, as far as a mesh is made of it."""

    def __init__(self, number, coords, slice_index=0):
        self.id, self.coords, self.slice_index = number, coords, slice_index
        self.platform, self.device_kind = "tpu", "TPU v5 lite"
        self.core_on_chip, self.process_index = 0, slice_index

    def __repr__(self):
        return f"Chip({self.id})"


def chips(slices=1):
    """A v5e-8 each: 4 x 2 chips."""
    places = [(x, y, 0) for y in range(2) for x in range(4)]
    return [
        Chip(8 * s + i, place, s)
        for s in range(slices)
        for i, place in enumerate(places)
    ]


@pytest.mark.parametrize("count", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_some_of_a_slices_chips_make_a_mesh(count, axis):
    axes: Any = tuple(count if i == axis else 1 for i in range(3))
    mesh = sharding.arranged(axes, chips()[:count])
    assert mesh.devices.shape == axes
    assert {d.id for d in mesh.devices.flat} == set(range(count))


@pytest.mark.parametrize(
    "kind, sides", [("TPU v6 lite", (8, 8, 1)), ("TPU v4", (4,) * 3)]
)
def test_every_mesh_of_a_slice_of_64_chips_is_made(kind, sides):
    places = itertools.product(*map(range, reversed(sides)))
    slice_ = [Chip(i, place[::-1]) for i, place in enumerate(places)]
    for chip in slice_:
        chip.device_kind = kind
    for data, fsdp in itertools.product((1, 2, 4, 8, 16, 32, 64), repeat=2):
        if 64 % (data * fsdp) == 0:
            axes = (data, fsdp, 64 // (data * fsdp))
            mesh = sharding.arranged(axes, slice_)
            assert mesh.devices.shape == axes
            assert len({d.id for d in mesh.devices.flat}) == 64


def test_slices_are_joined_along_the_data_axis_or_else_fsdp():
    mesh = sharding.arranged((2, 4, 2), chips(2))
    assert [{d.slice_index for d in part.flat} for part in mesh.devices] == [{0}, {1}]
    mesh = sharding.arranged((1, 8, 2), chips(2))
    halves = mesh.devices[0, :4], mesh.devices[0, 4:]
    assert [{d.slice_index for d in part.flat} for part in halves] == [{0}, {1}]
    with pytest.raises(ValueError, match="no multiples of the 2 slices"):
        sharding.arranged((1, 1, 16), chips(2))
