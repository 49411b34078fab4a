"""Facts about tokenizers: exact ids, nothing dropped, nothing becomes special."""

import hashlib
import itertools
import json
import pickle
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tokenizers as hf
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors

from gpt_jax import corpora, tokenizers
from gpt_jax.tokenizers import cuts

TEXT = (
    'First Citizen:\nBefore we proceed, hear me -- (all) "speak"! It\'s été, 日本 🙂\n'
)
TEXTS = [TEXT, TEXT[::-1], "x".join(["   ", " \n", "\n\n  "] * 9)]
EOS, UNK = "<|endoftext|>", "<|unk|>"
quick = settings(max_examples=60, deadline=None)

TRAINED = {
    spec: tokenizers.train(spec, iter(TEXTS))
    for spec in ("char", "word", "byte", "bpe:310")
}
every_kind = pytest.mark.parametrize("tokenizer", TRAINED.values(), ids=TRAINED)


def elsewhere(tokenizer, tmp_path):
    """The tokenizer as other software opens it."""
    tokenizer.save(tmp_path / "tokenizer.json")
    return hf.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))


def sentencepiece() -> tokenizers.Tokenizer:
    """A tokenizer built like Llama's: words marked in front, bytes as a last resort."""
    words = ["<unk>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b"]
    model = models.BPE(
        {word: i for i, word in enumerate([*words, "▁a"])},
        [("▁", "a")],
        unk_token="<unk>",
        byte_fallback=True,
    )
    backend = hf.Tokenizer(model)
    marks = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    backend.normalizer = normalizers.Sequence(marks)
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*parts, decoders.Strip(" ", 1, 0)])
    backend.add_special_tokens(["<unk>", "</s>"])
    return tokenizers.Tokenizer(backend.to_str())


# --- vocabularies ---------------------------------------------------------------------


def test_characters_are_numbered_in_sorted_order_without_specials():
    tokenizer = tokenizers.train("char", iter(["hello", "\nyou"]))
    assert tokenizer.encode("\nehlouy") == list(range(7))
    assert (tokenizer.vocab_size, tokenizer.specials) == (7, {})
    assert (tokenizer.eos_id, tokenizer.unk_id) == (None, None)


def test_words_are_numbered_in_sorted_order_then_end_then_unknown():
    tokenizer = tokenizers.train("word", iter(["the cat--the dog.", "a cat"]))
    words = ["--", ".", "a", "cat", "dog", "the"]
    assert [tokenizer.encode(word) for word in words] == [[i] for i in range(6)]
    assert (tokenizer.eos_id, tokenizer.unk_id, tokenizer.vocab_size) == (6, 7, 8)


def test_byte_ids_are_byte_values_then_end():
    tokenizer = TRAINED["byte"]
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(range(128)) == bytes(range(128)).decode()
    assert (tokenizer.eos_id, tokenizer.vocab_size) == (256, 257)


def test_bpe_has_the_size_asked_for_and_the_end_is_last():
    tokenizer = TRAINED["bpe:310"]
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (310, 309)
    assert len(tokenizer.encode(TEXT)) < len(TEXT.encode())


def test_training_twice_gives_the_same_file():
    for spec, tokenizer in TRAINED.items():
        again = tokenizers.train(spec, iter(TEXTS))
        assert again.sha256 == tokenizer.sha256


def test_the_kind_is_known_from_the_file_alone(tmp_path):
    for spec, tokenizer in TRAINED.items():
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = tokenizers.load(tmp_path / "tokenizer.json")
        assert loaded.kind == spec.partition(":")[0]
        assert loaded == tokenizer


def test_the_sha256_is_that_of_the_saved_file(tmp_path):
    TRAINED["char"].save(tmp_path / "new" / "tokenizer.json")
    content = (tmp_path / "new" / "tokenizer.json").read_bytes()
    assert hashlib.sha256(content).hexdigest() == TRAINED["char"].sha256


def test_byte_names_are_those_of_byte_level_vocabularies():
    assert set(tokenizers.byte_values()) == set(pre_tokenizers.ByteLevel.alphabet())


# --- training a BPE -------------------------------------------------------------------


def unbounded(texts, size):
    """The merges that Hugging Face's trainer finds, which takes words of any length."""
    backend = hf.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    options = {"initial_alphabet": alphabet, "show_progress": False}
    trainer = hf.trainers.BpeTrainer(vocab_size=size, **options)
    backend.train_from_iterator(texts, trainer)
    return json.loads(backend.to_str())["model"]["merges"]


def merges(tokenizer):
    return json.loads(tokenizer.json)["model"]["merges"]


def test_the_tokens_of_ordinary_text_are_those_of_words_of_any_length():
    library = corpora.open("builtin:json", field="", cache="unused")
    texts = [*library.documents(), "-" * 300 + "\n", " " * 1000 + "x " + "y" * 1000]
    found = tokenizers.train("bpe:900", texts)
    assert merges(found) == unbounded(texts, 899)
    assert len(merges(found)) == 899 - 256


@pytest.mark.parametrize("name", ["tinyshakespeare.txt", "sms_spam.tsv"])
def test_the_tokens_of_real_texts_are_those_of_words_of_any_length(corpus_file, name):
    text = corpus_file(name).read_text(encoding="utf-8")
    assert merges(tokenizers.train("bpe:2000", [text])) == unbounded([text], 1999)


def unspaced(kind, size):
    """Texts without white space, or of nothing else."""
    rng = random.Random(0)
    make = {
        "DNA": lambda: rng.choices("ACGT", k=size),
        "Chinese": lambda: map(chr, rng.choices(range(0x4E00, 0x5000), k=size)),
        "a log": lambda: map("{0:x},level=INFO;".format, range(size // 16)),
        "line breaks": lambda: ["\n"] * size,
    }[kind]
    return "".join(make())


@pytest.mark.parametrize("kind", ["DNA", "Chinese", "a log", "line breaks"])
def test_text_without_white_space_is_trained_on_in_proportion_to_its_length(kind):
    took = []
    for size in (40_000, 160_000):
        text, began = unspaced(kind, size), time.process_time()
        tokenizer = tokenizers.train("bpe:300", [text])
        took.append(time.process_time() - began)
        assert tokenizer.decode(tokenizer.encode(text[:9999])) == text[:9999]
        assert len(tokenizer.encode(text[:9999])) < 0.7 * len(text[:9999].encode())
    assert took[1] < 8 * took[0] + 0.5  # 16 times as much where time is quadratic


@pytest.mark.slow
def test_20_megabytes_without_white_space_take_about_20_times_one_megabyte():
    took = []
    for size in (1_000_000, 20_000_000):
        text, began = unspaced("DNA", size), time.process_time()
        tokenizers.train("bpe:1000", [text])
        took.append(time.process_time() - began)
    assert took[1] < 40 * took[0]


LONG_TRAINING = """
import random
from gpt_jax import tokenizers
text = "".join(random.Random(0).choices("ACGT", k=3_000_000))
tokenizers.train("bpe:4000", [text], tick=lambda seconds: print(seconds, flush=True))
print("trained")
"""


@pytest.mark.fault(33)
def test_ctrl_c_ends_the_training_of_a_bpe():
    command = [sys.executable, "-c", LONG_TRAINING]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout and 0.1 <= float(process.stdout.readline()) < 5
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == -signal.SIGINT, err
    assert "KeyboardInterrupt" in err and "trained" not in out


def test_what_goes_wrong_in_the_texts_or_while_waiting_ends_the_training():
    def texts():
        yield TEXT
        raise OSError(5, "Input/output error", "a disk")

    with pytest.raises(OSError, match="a disk"):
        tokenizers.train("bpe:310", texts())

    def refuse(seconds):
        raise InterruptedError(f"after {seconds:.0f} s")

    with pytest.raises(InterruptedError):
        tokenizers.train("bpe:310", itertools.repeat(TEXT), tick=refuse)


# --- round trips ----------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["byte", "bpe:310"])
@quick
@given(text=st.text())
def test_any_unicode_comes_back_from_bytes(spec, text):
    tokenizer = TRAINED[spec]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@quick
@given(text=st.text(alphabet=TEXT))
def test_characters_come_back(text):
    tokenizer = TRAINED["char"]
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text and len(ids) == len(text)


@quick
@given(text=st.text())
def test_words_are_split_by_the_books_rule(text):
    pieces = re.split(r"""([,.:;?_!"()']|--|\s)""", text)
    words = [piece.strip() for piece in pieces if piece.strip()]
    rule = tokenizers.PRE_TOKENIZERS["word"]().pre_tokenize_str(text)
    # Whitespace inside a piece is at its ends only, so strip finds all of it.
    assert [word for word, _ in rule] == words


def test_decoded_words_close_up_before_punctuation():
    tokenizer = tokenizers.train("word", iter(["Hello, do you (really) like tea?"]))
    ids = tokenizer.encode("Hello, do you (really) like tea?")
    # The book's rule joins with spaces, then removes those before these marks.
    joined = " ".join(str(tokenizer.backend.id_to_token(i)) for i in ids)
    book = re.sub(r"""\s+([,.:;?!"()'])""", r"\1", joined)
    assert tokenizer.decode(ids) == book == "Hello, do you( really) like tea?"


@pytest.mark.parametrize("kind", [*TRAINED, "sentencepiece"])
@quick
@given(data=st.data())
def test_streamed_text_is_the_decoded_text(kind, data):
    tokenizer = TRAINED.get(kind) or sentencepiece()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
    stream = tokenizer.decode_stream()
    parts = [stream.push(i) for i in ids]
    if kind == "sentencepiece" and "\ufffd" in tokenizer.decode(ids):
        return  # bytes that are not text: each decoder repairs them its own way
    assert "".join(parts) + stream.flush() == tokenizer.decode(ids)


@pytest.mark.parametrize("kind", ["byte", "bpe:310", "sentencepiece"])
def test_a_stream_never_shows_half_a_character(kind):
    tokenizer = TRAINED.get(kind) or sentencepiece()
    text = "🙂 é 日本語 🙂🙂"
    stream = tokenizer.decode_stream()
    parts = [stream.push(i) for i in tokenizer.encode(text)]
    assert "\ufffd" not in "".join(parts)
    assert "".join(parts) + stream.flush() == text
    assert len(parts) > len(text)  # some characters took several tokens


def test_a_stream_gives_up_an_unfinished_character_at_the_end():
    stream = TRAINED["byte"].decode_stream()
    assert stream.push("é".encode()[0]) == ""
    assert stream.flush() == "\ufffd"


@quick
@given(ids=st.lists(st.integers(0, 256), max_size=30))
def test_bytes_that_are_no_text_decode_as_elsewhere(ids):
    tokenizer = TRAINED["byte"]
    other = tokenizer.backend.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(ids) == other


@every_kind
def test_decoding_agrees_with_other_software(tokenizer, tmp_path):
    tokenizer = tokenizer.add_special(["<|user|>"])
    other = elsewhere(tokenizer, tmp_path)
    ids = tokenizer.encode(TEXT)
    ids += list(tokenizer.specials.values()) + ids[:3]
    assert tokenizer.decode(ids) == other.decode(ids, skip_special_tokens=False)
    assert tokenizer.decode(np.array(ids)) == tokenizer.decode(ids)


# --- the same ids elsewhere, in batches and in pieces ---------------------------------


@every_kind
@quick
@given(data=st.data())
def test_other_software_gives_the_same_ids(tokenizer, data):
    alphabet = TEXT if tokenizer.kind == "char" else None
    text = data.draw(st.text(alphabet) if alphabet else st.text())
    other = hf.Tokenizer.from_str(tokenizer.json)
    other.encode_special_tokens = True  # a text may spell one
    assert tokenizer.encode(text) == other.encode(text).ids


@every_kind
def test_a_saved_file_gives_the_same_ids(tokenizer, tmp_path):
    assert elsewhere(tokenizer, tmp_path).encode(TEXT).ids == tokenizer.encode(TEXT)


@every_kind
def test_a_batch_is_its_texts_one_by_one(tokenizer):
    texts = [TEXT, "", TEXT[:7], "\n\n"]
    ids = tokenizer.encode_batch(iter(texts))
    assert ids == [tokenizer.encode(text) for text in texts]
    assert ids[1] == [] and tokenizer.decode([]) == ""


@every_kind
@quick
@given(
    pieces=st.lists(
        st.sampled_from(
            ["a", "It's", "--", ". ", "\n", "  ", "\t", "。日", "\x1c", "1!"]
        )
    )
)
@example(pieces=["a", "\n" * 6, "a"])  # a token of several line breaks
def test_cutting_a_long_text_keeps_its_ids(tokenizer, pieces):
    text = "".join(pieces)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuts, "CUT_CHARS", 2)
        patch.setattr(cuts, "GROUP_CHARS", 5)
        assert "".join(cuts.cut_up(text)) == text
        if tokenizer.kind != "char":
            whole = tokenizer.backend.encode(text).ids
            assert tokenizer.encode_batch([text, "a", text])[::2] == [whole] * 2


@every_kind
def test_a_pickled_tokenizer_still_keeps_text_from_being_special(tokenizer):
    tokenizer.encode("a")
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy == tokenizer
    assert copy.backend.encode_special_tokens


def test_truncation_and_padding_of_a_foreign_file_are_turned_off(tmp_path):
    backend = hf.Tokenizer.from_str(TRAINED["bpe:310"].json)
    backend.enable_truncation(3)
    backend.enable_padding(length=99)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = tokenizers.load(tmp_path / "tokenizer.json")
    assert loaded.encode(TEXT) == TRAINED["bpe:310"].encode(TEXT)


# --- special tokens -------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["word", "byte", "bpe:310", "char"])
def test_text_never_becomes_a_special_token(spec, tmp_path):
    text = f"a{EOS}b {EOS} <|user|> {TEXT}"
    corpus = [*text, *TEXT] if spec == "char" else [TEXT, text.replace("<|user|>", "")]
    tokenizer = tokenizers.train(spec, iter(corpus))
    tokenizer = tokenizer.add_special(["<|user|>", *([EOS] if spec == "char" else [])])
    tokenizer.save(tmp_path / "tokenizer.json")
    tokenizer = tokenizers.load(tmp_path / "tokenizer.json")
    special = set(tokenizer.specials.values()) - {tokenizer.unk_id}
    assert len(special) == 2
    assert not special & set(tokenizer.encode(text))
    assert not special & set(tokenizer.encode_batch([text])[0])
    if spec != "word":
        assert tokenizer.decode(tokenizer.encode(text)) == text


@every_kind
def test_new_special_tokens_come_after_the_present_ids(tokenizer, tmp_path):
    grown = tokenizer.add_special(["<|user|>", "<|é 日|>"])
    assert grown.special_id("<|user|>") == tokenizer.vocab_size
    assert grown.special_id("<|é 日|>") == tokenizer.vocab_size + 1
    assert grown.vocab_size == tokenizer.vocab_size + 2
    assert grown.encode(TEXT) == tokenizer.encode(TEXT)
    assert grown.kind == tokenizer.kind
    assert grown.decode([tokenizer.vocab_size + 1]) == "<|é 日|>"
    grown.save(tmp_path / "tokenizer.json")
    assert tokenizers.load(tmp_path / "tokenizer.json") == grown
    assert "<|user|>" not in tokenizer.specials  # the original is as it was


@every_kind
@pytest.mark.parametrize("tokens", [["<|a|>", "<|a|>"], [""], ["T"]])
def test_a_special_token_that_would_be_ambiguous_is_refused(tokenizer, tokens):
    if tokenizer.kind == "word" and tokens == ["T"]:
        tokens = ["It"]
    with pytest.raises(ValueError, match="special token"):
        tokenizer.add_special(tokens)


def test_a_character_tokenizer_refuses_a_special_of_one_character():
    with pytest.raises(ValueError, match=r"'§'.*two characters"):
        TRAINED["char"].add_special(["§"])


def test_an_unknown_special_token_names_the_known_ones():
    with pytest.raises(ValueError, match=r"<\|user\|>.*has: <\|endoftext\|>"):
        TRAINED["byte"].special_id("<|user|>")


def opened_with(*tokens: str) -> tokenizers.Tokenizer:
    """Returns a BPE whose file asks for tokens round every text, as Llama's does."""
    grown = TRAINED["bpe:310"].add_special(["<s>", "</s>"])
    backend = hf.Tokenizer.from_str(grown.json)
    backend.post_processor = processors.TemplateProcessing(
        single=" ".join([*tokens, "$A", "</s>"]),
        special_tokens=[(name, grown.special_id(name)) for name in ("<s>", "</s>")],
    )
    return tokenizers.Tokenizer(backend.to_str())


def test_the_token_that_a_text_begins_with_is_known_and_not_a_part_of_it():
    llama = opened_with("<s>")
    assert llama.opening == [llama.special_id("<s>")]
    assert llama.encode("hear me") == TRAINED["bpe:310"].encode("hear me")
    assert opened_with().opening == []


@pytest.mark.parametrize("spec", ["char", "word", "byte", "bpe:300"])
def test_our_own_tokenizers_begin_with_no_token(spec):
    assert tokenizers.train(spec, ["b c d e"]).opening == []


# --- what the vocabulary lacks --------------------------------------------------------


def test_an_unseen_character_is_named_with_its_position():
    with pytest.raises(ValueError, match="character 'q' at position 6 "):
        TRAINED["char"].encode("First q")


@pytest.mark.parametrize("character", ["Å", "\U0010ffff", "\ud800"])
def test_characters_beyond_the_highest_are_unseen_too(character):
    with pytest.raises(ValueError, match="position 1 "):
        tokenizers.train("char", iter(["ab"])).encode("a" + character)


@pytest.mark.parametrize("earlier", [[], [EOS]])
def test_an_unseen_character_becomes_the_unknown_token(earlier, tmp_path):
    tokenizer = tokenizers.train("char", iter(["ab"])).add_special([*earlier, UNK])
    unk = tokenizer.special_id(UNK)
    assert tokenizer.unk_id == unk == 2 + len(earlier)
    assert tokenizer.encode("a🙂b") == [0, unk, 1]
    assert elsewhere(tokenizer, tmp_path).encode("a🙂b").ids == [0, unk, 1]


def test_an_unseen_word_becomes_the_unknown_token(tmp_path):
    tokenizer = TRAINED["word"]
    ids = tokenizer.encode("First zebra Citizen")
    assert ids[1] == tokenizer.unk_id and len(set(ids)) == 3
    assert elsewhere(tokenizer, tmp_path).encode("First zebra Citizen").ids == ids


def test_an_unseen_word_without_an_unknown_token_is_named():
    document = json.loads(TRAINED["word"].json)
    document["model"]["unk_token"] = "none"
    tokenizer = tokenizers.Tokenizer(json.dumps(document))
    with pytest.raises(ValueError, match="word 'zebra' at position 6 "):
        tokenizer.encode_batch(["First", "First zebra"])


@pytest.mark.parametrize("byte_level", [True, False])
def test_a_foreign_bpe_that_would_drop_characters_refuses_them(byte_level):
    backend = hf.Tokenizer(models.BPE({"a": 0, "b": 1, "Ġ": 2}, []))
    if byte_level:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        backend.decoder = decoders.ByteLevel()
    else:
        backend.pre_tokenizer = pre_tokenizers.Whitespace()
    assert backend.encode("ab éa").ids in ([0, 1, 0], [0, 1, 2, 0])  # the trap
    tokenizer = tokenizers.Tokenizer(backend.to_str())
    assert len(tokenizer.encode("ab a")) == 3 + byte_level
    with pytest.raises(ValueError, match="character 'é' at position 3 "):
        tokenizer.encode("ab éa")


@every_kind
def test_half_a_surrogate_pair_is_not_text(tokenizer):
    with pytest.raises(ValueError, match="position 1"):
        tokenizer.encode("F\ud800")


@every_kind
@pytest.mark.parametrize("ids", [[0, 10**6], [0, -1]])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer, ids):
    with pytest.raises(ValueError, match=f"id {ids[1]} at position 1 "):
        tokenizer.decode(ids)
    with pytest.raises(ValueError, match=f"id {ids[1]} "):
        tokenizer.decode_stream().push(ids[1])


# --- sizes ----------------------------------------------------------------------------


@pytest.mark.parametrize("spec", ["char", "byte", "bpe:310"])
def test_token_bytes_add_up_to_the_text(spec):
    tokenizer = TRAINED[spec]
    size_V = tokenizer.token_bytes()
    assert size_V[tokenizer.encode(TEXT)].sum() == len(TEXT.encode())
    assert (size_V.dtype, size_V.shape) == (np.int32, (tokenizer.vocab_size,))
    assert all(size_V[i] == 0 for i in tokenizer.specials.values())


def test_token_bytes_of_words_are_without_the_space():
    tokenizer = TRAINED["word"]
    assert tokenizer.token_bytes()[tokenizer.encode("été , --")].tolist() == [5, 1, 2]


def test_token_bytes_of_a_byte_fallback_are_one():
    tokenizer = sentencepiece()
    assert tokenizer.token_bytes()[tokenizer.encode("aé")].tolist() == [2, 1, 1]
    assert tokenizer.eos_id == 1 and tokenizer.unk_id == 0


# --- errors ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "spec", ["gpt2", "bpe", "char:5", "bpe:", "bpe:256", "bpe:x", ""]
)
def test_a_spec_that_cannot_be_trained_is_refused(spec):
    with pytest.raises(ValueError, match="tokenizer '" + spec):
        tokenizers.train(spec, iter([TEXT]))


@pytest.mark.parametrize("spec", ["char", "word", "bpe:310"])
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_on_no_text_is_refused(spec, texts):
    with pytest.raises(ValueError, match="no text"):
        tokenizers.train(spec, iter(texts))


@pytest.mark.parametrize("content", [b"", b"{}", b"\xff", b"[1]", b'{"model": 1}'])
def test_a_file_that_is_no_tokenizer_is_refused_by_name(tmp_path, content):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.json is not a tokenizer\.json"):
        tokenizers.load(tmp_path / "x.json")


def test_an_absent_file_is_named(tmp_path):
    for call in (tokenizers.load, lambda path: tokenizers.gpt2(path, path)):
        with pytest.raises(FileNotFoundError, match=r"absent\.json"):
            call(tmp_path / "absent.json")
    with pytest.raises(FileNotFoundError):
        tokenizers.load(tmp_path)


def test_a_special_token_that_would_be_renumbered_is_refused(tmp_path):
    document = json.loads(TRAINED["byte"].json)
    document["added_tokens"].append({**document["added_tokens"][0], "content": "<|a|>"})
    document["added_tokens"][1]["id"] = 300
    (tmp_path / "tokenizer.json").write_text(json.dumps(document))
    with pytest.raises(ValueError, match="should have id 300 but gets 257"):
        tokenizers.load(tmp_path / "tokenizer.json")


def test_files_that_are_not_gpt2s_are_refused(tmp_path):
    (tmp_path / "encoder.json").write_text('{"a": 0, "b": 1}')
    (tmp_path / "vocab.bpe").write_text("#version: 0.2\na c\n")
    with pytest.raises(ValueError, match="not GPT-2's"):
        tokenizers.gpt2(tmp_path / "encoder.json", tmp_path / "vocab.bpe")


# --- real texts -----------------------------------------------------------------------


@pytest.fixture
def gpt2(corpus_file):
    encoder = corpus_file("gpt2_tokenizer/encoder.json")
    return tokenizers.gpt2(encoder, corpus_file("gpt2_tokenizer/vocab.bpe"))


def test_gpt2_ids_are_openais(gpt2, corpus_file):
    verdict = corpus_file("the-verdict.txt").read_text(encoding="utf-8")
    ids = gpt2.encode(verdict)
    assert len(ids) == 5145 and ids[:4] == [40, 367, 2885, 1464]
    assert gpt2.decode(ids) == verdict
    assert gpt2.encode("Akwirw ier") == [33901, 86, 343, 86, 220, 959]
    assert (gpt2.vocab_size, gpt2.eos_id, gpt2.kind) == (50257, 50256, "bpe")
    assert 50256 not in gpt2.encode(EOS) and gpt2.decode([50256]) == EOS


def test_gpt2_ids_of_a_long_text_are_those_of_the_whole(gpt2, corpus_file):
    text = corpus_file("austen.txt").read_text(encoding="utf-8")[:600_000]
    assert gpt2.encode(text) == gpt2.backend.encode(text).ids
    assert gpt2.token_bytes()[gpt2.encode(text)].sum() == len(text.encode())


def test_the_verdict_has_4690_words_and_a_vocabulary_of_1132(corpus_file):
    text = corpus_file("the-verdict.txt").read_text(encoding="utf-8")
    tokenizer = tokenizers.train("word", iter([text]))
    assert len(text) == 20479 and len(tokenizer.encode(text)) == 4690
    assert tokenizer.vocab_size == 1132
    assert (tokenizer.eos_id, tokenizer.unk_id) == (1130, 1131)
    assert tokenizer.unk_id not in tokenizer.encode(text)


def test_tinyshakespeare_has_65_symbols(corpus_file):
    text = corpus_file("tinyshakespeare.txt").read_text(encoding="utf-8")
    tokenizer = tokenizers.train("char", iter(text.splitlines(keepends=True)))
    assert tokenizer.vocab_size == 65 and tokenizer.specials == {}
    assert tokenizer.decode(tokenizer.encode(text)) == text
