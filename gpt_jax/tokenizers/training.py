"""Tokenizers trained on texts: characters, words, bytes, byte-level BPE."""

import concurrent.futures
import threading
import time
from collections.abc import Callable, Iterable, Iterator

import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt_jax.tokenizers.cuts import cut_up
from gpt_jax.tokenizers.forms import (
    CLOSE_UP,
    EOS,
    PRE_TOKENIZERS,
    UNK,
    byte_level,
    byte_values,
)
from gpt_jax.tokenizers.tokenizer import Tokenizer, wrap

# What has no such place for so long is cut anywhere before a BPE is trained on it, and
# words longer than any of a language (DNA, lines of dashes) count as several: the time
# to find their pairs grows with the square of their length.
UNCUT_CHARS = 1 << 16
WORD_BYTES, WORD_PART_BYTES = 1 << 10, 1 << 7
TICK_SECONDS = 0.1  # between two signs of life of a training
STOP_SECONDS = 1.0  # how long who leaves a training waits for its thread


def train(
    spec: str, texts: Iterable[str], *, tick: Callable[[float], object] = lambda s: None
) -> Tokenizer:
    """Returns a tokenizer trained on texts.

    Args:
      spec: "char" (the sorted characters), "word" (the sorted words, then
        `<|endoftext|>` and `<|unk|>`), "byte" (ids are byte values, then
        `<|endoftext|>`; reads no text) or "bpe:<size>" (byte-level BPE of at most
        that many tokens, `<|endoftext|>` the last).
      texts: the training texts, read once.
      tick: is told, while pairs are counted and merged for a BPE, how many seconds
        went by since it was told last; what it raises ends the training.

    Raises:
      ValueError: the spec is none of these, or there is no text.
    """
    name, colon, size = spec.partition(":")
    if name not in TRAINERS or bool(colon) != (name == "bpe"):
        raise ValueError(
            f"tokenizer {spec!r} cannot be trained; choose char, word, byte or "
            "bpe:<size>, as in bpe:2000"
        )
    if name != "bpe":
        return TRAINERS[name](texts)
    if not size.isdecimal() or int(size) < 257:
        raise ValueError(
            f"tokenizer {spec!r}: the size must be a whole number, at least 257 "
            f"(256 bytes and {EOS})"
        )
    return train_bpe(texts, size=int(size), tick=tick)


def train_char(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer of the sorted characters, without special tokens."""
    alphabet = sorted(set().union(*map(set, _nonempty(texts))))
    vocab = {character: i for i, character in enumerate(alphabet)}
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    backend.pre_tokenizer = PRE_TOKENIZERS["char"]()
    backend.decoder = decoders.Fuse()
    return wrap(backend)


def train_word(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer of the sorted words, punctuation split off.

    The rule and the order of ids are those of Raschka, Build a Large Language Model
    (From Scratch), chapter 2.
    """
    rule = PRE_TOKENIZERS["word"]()
    words: set[str] = set()
    for text in _nonempty(texts):
        for piece in cut_up(text):
            words.update(word for word, _ in rule.pre_tokenize_str(piece))
    tokens = [*sorted(word for word in words if EOS not in word and word != UNK)]
    vocab = {token: i for i, token in enumerate([*tokens, EOS, UNK])}
    backend = hf.Tokenizer(models.WordLevel(vocab, unk_token=UNK))
    # The vocabulary must hold the end token for its id to come before <|unk|>; so
    # that a text which spells it does not become it, that spelling is unknown.
    backend.normalizer = normalizers.Replace(EOS, UNK)
    backend.pre_tokenizer = rule
    # A word never starts with a space, so each but the first is written after one.
    join = decoders.WordPiece(prefix=" ", cleanup=False)
    close = [decoders.Replace(" " + mark, mark) for mark in CLOSE_UP]
    backend.decoder = decoders.Sequence([join, decoders.Fuse(), *close])
    backend.add_special_tokens([EOS, UNK])
    return wrap(backend)


def train_byte(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer whose ids 0 to 255 are the bytes of UTF-8."""
    return wrap(byte_level(models.BPE(byte_values(), []), "byte"))


def train_bpe(
    texts: Iterable[str], *, size: int, tick: Callable[[float], object] = lambda s: None
) -> Tokenizer:
    """Returns a byte-level BPE tokenizer of at most `size` tokens; see `train`."""
    backend = hf.Tokenizer(models.BPE())
    # Words are found by the rule that the tokenizer will have, and then cut where they
    # are too long. No word of an ordinary text is, so its tokens are what they were.
    parts = hf.Regex(rf"\A.{{1,{WORD_BYTES}}}\z|.{{1,{WORD_PART_BYTES}}}")
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [PRE_TOKENIZERS["bpe"](), pre_tokenizers.Split(parts, "isolated")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    pieces = (
        piece for text in _nonempty(texts) for piece in cut_up(text, uncut=UNCUT_CHARS)
    )
    _apart(lambda going: backend.train_from_iterator(going(pieces), trainer), tick)
    return wrap(byte_level(backend.model, "bpe"))


def _apart(work: Callable[[Callable], object], tick: Callable[[float], object]) -> None:
    """Does one long call in a thread, so that this one is free to hear Ctrl-C.

    Args:
      work: is given what ends an iterator early when nobody waits any more.
      tick: see `train`.
    """
    done: concurrent.futures.Future = concurrent.futures.Future()
    left = threading.Event()

    def going(items: Iterable) -> Iterator:
        for item in items:
            if left.is_set():
                raise InterruptedError("nobody waits for this tokenizer any more")
            yield item

    def run() -> None:
        try:
            done.set_result(work(going))
        except BaseException as error:  # the edge of the thread: raised by who waits
            done.set_exception(error)

    # A daemon: whoever leaves the program does not wait for it.
    threading.Thread(target=run, name="gpt_jax-bpe", daemon=True).start()
    try:
        now = time.monotonic()
        while not concurrent.futures.wait([done], TICK_SECONDS).done:
            before, now = now, time.monotonic()
            tick(now - before)
    except BaseException:
        # While words are counted the thread ends at the next text; a program that is
        # torn down while it reads one would be aborted. Merges hear nothing.
        left.set()
        concurrent.futures.wait([done], STOP_SECONDS)
        raise
    done.result()


TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "char": train_char,
    "word": train_word,
    "byte": train_byte,
    "bpe": train_bpe,
}


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("there is no text to train a tokenizer on; check the corpus")
