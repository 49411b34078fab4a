"""Supervised fine-tuning: learn the answers of conversations.

The loss is that of language modelling with another mask: only positions whose next
token belongs to an answer count. Several conversations share a row of tokens
(`Packed`); segments and positions keep them from seeing each other.
"""

import hashlib
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from gpt_jax import (
    chat,
    data,
    instructions,
    names,
    prepare,
    screen,
    tokenizers,
)
from gpt_jax.model import GPTConfig
from gpt_jax.options import Data
from gpt_jax.tasks import lm
from gpt_jax.tasks.task import OF_ROWS, OF_THE_LOSS, OF_THE_MODEL, Kind, Task

LEARN = ("answers", "all")
TOO_LONG = ("refuse", "drop", "cut")
EMPTY = ("refuse", "drop")
PACKED = 1024  # tokens of a row of several conversations, where none is longer


@dataclass(frozen=True)
class Rows:
    """Which rows of a file are learnt, as conversations or as pairs of answers.

    Attributes:
      template: see `chat.render`.
      too_long: what becomes of a row longer than the window: "refuse" is an error,
        "drop" leaves it out, "cut" cuts its end off; the last two are counted.
      empty: what becomes of a row with an empty answer: "refuse" or "drop".
      test_fraction: the share of rows kept for a test; nothing here reads them.
      loss_chunk: see `lm.make_loss`.
    """

    template: str
    too_long: str
    empty: str
    test_fraction: float
    loss_chunk: int


@dataclass(frozen=True)
class Options(Rows):
    """The keys of `config.task`.

    Attributes:
      learn: which tokens count: "answers", or "all".
      pack: several conversations to a row, else one.
    """

    learn: str
    pack: bool


class Example(NamedTuple):
    """A conversation: its ids, and 1 where an id is to be predicted, else 0."""

    ids: np.ndarray
    learnt: np.ndarray

    @property
    def size(self) -> int:
        """The positions that it takes: its last id is only predicted."""
        return len(self.ids) - 1


def make(
    options: Options,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Reads, splits, encodes and packs conversations and returns the task.

    Args:
      options: what is learnt, and of which rows.
      model: the architecture; vocab_size 0 takes the tokenizer's.
      text: source is as `instructions.read` takes it.
      dropout: see `lm.make_loss`.
      progress: show how far reading is, and what was left out.

    Raises:
      ValueError: a setting or a row cannot be used; see `instructions.read`.
    """
    template = options.template
    seq_len = text.seq_len or model.context_length
    lm.check_window(seq_len, model.context_length)
    show = screen.Show(progress)
    rows = rows_of(text, show, progress)
    parts = instructions.split(
        rows,
        how=text.split,
        val_fraction=text.val_fraction,
        test_fraction=options.test_fraction,
    )
    tokenizer = tokenizer_of(text, parts["train"], template, progress)
    gpt = lm.make_model(model, tokenizer)
    encoded = {}
    for name in ("train", "val"):
        kept = _answered(
            parts[name], name, template, options.learn, options.empty, show
        )
        found = encode(kept, tokenizer, template, learn=options.learn, show=show)
        encoded[name] = fitting(
            found, seq_len, name=name, too_long=options.too_long, show=show
        )
    longest = max(example.size for part in encoded.values() for example in part)
    need = -(-longest // 8) * 8
    if options.pack and not text.seq_len:  # a context may be far longer than any row
        need = max(need, PACKED)
    width = seq_len if options.pack and text.seq_len else min(seq_len, need)
    packed = pack_rows if options.pack else one_a_row
    ready = {name: Packed(packed(part, width), width) for name, part in encoded.items()}
    counts = ", ".join(
        f"{len(encoded[name])} in {len(ready[name])} rows ({name})" for name in encoded
    )
    named = template if template in chat.TEMPLATES else "in Jinja"
    kept = f"{len(parts['test'])} kept for a test"
    show.say(f"conversations: {counts}, {kept}; template {named}")
    alone = {name: one_a_row(part, width) for name, part in encoded.items()}
    test = [row.fields for row in parts["test"]]
    return Task(
        model=gpt,
        tokenizer=tokenizer,
        loss=lm.make_loss(
            gpt, tokenizer.token_bytes(), loss_chunk=options.loss_chunk, dropout=dropout
        ),
        train=ready["train"],
        evals={"val": ready["val"]},
        tokens=width,
        fingerprint=fingerprint(alone, tokenizer, test),
        test=test,
        prompt=partial(prompt_ids, tokenizer=tokenizer, template=template),
        stop=tuple(chat.stop_ids(tokenizer, template)),
    )


def rows_of(text: Data, show: screen.Show, progress: bool) -> list[instructions.Row]:
    """Returns the rows of `config.data`; says how many skip_bad_docs leaves out."""
    lost: list[str] = []
    found = instructions.read(
        text.source,
        cache=text.cache,
        progress=progress,
        bad=lost.append if text.skip_bad_docs else None,
    )
    if lost:
        many = screen.count(len(lost), "row")
        show.say(f"{many} left out that cannot be read, the first: {lost[0]}")
    return found


def encode(
    rows: Sequence[instructions.Row],
    tokenizer,
    template: str,
    *,
    learn: str,
    show: screen.Show,
) -> list[Example]:
    """Returns each row's conversation as an Example."""
    talks = [chat.messages_of(row.fields, template) for row in rows]
    sizes = [sum(len(message.content) for message in talk) for talk in talks]
    examples = []
    with show.bar("encoding", sum(sizes)) as advance:
        for talk, size in zip(talks, sizes):
            ids, answer = chat.render(talk, tokenizer, template, reply=False)
            learnt = np.ones(len(ids)) if learn == "all" else np.asarray(answer)
            examples.append(
                Example(np.asarray(ids, np.int32), learnt.astype(np.float32))
            )
            advance(size)
    return examples


def fitting(
    examples: Sequence[Example],
    seq_len: int,
    *,
    name: str,
    too_long: str,
    show: screen.Show,
) -> list[Example]:
    """Returns the examples as they fit into a window of `seq_len` positions.

    What is left out or cut is counted and said. An example of which nothing that is to
    be learnt would remain is left out.

    Raises:
      ValueError: one is too long under "refuse", or nothing remains.
    """
    long = [n for n, example in enumerate(examples) if example.size > seq_len]
    if long and too_long == "refuse":
        most = max(examples[n].size for n in long)
        raise ValueError(
            f"{len(long)} of {len(examples)} conversations ({name}) are longer than "
            f"the window of {seq_len} tokens, the longest has {most}: raise "
            "data.seq_len (up to model.context_length), or choose what becomes of them "
            "with --config.task.too_long=drop or cut"
        )
    if too_long == "cut":
        kept = [
            Example(e.ids[: seq_len + 1], e.learnt[: seq_len + 1]) for e in examples
        ]
    else:
        kept = [example for example in examples if example.size <= seq_len]
    kept = [example for example in kept if example.learnt[1:].any()]
    lost = len(examples) - len(kept)
    if long:
        cut = sum(example.size > seq_len for example in examples) - lost
        done = f"{cut} cut, " if too_long == "cut" else ""
        show.say(
            f"{len(long)} of {len(examples)} conversations ({name}) were longer than "
            f"{seq_len} tokens: {done}{lost} left out"
        )
    if not kept:
        raise ValueError(
            f"no conversation ({name}) of {len(examples)} fits into {seq_len} tokens "
            "with its answer; use a longer context or a shorter template"
        )
    return kept


def pack_rows(examples: Sequence[Example], width: int) -> list[list[Example]]:
    """Returns the examples in rows of at most `width` positions.

    The longest first, each goes where it leaves the least room (best fit decreasing,
    Johnson 1973), so few positions stay empty.
    """
    rows: list[list[Example]] = []
    free: list[list[int]] = [[] for _ in range(width + 1)]  # rows by their room
    for example in sorted(examples, key=lambda e: -e.size):
        room = next((r for r in range(example.size, width + 1) if free[r]), 0)
        if room:
            row = free[room].pop()
        else:
            room, row = width, len(rows)
            rows.append([])
        rows[row].append(example)
        free[room - example.size].append(row)
    return rows


def one_a_row(examples: Sequence[Example], width: int) -> list[list[Example]]:
    """Returns every example in a row of its own."""
    del width
    return [[example] for example in examples]


class Packed:
    """Rows of conversations as examples for batches: arrays [T], random access.

    `tokens`, `targets` and `mask` are as in `data.Windows`; `positions` begin anew with
    each conversation and `segments` number them, the empty rest of the row last.
    """

    def __init__(self, rows: Sequence[Sequence[Example]], width: int):
        self.rows, self.width = rows, width

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> data.Batch:
        row = self.rows[index]
        arrays = {
            "tokens": np.zeros(self.width, np.int32),
            "targets": np.zeros(self.width, np.int32),
            "mask": np.zeros(self.width, np.float32),
            "positions": np.zeros(self.width, np.int32),
            "segments": np.full(self.width, len(row), np.int32),
        }
        at = 0
        for number, example in enumerate(row):
            place = slice(at, at + example.size)
            arrays["tokens"][place] = example.ids[:-1]
            arrays["targets"][place] = example.ids[1:]
            arrays["mask"][place] = example.learnt[1:]
            arrays["positions"][place] = np.arange(example.size)
            arrays["segments"][place] = number
            at += example.size
        return arrays


def _answered(
    rows: Sequence[instructions.Row],
    name: str,
    template: str,
    learn: str,
    empty: str,
    show: screen.Show,
) -> list[instructions.Row]:
    """Returns the rows whose every answer says something; see `make`."""
    kept, lost = [], []
    for row in rows:
        talk = chat.messages_of(row.fields, template)
        said = [message for message in talk if message.role == "assistant"]
        if learn == "all" and not all(message.weight for message in said):
            raise ValueError(
                f"{row.where}: an answer has the weight 0, but task.learn=all learns "
                "everything: take --config.task.learn=answers"
            )
        answers = [
            m.content.strip() for m in talk if m.role == "assistant" and m.weight
        ]
        (kept if answers and all(answers) else lost).append(row)
    share = f"{len(lost)} of {len(rows)} rows ({name})"
    if lost and empty == "refuse":
        raise ValueError(
            f"{share} have an empty answer, or none to learn, the first: "
            f"{lost[0].where}; mend them, or leave them out with "
            "--config.task.empty=drop"
        )
    if lost:
        show.say(f"{share} left out: their answer is empty")
    if not kept:
        raise ValueError(f"no row ({name}) has an answer to learn")
    return kept


def tokenizer_of(
    text: Data,
    rows: Sequence[instructions.Row],
    template: str,
    progress: bool,
) -> tokenizers.Tokenizer:
    """Returns the tokenizer of `config.data`, trained on `rows` where it must be."""
    spec = text.tokenizer
    ready = prepare.ready_tokenizer(spec, text.cache, progress)
    if ready is not None:
        return ready
    talks = (chat.messages_of(row.fields, template) for row in rows)
    texts = (message.content for talk in talks for message in talk)
    return prepare.train_tokenizer(spec, texts, screen.Show(progress))


def prompt_ids(text: str, *, tokenizer, template: str) -> list[int]:
    """Returns the ids after which the model answers a user's text."""
    return chat.render([chat.Message("user", text)], tokenizer, template, reply=True)[0]


def fingerprint(
    encoded: Mapping[str, Sequence[Sequence[Example]]], tokenizer, test: Sequence[Any]
) -> str:
    """Returns the sha256 of what is learnt, validated with, and kept for a test.

    Args:
      encoded: examples of each part, those that are compared with each other together.
      tokenizer: the one that encoded them.
      test: the rows that are kept.
    """
    digest = hashlib.sha256(tokenizer.sha256.encode())
    digest.update(digest_of(test))
    for name, groups in encoded.items():
        digest.update(f"{name} {len(groups)}\n".encode())
        for example in (example for group in groups for example in group):
            digest.update(example.ids.astype("<i4").tobytes())
            digest.update(example.learnt.astype("<f4").tobytes())
    return digest.hexdigest()


def digest_of(rows: Sequence[Any]) -> bytes:
    """Returns the sha256 of rows of data as they stand."""
    text = json.dumps(rows, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).digest()


def check(options: Options, text: Data) -> None:
    """Raises ValueError for options that cannot be; see `make`."""
    chat.check(options.template)
    names.choose("task.learn", options.learn, LEARN)
    check_rows(options, text)


def check_rows(options: Rows, text: Data) -> None:
    """Raises ValueError for options about rows that cannot be."""
    names.choose("task.too_long", options.too_long, TOO_LONG)
    names.choose("task.empty", options.empty, EMPTY)
    instructions.check_split(
        how=text.split,
        val_fraction=text.val_fraction,
        test_fraction=options.test_fraction,
    )
    lm.check_chunk(options.loss_chunk)


KIND = Kind(
    make=make,
    options=Options,
    check=check,
    reads=lambda options: (
        *(*OF_THE_MODEL, *OF_THE_LOSS, *OF_ROWS),
        "data.skip_bad_docs",
    ),
    config="configs/sft.py",
    tuned=True,
)
