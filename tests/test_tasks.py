"""Tasks: the loss and the examples that a config names."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import model, tasks
from gpt_jax.tasks import lm
from tests import test_step, tiny


def make(tmp_path, **changes):
    (tmp_path / "text.txt").write_text(
        "To be, or not to be: that is the question. " * 20
    )
    config = common.tiny(common.base())
    config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
    config.data.update(folder=str(tmp_path / "data"))
    return tasks.make(
        name="lm",
        model={**config.model.to_dict(), **changes.pop("model", {})},
        text={**config.data.to_dict(), **changes},
        dropout=(),
        progress=False,
    )


def test_language_modelling_takes_the_vocabulary_of_its_tokenizer(tmp_path):
    task = make(tmp_path)
    assert task.model.cfg.vocab_size == task.tokenizer.vocab_size
    assert task.tokens == 32  # the context, as seq_len is 0


def test_training_windows_may_overlap_and_evaluation_windows_never_do(tmp_path):
    task = make(tmp_path, seq_len=8, stride=2)
    first, second = task.train[0], task.train[1]
    np.testing.assert_array_equal(first["tokens"][2:], second["tokens"][:-2])
    np.testing.assert_array_equal(first["tokens"][1:], first["targets"][:-1])
    val = task.evals["val"]
    seen = sum(float(val[i]["mask"].sum()) for i in range(len(val)))
    assert seen == 860 * 0.1 - 1  # every validation character but the first is a target


def test_the_loss_of_training_is_smoothed_and_that_of_evaluation_plain():
    gpt = model.GPT(tiny.cfg())
    loss = lm.make_loss(gpt, np.ones(61), dropout=())
    weights = model.init(gpt.cfg, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], test_step.make_batch(1, 2))
    hyper = test_step.make_hyper(label_smoothing=0.2, z_loss=0.1)
    train = loss(weights, {}, batch, jax.random.key(1), hyper)
    plain = loss(weights, {}, batch, None, hyper)
    assert float(train["loss"]) > float(train["nll"]) + 0.1
    assert float(plain["loss"]) == pytest.approx(float(plain["nll"]), rel=1e-6)
    assert float(plain["bytes"]) == float(batch["mask"].sum())


def test_packed_documents_do_not_see_each_other():
    """Segments and positions in a batch reach the model."""
    gpt = model.GPT(tiny.cfg(position="rope"))
    loss = lm.make_loss(gpt, np.ones(61), dropout=())
    weights = model.init(gpt.cfg, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], test_step.make_batch(1, 1, masked=False))
    batch["segments"] = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1]], jnp.int32)
    batch["positions"] = jnp.asarray([[0, 1, 2, 3, 0, 1, 2, 3]], jnp.int32)
    batch["mask"] = jnp.asarray([[0, 0, 0, 0, 1, 1, 1, 1]], jnp.float32)
    hyper = test_step.make_hyper()
    before = loss(weights, {}, batch, None, hyper)["loss"]
    batch["tokens"] = batch["tokens"].at[0, :4].set(7)
    assert float(loss(weights, {}, batch, None, hyper)["loss"]) == float(before)
    batch.pop("segments")
    assert float(loss(weights, {}, batch, None, hyper)["loss"]) != float(before)


def test_an_unknown_task_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"task\.name 'lmm' is not one of: lm"):
        tasks.make(name="lmm")


def test_text_and_model_must_fit_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size 5 is less than"):
        make(tmp_path, model={"vocab_size": 5})
    with pytest.raises(
        ValueError, match=r"seq_len 33 is more than model\.context_length"
    ):
        make(tmp_path, seq_len=33)
