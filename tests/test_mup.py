"""model.param = mup: what it scales, what it leaves, and that widths behave alike."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import model, optimizer, train
from gpt_jax.microscope import attribution, taps
from gpt_jax.model import GPT
from tests import tiny

KEY = jax.random.key(0)
TOKENS_BT = np.random.default_rng(0).integers(0, 61, (4, 16))


def wide(width, param="mup", **more):
    fields = {"d_model": width, "n_heads": width // 16, "n_layers": 1, **more}
    return tiny.cfg(param=param, base_width=32, tie_embeddings=False, **fields)


def test_at_the_base_width_mup_is_standard_to_the_bit():
    shape = {"head_dim": 64, "n_heads": 2}
    for init in ("gpt2", "torch_default", "modern"):
        both = [wide(32, param, init=init, **shape) for param in ("standard", "mup")]
        assert model.rates(both[1]) == {}
        params = [model.init(cfg, KEY) for cfg in both]
        jax.tree.map(np.testing.assert_array_equal, *params)
        assert both[0].query_scale == both[1].query_scale


def test_the_rate_of_kernels_inside_falls_with_the_width_and_no_other():
    cfg = wide(128)
    found = model.rates(cfg)
    assert {*found.values()} == {1 / 4}
    kinds = {path.partition("/")[2] for path in found}
    inside = {f"attn/{name}/kernel" for name in ("query", "key", "value", "out")}
    assert kinds == inside | {"mlp/up/kernel", "mlp/down/kernel"}
    scanned = model.rates(replace(cfg, scan_layers=True))
    assert scanned.keys() == {
        path.replace("block_0", "blocks/kind_0") for path in found
    }


@pytest.mark.parametrize("init", ["gpt2", "torch_default", "modern"])
def test_first_kernels_shrink_by_what_they_read_and_heads_do_not(init):
    drawn = {width: model.init(wide(width, init=init), KEY) for width in (64, 256)}

    def deviation(width, path):
        group, name = path.rsplit("/", 1)
        tree = drawn[width]
        for word in group.split("/"):
            tree = tree[word]
        return float(tree[name].std())

    for path, wanted in (
        ("block_0/mlp/up", 0.5),
        ("block_0/mlp/down", 0.5),
        ("block_0/attn/out", 0.5),
        ("head", 1.0),
    ):
        found = deviation(256, f"{path}/kernel") / deviation(64, f"{path}/kernel")
        assert found == pytest.approx(wanted, rel=0.05), path
    table = deviation(256, "embed/embedding") / deviation(64, "embed/embedding")
    assert table == pytest.approx(1.0, rel=0.05)


def test_scores_of_attention_are_divided_by_the_features_of_a_head():
    assert wide(64, head_dim=64).query_scale == 1 / 8
    assert wide(64, head_dim=16).query_scale == pytest.approx(8 / 16)
    assert wide(64, "standard", head_dim=16).query_scale == 1 / 4
    assert wide(64, head_dim=16, query_scale=0.3).query_scale == 0.3


def test_updates_are_scaled_and_the_decay_is_not():
    options = common.base().optimizer.to_dict()
    del options["ema"]
    cfg = wide(64)
    params = model.init(cfg, KEY)
    grads = jax.tree.map(jnp.ones_like, params)
    hyper = optimizer.Hyper(
        **{k: jnp.float32(v) for k, v in common.base().hyper.items()}
    )
    hyper = hyper._replace(warmup_steps=jnp.float32(0), clip=jnp.float32(0))

    def moved(decay, scales):
        tx = optimizer.make(model.declared(cfg), **options, scales=scales)
        own = hyper._replace(weight_decay=jnp.float32(decay))
        new, *_ = tx.update(grads, tx.init(params), params, jnp.int32(0), own)
        return jax.tree.map(lambda a, b: np.asarray(a - b), new, params)

    plain, scaled = moved(0.0, {}), moved(0.0, model.rates(cfg))
    up, head = (lambda t: t["block_0"]["mlp"]["up"]["kernel"]), (lambda t: t["head"])
    np.testing.assert_allclose(up(scaled), up(plain) / 2, rtol=1e-2)
    np.testing.assert_allclose(head(scaled)["kernel"], head(plain)["kernel"])
    pull = up(moved(5.0, model.rates(cfg))) - up(scaled)
    np.testing.assert_allclose(pull, up(moved(5.0, {})) - up(plain), atol=1e-5)


def trained_size(param, width):
    """Returns the size of the logits after eight steps of AdamW at one rate."""
    cfg = wide(width, param)
    options = common.base().optimizer.to_dict()
    del options["ema"]
    tx = optimizer.make(model.declared(cfg), **options, scales=model.rates(cfg))
    numbers = common.base().hyper.to_dict() | {"lr": 1e-2, "warmup_steps": 0.0}
    numbers |= {"weight_decay": 0.0, "decay_steps": 1e9}
    hyper = optimizer.Hyper(**{k: jnp.float32(v) for k, v in numbers.items()})
    gpt = GPT(cfg)

    def logits(params):
        return gpt.apply({"params": params}, TOKENS_BT)[0]

    def loss(params):
        logp = jax.nn.log_softmax(logits(params)[:, :-1])
        return -jnp.take_along_axis(logp, TOKENS_BT[:, 1:, None], -1).mean()

    @tiny.jit
    def step(params, memory, number):
        grads = jax.grad(loss)(params)
        return tx.update(grads, memory, params, number, hyper)[:2]

    params = model.init(cfg, KEY)
    memory = tx.init(params)
    for number in range(8):
        params, memory = step(params, memory, jnp.int32(number))
    return float(jnp.sqrt(jnp.square(logits(params)).mean()))


def test_logits_grow_alike_at_every_width_under_mup_and_not_under_standard():
    grown = {
        param: trained_size(param, 256) / trained_size(param, 32)
        for param in ("standard", "mup")
    }
    assert grown["standard"] > 2
    assert 0.6 < grown["mup"] < 1.5


def test_a_logit_under_mup_is_still_the_sum_of_its_parts():
    cfg = wide(64, norm_bias=True)
    gpt, params = GPT(cfg), model.init(cfg, KEY)
    params = jax.tree.map(lambda x: x + 0.01, params)
    row = taps.row([TOKENS_BT[0].tolist()])
    seen = jax.jit(lambda p: taps.see(gpt, p, row))(params)
    wanted_T = TOKENS_BT[1]
    parts = jax.jit(lambda p: attribution.attribute(gpt, p, seen, wanted_T))(params)
    total_T = parts.embedding_T + parts.head_TLH.sum((1, 2)) + parts.shift_TL.sum(1)
    total_T += parts.mlp_TL.sum(1) + parts.constant_T + parts.softcap_T
    np.testing.assert_allclose(total_T, parts.logit_T, atol=2e-5)


def test_what_does_not_fit_mup_is_refused():
    config = common.tiny(common.base())
    config.model.param = "mup"
    config.optimizer.name = "sgd"
    with pytest.raises(
        ValueError, match=r"model\.param is mup, .* but optimizer\.name"
    ):
        train.check(config)
    recipe = common.tiny(common.base())
    config = common.tiny(common.base())
    config.model.base_width = 128
    with pytest.raises(
        ValueError, match=r"base_width is 128, but model\.param standard"
    ):
        train.check(config, recipe)
    with pytest.raises(ValueError, match="param 'mop' is not one of: standard, mup"):
        wide(64, "mop")
    assert math.isclose(wide(64).width_ratio, 2.0)
