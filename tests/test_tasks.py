"""Tasks: the loss and the examples that a config names."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import model, sharding, tasks
from gpt_jax.tasks import lm, scores
from tests import test_step, tiny
from tests.cases import few


def make(tmp_path, **changes):
    (tmp_path / "text.txt").write_text(
        "To be, or not to be: that is the question. " * 20
    )
    loss_chunk = changes.pop("loss_chunk", 0)
    config = common.tiny(common.base())
    config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
    config.data.update(folder=str(tmp_path / "data"))
    config.task.loss_chunk = loss_chunk
    config.model.update(changes.pop("model", {}))
    config.data.update(changes)
    return tiny.task(config)


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
    loss = lm.make_loss(gpt, np.ones(61), loss_chunk=0, dropout=())
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
    loss = lm.make_loss(gpt, np.ones(61), loss_chunk=0, dropout=())
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


HEADS = {
    "tied": {},
    "padded": {"vocab_multiple": 64},
    "capped": {"logit_softcap": 2.0, "tie_embeddings": False, "head_bias": True},
    "padded and capped": {"logit_softcap": 2.0, "vocab_multiple": 64},
}


@pytest.mark.parametrize("head", few(HEADS, "padded and capped"))
def test_logits_in_chunks_give_the_loss_and_the_gradient_of_all_at_once(head):
    gpt = model.GPT(tiny.cfg(init="torch_default", **HEADS[head]))
    weights = model.init(gpt.cfg, jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], test_step.make_batch(1, 3))
    hyper = test_step.make_hyper(label_smoothing=0.1, z_loss=0.01, dropout_residual=0.2)

    def summed(weights, loss_chunk):
        loss = lm.make_loss(
            gpt, np.ones(61), loss_chunk=loss_chunk, dropout=("dropout_residual",)
        )
        sums = loss(weights, {}, batch, jax.random.key(1), hyper)
        return sums["loss"], sums

    gradient = tiny.jit(jax.grad(summed, has_aux=True), static_argnums=1)
    wanted, got = gradient(weights, 8), gradient(weights, 3)
    test_step.assert_close(got, wanted, rtol=1e-5, atol=1e-5)
    assert float(got[1]["weight"]) == float(batch["mask"].sum())


@pytest.mark.parametrize("devices", few([1, 4], 4))
def test_logits_in_chunks_train_alike_on_a_mesh_with_micro_batches(devices):
    states = []
    for chunk in (0, 3):
        loss = lm.make_loss(test_step.GPT, np.ones(61), loss_chunk=chunk, dropout=())
        function, tx = test_step.make_step(name="sgd", loss=loss)
        axes = {"data": devices, "fsdp": 1, "tensor": 1, "cpu_devices": 0}
        declared = model.declared(test_step.CFG)
        strategy = sharding.make(4, declared, strategy="mesh", **axes)
        function = partial(function.func, **{**function.keywords})
        del function.keywords["reduce"]
        state = strategy.place(test_step.begin(tx))
        batch = strategy.put(test_step.make_batch(2, 4))
        hyper = test_step.make_hyper(label_smoothing=0.1)
        run = strategy.compile(function)
        states.append(jax.device_get(run(state, batch, test_step.KEY, hyper)))
    test_step.assert_close(*states)


@pytest.mark.slow
def test_logits_in_chunks_can_be_vmapped_over_numbers():
    loss = lm.make_loss(test_step.GPT, np.ones(61), loss_chunk=3, dropout=())
    function, tx = test_step.make_step(name="sgd", loss=loss)
    batch = test_step.make_batch(2, 2)
    hypers = [test_step.make_hyper(label_smoothing=s, lr=s + 0.1) for s in (0.0, 0.3)]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *hypers)
    over = jax.vmap(function, in_axes=(None, None, None, 0))
    together = tiny.jit(over)(test_step.begin(tx), batch, test_step.KEY, stacked)
    for i, hyper in enumerate(hypers):
        alone = tiny.jit(function)(test_step.begin(tx), batch, test_step.KEY, hyper)
        own = jax.tree.map(lambda x, i=i: x[i], together)
        test_step.assert_close(own, alone)


def gradient_memory(loss_chunk, rows=4):
    """Returns bytes beside weights and gradients, by XLA's own account."""
    cfg = tiny.cfg(vocab_size=8192, context_length=256, d_model=16, n_layers=1)
    gpt = model.GPT(cfg)
    loss = lm.make_loss(gpt, np.ones(8192), loss_chunk=loss_chunk, dropout=())
    tokens = jnp.zeros((rows, 256), jnp.int32)
    batch = {"tokens": tokens, "targets": tokens, "mask": jnp.ones((rows, 256))}

    def summed(weights):
        key = jax.random.key(1)
        return loss(weights, {}, batch, key, test_step.make_hyper())["loss"]

    shapes = jax.eval_shape(partial(model.init, cfg), jax.random.key(0))
    compiled = jax.jit(jax.grad(summed)).lower(shapes).compile()
    return compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.slow
def test_chunks_bound_the_memory_of_logits(monkeypatch):
    logits = 4 * 256 * 8192 * 4
    whole, quarter, least = map(gradient_memory, (256, 64, 16))
    assert whole > 1.5 * logits  # else the test would measure nothing
    assert quarter < 0.5 * whole
    assert least < 0.2 * whole
    # What 0 chooses: everything while it fits, and then as much as fits.
    assert gradient_memory(0) == whole
    monkeypatch.setattr(scores, "LOGITS_BYTES", logits // 4)
    assert gradient_memory(0) == quarter


def test_a_chunk_below_zero_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"task\.loss_chunk is -1"):
        make(tmp_path, loss_chunk=-1)


def equations(jaxpr):
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("attention", ["plain", "blocked", "xla"])
@pytest.mark.parametrize("norm", ["layernorm", "rmsnorm"])
def test_softmax_norms_and_the_loss_are_float32_under_bfloat16(attention, norm):
    """Oracle: JAX's own account of what is computed in which type."""
    cfg = tiny.cfg(dtype="bfloat16", attention=attention, norm=norm, activation="relu2")
    loss = lm.make_loss(model.GPT(cfg), np.ones(61), loss_chunk=3, dropout=())
    shapes = jax.eval_shape(partial(model.init, cfg), jax.random.key(0))
    batch = jax.tree.map(lambda x: x[0], test_step.make_batch(1, 2))

    def summed(weights):
        hyper = test_step.make_hyper(label_smoothing=0.1)
        return loss(weights, {}, batch, jax.random.key(1), hyper)["loss"]

    found = list(equations(jax.make_jaxpr(jax.grad(summed))(shapes).jaxpr))
    types = {
        name: {str(e.outvars[0].aval.dtype) for e in found if e.primitive.name == name}
        for name in ("exp", "log", "rsqrt", "reduce_max", "reduce_sum", "dot_general")
    }
    assert types.pop("dot_general") == {"bfloat16", "float32"}
    assert types.pop("reduce_sum") >= {
        "float32"
    }  # a bias sums its gradient in bfloat16
    assert all(kinds == {"float32"} for kinds in types.values()), types


def test_an_unknown_task_is_refused_with_the_choices():
    with pytest.raises(ValueError, match=r"task\.name 'lmm' is not one of: lm"):
        tasks.chosen({"name": "lmm"})


def test_text_and_model_must_fit_each_other(tmp_path):
    with pytest.raises(ValueError, match=r"model\.vocab_size 5 is less than"):
        make(tmp_path, model={"vocab_size": 5})
    with pytest.raises(
        ValueError, match=r"seq_len 33 is more than model\.context_length"
    ):
        make(tmp_path, seq_len=33)
