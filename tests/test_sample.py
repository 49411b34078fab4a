"""Decoding against recomputation, filters against NumPy, texts against streams."""

import json
import math
import re
import shutil
import subprocess
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax import model as models
from gpt_jax import runs, sample, tokenizers
from gpt_jax.sample import LENGTH, STOP
from tests import serving, tiny
from tests.cases import few

CONTEXT = 16
PLAIN = {
    "temperature": 0.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "max_new": 99,
}
KINDS = {
    "full": {"window": 0, "rope_base": 10000.0, "rope_scaling": None},
    "local": {"window": 4, "rope_base": 500.0, "rope_scaling": None},
}


def build(**overrides):
    """A tiny model whose weights are large enough to say different things."""
    cfg = tiny.cfg(**{"context_length": CONTEXT, **overrides})
    params = models.init(cfg, jax.random.key(3))
    return models.GPT(cfg), jax.tree.map(lambda x: 5 * x, params)


def ragged(rows, vocab, width=CONTEXT, seed=0):
    """Right-padded random prompts; the pads are no token of the model's own making."""
    rng = np.random.default_rng(seed)
    return rng.integers(0, vocab, (rows, width), dtype=np.int32)


def keys(n, seed=0):
    return jax.random.split(jax.random.key(seed), n)


CHEAP = {"xla_backend_optimization_level": 0}  # compiles in half the time
generate = jax.jit(
    sample.generate, static_argnames=("model", "max_length"), compiler_options=CHEAP
)


@partial(jax.jit, static_argnames="model", compiler_options=CHEAP)
def forward(params, tokens_BT, *, model):
    return model.apply({"params": params}, tokens_BT)[0]


def greedy_without_cache(model, params, prompt, most):
    """The likeliest token again and again, each from a whole new forward pass."""
    ids = list(prompt)
    while len(ids) < most:
        padded = np.zeros((1, CONTEXT), np.int32)
        padded[0, : len(ids)] = ids
        logits_BTV = forward(params, padded, model=model)
        ids.append(int(logits_BTV[0, len(ids) - 1].argmax()))
    return ids


# ---------------------------------------------------------------- the decode loop

OPTIONS = {
    "learned positions, tied": {},
    "rope, grouped queries": {"position": "rope", "n_kv_heads": 2, "norm": "rmsnorm"},
    "window, soft-caps, untied": {
        "pattern": (KINDS["local"],),
        "attn_softcap": 3.0,
        "logit_softcap": 9.0,
        "tie_embeddings": False,
        "head_bias": True,
    },
    "pattern, qk-norm, gated": {
        "pattern": (KINDS["local"], KINDS["full"]),
        "n_layers": 3,
        "position": "rope",
        "qk_norm": True,
        "gated": True,
        "norm_placement": "both",
        "n_kv_heads": 1,
        "vocab_multiple": 8,
        "tie_embeddings": False,
    },
    "scanned layers": {
        "pattern": (KINDS["local"], KINDS["full"]),
        "n_layers": 5,
        "position": "rope",
        "scan_layers": True,
    },
}


@pytest.mark.fault(20)
@pytest.mark.parametrize(
    "option", few(OPTIONS, "learned positions, tied", "pattern, qk-norm, gated")
)
def test_greedy_with_cache_equals_recomputation_for_ragged_rows_up_to_the_limit(option):
    model, params = build(**OPTIONS[option])
    lengths = np.array([1, 5, CONTEXT - 1, CONTEXT, 9], np.int32)
    tokens_BT = ragged(len(lengths), 61)
    sampling = sample.rows_of([PLAIN] * len(lengths))
    loose = sample.laid_out(model, params, rows=len(lengths))
    tokens_BS, length_B, reason_B = generate(
        loose[1],
        tokens_BT,
        lengths,
        sampling,
        keys(5),
        model=loose[0],
        max_length=CONTEXT,
        stop_id=-1,
    )
    assert (length_B == CONTEXT).all() and (reason_B == LENGTH).all()
    for row, length, found in zip(tokens_BT, lengths, tokens_BS, strict=True):
        wanted = greedy_without_cache(model, params, row[:length], CONTEXT)
        assert found.tolist() == wanted
    assert len(set(tokens_BS[0].tolist())) > 4  # not one token for ever


@pytest.mark.parametrize(
    "option",
    few(["learned positions, tied", "scanned layers"], "learned positions, tied"),
)
def test_a_single_row_chooses_the_same_tokens_with_weights_laid_out_for_it(option):
    model, params = build(**OPTIONS[option])
    prompt_BT = ragged(1, 61, width=5)
    loose = sample.laid_out(model, params, rows=1)
    assert "transposed" in loose[1]["block_0"]["mlp"]["up"]
    tokens_BS, _, _ = generate(
        loose[1],
        prompt_BT,
        np.array([5], np.int32),
        sample.rows_of([PLAIN]),
        keys(1),
        model=loose[0],
        max_length=CONTEXT,
        stop_id=-1,
    )
    wanted = greedy_without_cache(model, params, prompt_BT[0], CONTEXT)
    assert tokens_BS[0].tolist() == wanted


@pytest.mark.fault(20)
def test_a_row_ends_at_its_stop_token_its_max_new_or_the_limit_and_stays_ended():
    model, params = build()
    prompt = [7, 8, 9]
    free = greedy_without_cache(model, params, prompt, CONTEXT)
    stop_id = free[8]
    first = free.index(stop_id, 3)
    tokens_BT = np.zeros((5, CONTEXT), np.int32)
    tokens_BT[:, :3] = prompt
    tokens_BT[3, :first] = free[:first]
    rows = [{**PLAIN, "max_new": n} for n in (99, 2, 0, 99, 1)]
    tokens_BS, length_B, reason_B = generate(
        params,
        tokens_BT,
        np.array([3, 3, 3, first, 3], np.int32),
        sample.rows_of(rows),
        keys(5),
        model=model,
        max_length=CONTEXT,
        stop_id=stop_id,
    )
    assert first > 4
    assert length_B.tolist() == [first + 1, 5, 3, first + 1, 4]
    assert reason_B.tolist() == [STOP, LENGTH, LENGTH, STOP, LENGTH]
    for row, length in zip(tokens_BS.tolist(), length_B.tolist(), strict=True):
        assert row == free[:length] + [0] * (CONTEXT - length)


# ---------------------------------------------------------------- filters


def kept_by_numpy(logits, top_k, top_p, min_p):
    """The set of ids that the filters keep, by sorting; no ties in the logits."""
    order = np.argsort(-logits)
    if top_k:
        order = order[:top_k]
    chance = np.exp(logits[order].astype(np.float64) - logits.max())
    if top_p < 1:
        share = np.cumsum(chance) / chance.sum()
        order = order[: 1 + int((share < top_p).sum())]
    best = logits.max()
    return {int(i) for i in order if np.exp(np.float64(logits[i] - best)) >= min_p}


kept = jax.jit(lambda logits, sampling: sample.keep(logits, sampling))


@pytest.mark.parametrize("spread", [0.05, 1.0, 6.0])
def test_filters_keep_what_numpy_keeps_in_small_and_large_vocabularies(spread):
    rng = np.random.default_rng(int(10 * spread))
    choices = {
        "top_k": [0, 1, 3, 300, 10**12],
        "top_p": [1.0, 0.9, 0.5],
        "min_p": [0, 0.2],
    }
    rows = [
        {**PLAIN, "top_k": k, "top_p": p, "min_p": m}
        for k in choices["top_k"]
        for p in choices["top_p"]
        for m in choices["min_p"]
    ]
    for vocab in (5, 700):
        even_V = np.linspace(-4 * spread, 4 * spread, vocab, dtype=np.float32)
        logits_BV = rng.permuted(np.tile(even_V, (len(rows), 1)), axis=1)
        logits_BV -= logits_BV.max(-1, keepdims=True)
        found_BV = np.asarray(kept(logits_BV, sample.rows_of(rows)))
        for row, logits, found in zip(rows, logits_BV, found_BV, strict=True):
            wanted = kept_by_numpy(logits, row["top_k"], row["top_p"], row["min_p"])
            got = set(np.flatnonzero(np.isfinite(found)).tolist())
            assert len(got ^ wanted) <= (row["top_p"] < 1), row  # float32 sums
            assert (found[list(got)] == logits[list(got)]).all()


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    logits=st.lists(st.floats(-1e4, 1e4, width=32), min_size=6, max_size=6),
    temperature=st.floats(0, 1e6),
    top_k=st.integers(0, 9),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
)
def test_the_best_token_always_stays_and_chances_sum_to_one(
    logits, temperature, top_k, top_p, min_p
):
    given_ = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
    row = {**PLAIN, **given_, "min_p": min_p}
    sample.check(**row)
    sampling = sample.rows_of([row])
    logits_BV = jnp.asarray([logits], jnp.float32)
    found_V = kept(sample.temper(logits_BV, sampling.temperature), sampling)[0]
    best = int(np.argmax(logits_BV[0]))
    assert np.isfinite(found_V[best]) and found_V[best] == found_V.max()
    chance_V = jax.nn.softmax(found_V)
    np.testing.assert_allclose(chance_V.sum(), 1, atol=1e-5)
    assert (chance_V[~np.isfinite(found_V)] == 0).all()


def test_switched_off_filters_keep_everything_even_a_far_tail():
    logits_BV = jnp.asarray([[0.0, -90.0, -1e4] + [-20.0] * 400])
    assert (kept(logits_BV, sample.rows_of([PLAIN])) == logits_BV).all()


def test_the_penalty_makes_seen_tokens_less_likely_whatever_their_sign():
    logits_BV = jnp.asarray([[2.0, -2.0, 2.0, -2.0]])
    seen_BV = jnp.asarray([[True, True, False, False]])
    found = sample.penalise(logits_BV, seen_BV, jnp.asarray([2.0]))
    assert found.tolist() == [[1.0, -4.0, 2.0, -2.0]]


def test_the_penalty_counts_the_prompt_and_the_text_but_no_pads():
    logits_BV = jnp.asarray([[3.0, 2.9, 2.8, 0.0]] * 3)
    tokens_BS = jnp.asarray([[1, 0, 0], [1, 0, 0], [0, 1, 0]])
    sampling = sample.rows_of([{**PLAIN, "repetition_penalty": 2.0}] * 3)
    one_B = jnp.ones(3, jnp.int32)
    found = sample.choose(
        logits_BV, tokens_BS, one_B, jnp.asarray([1, 2, 2]), sampling, keys(3)
    )
    assert found.tolist() == [0, 2, 2]


def chi_square(counts, chances):
    expected = counts.sum() * np.asarray(chances)
    return float(((counts - expected) ** 2 / expected).sum())


def drawn(logits_V, *, one_key=False, **changes):
    """How often each token came in 20,000 draws: by as many keys, or by one key."""
    many = 20_000
    row = {**PLAIN, "temperature": 1.0, **changes}
    key_B, position_B = keys(many, seed=2), jnp.ones(many, jnp.int32)
    if one_key:
        key_B, position_B = key_B[jnp.zeros_like(position_B)], jnp.arange(many)
    found = choose(
        jnp.broadcast_to(logits_V, (many, len(logits_V))),
        jnp.zeros((many, 1), jnp.int32),
        jnp.zeros(many, jnp.int32),
        position_B,
        sample.rows_of([row] * many),
        key_B,
    )
    return np.bincount(found, minlength=len(logits_V))


choose = jax.jit(lambda *args: sample.choose(*args))
FIVE = jnp.asarray([1.0, -0.5, 0.3, 0.0, 2.0])


@pytest.mark.parametrize("one_key", [False, True])
def test_draws_of_many_keys_or_positions_follow_the_tempered_softmax(one_key):
    counts = drawn(FIVE, temperature=0.7, one_key=one_key)
    assert chi_square(counts, jax.nn.softmax(FIVE / 0.7)) < 18.5  # 0.1 % of samples
    assert chi_square(counts, jax.nn.softmax(FIVE)) > 500  # the test can tell


def test_what_was_filtered_out_is_never_drawn_and_the_rest_keeps_its_odds():
    counts = drawn(FIVE, top_k=3)
    assert counts[1] == counts[3] == 0
    left = jnp.asarray([0, 2, 4])
    assert chi_square(counts[left], jax.nn.softmax(FIVE[left])) < 13.8


# ---------------------------------------------------------------- texts and streams


BYTES = tokenizers.train("byte", iter(()))


@pytest.fixture(scope="module")
def byte_model():
    """What texts and stream need of a run; a model of bytes with a context of 32."""
    model, params = build(vocab_size=BYTES.vocab_size, context_length=32)
    return {"model": model, "params": params, "tokenizer": BYTES}


class Other:
    """The tokenizer of bytes, were another token its end of text, or none."""

    def __init__(self, *, eos_id):
        self.eos_id, self.opening = eos_id, []
        self.ends = () if eos_id is None else (eos_id,)
        self.encode, self.decode_stream = BYTES.encode, BYTES.decode_stream


LIVELY = {**PLAIN, "temperature": 1.0, "top_k": 60, "max_new": 20}


def texts(run, prompts, *, count=1, seed=1, stop=(), **changes):
    options = {**LIVELY, **changes}
    return sample.texts(
        prompts=prompts, count=count, seed=seed, stop=stop, **options, **run
    )


def test_a_row_is_the_same_alone_less_padded_and_beside_other_settings(byte_model):
    own = {**LIVELY, "top_p": 0.9, "repetition_penalty": 1.2}
    others = [
        PLAIN,
        {**own, "temperature": 3.0, "top_k": 0, "top_p": 0.999},
        {**own, "repetition_penalty": 1.7, "min_p": 0.1, "max_new": 2},
    ]
    key_B = keys(4, seed=5)
    tokens_BT = ragged(4, 257, width=32)
    lengths = np.array([4, 19, 1, 30], np.int32)

    def run(rows, width):
        fixed = {"model": byte_model["model"], "stop_id": 256}
        few = (sample.rows_of([own, *others][:rows]), key_B[:rows])
        tokens = tokens_BT[:rows, :width]
        state = sample._start(
            byte_model["params"], tokens, lengths[:rows], *few, max_length=32, **fixed
        )
        state = sample._advance(byte_model["params"], state, *few, 99, **fixed)
        return state.tokens_BS[0].tolist()

    assert run(1, 16) == run(4, 32)
    assert len(set(run(1, 16))) > 9


def test_a_text_depends_on_its_prompt_seed_and_number_only(byte_model, monkeypatch):
    prompts = ["one", "longer than sixteen"]
    batch = texts(byte_model, prompts, count=2)
    assert [t.prompt for t in batch] == [p for p in prompts for _ in range(2)]
    assert batch[0].ids != batch[1].ids
    assert texts(byte_model, ["one"]) == batch[:1]
    assert texts(byte_model, ["one"], seed=2)[0].ids != batch[0].ids
    monkeypatch.setattr(sample, "ROWS", 4)  # 4 rows, then 2 and 2 that do nothing
    thrice = texts(byte_model, [*prompts, "longer than sixteen"], count=2)
    assert thrice == [*batch, *batch[2:]]


def test_prompts_do_not_share_their_luck_and_half_a_character_at_the_end_shows(
    byte_model,
):
    blind = {**byte_model, "params": jax.tree.map(jnp.zeros_like, byte_model["params"])}
    prompts = ["of equal length to", "a blind model same"]
    found = texts(blind, prompts, count=2, seed=0, top_k=0, max_new=10)
    assert len({tuple(t.ids) for t in found}) == 4
    assert any(0xC2 <= t.ids[-1] <= 0xF4 for t in found)  # the first byte of several
    assert [t.text for t in found] == [BYTES.decode(t.ids) for t in found]


@pytest.mark.parametrize("seed", [0, -5, 2**70])
def test_a_stream_is_the_text_in_whole_characters(byte_model, seed):
    (wanted,) = texts(byte_model, ["Grüße"], seed=seed, temperature=0.7)
    options = {**LIVELY, "temperature": 0.7}
    pieces = sample.stream(prompt="Grüße", seed=seed, stop=(), **options, **byte_model)
    shown = []
    while True:
        try:
            shown.append(next(pieces))
        except StopIteration as end:
            assert end.value == wanted
            break
    assert "".join(shown) == wanted.text and len(shown) > 2


def test_changing_settings_compiles_nothing_new(byte_model):
    texts(byte_model, ["warm"])
    before = sample._start._cache_size(), sample._advance._cache_size()
    texts(byte_model, ["warmer"], temperature=0, top_p=0.5, min_p=0.1, max_new=22)
    texts(byte_model, ["w"], top_k=0, repetition_penalty=1.3, max_new=19, seed=9)
    assert (sample._start._cache_size(), sample._advance._cache_size()) == before


@pytest.mark.fault(20)
def test_generation_ends_at_the_context_and_says_so(byte_model):
    prompts = ["x" * 32, "x" * 31, "x" * 30, "x"]
    full, last, short, _ = texts(byte_model, prompts, max_new=1)
    assert (full.ids, full.text, full.reason) == ([], "", "length")
    assert full.detail == last.detail == "the context of 32 tokens is full"
    assert (len(last.ids), last.reason) == (1, "length")
    assert (len(short.ids), short.detail) == (1, "1 new tokens")
    (far,) = texts(byte_model, ["x" * 12], max_new=10**12)
    assert (len(far.ids), far.reason, far.detail) == (20, "length", full.detail)
    (none,) = texts(byte_model, ["x" * 16], max_new=0)
    assert (none.ids, none.reason) == ([], "length")


def test_beyond_its_context_a_text_goes_on_from_the_last_half(byte_model):
    """Oracle: one full context after another, each from the last half of the one
    before; a longer prompt beside it fills up sooner."""
    fixed = {**byte_model, **PLAIN, "seed": 1, "stop": []}
    go_on = {**fixed, "max_new": 70, "beyond_context": True}
    prompts = ["hello", "hello there"]
    done = sample.texts(prompts=prompts, count=1, **go_on)
    assert [text.detail for text in done] == ["70 new tokens"] * 2
    for prompt, text in zip(prompts, done, strict=True):
        ids, wanted = BYTES.encode(prompt), []
        while len(wanted) < 70:
            fixed["max_new"] = 70 - len(wanted)
            (new,) = sample.texts(prompts=[ids], count=1, **fixed)
            wanted, ids = wanted + new.ids, (ids + new.ids)[-16:]
        assert text.ids == wanted
    stream = sample.stream(prompt="hello", **go_on)
    assert "".join(stream) == done[0].text


def test_a_prompt_that_ends_in_a_space_is_told_where_words_begin_with_theirs():
    bpe = tokenizers.train("bpe:300", ["the cat sat on the mat and the hat " * 9])
    assert "leave the space off" in sample.advice("the cat ", bpe)
    assert sample.advice("the cat", bpe) == "" == sample.advice("the cat ", BYTES)
    words = tokenizers.train("word", ["the cat"])  # to which spaces are nothing
    assert sample.advice("the cat ", words) == ""


def test_stop_strings_and_stop_tokens_end_a_text_and_are_cut_off(byte_model):
    (free,) = texts(byte_model, ["stop"])
    mark = free.text[5:7]
    end = free.text.index(mark)
    (cut,) = texts(byte_model, ["stop"], stop=["never there", mark])
    assert (cut.text, cut.reason) == (free.text[:end], "stop")
    assert cut.detail == f"stop string {mark!r}"
    assert cut.ids == free.ids[: len(cut.ids)] and len(cut.ids) < len(free.ids)
    token = free.ids[4]
    (ended,) = texts(byte_model, ["stop"], stop=[token])
    assert ended.ids == free.ids[: free.ids.index(token)]
    assert (ended.reason, ended.detail) == ("stop", f"stop token {token}")


@pytest.mark.fault(20)
def test_end_of_text_ends_a_text_and_is_not_part_of_it(byte_model):
    (free,) = texts(byte_model, ["end"], temperature=0)
    run = {**byte_model, "tokenizer": Other(eos_id=free.ids[0])}
    (done,) = texts(run, ["end"], temperature=0)
    assert (done.ids, done.text, done.reason) == ([], "", "stop")
    assert done.detail == "end of text"
    (begun,) = texts(run, [""], temperature=0)
    assert begun.ids == texts(run, [free.ids[:1]], temperature=0)[0].ids


@pytest.mark.fault(20)
def test_an_empty_prompt_without_end_of_text_is_a_newline_or_an_error(byte_model):
    run = {**byte_model, "tokenizer": Other(eos_id=None)}
    (empty,), (line,) = texts(run, [""]), texts(run, ["\n"])
    assert empty.ids == line.ids and empty.prompt == ""
    run["tokenizer"] = tokenizers.train("char", iter(["abc"]))
    with pytest.raises(ValueError, match="neither an end-of-text token nor a newline"):
        texts(run, [""])


@pytest.mark.parametrize(
    "prompt, changes, words",
    [
        ("x" * 33, {}, "33 tokens but the model's context is 32"),
        ([3, 257], {}, "id 257 .* vocabulary of 257"),
        ([-1], {}, "id -1"),
        ("x", {"temperature": -0.1}, "temperature is -0.1 but must be 0 or more"),
        ("x", {"temperature": math.nan}, "temperature"),
        ("x", {"temperature": math.inf}, "temperature"),
        ("x", {"top_k": -1}, "top_k is -1"),
        ("x", {"top_p": 0.0}, "top_p is 0.0 but must be above 0"),
        ("x", {"top_p": 1.1}, "top_p"),
        ("x", {"min_p": -0.1}, "min_p"),
        ("x", {"repetition_penalty": 0.0}, "repetition_penalty"),
        ("x", {"max_new": -1}, "max_new"),
        ("x", {"count": 0}, "count 0"),
        ("x", {"stop": [""]}, "stop string is empty"),
        ("x", {"stop": "end"}, "must be a list"),
    ],
)
def test_mistakes_are_told_before_anything_runs(byte_model, prompt, changes, words):
    with pytest.raises(ValueError, match=words):
        texts(byte_model, [prompt], **changes)


def test_a_stream_tells_mistakes_before_its_first_piece(byte_model):
    with pytest.raises(ValueError, match="stop string is empty"):
        sample.stream(prompt="x", seed=0, stop=[""], **LIVELY, **byte_model)
    with pytest.raises(ValueError, match="33 tokens"):
        sample.stream(prompt="x" * 33, seed=0, stop=[], **LIVELY, **byte_model)


def test_no_prompts_give_no_texts(byte_model):
    assert texts(byte_model, []) == []


# ---------------------------------------------------------------- transcripts


def read(text, stop, tokenizer):
    """Pushes a text's bytes; returns what was shown and what the transcript holds."""
    scribe = sample.Transcript(tokenizer, [], stop)
    shown = ""
    for token in text.encode():
        shown += scribe.push(token)
        if scribe.stopped_by is not None:
            break
    return shown + scribe.flush(), scribe


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    text=st.text("abé", max_size=12),
    stop=st.lists(st.text("abé", min_size=1, max_size=4), max_size=3),
)
def test_a_transcript_shows_the_text_before_the_first_stop_string(text, stop):
    shown, scribe = read(text, stop, BYTES)
    prefixes = [text[:n] for n in range(len(text) + 1)]
    hit = next((p for p in prefixes if any(s in p for s in stop)), None)
    wanted = text if hit is None else hit[: min(hit.index(s) for s in stop if s in hit)]
    assert shown == scribe.text == wanted
    assert (scribe.stopped_by is not None) == (hit is not None)


def test_a_transcript_never_shows_half_a_character_or_the_start_of_a_stop_string():
    scribe = sample.Transcript(BYTES, [], ["END"])
    shown = [scribe.push(token) for token in "é ENe".encode()]
    assert shown == ["", "é", " ", "", "", "ENe"]


def test_words_continue_the_prompt_with_a_space_and_unknown_ids_are_no_text():
    words = tokenizers.train("word", iter(["to be, or"]))
    scribe = sample.Transcript(words, words.encode("to"), [])
    shown = [scribe.push(token) for token in [*words.encode("be, or"), 10**6]]
    assert shown == [" be", ",", " or", ""]


# ---------------------------------------------------------------- the door


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the tiny config whose tokens are bytes."""
    return serving.byte_run(tmp_path_factory.mktemp("runs") / "bytes")


def door(*args, text=""):
    """Runs the door; returns its exit code, stdout and stderr."""
    command = [sys.executable, "-m", "experiments.sample", *args]
    done = subprocess.run(
        command, input=text.encode(), capture_output=True, timeout=240
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def test_the_door_streams_one_prompt_as_the_models_makers_say(run_folder, tmp_path):
    folder = tmp_path / "published"
    shutil.copytree(run_folder, folder)
    drawn = {"do_sample": False, "min_new_tokens": 3}
    (folder / "generation_config.json").write_text(json.dumps(drawn))
    code, out, err = door(f"--run={folder}", "--prompt_file=-", text="Grüße\n")
    assert code == 0
    run = runs.open(run_folder)
    parts = {"model": run.model, "params": run.params, "tokenizer": run.tokenizer}
    (wanted,) = texts(parts, ["Grüße"], temperature=0.0, max_new=200)
    assert out == f"Grüße{wanted.text}\n" and len(out) > 12
    assert "[generation_config.json says min_new_tokens 3, which nothing" in err
    told = "the context of 32 tokens is full; --beyond_context goes on when the context"
    assert err.splitlines()[-1] == f"[stopped: {told} is full]"


@pytest.mark.slow
def test_the_door_goes_on_beyond_the_context(run_folder):
    wanted = ["--prompt=Once", "--beyond_context", "--max_new_tokens=70"]
    code, _, err = door(f"--run={run_folder}", *wanted)
    assert code == 0 and err.splitlines()[-1] == "[stopped: 70 new tokens]"


@pytest.mark.parametrize("name", ["sample", "chat"])
def test_the_help_says_where_a_settings_default_comes_from(name):
    command = [sys.executable, "-m", f"experiments.{name}", "--help"]
    told = subprocess.run(command, capture_output=True, text=True).stdout
    for flag, default in (("temperature", "0.8"), ("top_p", "1"), ("top_k", "0")):
        origin = f"the model's generation_config.json says, else {default}\\)"
        assert re.search(f"--{flag}: .* \\(default: what {origin}$", told, re.M)
    assert "default: None" not in told


def test_the_door_puts_headers_over_many_texts(run_folder):
    prompts = ["--prompt=one", "--prompt=two", "--count=2", "--max_new_tokens=3"]
    code, out, _ = door(f"--run={run_folder}", *prompts)
    assert code == 0
    headers = re.findall("^--- prompt (.) of 2, completion (.) of 2, (.*)$", out, re.M)
    ended = "stopped: 3 new tokens"
    assert headers == [(p, c, ended) for p in "12" for c in "12"]
    assert out.count("\none") == out.count("\ntwo") == 2


@pytest.mark.parametrize(
    "args, words",
    [
        ([], "--run is missing"),
        (["--run=x", "--step=last"], "--step=last is not best, newest or a step"),
        (["--run=x", "--prompt_file=no/such"], "No such file or directory: no/such"),
        (["--run=x", "--temperature=-1"], "temperature is -1.0 but must be 0 or more"),
        (["--run=no/such/run"], "no/such/run is not a run folder"),
    ],
)
def test_mistakes_at_the_door_are_one_sentence_and_exit_code_2(args, words):
    code, out, err = door(*args)
    assert code == 2 and not out
    assert words in err and err.count("\n") == 1


def test_weights_wider_than_the_activations_are_rounded_once_with_the_same_logits():
    cfg = tiny.cfg(dtype="bfloat16")
    params = models.init(cfg, jax.random.key(0))
    gpt, laid = sample.laid_out(models.GPT(cfg), params, rows=2)
    again = sample.laid_out(gpt, laid, rows=2)[1]
    assert again is laid
    assert laid["block_0"]["mlp"]["up"]["kernel"].dtype == jnp.bfloat16
    assert laid["block_0"]["norm1"]["scale"].dtype == jnp.float32
    tokens_BT = jnp.arange(8)[None]
    one, other = (
        tiny.jit(lambda p: gpt.apply({"params": p}, tokens_BT)[0])(tree)
        for tree in (params, laid)
    )
    np.testing.assert_array_equal(one, other)


# ---------------------------------------------------------------- prompt lookup


def test_a_guess_is_what_stood_behind_the_newest_tokens_where_they_stood_last():
    tokens_BS = np.zeros((4, 12), np.int32)
    for row, ids in enumerate(([1, 2, 3, 9, 1, 2, 4, 5, 1, 2], [1, 2, 3], [7], [5, 5])):
        tokens_BS[row, : len(ids)] = ids
    guess_BM, found_B = sample.guess(
        jnp.asarray(tokens_BS), jnp.array([10, 3, 1, 2]), 3
    )
    assert found_B.tolist() == [True, False, False, False]
    assert guess_BM[0].tolist() == [4, 5, 1]


HOT = {"temperature": 0.7, "repetition_penalty": 1.3, "top_k": 20}


@pytest.mark.parametrize(
    "options",
    few(
        ["learned positions, tied", "pattern, qk-norm, gated"],
        "learned positions, tied",
    ),
)
def test_guesses_change_no_text_and_save_passes(options):
    model, params = build(**{**OPTIONS[options], "context_length": 64})
    prompts = ragged(6, model.cfg.vocab_size, width=8)
    prompts[:3, 4:] = prompts[:3, :4]  # that repeat themselves
    length_B = jnp.array([8, 7, 8, 8, 3, 1])
    rows = [{**PLAIN, **(HOT if i == 2 else {})} for i in range(6)]
    rows[1]["max_new"] = 11
    sampling, key_B = sample.rows_of(rows), keys(6)
    tables = {}
    for lookup in (0, 4):
        state = jax.jit(
            partial(sample.start, model=model, max_length=64, stop_id=5),
            compiler_options=CHEAP,
        )(params, jnp.asarray(prompts), length_B, sampling, key_B)
        run = jax.jit(
            partial(sample.advance, model=model, stop_id=5, lookup=lookup),
            compiler_options=CHEAP,
        )
        some = run(params, state, sampling, key_B, 20)
        tables[lookup] = some.length_B, run(params, some, sampling, key_B, 99)
    (short_B, plain), (long_B, guessed) = tables[0], tables[4]
    for name in ("tokens_BS", "length_B", "reason_B"):
        np.testing.assert_array_equal(getattr(guessed, name), getattr(plain, name))
    assert (long_B >= short_B).all()
    if "learned" in options:  # the other says nothing twice in so few steps
        assert (long_B > short_B).any()


@pytest.mark.parametrize("same", [True, False], ids=["its like", "another"])
def test_a_draft_changes_no_text_and_saves_passes_where_it_agrees(same):
    model, params = build(context_length=64, position="rope")
    small = build(context_length=64, position="rope", n_layers=1, d_model=16)
    draft, draft_params = (model, params) if same else small
    prompts, key_B = jnp.asarray(ragged(4, model.cfg.vocab_size, width=8)), keys(4)
    rows = [{**PLAIN, **(HOT if i % 2 else {})} for i in range(4)]
    rows[2]["max_new"] = 11
    given = (jnp.array([8, 3, 5, 1]), sample.rows_of(rows), key_B)
    guessing = {"draft": draft, "draft_params": draft_params}
    tables = []
    for lookup, more in ((0, {}), (3, guessing)):
        begin = partial(sample.start, model=model, max_length=64, stop_id=5)
        step = partial(sample.advance, model=model, stop_id=5, lookup=lookup)
        static = ("draft",)
        begin = jax.jit(begin, static_argnames=static, compiler_options=CHEAP)
        step = jax.jit(step, static_argnames=static, compiler_options=CHEAP)
        state = begin(params, prompts, *given, **more)
        some = step(params, state, *given[1:], 5, **more)
        tables.append((some.length_B, step(params, some, *given[1:], 99, **more)))
    (short_B, plain), (long_B, guessed) = tables
    for name in ("tokens_BS", "length_B", "reason_B"):
        np.testing.assert_array_equal(getattr(guessed, name), getattr(plain, name))
    assert (long_B >= short_B).all()
    if same:  # every guess is right: four tokens a pass, until a row ends
        whole_B = jnp.minimum(given[0] + 1 + 5 * 4, plain.length_B)
        np.testing.assert_array_equal(long_B, whole_B)


@pytest.mark.parametrize(
    "other, sentence",
    [
        ({"vocab_size": 60}, "the draft has 60 tokens, but the model has"),
        ({"context_length": 8}, "the draft has a context of 8, shorter than the"),
    ],
)
def test_a_draft_that_cannot_guess_is_refused(other, sentence):
    model, params = build()
    with pytest.raises(ValueError, match=sentence):
        sample.texts(
            **{"model": model, "params": params, "tokenizer": None, "prompts": [[1]]},
            **{
                "count": 1,
                "seed": 0,
                "stop": [],
                "draft": sample.Draft(*build(**other)),
            },
            **PLAIN,
        )


def test_too_many_guesses_are_refused():
    model, params = build()
    with pytest.raises(ValueError, match="lookup is 99; it must be 0 to 15"):
        sample.texts(
            **{"model": model, "params": params, "tokenizer": None, "prompts": [[1]]},
            **{"count": 1, "seed": 0, "stop": [], "lookup": 99},
            **PLAIN,
        )
