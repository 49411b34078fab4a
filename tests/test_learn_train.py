"""Training with a reader's function: it stands in the run, and both curves tell.

`make test-slow` trains through every place: right code of another form makes the run as
it is, a usual mistake another one.
"""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import attention, learn
from gpt_jax.learn import layers, trained, training
from gpt_jax.learn.trained import Curve
from tests.test_learn import written

pytestmark = pytest.mark.usefixtures("promotion")  # of what readers write

STEPS = 6
AHEAD = (  # sees the next token
    "s = q_TK @ k_SK.T / q_TK.shape[-1] ** 0.5\n"
    "s = s + jnp.triu(jnp.full(s.shape, -1e9), 2)\n"
    "return jax.nn.softmax(s, -1) @ v_SK"
)


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory):
    """One folder for all, where the text is prepared once."""
    before, folder = os.getcwd(), tmp_path_factory.mktemp("learn")
    os.chdir(folder)
    yield folder
    os.chdir(before)


def losses(place, function, steps=STEPS):
    curve = trained.run(place, function, steps)
    assert [step for step, _ in curve.train] == [*range(1, steps + 1)]
    return np.array([loss for _, loss in curve.train])


@pytest.mark.slow
def test_a_run_goes_through_the_readers_function_and_both_curves_are_drawn(tmp_path):
    before = attention.choose
    written(tmp_path, "attention", AHEAD)
    made = learn.train("attention", tmp_path, steps=STEPS)
    assert attention.choose is before
    assert made.picture == tmp_path / "attention.png"
    assert made.picture.read_bytes().startswith(b"\x89PNG")
    assert made.lines[0].startswith(f"validation loss after {STEPS} steps: ")
    assert made.real.train[-1] != pytest.approx(made.mine.train[-1], rel=1e-4)


def shortened(grads, limit):
    long = jnp.sqrt(sum((x**2).sum() for x in jax.tree.leaves(grads)))
    return jax.tree.map(lambda x: x * jnp.minimum(1.0, limit / long), grads)


def negative_log(logits_TV, target_T, mask_T):
    return (training._nll(logits_TV, target_T) * mask_T).sum() / mask_T.sum()


def masked(tokens, window):
    apart = jnp.arange(tokens)[:, None] - jnp.arange(tokens)
    return (apart >= 0) & ((window == 0) | (apart < window))


RIGHT = {  # by other code than the package's
    "softmax": lambda x: (
        jnp.exp(x - x.max(-1, keepdims=True))
        / jnp.exp(x - x.max(-1, keepdims=True)).sum(-1, keepdims=True)
    ),
    "causal_mask": masked,
    "attention": layers._attended,
    "gqa": lambda q, k, v: layers._heads(
        q, *(jnp.repeat(x, q.shape[1] // x.shape[1], 1) for x in (k, v))
    ),
    "rope": layers._roped,
    "layer_norm": layers._layer_normed,
    "rms_norm": lambda x, scale: (
        x * scale / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-5)
    ),
    "gelu": layers._gelu,
    "dropout": learn.HOLES["dropout"].real,
    "cross_entropy": negative_log,
    "cross_entropy_grad": lambda x, target: training._pull(x, target) / len(target),
    "adamw": training._adam,
    "schedule": training._rate,
    "clip": shortened,
    "orthogonalise": training._rounds,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", [*trained.PLACES])
def test_a_right_function_in_its_place_makes_the_run_as_it_is_and_a_mistake_none(name):
    place = trained.PLACES[name]
    wanted = losses(place, None)
    np.testing.assert_allclose(losses(place, RIGHT[name]), wanted, rtol=1e-4)
    wrong = [losses(place, each.made) for each in learn.HOLES[name].mistakes[-2:]]
    assert not all(np.allclose(each, wanted, rtol=1e-4) for each in wrong)


@pytest.mark.slow
def test_who_sees_the_next_token_is_too_good_to_be_true(tmp_path):
    written(tmp_path, "attention", AHEAD)
    made = learn.train("attention", tmp_path)
    assert made.lines[1].startswith("too good to be true")
    assert made.mine.val[-1][1] < made.real.val[-1][1] / 2


@pytest.mark.parametrize(
    "mine, line",
    [
        (3.001, "it is the same curve"),
        (3.3, "the curves are up to 0.300 nats apart"),
        (1.0, "too good to be true: does something see what it is to predict?"),
    ],
)
def test_two_curves_are_told_apart(mine, line):
    real = Curve([(1, 5.0)], [(0, 5.5), (200, 3.0)])
    lines = trained.told(real, Curve([(1, 5.0)], [(0, 5.5), (200, mine)]))
    assert lines == [
        f"validation loss after 200 steps: 3.000, with yours {mine:.3f}",
        line,
    ]


def test_what_no_training_goes_through_is_told_with_what_one_does(tmp_path):
    written(tmp_path, "top_k", "return logits_V")
    with pytest.raises(ValueError, match=r"goes through top_k; .*attention, gqa"):
        learn.train("top_k", tmp_path)


@pytest.mark.parametrize(
    "body, told",
    [
        ('raise NotImplementedError("write clip")', "clip is not written yet"),
        ("return grads + limit", "training with your clip raises TypeError: "),
        (
            "return jax.tree.map(lambda x: x * jnp.nan, grads)",
            "with your clip losses are not finite",
        ),
    ],
)
def test_a_function_that_cannot_be_trained_with_is_told(body, told, tmp_path):
    written(tmp_path, "clip", body)
    found, mine = learn._written("clip", tmp_path)
    with pytest.raises(ValueError, match=told):
        trained.own(found, mine, steps=20)
