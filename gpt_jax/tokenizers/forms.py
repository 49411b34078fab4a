"""The forms of tokenizers: how each splits a text, and what its tokens stand for."""

from collections.abc import Callable
from functools import lru_cache

import tokenizers as hf
from tokenizers import decoders, models, pre_tokenizers

EOS = "<|endoftext|>"
UNK = "<|unk|>"
# No space is written before these when words are joined.
CLOSE_UP = tuple(",.:;?!\"()'")


def _char_rule() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.Split(hf.Regex(r"[\s\S]"), "isolated")


def _word_rule() -> pre_tokenizers.PreTokenizer:
    # Python counts the four separators as whitespace, this regex engine does not.
    space = pre_tokenizers.Split(hf.Regex(r"[\s\x1c-\x1f]"), "removed")
    marks = pre_tokenizers.Split(hf.Regex(r"""[,.:;?_!"()']|--"""), "isolated")
    return pre_tokenizers.Sequence([space, marks])


def _byte_rule() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)


def _bpe_rule() -> pre_tokenizers.PreTokenizer:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)


PRE_TOKENIZERS: dict[str, Callable[[], pre_tokenizers.PreTokenizer]] = {
    "char": _char_rule,
    "word": _word_rule,
    "byte": _byte_rule,
    "bpe": _bpe_rule,
}


def byte_level(model: models.Model, rule: str) -> hf.Tokenizer:
    """Returns a byte-level tokenizer of a model, which ends texts with EOS."""
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return backend


def state(part) -> bytes:
    """Returns what a part of a Hugging Face tokenizer is; b"" for none."""
    return b"" if part is None else part.__getstate__()


def kind_of(backend: hf.Tokenizer) -> str:
    """Returns char, word, byte, bpe (any byte-level BPE), or other."""
    rule = state(backend.pre_tokenizer)
    if isinstance(backend.model, models.WordLevel):
        kinds = [k for k in ("char", "word") if state(PRE_TOKENIZERS[k]()) == rule]
        return kinds[0] if kinds else "other"
    byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    if not isinstance(backend.model, models.BPE) or not byte_level:
        return "other"
    values = all(backend.token_to_id(c) == b for c, b in byte_values().items())
    return "byte" if values and rule == state(_byte_rule()) else "bpe"


@lru_cache(maxsize=1)
def byte_values() -> dict[str, int]:
    """Returns the character that byte-level vocabularies write for each byte.

    Bytes that print stand for themselves in Latin-1; the others are numbered from
    U+0100 on (GPT-2, section 2.2, and its published encoder).
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = sorted(set(range(256)) - prints)
    name = {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return {name[b]: b for b in range(256)}


def byte_piece(token: str) -> bytes:
    """Returns the bytes that a token of a byte-level vocabulary stands for."""
    values = byte_values()
    if all(character in values for character in token):
        return bytes(values[character] for character in token)
    return token.encode()


def word_piece(token: str) -> bytes:
    """Returns what a word adds to a text: itself, mostly behind a space."""
    return token.encode() if token in CLOSE_UP else b" " + token.encode()
