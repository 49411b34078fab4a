"""A published model with new special tokens."""

import dataclasses

import numpy as np
import pytest

from gpt_jax import pretrained
from gpt_jax.model import GPT
from gpt_jax.pretrained import vocabulary, weights
from tests.test_pretrained import config_of, logits, opened, same


@pytest.mark.parametrize("name", ["gpt2", "llama_biases", "phi"])  # tied, not, biased
def test_old_rows_stay_bit_for_bit_and_new_ones_are_the_mean(name, tmp_path):
    gpt, params, answers = opened(name)
    grown, cfg = vocabulary.grow(params, gpt.cfg, [128, 129])
    assert cfg == dataclasses.replace(gpt.cfg, vocab_size=130)
    before = logits(gpt, params, answers["ids"])
    after = logits(GPT(cfg), grown, answers["ids"])
    np.testing.assert_allclose(after[..., :128], before, atol=1e-5)
    table = np.asarray(params["embed"]["embedding"])
    found = np.asarray(grown["embed"]["embedding"])
    assert found[:128].tobytes() == table.tobytes()
    table, rows = table.astype(np.float64), found[128:]
    np.testing.assert_allclose(rows, [table.mean(0)] * 2, atol=1e-6)
    # A row that is the mean gives the mean of the others' logits.
    np.testing.assert_allclose(
        after[..., 128:], before.mean(-1, keepdims=True).repeat(2, -1), atol=1e-4
    )
    weights.save(tmp_path, grown, cfg, tokens={}, shard_bytes=10**9)
    assert same(pretrained.load(tmp_path, config_of(tmp_path)), grown)


def test_a_row_that_no_token_used_is_overwritten_and_padding_grows():
    gpt, params, _ = opened("llama_biases")
    grown, cfg = vocabulary.grow(params, gpt.cfg, [127])
    assert cfg == gpt.cfg
    table = np.asarray(params["embed"]["embedding"])
    found = np.asarray(grown["embed"]["embedding"])
    np.testing.assert_array_equal(found[:127], table[:127])
    np.testing.assert_allclose(found[127], table[:127].mean(0), atol=1e-6)
    wide = dataclasses.replace(gpt.cfg, vocab_multiple=64)
    made, cfg = vocabulary.grow(params, wide, [128])
    assert cfg.vocab_rows == 192 == len(made["embed"]["embedding"])
    assert made["head"]["kernel"].shape == (32, 192)
    assert not made["head"]["kernel"][:, 129:].any()
