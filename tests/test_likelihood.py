"""Likelihoods against sums of single log-probabilities taken in NumPy."""

import math

import jax
import numpy as np
import pytest

from gpt_jax import corpora, model, tokenizers
from gpt_jax.evaluate import likelihood, text
from tests import tiny

BYTES = tokenizers.train("byte", [])
CFG = tiny.cfg(vocab_size=BYTES.vocab_size, context_length=16)
GPT = model.GPT(CFG)


def quiet(more: int) -> None:
    """A progress display that shows nothing."""


@pytest.fixture(scope="module")
def params():
    # Larger than at first: it is sure of some tokens and surprised by others.
    return jax.tree.map(lambda x: 4 * x, model.init(CFG, jax.random.key(1)))


@pytest.fixture(scope="module")
def scorer(params):
    return likelihood.scorer(GPT, params)


@pytest.fixture(scope="module")
def logits(params):
    """Returns a function from at most 16 ids to logits [T, V] in float64."""
    forward = tiny.jit(lambda ids: GPT.apply({"params": params}, ids)[0])

    def of(ids):
        padded = np.zeros((1, 16), np.int32)
        padded[0, : len(ids)] = ids
        return np.asarray(forward(padded), np.float64)[0, : len(ids)]

    return of


def logp(logits_TV, targets):
    """Returns the log-probability of each target."""
    norm_T = np.log(np.exp(logits_TV).sum(-1))
    return logits_TV[np.arange(len(targets)), targets] - norm_T


def test_spans_are_scored_as_if_each_were_alone(scorer, logits):
    rng = np.random.default_rng(0)
    spans = []
    for length in rng.integers(2, 18, 150):
        ids = rng.integers(0, CFG.vocab_size, length)
        spans.append(likelihood.Span(ids, int(rng.integers(1, length))))
    likeliest = [7, 3]
    while len(likeliest) < 12:
        likeliest.append(int(logits(likeliest)[-1].argmax()))
    spans += [likelihood.Span(likeliest, 10), likelihood.Span(likeliest, 11)]
    done = []
    found = list(likelihood.scores(scorer, spans, done.append))
    assert sum(done) == len(found) == len(spans)
    for span, score in zip(spans, found):
        ids = np.asarray(span.ids)
        parts = logp(logits(ids[:-1]), ids[1:])[-span.scored :]
        best = logits(ids[:-1]).argmax(-1)[-span.scored :]
        assert score.logp == pytest.approx(parts.sum(), rel=1e-4)
        assert score.greedy == (best == ids[-span.scored :]).all()
    assert found[-2].greedy and not found[0].greedy


def test_logits_in_chunks_give_the_same_scores(scorer, params, monkeypatch):
    rng = np.random.default_rng(1)
    spans = [likelihood.Span(rng.integers(0, 257, 12), 9) for _ in range(3)]
    whole = list(likelihood.scores(scorer, spans, quiet))
    monkeypatch.setattr(likelihood, "LOGITS_BYTES", 4 * 257 * 5)  # 5 positions
    pieces = list(likelihood.scores(likelihood.scorer(GPT, params), spans, quiet))
    assert [p.greedy for p in pieces] == [w.greedy for w in whole]
    np.testing.assert_allclose(
        [p.logp for p in pieces], [w.logp for w in whole], rtol=1e-5
    )


@pytest.mark.parametrize("size", [2, 9, 16, 17, 18, 33, 100])
@pytest.mark.parametrize("stride", [1, 5, 16])
def test_windows_score_every_id_but_the_first_once_with_enough_context(size, stride):
    ids = np.arange(size)
    seen = []
    for number, span in enumerate(likelihood.windows(ids, length=16, stride=stride)):
        assert len(span.ids) <= 17
        assert number == 0 or len(span.ids) == 17
        assert number == 0 or len(span.ids) - span.scored >= 16 - stride + 1
        seen += list(span.ids[-span.scored :])
    assert seen == list(range(1, size))


def rolling(ids, length, stride):
    """Each id's own window, by the definition: where its window ends, then back."""
    for i in range(1, len(ids)):
        if i <= length:
            yield ids[:i], ids[i]
        else:
            end = length + 1 + stride * math.ceil((i - length) / stride)
            start = min(end, len(ids)) - length - 1
            yield ids[start:i], ids[i]


@pytest.mark.parametrize("stride", [3, 16])
def test_a_text_costs_the_sum_of_its_tokens(scorer, logits, stride, tmp_path):
    (tmp_path / "a.txt").write_text("Ein Käse, zwei Käse — and so on; no more of it.")
    corpus = corpora.open(str(tmp_path / "a.txt"), field="text", cache=tmp_path)
    texts = list(text.documents(corpus, BYTES))
    (only,) = texts
    assert only.ids[0] == BYTES.eos_id and only.bytes == len(only.ids) - 1 == 51
    found = text.evaluate(scorer, texts, length=16, stride=stride, show=quiet)
    nll = -sum(
        logp(logits(context)[-1:], [target])[0]
        for context, target in rolling(only.ids, 16, stride)
    )
    assert found["loss"] == pytest.approx(nll / 51, rel=1e-5)
    assert found["perplexity"] == pytest.approx(math.exp(nll / 51), rel=1e-4)
    assert found["bpb"] == pytest.approx(nll / 51 / math.log(2), rel=1e-5)
    assert found["tokens"] == 51 and found["context"] == 17 - stride


def test_the_first_token_is_only_read_where_nothing_begins_a_text():
    chars = tokenizers.train("char", ["aäb"])
    read = text.document(np.array(chars.encode("äab"), np.int32), 4, chars)
    assert len(read.ids) == 3 and read.bytes == 2


def test_a_pair_is_encoded_as_the_whole_and_spaces_go_to_what_follows():
    bpe = tokenizers.train("bpe:270", ["the cat the cat the cat the dog"] * 9)
    before, after = likelihood.encode_pair(bpe, "the ", "cat")
    assert before == bpe.encode("the") and after == bpe.encode(" cat")
    before, after = likelihood.encode_pair(BYTES, "", "cat")
    assert before == [BYTES.eos_id] and after == BYTES.encode("cat")


def test_a_long_context_loses_its_oldest_ids():
    span = likelihood.fit(range(100), [7, 8], 16)
    assert span == likelihood.Span([*range(85, 100), 7, 8], 2)


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: likelihood.fit([1], [], 16), "no token"),
        (lambda: likelihood.fit([1], range(17), 16), "17 tokens .* context is 16"),
        (lambda: likelihood.encode_pair(BYTES, "a", ""), "cannot be scored"),
        (
            lambda: likelihood.encode_pair(tokenizers.train("char", ["ab"]), "", "a"),
            "empty context",
        ),
    ],
)
def test_what_cannot_be_scored_is_told(call, words):
    with pytest.raises(ValueError, match=words):
        call()


@pytest.mark.parametrize(
    "ids, changes, words",
    [
        ([1, 2], {"length": 17}, "window is 17: from 1 to 16"),
        ([1, 2], {"stride": 0}, "stride is 0: from 1 to the window, 16"),
        ([1], {}, "no token to predict"),
        ([1, 300], {}, "id 300 .* knows 257"),
    ],
)
def test_mistakes_in_a_text_are_told(scorer, ids, changes, words):
    texts = [text.Document(np.array(ids, np.int32), 1)]
    settings = {"length": 16, "stride": 16, **changes}
    with pytest.raises(ValueError, match=words):
        text.evaluate(scorer, texts, show=quiet, **settings)
