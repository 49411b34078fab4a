"""Properties that no module's own tests state over generated inputs.

Those of one module stand beside its other facts: round trips of bytes and characters
and streamed text in test_tokenizers.py, windows in test_data.py, filters of sampling in
test_sample.py.
"""

import math
import re

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs import common
from gpt_jax import chat, data, model, sharding, tokenizers, train
from gpt_jax.sweep import plan
from gpt_jax.tasks import sft
from tests import tiny

few = settings(max_examples=25, deadline=None, derandomize=True, database=None)
many = settings(max_examples=100, deadline=None, derandomize=True, database=None)

# --- tokenizers and data --------------------------------------------------------------

WORDS = ("the", "quick", "don", "t", "--", "-", ",", ".", "'", "(", ")", "é", "x1")
WORD = tokenizers.train("word", [" ".join(WORDS)])


@many
@given(st.lists(st.sampled_from([*WORDS, " ", "\n", "unknown", "<|unk|>", "ü"])))
def test_words_decoded_and_encoded_again_are_the_same_ids(pieces):
    ids = WORD.encode("".join(pieces))
    assert WORD.encode(WORD.decode(ids)) == ids


@many
@given(st.text())
def test_any_text_in_words_decoded_and_encoded_again_is_the_same_ids(text):
    ids = WORD.encode(text)
    assert WORD.encode(WORD.decode(ids)) == ids


@few
@given(
    documents=st.lists(st.lists(st.integers(0, 99), max_size=9), min_size=3),
    shard_tokens=st.integers(1, 6),
    bounds=st.tuples(st.integers(-30, 15), st.integers(-9, 30)),
)
def test_a_slice_of_shards_is_that_slice_of_all_ids(
    tmp_path_factory, documents, shard_tokens, bounds
):
    assume(any(documents))
    whole: list[int] = []
    for document in filter(None, documents):
        whole += [99, *document] if whole else document
    tokens = data.open(
        data.write(
            (np.array(document) for document in documents),
            folder := tmp_path_factory.mktemp("tokens") / "a",
            vocab_size=100,
            eos_id=99,
            meta={},
            shard_tokens=shard_tokens,
        )
        and folder
    )
    start, stop = bounds
    assert len(tokens) == len(whole)
    assert tokens[start:stop].tolist() == whole[slice(start, stop)]


# --- what is learnt of conversations --------------------------------------------------

SPOKEN = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
CHAT = {
    "byte": tokenizers.train("byte", []).add_special(["<|end|>", "<|user|>"]),
    "bpe": tokenizers.train("bpe:300", ["a few words of text, some of them twice"]),
}


@pytest.mark.parametrize("kind", CHAT)
@pytest.mark.parametrize("template", ["phi3", "alpaca", "plain"])
@few
@given(st.lists(st.tuples(SPOKEN, SPOKEN), min_size=1, max_size=3))
def test_exactly_the_answers_and_their_ends_are_learnt(template, kind, turns):
    tokenizer = CHAT[kind]
    messages = []
    for question, answer in turns:
        messages += [chat.Message("user", question), chat.Message("assistant", answer)]
    ids, learnt = chat.render(messages, tokenizer, template, reply=False)
    end = chat.stop_ids(tokenizer, template)[0]
    wanted: list[int] = []
    for _, answer in turns:
        wanted += [*answer.encode(), -1]
    found: list[int] = []
    for i, is_answer in zip(ids, learnt, strict=True):
        if is_answer:
            found += [-1] if i == end else tokenizer.bytes_of(i)
    assert found == wanted
    assert ids.count(end) >= len(turns)  # what people wrote never ends an answer
    _, prompt = chat.render(messages[:1], tokenizer, template, reply=True)
    assert not any(prompt)


@many
@given(st.lists(st.integers(1, 16), max_size=20), st.integers(16, 40))
def test_packing_keeps_every_conversation_once_and_whole(sizes, seq_len):
    examples = [
        sft.Example(np.full(size + 1, n), np.ones(size + 1, np.float32))
        for n, size in enumerate(sizes)
    ]
    rows = sft.pack_rows(examples, seq_len)
    there = sorted(int(example.ids[0]) for row in rows for example in row)
    assert there == list(range(len(sizes)))
    assert all(sum(example.size for example in row) <= seq_len for row in rows)


# --- configs --------------------------------------------------------------------------

BASE = common.base()


def fields(node=BASE, prefix=""):
    """Returns dotted key -> default value of every field of the config."""
    found = {}
    for key, value in node.items():
        more = hasattr(value, "items")
        found |= fields(value, f"{prefix}{key}.") if more else {f"{prefix}{key}": value}
    return found


FIELDS = fields()
ODD_INTS = st.sampled_from([0, 1, 2, 3, -1, -7, 2**31, -(2**63), 10**30])
ODD_FLOATS = st.sampled_from([0.0, 1.0, -1e-9, 1e39, math.inf, -math.inf, math.nan])
ODD_TEXTS = st.sampled_from(["", "adamw ", "MESH", "../../etc", "\0", "1e-4", "(", "x"])
ODD = {bool: st.booleans(), int: ODD_INTS, float: ODD_FLOATS, str: ODD_TEXTS}
WRONG = {
    bool: [1, "True", None, 0.5],
    int: ["1e-4", "7", 1.5, True, [1]],
    float: ["1e-4", "fast", True, [1.0]],
    str: [1, 0.5, True, ("x",)],
}


@settings(few, max_examples=300)
@given(st.data())
def test_any_value_of_any_field_is_accepted_or_refused_in_a_sentence(draw):
    """No other error than ValueError, which is what doors tell as a sentence."""
    key = draw.draw(st.sampled_from([k for k, v in FIELDS.items() if type(v) in ODD]))
    value = draw.draw(ODD[type(FIELDS[key])])
    config = plan.override(BASE, {key: value})
    try:
        train.check(config)
    except ValueError as error:
        words = str(error)
        assert key.rpartition(".")[2].split("_")[0] in words, (key, value, words)


@many
@given(st.data())
def test_a_value_of_another_type_is_refused_with_its_key(draw):
    key = draw.draw(st.sampled_from([k for k, v in FIELDS.items() if type(v) in WRONG]))
    value = draw.draw(st.sampled_from(WRONG[type(FIELDS[key])]))
    with pytest.raises(ValueError, match=re.escape(key)):
        plan.override(BASE, {key: value})


@many
@given(st.data())
def test_a_mistyped_key_is_refused_with_the_nearest_one(draw):
    key = draw.draw(st.sampled_from(sorted(FIELDS)))
    name = key.rpartition(".")[2]
    at = draw.draw(st.integers(0, len(name)))
    typo = key[: len(key) - len(name)] + name[:at] + "q" + name[at:]
    assume(typo not in FIELDS)
    with pytest.raises(ValueError, match=f"no config key {typo!r}.*{re.escape(key)}"):
        plan.override(BASE, {typo: FIELDS[key]})


# --- sharding -------------------------------------------------------------------------


def split_model(heads, vocab, scan):
    """Returns a model whose weights a mesh may split, or not."""
    return tiny.cfg(
        n_heads=heads[0],
        n_kv_heads=heads[1],
        d_model=24,
        n_layers=1,
        vocab_size=vocab,
        scan_layers=scan,
        position="learned",
        tie_embeddings=False,
        head_bias=True,
        gated=True,
    )


@few
@given(
    heads=st.sampled_from([(4, 2), (6, 3), (3, 1)]),
    vocab=st.sampled_from([61, 64]),
    scan=st.booleans(),
    fsdp=st.sampled_from([1, 2, 4]),
    tensor=st.sampled_from([1, 2]),
)
def test_every_weight_is_split_evenly_or_refused_by_name(
    heads, vocab, scan, fsdp, tensor
):
    axes = {"data": 1, "fsdp": fsdp, "tensor": tensor, "cpu_devices": 0}
    mesh = sharding.make_mesh(8, **axes)
    declared = model.declared(split_model(heads, vocab, scan))
    for path, weight in declared.items():
        shape = weight.shape
        try:
            spec = sharding.spec(declared, path, shape, mesh)
        except ValueError as error:
            assert path in str(error)
            names = [sharding.SPLIT.get(axis) for axis in weight.axes]
            assert any(n and size % axes[n] for n, size in zip(names, shape))
            continue
        assert len(spec) <= len(shape)
        for axis, size in zip(spec, shape, strict=False):
            assert axis is None or size % axes[axis] == 0
