"""Evaluation: every example once, sums first, means last."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import data, evaluate, model, sharding
from gpt_jax.tasks import lm
from tests import test_step, tiny

CFG = tiny.cfg()
GPT = model.GPT(CFG)
BYTES = np.arange(CFG.vocab_size, dtype=np.int32) % 4  # bytes that a token stands for


def make(devices):
    mesh = sharding.make_mesh(8, data=devices, fsdp=1, tensor=1, cpu_devices=0)
    compiled = evaluate.compile(
        lm.make_loss(GPT, BYTES, loss_chunk=0, dropout=()), mesh
    )
    weights = sharding.replicate(model.init(CFG, jax.random.key(5)), mesh=mesh)
    return mesh, compiled, weights


@pytest.mark.parametrize("devices, batch_size", [(1, 3), (2, 8)])
def test_every_target_counts_once_whatever_the_batch_and_the_devices(
    devices, batch_size
):
    """Oracle: log-probabilities of each window alone, added up in NumPy."""
    ids = np.random.default_rng(0).integers(0, CFG.vocab_size, 70).astype(np.int32)
    windows = data.Windows(ids, seq_len=8, stride=8, tail=True)
    mesh, compiled, weights = make(devices)
    found = evaluate.evaluate(
        weights,
        {},
        data.once(windows, batch_size=batch_size * devices),
        test_step.make_hyper(label_smoothing=0.3, z_loss=0.1),  # training's business
        compiled=compiled,
        mesh=mesh,
        interrupted=lambda: False,
    )
    nll = 0.0
    params = sharding.local(weights)
    for start in range(0, 69, 8):
        window = ids[start : start + 9]
        logits, _ = GPT.apply({"params": params}, jnp.asarray(window[None, :-1]))
        logp = np.asarray(jax.nn.log_softmax(logits[0]), np.float64)
        nll -= logp[np.arange(len(window) - 1), window[1:]].sum()
    assert found["loss"] == pytest.approx(nll / 69, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / 69), rel=1e-5)
    assert found["bpb"] == pytest.approx(nll / math.log(2) / BYTES[ids[1:]].sum(), 1e-5)


def test_an_interrupted_evaluation_has_no_result():
    asked = iter([False, True])
    windows = data.Windows(np.zeros(40, np.int32), seq_len=8, stride=8, tail=True)
    mesh, compiled, weights = make(1)
    found = evaluate.evaluate(
        weights,
        {},
        data.once(windows, batch_size=2),
        test_step.make_hyper(),
        compiled=compiled,
        mesh=mesh,
        interrupted=lambda: next(asked),
    )
    assert found is None


def test_means_divide_sums_once_and_name_what_they_know():
    means = evaluate.means({"loss": 6.0, "nll": 4.0, "weight": 2.0, "bytes": 8.0})
    assert means == {
        "loss": 3.0,
        "perplexity": pytest.approx(math.exp(2.0)),
        "bpb": pytest.approx(4.0 / math.log(2) / 8.0),
    }
    assert evaluate.means({"loss": 6.0, "weight": 0.0}) == {"loss": 6.0}
    assert (
        evaluate.means({"loss": 1e6, "nll": 1e6, "weight": 1.0})["perplexity"] > 1e300
    )


def test_other_sums_are_divided_by_the_weight_under_their_own_names():
    sums = {"loss": 6.0, "weight": 4.0, "accuracy": 3.0, "margin": -2.0}
    wanted = {"loss": 1.5, "accuracy": 0.75, "margin": -0.5}
    assert evaluate.means(sums) == wanted


def test_sums_of_batches_add_up_by_name():
    parts = [{"loss": 1.5, "weight": 2.0}, {"loss": np.float32(2.5), "weight": 1.0}]
    assert evaluate.add(parts) == {"loss": 4.0, "weight": 3.0}
