"""What the compilers of GPUs and TPUs themselves make of programs, without devices.

`make test-compilers` installs them, each into an environment of its own; elsewhere all
of this is skipped. What a GPU or TPU computes is not asked here.
"""

import itertools
import os
from typing import Any

import jax
import pytest

from configs import common
from gpt_jax import estimate, sharding
from gpt_jax.estimate import dry, targets
from gpt_jax.mesh import AXES

os.environ.update(targets.ENVIRONMENT)  # read when the compilers are loaded
pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("promotion")]
BFLOAT16 = {"dtype": "bfloat16"}


def needs(name: str) -> targets.Target:
    if not targets.installed(targets.parse(name)[0]):
        pytest.skip("its compiler is not installed")
    return targets.find(name)


def small(axes=(1, 1, 1), tokens=1024, **fields):
    """Returns two layers of GPT-2 small's width."""
    config = common.base()
    sizes = {"n_layers": 2, "d_model": 768, "n_heads": 12, "context_length": tokens}
    config.model.update({**sizes, "vocab_size": 50_304, **BFLOAT16, **fields})
    config.mesh.update(dict(zip(AXES, axes, strict=True)))
    config.batch_size = 8 * axes[0] * axes[1]
    return config


def compiled(name, config, which=("train",)):
    """Returns what `dry.on` finds, by program."""
    mesh = dict(estimate.abstract(config, 0).shape)
    target = needs(name)
    peak = estimate.find(target.kind.device, "").peak_flops or 0.0
    given = {"which": which, "rows": 8, "peak": peak, "out": "", "tell": print}
    return {one["program"]: one for one in dry.on(target, config, mesh, **given)}


def sent(found) -> float:
    return sum(total["bytes"] for total in found["collectives"].values())


# ---------------------------------------------------------------- GPU


@pytest.mark.parametrize("tokens", [1024, 1023])
def test_an_h100_trains_with_cudnn_at_any_length(tokens):
    step = compiled("h100-1", small(tokens=tokens))[dry.TRAIN]
    assert step["calls"]["__cudnn$fmhaSoftmax"] == 2
    assert step["calls"]["__cudnn$fmhaSoftmaxBackward"] == 2
    assert set(step["products"]) == {"bfloat16"}


def test_few_key_heads_go_with_a_tensor_mesh_on_gpus():
    config = small((1, 1, 4), n_kv_heads=2)
    step = compiled("h100-4", config)[dry.TRAIN]
    assert step["calls"]["__cudnn$fmhaSoftmaxBackward"] == 2


def test_the_head_is_gathered_once_and_not_for_each_chunk():
    config = small((1, 8, 1))
    config.task.loss_chunk = 128  # eight chunks
    step = compiled("h100-8", config)[dry.TRAIN]
    weights = 4 * (50_304 * 768 + 1024 * 768 + 2 * 12 * 768**2)
    assert sent(step) < 3 * weights  # gathered, and their gradients added up


def test_decoding_on_a_gpu_reads_rounded_weights():
    found = compiled("h100-1", small(), which=("decode",))
    step = found["server's step"]
    weights = 2 * (50_304 * 768 + 1024 * 768 + 2 * 12 * 768**2)
    cache = 2 * 2 * 8 * 1024 * 768 * 2
    assert step["time"]["traffic"] < 1.2 * (weights + cache)


# ---------------------------------------------------------------- TPU


@pytest.mark.parametrize("tokens", [1024, 1000])
def test_a_v5e_trains_with_splash(tokens):
    step = compiled("v5e-8", small((8, 1, 1), tokens))[dry.TRAIN]
    assert step["calls"]["tpu_custom_call"] == 6
    assert step["memory"]["peak"] < 16e9


def test_what_does_not_fit_says_how_much_it_needs():
    config = small(tokens=8192, n_layers=8)
    config.batch_size = 64
    step = compiled("v5e-1", config)[dry.TRAIN]
    assert step["needs"] > step["has"] > 10e9


def factors(number: int):
    sides = [n for n in range(1, number + 1) if number % n == 0]
    return [
        axes
        for axes in itertools.product(sides, repeat=3)
        if axes[0] * axes[1] * axes[2] == number
    ]


@pytest.mark.parametrize("name", ["v5e-64", "v6e-64", "v4-64", "v5p-64", "v5e-256"])
def test_every_mesh_of_a_slice_is_made(name):
    target = needs(name)
    shapes: Any = factors(target.number)
    for axes in shapes:
        mesh = sharding.arranged(axes, target.devices)
        assert mesh.devices.shape == axes
        assert len({device.id for device in mesh.devices.flat}) == target.number


@pytest.mark.parametrize("count", [3, 5, 6, 7])
def test_some_chips_of_a_slice_make_a_mesh(count):
    chips = needs("v5e-8").devices[:count]
    mesh = sharding.arranged((count, 1, 1), chips)
    assert {device.id for device in mesh.devices.flat} == {d.id for d in chips}
    if count == 6:  # of 8 chips the compiler itself ends the process; of 16 it does not
        return
    split = jax.NamedSharding(mesh, jax.P("data"))
    x = jax.ShapeDtypeStruct((count, 8), "float32", sharding=split)
    assert jax.jit(lambda x: x.sum()).lower(x).compile()


def test_two_slices_are_joined_by_data():
    target = needs("2xv5e-16")
    mesh = sharding.arranged((4, 8, 1), target.devices)
    for half in (mesh.devices[:2], mesh.devices[2:]):
        assert len({device.slice_index for device in half.flat}) == 1
