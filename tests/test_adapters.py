"""Adapters: which weights move, and what a run with frozen weights leaves behind."""

import shutil
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import adapters, checkpoint, metrics, model, optimizer, runs, step, train
from gpt_jax.model import GPT
from gpt_jax.model.layers import Dense
from tests import test_step, tiny
from tests.cases import few

KEY = jax.random.key(5)
TOKENS = jax.random.randint(KEY, (2, 16), 0, 61)
LAYOUTS = {
    "unrolled": {},
    "scanned": {"scan_layers": True, "n_layers": 3},
    "gated": {"gated": True, "activation": "silu", "n_kv_heads": 2, "qkv_bias": False},
}


def make(cfg, **changes):
    options = {**common.adapter_lora(), **changes}
    return adapters.make(model.declared(cfg), **options)


def logits(cfg, weights, dropout=None):
    run = tiny.jit(lambda w, d: GPT(cfg).apply({"params": w}, TOKENS, dropout=d)[0])
    return np.asarray(run(weights, dropout))


def moved(params, scale=0.3):
    """Returns params as if they had trained: no B is zero any more."""
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(9), len(leaves))
    drawn = [
        x + scale * jax.random.normal(k, x.shape)
        for x, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, drawn)


def test_the_full_adapter_trains_everything_and_joins_to_the_same_tree():
    weights = {"a": 1, "b": {"c": 2}}
    full = adapters.make({}, name="full")
    params, frozen = full.split(weights, KEY)
    assert (params, frozen) == (weights, {})
    assert full.join(params, frozen) == weights


def test_only_trains_what_the_regexes_match_and_joins_to_the_same_tree():
    weights = {"a": {"x": 1, "y": 2}, "b": {"x": 3}}
    only = adapters.make({}, name="only", train=("a/x", "^b"))
    params, frozen = only.split(weights, KEY)
    assert params == {"a": {"x": 1}, "b": {"x": 3}}
    assert frozen == {"base": {"a": {"y": 2}}}
    assert only.join(params, frozen) == weights


@pytest.mark.parametrize("layout", few(LAYOUTS, "unrolled"))
def test_lora_starts_as_exactly_the_base_and_merges_and_unmerges(layout):
    cfg = tiny.cfg(**LAYOUTS[layout])
    base = model.init(cfg, KEY)
    adapter = make(cfg, rank=4)
    params, frozen = adapter.split(base, KEY)
    joined = adapter.join(params, frozen)
    before = logits(cfg, base)
    np.testing.assert_array_equal(logits(cfg, joined), before)

    trained = adapter.join(moved(params), frozen)
    after = logits(cfg, trained)
    assert np.abs(after - before).max() > 0.1
    merged = adapters.merge(trained, "float32")
    assert jax.tree.structure(merged) == jax.tree.structure(base)
    np.testing.assert_allclose(logits(cfg, merged), after, atol=5e-5)
    assert checkpoint.digest(adapters.unmerge(trained)) == checkpoint.digest(base)
    assert checkpoint.digest(adapters.reference(frozen)) == checkpoint.digest(base)


def test_a_linear_layer_adds_the_scaled_product():
    """Oracle: x W + (x A) B alpha / rank in numpy."""
    cfg = tiny.cfg(n_heads=1)
    base = model.init(cfg, KEY)
    adapter = make(cfg, rank=2, alpha=3.0, targets=("up/kernel",))
    joined = adapter.join(moved(adapter.split(base, KEY)[0]), {"base": base})
    up = {
        k: np.asarray(v, np.float64) for k, v in joined["block_0"]["mlp"]["up"].items()
    }
    x = np.asarray(jax.random.normal(KEY, (3, 32)))
    dense = Dense(("embed",), ("mlp",), True, cfg)
    got: Any = dense.apply({"params": joined["block_0"]["mlp"]["up"]}, jnp.asarray(x))
    wanted = x @ up["kernel"] + up["bias"] + x @ up["lora_a"] @ up["lora_b"] * 1.5
    np.testing.assert_allclose(got, wanted, atol=1e-4)


@pytest.mark.parametrize("layout", few(["unrolled", "scanned"], "scanned"))
def test_lora_on_a_bfloat16_base_starts_as_that_base(layout):
    cfg = tiny.cfg(**LAYOUTS[layout])
    base = model.init(cfg, KEY)
    adapter = make(cfg, base_dtype="bfloat16")
    params, frozen = adapter.split(base, KEY)
    kinds = {str(x.dtype) for x in jax.tree.leaves(params)}
    assert kinds == {"float32"}
    big = [x for x in jax.tree.leaves(frozen) if x.size > 1000]
    assert big and all(x.dtype == jnp.bfloat16 for x in big)
    rounded = jax.tree.map(lambda x: x.astype(jnp.float32), frozen["base"])
    joined = adapter.join(params, frozen)
    np.testing.assert_array_equal(logits(cfg, joined), logits(cfg, rounded))
    trained = adapter.join(moved(params), frozen)
    merged = adapters.merge(trained, "float32")
    np.testing.assert_allclose(logits(cfg, merged), logits(cfg, trained), atol=1e-5)


@pytest.mark.parametrize("layout", few(LAYOUTS, "unrolled"))
def test_lora_on_an_int8_base_starts_close_to_it_and_merges(layout):
    cfg = tiny.cfg(**LAYOUTS[layout])
    base = model.init(cfg, KEY)
    adapter = make(cfg, base_dtype="int8")
    params, frozen = adapter.split(base, KEY)
    kernels = [
        (path, x)
        for path, x in jax.tree_util.tree_leaves_with_path(frozen)
        if "'kernel'" in str(path[-1])
    ]
    assert kernels and all(x.dtype == jnp.int8 for _, x in kernels)
    assert max(np.abs(x).max() for _, x in kernels) == 127
    plain = adapters.merge(adapters.reference(frozen), "float32")
    # Rounded to the nearest of 127 steps: no number is further off than half a step.
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(base), jax.tree.leaves(plain), strict=True
    ):
        assert np.abs(x - y).max() <= np.abs(x).max() / 127 * 0.501, path
    joined = adapter.join(params, frozen)
    np.testing.assert_allclose(logits(cfg, joined), logits(cfg, plain), atol=1e-5)
    trained = adapter.join(moved(params), frozen)
    merged = adapters.merge(trained, "float32")
    np.testing.assert_allclose(logits(cfg, merged), logits(cfg, trained), atol=1e-5)


def test_lora_of_gpt2_small_with_two_classes_trains_2666528_numbers():
    """TARGETS: the book's appendix E, rank 16 on every linear layer."""
    cfg = tiny.cfg(
        **{"vocab_size": 50257, "context_length": 1024, "n_layers": 12},
        **{"d_model": 768, "n_heads": 12, "n_classes": 2},
    )
    weights = jax.eval_shape(partial(model.init, cfg), KEY)
    params, _ = jax.eval_shape(make(cfg, rank=16).split, weights, KEY)
    assert model.count(params) == 2_666_528


def test_the_state_of_lora_is_little_more_than_the_base():
    cfg = tiny.cfg(d_model=128, n_layers=4, vocab_size=512)
    base = jax.eval_shape(partial(model.init, cfg), KEY)
    options = common.base().optimizer.to_dict()
    del options["ema"]
    tx = optimizer.make(model.declared(cfg), **options)

    def state(adapter):
        def begin(weights):
            params, frozen = adapter.split(weights, KEY)
            return step.start(params, frozen, tx, ema=False)

        return jax.eval_shape(begin, base)

    def size(tree):
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))

    lora = state(make(cfg, rank=4))
    assert size(lora) <= 1.2 * size(base) < size(state(adapters.full({}))) / 2
    names = checkpoint.leaves(lora.opt_state)
    assert all("lora" in path for path in names if not path.endswith("count"))


@pytest.mark.parametrize("layout", few(["unrolled", "scanned"], "scanned"))
def test_adapter_dropout_is_traced_and_differs_by_key_layer_and_kernel(layout):
    cfg = tiny.cfg(**LAYOUTS[layout])
    adapter = make(cfg, rank=4)
    params, frozen = adapter.split(model.init(cfg, KEY), KEY)
    weights = adapter.join(moved(params), frozen)

    run = tiny.jit(lambda w, d: GPT(cfg).apply({"params": w}, TOKENS, dropout=d)[0])

    def at(rate, key=KEY):
        return np.asarray(run(weights, model.Dropout(key, None, None, None, rate)))

    np.testing.assert_allclose(at(0.0), logits(cfg, weights), atol=1e-5)
    assert np.abs(at(0.5) - at(0.0)).max() > 1e-2
    assert np.abs(at(0.5) - at(0.5, jax.random.key(1))).max() > 1e-2
    np.testing.assert_array_equal(at(0.5), at(0.5))


def test_kernels_of_a_layer_drop_different_inputs():
    cfg = tiny.cfg()
    x = jnp.ones((4, 32))
    leaves = {
        "lora_a": jnp.eye(32),
        "lora_b": jnp.eye(32),
        "lora_scale": jnp.float32(1),
    }
    weights = {"kernel": jnp.zeros((32, 4, 8)), **leaves}
    dropout = model.Dropout(KEY, None, None, None, 0.5)

    def out(name):
        dense = Dense(("embed",), ("heads", "head"), False, cfg, name=name)
        return np.asarray(dense.apply({"params": weights}, x, dropout)).reshape(4, 32)

    query, value = out("query"), out("value")
    assert set(np.unique(query)) == {0.0, 2.0}
    assert 0.2 < (query == value).mean() < 0.8


def test_a_step_moves_the_adapter_and_nothing_else():
    base = model.init(test_step.CFG, KEY)
    adapter = make(test_step.CFG, rank=4)
    function, tx = test_step.make_step()
    function = partial(function.func, **{**function.keywords, "join": adapter.join})
    first = step.start(*adapter.split(base, KEY), tx, ema=False)
    hyper = test_step.make_hyper(warmup_steps=0)
    run = tiny.jit(function)
    after, _, _ = run(first, test_step.make_batch(1, 4), KEY, hyper)
    after, _, _ = run(after, test_step.make_batch(1, 4), KEY, hyper)
    assert checkpoint.digest(after.frozen["base"]) == checkpoint.digest(base)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), first.params, after.params)
    assert not any(jax.tree.leaves(same))


def test_the_reference_is_a_copy_of_what_the_base_does_not_hold():
    weights = {"a": {"x": jnp.ones(3)}, "b": jnp.zeros(2)}
    for adapter, held in (
        (adapters.full({}), {"a/x", "b"}),
        (adapters.only({}, train=("a/",)), {"a/x"}),
    ):
        params, frozen = adapter.split(weights, KEY)
        frozen = adapters.with_reference(weights, frozen)
        assert set(checkpoint.leaves(frozen["reference"])) == held
        assert checkpoint.digest(adapters.reference(frozen)) == checkpoint.digest(
            weights
        )
        assert frozen["reference"]["a"]["x"] is not params["a"]["x"]
    base = model.init(tiny.cfg(), KEY)
    _, frozen = make(tiny.cfg()).split(base, KEY)
    assert "reference" not in adapters.with_reference(base, frozen)  # held once


@pytest.mark.parametrize(
    "options, message",
    [
        ({"name": "lorra"}, "'lorra' is not one of: full"),
        ({"name": "only", "train": ("colour",)}, "matches none of the"),
        ({"name": "only", "train": (".*",)}, "matches all of the"),
        ({"name": "only", "train": ("(",)}, "not a regular expression"),
        ({"rank": 0}, "must be above 0"),
        ({"alpha": 0.0}, "must be above 0"),
        ({"base_dtype": "int3"}, "'int3' is not one of"),
        ({"targets": ("colour",)}, "matches none of the"),
        ({"targets": ("embedding",)}, "is not the kernel of a linear layer"),
        ({"targets": (".*kernel",)}, "head/kernel, which is not the kernel"),
    ],
)
def test_what_cannot_be_is_refused_in_a_sentence(options, message):
    cfg = tiny.cfg(tie_embeddings=False)
    weights = jax.eval_shape(partial(model.init, cfg), KEY)
    keys = {} if "name" in options else common.adapter_lora()
    with pytest.raises(ValueError, match=message):
        adapters.make(model.declared(cfg), **{**keys, **options}).split(weights, KEY)


# ---- whole runs ----


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Returns the folder of `base`, a short run, and of a LoRA run from it, `whole`."""
    home = tmp_path_factory.mktemp("adapters")
    (home / "text.txt").write_text(
        "the quick brown fox jumps over the lazy dog. " * 300
    )
    config = configure(home)
    config.update(steps=4, init_from="")
    config.adapter = common.adapter_full()
    config.hyper.dropout_adapter = 0.0
    train.train(config, home / "base")
    train.train(configure(home), home / "whole")
    return home


def configure(home):
    config = common.tiny(common.base())
    config.data.update(source=str(home / "text.txt"), tokenizer="char")
    config.data.update(folder=str(home / "data"), cache=str(home / "cache"))
    config.model.context_length = 16
    config.update(steps=8, eval_every=4, checkpoint_every=3, compile_cache="")
    config.hyper.update(decay_steps=8.0, warmup_steps=0.0, lr=1e-2)
    config.tensorboard = False
    config.init_from = str(home / "base")
    config.adapter = common.adapter_lora()
    config.hyper.dropout_adapter = 0.1
    return config


@pytest.mark.slow
def test_a_resumed_lora_run_ends_bit_equal_to_an_uninterrupted_one(home):
    config = configure(home)
    config.steps = 5
    train.train(config, home / "parts")
    shutil.rmtree(home / "parts" / "checkpoints" / "5")  # as if killed after step 4
    config.steps = 8
    assert train.train(config, home / "parts").step == 8
    whole, parts = (
        checkpoint.digest(runs.open(home / name, step="latest").params)
        for name in ("whole", "parts")
    )
    assert whole == parts
    assert metrics.read(home / "whole")[-1]["val_loss"] < 2.9


def test_a_lora_checkpoint_holds_the_adapter_and_the_run_its_base_once(home):
    store = checkpoint.Checkpoints(home / "whole" / "checkpoints", keep=None)
    for number in store.steps():
        tree, meta, _ = store.restore(None, number)
        assert not tree["frozen"]
        assert all("lora" in path for path in checkpoint.leaves(tree["params"]))
    stored = [path.name for path in (home / "whole" / "frozen").iterdir()]
    assert stored == [meta["frozen"]]
    base = runs.open(home / "base").params
    assert stored == [checkpoint.digest({"base": base})]


def test_a_lora_run_opens_merged_and_unmerges_to_the_stored_base(home):
    base, whole = (runs.open(home / name) for name in ("base", "whole"))
    assert jax.tree.structure(whole.params) == jax.tree.structure(base.params)
    assert checkpoint.digest(whole.params) != checkpoint.digest(base.params)
    unmerged = runs.open(home / "whole", weights="base")
    assert checkpoint.digest(unmerged.params) == checkpoint.digest(base.params)
    with pytest.raises(ValueError, match="does not hold the weights that it started"):
        runs.open(home / "base", weights="base")


@pytest.mark.parametrize("fault", ["missing", "damaged", "another"])
def test_frozen_weights_that_are_not_its_own_are_refused(home, tmp_path, fault):
    shutil.copytree(home / "whole", tmp_path / "run")
    (stored,) = (tmp_path / "run" / "frozen").iterdir()
    if fault == "missing":
        shutil.rmtree(stored)
    elif fault == "damaged":
        victim = max(stored.rglob("*"), key=lambda path: path.stat().st_size)
        victim.write_bytes(b"\0" + victim.read_bytes()[1:])
    else:
        store = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=1)
        tree = store.load_frozen(stored.name)
        tree = jax.tree.map(lambda x: x + 1, tree)
        shutil.rmtree(stored)
        (tmp_path / "run" / "frozen" / store.save_frozen(tree)).rename(stored)
    config = configure(home)
    config.steps = 9
    for use in (
        lambda: runs.open(tmp_path / "run"),
        lambda: train.train(config, tmp_path / "run"),
    ):
        with pytest.raises(ValueError, match=r"frozen weights .* cannot be used"):
            use()


def test_dropout_of_an_adapter_that_is_not_there_is_refused(home):
    config = configure(home)
    config.adapter = common.adapter_full()
    with pytest.raises(
        ValueError, match=r"dropout_adapter is .* adapter full does not"
    ):
        train.check(config)
