"""Text to token ids and back: character, word, byte and byte-level BPE tokenizers.

Every tokenizer is a Hugging Face `tokenizers` object that lives in one
tokenizer.json, so other software can load it and gets the same ids. This module
keeps three promises on top: text never becomes a special token, nothing unseen is
dropped in silence, and streamed text never holds half a character.
"""

import codecs
import concurrent.futures
import json
import os
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import ClassVar

import numpy as np
import tokenizers as hf
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt_jax import files, special
from gpt_jax.special import Special

EOS = "<|endoftext|>"
UNK = "<|unk|>"
# What the end of a text is called where nobody says it, here first.
END_NAMES = (EOS, "<|end_of_text|>", "</s>", "<eos>")
# No space is written before these when words are joined.
CLOSE_UP = tuple(",.:;?!\"()'")

# Long texts are cut where no token can span, so that all cores encode one text and
# memory stays bounded. A token of the word rule or of GPT-2's rule never runs from a
# letter or one of these marks into the whitespace behind it.
CUT = re.compile(r"(?<=[\w.,;:!?。])(?=[ \n])")
CUT_CHARS = 1 << 12  # encodes a sixth faster than 1 << 16: the work stays in the cache
GROUP_CHARS = 1 << 22
# What has no such place for so long is cut anywhere before a BPE is trained on it, and
# words longer than any of a language (DNA, lines of dashes) count as several: the time
# to find their pairs grows with the square of their length.
UNCUT_CHARS = 1 << 16
WORD_BYTES, WORD_PART_BYTES = 1 << 10, 1 << 7
TICK_SECONDS = 0.1  # between two signs of life of a training
STOP_SECONDS = 1.0  # how long who leaves a training waits for its thread
HELD = 8  # tokens: whoever waits for the rest of a character gives up after so many


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
        return _kind(self.backend)

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
        for group in _groups(texts, cut=self._cuttable):
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
        return replace(self, json=_wrap(grown).json)

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
        return replace(_wrap(backend), special=found)

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
        piece = {"char": str.encode, "word": _word_piece}.get(self.kind, _byte_piece)
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
        rule = _state(self.backend.pre_tokenizer)
        known = [_state(make()) for make in PRE_TOKENIZERS.values()]
        return self.kind != "other" and rule in known

    @cached_property
    def _missing_bytes(self) -> set[int]:
        return {b for c, b in _byte_values().items() if c not in self.vocab}

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
        return replace(self, json=_wrap(grown).json)


class PieceStream:
    """Decodes ids one by one where each id stands for fixed bytes."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.started = tokenizer.kind != "word"

    def push(self, id: int) -> str:
        """Returns the text that this id completes, often all of it."""
        (id,) = self.tokenizer._checked([id])
        pieces = self.tokenizer._pieces
        assert pieces is not None
        text = self.decoder.decode(pieces[id])
        if not self.started:
            text, self.started = text.removeprefix(" "), True
        return text

    def flush(self) -> str:
        """Returns what is left of an unfinished character, as U+FFFD."""
        return self.decoder.decode(b"", final=True)


class WindowStream:
    """Decodes ids one by one where a token's text depends on its neighbours."""

    def __init__(self, tokenizer: Tokenizer):
        self.tokenizer = tokenizer
        self.context: list[int] = []  # printed already; what follows is read after it
        self.fresh: list[int] = []

    def push(self, id: int) -> str:
        """Returns the text that this id completes."""
        self.fresh += self.tokenizer._checked([id])
        return self._emit(final=False)

    def flush(self) -> str:
        """Returns the text that was held back."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self.tokenizer.decode(self.context)
        after = self.tokenizer.decode(self.context + self.fresh)
        more = after.endswith("\ufffd") and len(self.fresh) < HELD and not final
        if not self.fresh or more:
            return ""
        self.context, self.fresh = self.fresh, []
        return after[len(before) :]


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
    return _wrap(backend)


def train_word(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer of the sorted words, punctuation split off.

    The rule and the order of ids are those of Raschka, Build a Large Language Model
    (From Scratch), chapter 2.
    """
    rule = PRE_TOKENIZERS["word"]()
    words: set[str] = set()
    for text in _nonempty(texts):
        for piece in _cut(text):
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
    return _wrap(backend)


def train_byte(texts: Iterable[str]) -> Tokenizer:
    """Returns a tokenizer whose ids 0 to 255 are the bytes of UTF-8."""
    return _byte_level(models.BPE(_byte_values(), []), "byte")


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
        piece for text in _nonempty(texts) for piece in _cut(text, uncut=UNCUT_CHARS)
    )
    _apart(lambda going: backend.train_from_iterator(going(pieces), trainer), tick)
    return _byte_level(backend.model, "bpe")


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
    found = _wrap(backend)
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
    return _byte_level(model, "bpe")


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

TRAINERS: dict[str, Callable[..., Tokenizer]] = {
    "char": train_char,
    "word": train_word,
    "byte": train_byte,
    "bpe": train_bpe,
}


def _byte_level(model: models.Model, rule: str) -> Tokenizer:
    backend = hf.Tokenizer(model)
    backend.pre_tokenizer = PRE_TOKENIZERS[rule]()
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([EOS])
    return _wrap(backend)


def _wrap(backend: hf.Tokenizer) -> Tokenizer:
    return Tokenizer(backend.to_str(pretty=True))


def _state(part) -> bytes:
    return b"" if part is None else part.__getstate__()


def _kind(backend: hf.Tokenizer) -> str:
    rule = _state(backend.pre_tokenizer)
    if isinstance(backend.model, models.WordLevel):
        kinds = [k for k in ("char", "word") if _state(PRE_TOKENIZERS[k]()) == rule]
        return kinds[0] if kinds else "other"
    byte_level = isinstance(backend.decoder, decoders.ByteLevel)
    if not isinstance(backend.model, models.BPE) or not byte_level:
        return "other"
    values = all(backend.token_to_id(c) == b for c, b in _byte_values().items())
    return "byte" if values and rule == _state(_byte_rule()) else "bpe"


@lru_cache(maxsize=1)
def _byte_values() -> dict[str, int]:
    """Returns the character that byte-level vocabularies write for each byte.

    Bytes that print stand for themselves in Latin-1; the others are numbered from
    U+0100 on (GPT-2, section 2.2, and its published encoder).
    """
    prints = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = sorted(set(range(256)) - prints)
    name = {b: chr(b) for b in prints} | {b: chr(256 + i) for i, b in enumerate(hidden)}
    return {name[b]: b for b in range(256)}


def _byte_piece(token: str) -> bytes:
    values = _byte_values()
    if all(character in values for character in token):
        return bytes(values[character] for character in token)
    return token.encode()


def _word_piece(token: str) -> bytes:
    return token.encode() if token in CLOSE_UP else b" " + token.encode()


def _nonempty(texts: Iterable[str]) -> Iterator[str]:
    empty = True
    for text in texts:
        empty = empty and not text
        yield text
    if empty:
        raise ValueError("there is no text to train a tokenizer on; check the corpus")


def _cut(text: str, *, uncut: int = 0) -> Iterator[str]:
    """Yields the parts of a text, cut where no token spans.

    Where there is no such place within `uncut` characters it is cut after so many; 0
    leaves it whole, however long it is.
    """
    start = 0
    while len(text) - start > CUT_CHARS:
        limit = start + CUT_CHARS + uncut if uncut else len(text)
        place = CUT.search(text, start + CUT_CHARS, limit)
        if place is None and limit >= len(text):
            break
        end = place.start() if place else limit
        yield text[start:end]
        start = end
    yield text[start:]


def _groups(texts: Sequence[str], *, cut: bool) -> Iterator[list[tuple[int, str]]]:
    """Yields (index of the text, part of it) in groups of bounded size."""
    group, size = [], 0
    for owner, text in enumerate(texts):
        for piece in _cut(text) if cut else [text]:
            group.append((owner, piece))
            size += len(piece)
            if size >= GROUP_CHARS:
                yield group
                group, size = [], 0
    if group:
        yield group
