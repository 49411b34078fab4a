"""The tokenizer: one tokenizer.json, and what it promises of texts and ids."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import tokenizers as hf
from tokenizers import models

from gpt_jax import files, special
from gpt_jax.special import Special
from gpt_jax.tokenizers.cuts import groups
from gpt_jax.tokenizers.forms import (
    EOS,
    PRE_TOKENIZERS,
    UNK,
    byte_piece,
    byte_values,
    kind_of,
    state,
    word_piece,
)
from gpt_jax.tokenizers.streams import PieceStream, WindowStream

# What the end of a text is called where nobody says it, here first.
END_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>")


@dataclass(frozen=True)
class Tokenizer:
    """A tokenizer, held as the text of its tokenizer.json.

    Equal texts are equal tokenizers; pickling sends the text only.

    Attributes:
      json: that text.
      special: which tokens begin and end texts, where somebody says it; None = a token
        of a usual name ends them.
    """

    json: str = field(repr=False)
    special: Special | None = None
    # For private use: stands for a special token in what `encode_joined` takes.
    JOINT: ClassVar[str] = "\ue0ff\ue0ff"

    def __reduce__(self):
        # The Hugging Face object would lose encode_special_tokens on its way.
        return Tokenizer, (self.json, self.special)

    @cached_property
    def backend(self) -> hf.Tokenizer:
        """The Hugging Face object, set so that text never becomes a special token."""
        backend = hf.Tokenizer.from_str(self.json)
        backend.encode_special_tokens = True  # not a part of tokenizer.json
        return backend

    @cached_property
    def sha256(self) -> str:
        """The hash of what `save` writes."""
        return files.digest(self.json + (self.special.text() if self.special else ""))

    @cached_property
    def kind(self) -> str:
        """char, word, byte, bpe (any byte-level BPE), or other."""
        return kind_of(self.backend)

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token, as tokenizer.json spells it, and its id."""
        return self.backend.get_vocab(with_added_tokens=True)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id."""
        return 1 + max(self.vocab.values())

    @cached_property
    def specials(self) -> dict[str, int]:
        """The special tokens and their ids."""
        added = self.backend.get_added_tokens_decoder()
        return {token.content: i for i, token in added.items() if token.special}

    @property
    def eos_id(self) -> int | None:
        """The id of the end of a text, if there is one.

        Where nobody says which it is: `<|endoftext|>`, or one of its usual other names.
        """
        if self.special is not None:
            return self.special.eos
        names = [name for name in END_NAMES if name in self.specials]
        return self.specials[names[0]] if names else None

    @property
    def ends(self) -> tuple[int, ...]:
        """The ids at which writing ends: the end of a text, and whatever else does."""
        if self.special is not None:
            return self.special.ends
        return () if self.eos_id is None else (self.eos_id,)

    @property
    def bos_id(self) -> int | None:
        """The id of what a chat template calls bos_token, if there is one."""
        if self.special is not None:
            return self.special.bos
        return self.opening[0] if self.opening else None

    @cached_property
    def opening(self) -> list[int]:
        """The ids that a text begins with, before its first token; often none.

        Llama's and Gemma's tokenizers ask for one, and their models were never
        trained without it.
        """
        if self.backend.post_processor is None:
            return []
        bare = self.backend.encode("a", add_special_tokens=False).ids
        ids = self.backend.encode("a", add_special_tokens=True).ids
        start = next(i for i in range(len(ids)) if ids[i : i + len(bare)] == bare)
        return ids[:start]

    @cached_property
    def unk_id(self) -> int | None:
        """The id that stands for text outside the vocabulary, if there is one."""
        model = json.loads(self.json)["model"]
        unk = model.get("unk_token")
        return self.vocab.get(unk) if unk is not None else model.get("unk_id")

    def encode(self, text: str) -> list[int]:
        """Returns the ids of a text; see `encode_batch`."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Returns the ids of each text, using all cores.

        Special tokens written in a text are encoded as the text they are.

        Raises:
          ValueError: a text holds something that the vocabulary lacks and there is
            no token for the unknown; the sentence names it and its position.
        """
        texts = list(texts)
        if self.kind == "char":
            return [self._look_up(text) for text in texts]
        if self._may_drop:
            for text in texts:
                self._refuse_dropped(text)
        ids: list[list[int]] = [[] for _ in texts]
        for group in groups(texts, cut=self._cuttable):
            try:
                pieces = [piece for _, piece in group]
                encoded = self.backend.encode_batch_fast(
                    pieces, add_special_tokens=False
                )
            except Exception as error:  # Hugging Face raises nothing narrower
                for text in texts:
                    self._explain(text)
                raise ValueError(f"this text cannot be tokenized: {error}") from error
            for (owner, _), encoding in zip(group, encoded, strict=True):
                ids[owner].extend(encoding.ids)
        return ids

    def encode_joined(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids of a text that special tokens cut, and where each id lies.

        Each JOINT in the text stands for a special token and has the id -1. What is
        behind it is encoded as the rest of a text that began before it: without the
        space that some tokenizers put in front of a text.

        Returns:
          (ids, the (begin, end) of each in the text).

        Raises:
          ValueError: see `encode_batch`.
        """
        if self._may_drop:
            for part in text.split(self.JOINT):
                self._refuse_dropped(part)
        joint = self._joined.token_to_id(self.JOINT)
        try:
            found = self._joined.encode(text, add_special_tokens=False)
        except Exception as error:  # Hugging Face raises nothing narrower
            for part in text.split(self.JOINT):
                self._explain(part)
            raise ValueError(f"this text cannot be tokenized: {error}") from error
        return [-1 if i == joint else i for i in found.ids], found.offsets

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Returns the text of ids; special tokens appear by name.

        Bytes that are not UTF-8 become U+FFFD.

        Raises:
          ValueError: an id is not in the vocabulary.
        """
        ids = self._checked(ids)
        if self._pieces is None:
            return self.backend.decode(ids, skip_special_tokens=False)
        joined = b"".join(self._pieces[i] for i in ids)
        text = joined.decode("utf-8", errors="replace")
        return text.removeprefix(" ") if self.kind == "word" else text

    def decode_stream(self) -> "PieceStream | WindowStream":
        """Returns an object whose `push(id)` gives the text that id completes.

        The pushed texts and a final `flush()` join to what `decode` returns, but that
        a run of more than HELD tokens without a whole character may differ in its
        U+FFFD.
        """
        return WindowStream(self) if self._pieces is None else PieceStream(self)

    def add_special(self, tokens: Sequence[str]) -> "Tokenizer":
        """Returns a tokenizer with new special tokens after the present ids.

        Raises:
          ValueError: a token is empty, given twice or in the vocabulary already.
        """
        for position, token in enumerate(tokens):
            if not token:
                raise ValueError("a special token needs at least one character")
            if token in self.vocab or token in tokens[:position]:
                raise ValueError(
                    f"special token {token!r} is in the vocabulary already; "
                    "choose another name"
                )
        if self.kind == "char":
            return self._add_to_characters(tokens)
        grown = hf.Tokenizer.from_str(self.json)
        grown.add_special_tokens(list(tokens))
        return replace(self, json=wrap(grown).json)

    def with_special(self, found: Special | None) -> "Tokenizer":
        """Returns the tokenizer with `special` set; what it names is no longer text."""
        if found is None:
            return self
        named = {found.bos, found.eos, found.pad, *found.ends}
        names = {i: token for token, i in self.vocab.items()}
        texts = (named & names.keys()) - {*self.specials.values()}
        if not texts:
            return replace(self, special=found)
        backend = hf.Tokenizer.from_str(self.json)
        backend.add_special_tokens([names[i] for i in texts])
        return replace(wrap(backend), special=found)

    def special_id(self, token: str) -> int:
        """Returns the id of a special token; ValueError when there is none such."""
        if token not in self.specials:
            known = ", ".join(self.specials) or "none"
            raise ValueError(
                f"{token!r} is not a special token of this tokenizer, which has: "
                f"{known}; add it with add_special"
            )
        return self.specials[token]

    def bytes_of(self, id: int) -> bytes:
        """Returns what a token stands for, which may be a part of a character.

        Raises:
          ValueError: the id is not in the vocabulary.
        """
        (id,) = self._checked([id])
        if self._pieces is not None:
            return self._pieces[id]
        byte = re.fullmatch("<0x([0-9A-F]{2})>", self.backend.id_to_token(id) or "")
        return bytes.fromhex(byte[1]) if byte else self.decode([id]).encode()

    def token_bytes(self) -> np.ndarray:
        """Returns int32 [V]: the UTF-8 bytes each token stands for; specials 0."""
        size_V = np.zeros(self.vocab_size, np.int32)
        for token, i in self.vocab.items():
            if self._pieces is not None:
                piece = self._pieces[i]
                size_V[i] = len(piece.lstrip(b" ") if self.kind == "word" else piece)
            elif re.fullmatch("<0x[0-9A-F]{2}>", token):
                size_V[i] = 1
            else:
                size_V[i] = len(token.replace("▁", " ").encode())
        size_V[list(self.specials.values())] = 0
        return size_V

    def save(self, path: str | os.PathLike) -> None:
        """Writes tokenizer.json at `path`, whole or not at all, and what goes with it.

        That is tokenizer.special.json, where it is said which tokens end texts.
        """
        special.write(Path(path), self.special)
        files.write(Path(path), self.json)

    @cached_property
    def _joined(self) -> hf.Tokenizer:
        """The Hugging Face object with JOINT for every special token."""
        document = json.loads(self.json) | {"post_processor": None}
        backend = hf.Tokenizer.from_str(json.dumps(document))
        backend.encode_special_tokens = True
        backend.add_tokens([hf.AddedToken(self.JOINT, normalized=False)])
        return backend

    @cached_property
    def _pieces(self) -> list[bytes] | None:
        """What each id adds to a decoded text; None where that is no table."""
        if self.kind == "other":
            return None
        added = self.backend.get_added_tokens_decoder()
        piece = {"char": str.encode, "word": word_piece}.get(self.kind, byte_piece)
        pieces = [b""] * self.vocab_size
        for token, i in self.vocab.items():
            named = i in added and self.kind != "word"
            pieces[i] = token.encode() if named else piece(token)
        return pieces

    @cached_property
    def _known_V(self) -> np.ndarray:
        """bool [V]: False for the ids that a published vocabulary leaves out."""
        known_V = np.zeros(self.vocab_size, bool)
        known_V[list(self.vocab.values())] = True
        return known_V

    @cached_property
    def _table(self) -> np.ndarray:
        """int32 [C]: the id of each code point, the last entry for those above."""
        codes = {ord(token): i for token, i in self.vocab.items() if len(token) == 1}
        unknown = -1 if self.unk_id is None else self.unk_id
        table_C = np.full(max(codes) + 2, unknown, np.int32)
        table_C[list(codes)] = list(codes.values())
        return table_C

    def _look_up(self, text: str) -> list[int]:
        # The same ids as the Hugging Face object gives, some forty times as fast.
        code_T = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")
        id_T = self._table[np.minimum(code_T, len(self._table) - 1)]
        if (id_T < 0).any():
            position = int((id_T < 0).argmax())
            raise self._unseen("character", text[position], position)
        return id_T.tolist()

    @cached_property
    def _cuttable(self) -> bool:
        """Whether the rule for splitting is one of ours, for which CUT is right."""
        rule = state(self.backend.pre_tokenizer)
        known = [state(make()) for make in PRE_TOKENIZERS.values()]
        return self.kind != "other" and rule in known

    @cached_property
    def _missing_bytes(self) -> set[int]:
        return {b for c, b in byte_values().items() if c not in self.vocab}

    @cached_property
    def _alphabet(self) -> set[str]:
        model = json.loads(self.json)["model"]
        before = model.get("continuing_subword_prefix") or ""
        behind = model.get("end_of_word_suffix") or ""
        return {t.removeprefix(before).removesuffix(behind) for t in self.vocab}

    @cached_property
    def _may_drop(self) -> bool:
        """Whether the model leaves out what it does not know without a word."""
        model = json.loads(self.json)["model"]
        if model.get("type") != "BPE" or self.unk_id is not None:
            return False
        if self.kind in ("byte", "bpe"):
            return bool(self._missing_bytes)
        every_byte = all(f"<0x{b:02X}>" in self.vocab for b in range(256))
        return not (model.get("byte_fallback") and every_byte)

    def _refuse_dropped(self, text: str) -> None:
        # Offsets do not tell: after a dropped character they are off by its length.
        if self.kind in ("byte", "bpe"):
            for position, character in enumerate(text):
                if not self._missing_bytes.isdisjoint(character.encode()):
                    raise self._unseen("character", character, position)
            return
        if self.backend.normalizer is not None:
            text = self.backend.normalizer.normalize_str(text)
        rule = self.backend.pre_tokenizer
        pieces = rule.pre_tokenize_str(text) if rule else [(text, (0, len(text)))]
        for piece, (start, _) in pieces:
            for offset, character in enumerate(piece):
                if character not in self._alphabet:
                    raise self._unseen("character", character, start + offset)

    def _explain(self, text: str) -> None:
        """Raises a ValueError that names what is wrong with a refused text."""
        half = re.search("[\ud800-\udfff]", text)
        if half:
            raise ValueError(
                f"character {half.group()!r} at position {half.start()} is half of a "
                "surrogate pair, which is not text; remove it"
            )
        if isinstance(self.backend.model, models.WordLevel) and self.unk_id is None:
            pieces = self.backend.pre_tokenizer.pre_tokenize_str(text)
            for piece, (position, _) in pieces:
                if piece not in self.vocab:
                    raise self._unseen("word", piece, position)

    def _unseen(self, what: str, piece: str, position: int) -> ValueError:
        return ValueError(
            f"{what} {piece!r} at position {position} is not in the vocabulary of "
            f"this {self.kind} tokenizer ({self.vocab_size} tokens) and it has no "
            f"{UNK}; remove it, or use a byte or bpe tokenizer"
        )

    def _checked(self, ids: Sequence[int] | np.ndarray) -> list[int]:
        id_T = np.asarray(ids, np.int64).reshape(-1)
        known_T = (id_T >= 0) & (id_T < self.vocab_size)
        known_T[known_T] = self._known_V[id_T[known_T]]
        if not known_T.all():
            position = int(known_T.argmin())
            raise ValueError(
                f"id {id_T[position]} at position {position} is not in the vocabulary "
                f"of {self.vocab_size} tokens; was it made by another tokenizer?"
            )
        return id_T.tolist()

    def _add_to_characters(self, tokens: Sequence[str]) -> "Tokenizer":
        # Their own vocabulary takes them too: only there does <|unk|> do its work,
        # and no single character of a text is ever equal to one of them.
        document = json.loads(self.json)
        for token in tokens:
            if len(token) < 2:
                raise ValueError(
                    f"special token {token!r} of a character tokenizer needs two "
                    "characters or more, or text would become it"
                )
            document["model"]["vocab"][token] = len(document["model"]["vocab"])
        grown = hf.Tokenizer.from_str(json.dumps(document))
        grown.add_special_tokens(list(tokens))
        return replace(self, json=wrap(grown).json)


def wrap(backend: hf.Tokenizer) -> Tokenizer:
    """Returns the tokenizer of a Hugging Face object."""
    return Tokenizer(backend.to_str(pretty=True))
