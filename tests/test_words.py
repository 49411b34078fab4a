"""The share of written words that are words of a text."""

import numpy as np
import pytest

from gpt_jax import tokenizers, words

TEXT = "It was a fine day. Don't go, Émile! " * 40 + "the end of 1 thing"


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:300", "word"])
@pytest.mark.parametrize("chunk", [7, 1 << 20])
def test_the_words_of_a_text_are_those_that_a_reader_sees(spec, chunk, monkeypatch):
    monkeypatch.setattr(words, "CHUNK", chunk)  # cuts amid words and letters
    tokenizer = tokenizers.train(spec, [TEXT])
    ids = np.array(tokenizer.encode(TEXT))
    found = words.known(ids, tokenizer)
    plain = {"it", "was", "a", "fine", "day", "go", "émile", "the", "end", "of"}
    plain |= {"thing"}
    if spec == "word":  # it parts at apostrophes
        assert found == plain | {"don", "t"}
    else:
        assert found == plain | {"don't"}


@pytest.mark.parametrize(
    "texts, share",
    [
        ([("It was", " a fine dxy. ")], 2 / 3),  # the prompt's words are not written
        ([("a fi", "ne day.")], 1.0),  # one that the prompt began is
        ([("", "fine da")], 1.0),  # one that was cut off does not count
        ([("", "Fine."), ("", "qqq ")], 0.5),
        ([("", "1 2 3!")], None),
    ],
)
def test_the_share_counts_whole_words_that_were_written(texts, share):
    assert words.share(texts, frozenset({"it", "was", "a", "fine", "day"})) == share
