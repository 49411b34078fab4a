"""Training with a reader's function: it stands in the run, and both curves tell.

`make test-slow` trains through every place: with the real function as without one, and
with a usual mistake otherwise.
"""

import os

import numpy as np
import pytest

from gpt_jax import attention, learn
from gpt_jax.learn import trained
from gpt_jax.learn.trained import Curve, Place
from tests.test_learn import written

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


def test_a_run_goes_through_the_readers_function_and_both_curves_are_drawn(tmp_path):
    before = attention.choose
    written(tmp_path, "attention", AHEAD)
    made = learn.train("attention", tmp_path, steps=STEPS)
    assert attention.choose is before
    assert made.picture == tmp_path / "attention.png"
    assert made.picture.read_bytes().startswith(b"\x89PNG")
    assert made.lines[0].startswith(f"validation loss after {STEPS} steps: ")
    assert made.real.train[0] == pytest.approx(made.mine.train[0], rel=1e-5)
    assert made.real.train[-1] != pytest.approx(made.mine.train[-1], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*trained.PLACES])
def test_a_place_with_the_real_function_is_the_run_without_it(name):
    place = trained.PLACES[name]
    got = losses(place, learn.HOLES[name].real)
    wanted = losses(Place(lambda mine: [], place.config), None)
    # The real rule spares some weights the decay; a reader's knows none of them.
    close = 0.02 if name == "adamw" else 1e-4
    np.testing.assert_allclose(got, wanted, rtol=close)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*trained.PLACES])
def test_a_mistake_in_a_place_changes_the_run(name):
    found, place = learn.HOLES[name], trained.PLACES[name]
    right = losses(place, found.real)
    wrong = [losses(place, mistake.made) for mistake in found.mistakes[:2]]
    assert not all(np.allclose(right, each, rtol=1e-5) for each in wrong)


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
