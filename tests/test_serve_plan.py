"""Facts about the memory of a server: planned before it is taken, refused in words."""

import re

import jax
import numpy as np
import pytest

from gpt_jax import model as models
from gpt_jax.serve import batch, plan
from tests import tiny

CFG = tiny.cfg(context_length=1024, vocab_size=257, position="rope")


def shapes(cfg):
    return jax.eval_shape(lambda key: models.init(cfg, key), jax.random.key(0))


def cache_bytes(rows, reach):
    made = jax.eval_shape(lambda: batch.empty(CFG, rows, reach))
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(made.cache.layers))


def test_the_caches_are_those_of_the_largest_batch_while_it_grows():
    found = plan.of(CFG, {}, [1, 8])
    own = cache_bytes(8, 1024) + cache_bytes(8, 512)  # the old one and the new one
    assert 0 <= found.caches - own < 1000  # and lengths
    prompts = sum(cache_bytes(1, reach) for reach in (128, 256, 512, 1024))
    assert 0 <= found.prompts - prompts < 1000
    alone = plan.of(CFG, {}, [8])
    assert 0 <= alone.caches - cache_bytes(8, 1024) < 1000


def test_one_row_on_a_cpu_and_other_types_are_copies_of_the_weights():
    params = {"kernel": np.zeros((100, 10), np.float32)}
    assert plan.of(CFG, params, [1, 8]).weights == 4000
    assert plan.of(CFG, params, [8]).weights == 0


@pytest.mark.fault(38)
def test_a_plan_that_does_not_fit_is_refused_with_one_that_does():
    params, sizes = {}, [1, 8, 32]
    full = plan.of(CFG, params, sizes).total
    assert plan.check(CFG, params, sizes, full).total == full
    with pytest.raises(ValueError, match="serving this needs") as refused:
        plan.check(CFG, params, sizes, full / 3)
    sentence = str(refused.value)
    assert "32 texts of 1,024 tokens" in sentence and "are free" in sentence
    flags = re.search(r"--batches=([\d,]+) --context=(\d+)", sentence)
    fewer, shorter = [int(n) for n in flags[1].split(",")], int(flags[2])
    cfg = tiny.cfg(context_length=shorter, vocab_size=257, position="rope")
    assert plan.of(cfg, params, fewer).total <= full / 3
    assert "\n" not in sentence
    with pytest.raises(ValueError, match="nothing smaller does"):
        plan.check(CFG, params, sizes, 1000)


@pytest.mark.parametrize("position", ["learned", "rope"])
def test_a_shorter_context_computes_the_same(position):
    cfg = tiny.cfg(context_length=32, vocab_size=257, position=position)
    full, params = models.GPT(cfg), models.init(cfg, jax.random.key(1))
    short, cut = plan.shortened(full, params, 16)
    assert short.cfg.context_length == 16
    ids = np.arange(16)[None]
    logits, _ = short.apply({"params": cut}, ids)
    wanted, _ = full.apply({"params": params}, ids)
    np.testing.assert_array_equal(logits, wanted)
    assert plan.shortened(full, params, 0) == (full, params)
    with pytest.raises(ValueError, match="own context of 32"):
        plan.shortened(full, params, 33)
