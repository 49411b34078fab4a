"""Multiple choice: picks from likelihoods that are taken choice by choice."""

import numpy as np
import pytest

from gpt_jax import runs
from gpt_jax.evaluate import choices, likelihood
from tests import runs_to_evaluate, tiny

BYTES = runs_to_evaluate.BYTES
ROWS = [
    {"context": "The sky is", "choices": [" blue", " a very green thing"], "answer": 0},
    {"context": "", "choices": ["x", "yy", "zzz"], "answer": "yy"},
]


def quiet(more: int) -> None:
    """A progress display that shows nothing."""


def test_picks_are_the_likeliest_choices_raw_and_per_byte(tmp_path):
    run = runs.open(runs_to_evaluate.make(tmp_path))
    scorer = likelihood.scorer(run.model, run.params)
    questions = [choices.question(row) for row in ROWS]
    forward = tiny.jit(lambda ids: run.model.apply({"params": run.params}, ids)[0])
    picks = choices.pick(scorer, BYTES, questions, show=quiet)
    for question, pick in zip(questions, picks):
        for choice, logp, per_byte in zip(question.choices, pick.logp, pick.per_byte):
            before = BYTES.encode(question.context) or [BYTES.eos_id]
            ids = np.array(before + BYTES.encode(choice))
            padded = np.pad(ids[:-1], (0, 65 - len(ids)))[None]
            logits = np.asarray(forward(padded), np.float64)[0, : len(ids) - 1]
            logp_TV = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
            each = logp_TV[np.arange(len(logp_TV)), ids[1:]][len(before) - 1 :]
            assert logp == pytest.approx(each.sum(), rel=1e-4)
            assert per_byte == pytest.approx(each.sum() / len(choice), rel=1e-4)
        assert pick.raw == int(np.argmax(pick.logp))
        assert pick.normed == int(np.argmax(pick.per_byte))


def test_a_summary_counts_right_picks_against_chance():
    questions = [choices.question(row) for row in ROWS]
    picks = [choices.Pick([], [], 0, 1), choices.Pick([], [], 2, 1)]
    found = choices.summary(questions, picks, seed=1)
    assert found["accuracy"]["mean"] == 50 and found["questions"] == 2
    assert found["accuracy_per_byte"]["mean"] == 50
    assert found["chance"] == pytest.approx((50 + 100 / 3) / 2)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"choices": ["a"]}, "two texts or more"),
        ({"choices": ["a", ""]}, "two texts or more"),
        ({"answer": 2}, "neither one of the choices nor a number from 0 to 1"),
        ({"answer": True}, "True is neither"),
        ({"answer": "red"}, "'red' is neither"),
    ],
)
def test_wrong_questions_are_told(change, words):
    with pytest.raises(ValueError, match=words):
        choices.question({**ROWS[0], **change})


def test_a_missing_column_is_named():
    with pytest.raises(ValueError, match=r"lacks context, choices .*columns: answer"):
        choices.question({"answer": 0})
