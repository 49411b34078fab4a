"""A weight says what it is once; what handles it needs to be told nothing else."""

from dataclasses import replace

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import adapters, model, optimizer, sharding, weights
from gpt_jax.model import initializers
from tests import test_configs, test_optimizer, tiny

KEY = jax.random.key(5)
E, D, F, R = 8, 6, 10, 3  # experts, width, hidden units, rank of an adapter


class Experts(nn.Module):
    """A layer that the library does not have: every expert has a kernel of its own."""

    @nn.compact
    def __call__(self, x_BD):
        axes = ("experts", "embed", "mlp")
        how = {"inputs": 1, "fan_in": D, "linear": True, "dtype": "float32"}
        kernel = weights.param(self, "kernel", (E, D, F), axes, draw="kernel", **how)
        return jnp.einsum("BD,EDF->BEF", x_BD, kernel)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x_BD):
        return Experts(name="up")(x_BD)


class Careless(nn.Module):
    @nn.compact
    def __call__(self, x_BD):
        return x_BD * self.param("gain", nn.initializers.ones, (D,))[None]


PATH = "up/kernel"
DECLARED = weights.declared(Layer().init, KEY, jnp.zeros((1, D)))


def drawn():
    return initializers.draw(DECLARED, tiny.cfg(init="torch_default"), KEY)[PATH]


def nested(leaf):
    return {"up": {"kernel": leaf}}


def test_experts_are_drawn_by_what_each_of_them_reads():
    edge = 1 / np.sqrt(D)
    kernel = np.asarray(drawn())
    assert kernel.shape == (E, D, F)
    assert 0.95 * edge < np.abs(kernel).max() <= edge


def test_experts_are_split_over_the_mesh_by_the_names_of_their_axes():
    axes = {"data": 1, "fsdp": 2, "tensor": 2, "cpu_devices": 0}
    mesh = sharding.make_mesh(8, **axes)
    wanted = sharding.P(None, "fsdp", "tensor")
    path = f"opt_state/matrices/{PATH}"
    assert sharding.spec(DECLARED, path, (E, D, F), mesh) == wanted
    strategy = sharding.mesh_strategy(mesh, DECLARED)
    like = nested(jax.ShapeDtypeStruct((E, D, F), jnp.float32))
    assert strategy.held(like) == 4 * E * D * F // 4


def test_muon_orthogonalises_every_expert_by_itself():
    options = {**test_optimizer.TABLES, "name": "muon", "muon": ("kernel$",)}
    tx = optimizer.make(DECLARED, **options)
    params, grads = nested(drawn()), nested(jax.random.normal(KEY, (E, D, F)))
    numbers = test_optimizer.hyper(weight_decay=0.0, matrix_lr=1.0)
    moved, _, _ = tx.update(grads, tx.init(params), params, jnp.int32(0), numbers)
    step_EDF = np.asarray(params["up"]["kernel"] - moved["up"]["kernel"])
    scale = np.sqrt(max(1.0, F / D))
    for one in step_EDF:
        singular = np.linalg.svd(one / scale, compute_uv=False)
        assert singular.min() > 0.6 and singular.max() < 1.3


def test_an_adapter_puts_a_product_beside_every_expert():
    lora = {**common.adapter_lora(), "rank": R, "targets": ("kernel$",)}
    adapter = adapters.make(DECLARED, **lora)
    params, frozen = adapter.split(nested(drawn()), KEY)
    assert params["up"]["lora_a"].shape == (E, D, R)
    assert params["up"]["lora_b"].shape == (E, R, F)
    assert adapter.declared["up/lora_a"].axes == ("experts", "inputs", "rank")
    params["up"]["lora_b"] += 1.0
    merged = adapters.merge(adapter.join(params, frozen), "float32")["up"]["kernel"]
    product = np.einsum("EDR,ERF->EDF", *params["up"].values()) * lora["alpha"] / R
    np.testing.assert_allclose(merged, drawn() + product, rtol=1e-5, atol=1e-6)


def test_every_output_of_every_expert_is_rounded_by_its_own_scale():
    rounded = adapters.quantise(nested(drawn()), DECLARED)["up"]
    assert rounded["kernel"].dtype == jnp.int8
    largest = np.abs(np.asarray(drawn())).max(1)
    np.testing.assert_allclose(rounded["kernel_scale"], largest / 127, rtol=1e-6)


def test_a_weight_without_a_declaration_is_named():
    with pytest.raises(ValueError, match=r"gain \(6,\) says nothing of its axes"):
        weights.declared(Careless().init, KEY, jnp.zeros((1, D)))
    with pytest.raises(ValueError, match="down/kernel is no weight that a layer decl"):
        weights.at(DECLARED, "opt_state/down/kernel")


@pytest.mark.parametrize("name", test_configs.ARGS)
def test_the_axes_of_every_weight_explain_its_shape(name):
    fields = test_configs.get(name).model.to_dict()
    cfg = model.GPTConfig(**{**fields, "vocab_size": fields["vocab_size"] or 50257})
    for scanned in (False, True):
        cfg = replace(cfg, scan_layers=scanned)
        declared = model.declared(cfg)
        first = jax.eval_shape(lambda key, cfg=cfg: model.init(cfg, key), KEY)
        shapes = {path: x.shape for path, x in optimizer._by_path(first).items()}
        assert shapes == {path: weight.shape for path, weight in declared.items()}
        lengths = {**cfg.lengths, "layers": cfg.n_periods}
        for path, weight in declared.items():
            assert weight.shape == tuple(lengths[axis] for axis in weight.axes), path
