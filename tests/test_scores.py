"""Scores against values worked out by hand, intervals against theory."""

import builtins

import numpy as np
import pytest

from gpt_jax.evaluate import scores

SAID = "The cat sat on the mat."
WANTED = "the cat lay on a mat"


def test_scores_of_one_answer_are_what_their_definitions_give():
    (found,) = scores.rows([SAID], [WANTED])
    # cat, on, mat of 4 and 4 words, without articles.
    assert found["f1"] == pytest.approx(100 * 2 * 3 / (4 + 4))
    # Longest common subsequence: the cat on mat, of 6 and 6 words.
    assert found["rouge_l"] == pytest.approx(100 * 2 * 4 / (6 + 6))
    assert found["exact"] == 0


def chrf(answer, reference, order=6, beta=2):
    """F-beta of the mean precision and recall of 1- to 6-grams, spaces left out."""
    answer, reference = answer.replace(" ", ""), reference.replace(" ", "")
    precisions, recalls = [], []
    for n in range(1, order + 1):
        a = [answer[i : i + n] for i in range(len(answer) - n + 1)]
        r = [reference[i : i + n] for i in range(len(reference) - n + 1)]
        if a and r:
            common = sum(min(a.count(gram), r.count(gram)) for gram in {*a})
            precisions.append(common / len(a))
            recalls.append(common / len(r))
    p, r = np.mean(precisions), np.mean(recalls)
    return 100 * (1 + beta**2) * p * r / (beta**2 * p + r) if p + r else 0


def test_chrf_is_the_f_score_of_character_n_grams():
    (found,) = scores.rows([SAID], [WANTED])
    assert found["chrf"] == pytest.approx(chrf(SAID, WANTED), abs=1e-6)


def test_the_right_answer_scores_100_and_an_empty_one_0():
    right, empty = scores.rows([f" {WANTED}\n", ""], [WANTED, WANTED])
    assert right == dict.fromkeys(scores.NAMES, pytest.approx(100))
    assert empty == dict.fromkeys(scores.NAMES, 0)


def test_a_reference_without_words_is_met_by_an_answer_without_words():
    assert scores.f1("...", "?") == 100 and scores.f1("one", "?") == 0


def test_a_bootstrap_gives_the_interval_of_a_mean():
    """Oracle: the normal interval mean +- 1.96 s / sqrt(n), near for n = 400."""
    value_N = np.random.default_rng(0).normal(5.0, 2.0, 400)
    values = value_N.tolist()
    found = scores.bootstrap(values, seed=1)
    half = 1.96 * value_N.std() / 20
    assert found.mean == pytest.approx(value_N.mean())
    assert found.low == pytest.approx(value_N.mean() - half, abs=0.05 * half)
    assert found.high == pytest.approx(value_N.mean() + half, abs=0.05 * half)
    assert found == scores.bootstrap(values, seed=1)


def test_equal_values_leave_no_doubt():
    assert scores.bootstrap([3.0] * 5, seed=0) == (3.0, 3.0, 3.0)


def test_mistakes_are_told():
    with pytest.raises(ValueError, match="2 answers but 1 reference"):
        scores.rows(["a", "b"], ["a"])
    with pytest.raises(ValueError, match="not one value"):
        scores.bootstrap([], seed=0)


def test_a_missing_package_is_named_with_the_command(monkeypatch):
    real = builtins.__import__

    def absent(name, *args, **kwargs):
        if name.startswith("sacrebleu"):
            raise ModuleNotFoundError("No module named 'sacrebleu'", name="sacrebleu")
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", absent)
    with pytest.raises(ValueError, match=r"package sacrebleu.*pip install .*sacrebleu"):
        scores.rows(["a"], ["a"])
