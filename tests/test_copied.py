"""Copies against a search that tries every span."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax.evaluate import copied

WORDS = st.text(alphabet="ab☃", max_size=30)


def by_trying(text, others, least):
    found = []
    for start in range(len(text)):
        length = 0
        while start + length < len(text) and any(
            text[start : start + length + 1] in other for other in others
        ):
            length += 1
        found.append(length if length >= least else 0)
    return found


@settings(max_examples=150, deadline=None)
@given(
    st.lists(WORDS, max_size=3),
    st.lists(WORDS, max_size=3),
    st.integers(1, 6),
    st.sampled_from([1, 7, 1 << 22]),
)
def test_every_place_has_its_longest_copy(texts, others, least, chunk):
    whole, copied.CHUNK = copied.CHUNK, chunk  # stretches cross the chunks
    try:
        matches = copied.find(texts, others, least=least)
    finally:
        copied.CHUNK = whole
    assert [match.text for match in matches] == texts
    for match in matches:
        assert match.length_N.tolist() == by_trying(match.text, others, least)


def test_two_documents_do_not_join_to_a_copy():
    (match,) = copied.find(["abcdef"], ["xabc", "defx"], least=2)
    assert match.longest == "abc"


def test_a_summary_counts_characters_in_copies_of_each_length():
    source = "It is a truth universally acknowledged"
    texts = ["XXXX" + source[:20] + "YY" + source[-10:], "nothing of it"]
    found = copied.summary(copied.find(texts, [source], least=5), [5, 15, 30])
    assert found["texts"] == 2 and found["characters"] == 36 + 13
    assert found["longest"] == 20 and found["longest_text"] == source[:20]
    assert found["median_longest"] == 10
    assert found["copied"] == {5: 30 / 49, 15: 20 / 49, 30: 0.0}


def test_overlapping_copies_count_their_characters_once():
    (match,) = copied.find(["abcdefgh"], ["abcdef", "defgh"], least=3)
    assert match.length_N.tolist() == [6, 5, 4, 5, 4, 3, 0, 0]
    assert match.covered(3) == 8 and match.covered(6) == 6


def test_nothing_written_or_nothing_to_copy_from_is_no_copy():
    assert copied.find([], ["abc"], least=1) == []
    (match,) = copied.find(["abc"], [], least=1)
    assert match.longest == "" and match.covered(1) == 0
    assert copied.summary([], [10])["copied"] == {10: 0.0}


def test_a_least_length_below_1_is_refused():
    with pytest.raises(ValueError, match="least length of a copy is 0"):
        copied.find(["a"], ["a"], least=0)
