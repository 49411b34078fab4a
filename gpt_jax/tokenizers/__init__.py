"""Text to token ids and back: character, word, byte and byte-level BPE tokenizers.

Every tokenizer is a Hugging Face `tokenizers` object that lives in one
tokenizer.json, so other software can load it and gets the same ids. This package
keeps three promises on top: text never becomes a special token, nothing unseen is
dropped in silence, and streamed text never holds half a character.
"""

import json
import os
from pathlib import Path

import tokenizers as hf
from tokenizers import models

from gpt_jax import special
from gpt_jax.tokenizers.forms import EOS, PRE_TOKENIZERS, UNK, byte_level, byte_values
from gpt_jax.tokenizers.tokenizer import Tokenizer, wrap
from gpt_jax.tokenizers.training import train, train_byte

__all__ = ["EOS", "PRE_TOKENIZERS", "UNK", "Tokenizer", "byte_values", "gpt2", "load"]
__all__ += ["train", "train_byte"]


def load(path: str | os.PathLike) -> Tokenizer:
    """Returns the tokenizer of a tokenizer.json, with what the files beside it say.

    Which tokens begin and end texts stands in tokenizer.special.json or, in a published
    folder, in config.json and others.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: the file is not a tokenizer.json, or its special tokens have ids
        that the file's vocabulary cannot give them.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; wanted a tokenizer.json")
    try:
        text = path.read_text(encoding="utf-8")
        backend = hf.Tokenizer.from_str(text)
        added = json.loads(text).get("added_tokens") or []
    except Exception as error:  # Hugging Face raises nothing narrower
        raise ValueError(
            f"{path} is not a tokenizer.json: {error}; make one with Tokenizer.save"
        ) from error
    for token in added:
        found = backend.token_to_id(token["content"])
        if found != token["id"]:
            raise ValueError(
                f"{path}: token {token['content']!r} should have id {token['id']} but "
                f"gets {found}, because ids in between are missing"
            )
    # Settings for training elsewhere that would shorten or lengthen every text.
    backend.no_truncation()
    backend.no_padding()
    if not backend.get_vocab_size():
        raise ValueError(f"{path} holds a tokenizer without a vocabulary")
    found = wrap(backend)
    said = special.read(path)
    if said is None and special.is_published(path.parent):
        said = special.published(path.parent, found.vocab)
    return found.with_special(said)


def gpt2(encoder_json: str | os.PathLike, vocab_bpe: str | os.PathLike) -> Tokenizer:
    """Returns GPT-2's tokenizer from OpenAI's two files.

    Args:
      encoder_json: the file of tokens and ids.
      vocab_bpe: the file of merges.

    Raises:
      FileNotFoundError: one of the files is absent.
      ValueError: the files are not GPT-2's kind or do not belong together.
    """
    for path in map(Path, (encoder_json, vocab_bpe)):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there; GPT-2's tokenizer needs it")
    try:
        model = models.BPE.from_file(str(encoder_json), str(vocab_bpe))
    except Exception as error:  # Hugging Face raises nothing narrower
        raise ValueError(
            f"{encoder_json} and {vocab_bpe} are not GPT-2's tokenizer files: {error}"
        ) from error
    return wrap(byte_level(model, "bpe"))
