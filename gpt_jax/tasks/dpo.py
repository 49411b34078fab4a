"""Preferences: raise the odds of a chosen answer over a rejected one.

Direct preference optimisation needs neither a reward model nor sampling: its loss
compares what the model gives the two answers with what the weights that it started
from gave them. Those are held once, in `frozen`; with LoRA they are the base itself.
"""

import logging
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import numpy as np

from gpt_jax import adapters, chat, data, instructions, losses, names, screen
from gpt_jax.model import GPT, GPTConfig, hidden
from gpt_jax.options import Data
from gpt_jax.tasks import lm, sft
from gpt_jax.tasks.scores import scores
from gpt_jax.tasks.task import (
    OF_ROWS,
    OF_THE_MODEL,
    Kind,
    Task,
    dropout_of,
    with_own,
)

log = logging.getLogger(__name__)

LOGPS = ("sum", "mean")
WITHOUT_REFERENCE = ("orpo",)
CHOSEN = ("chosen", "output")  # columns of the better answer, the first that is there
WANTED = "wanted are 'rejected', and 'chosen' or 'output'"


@dataclass(frozen=True)
class Options(sft.Rows):
    """The keys of `config.task`.

    A pair is too long where an answer ends behind the window; both are cut there.

    Attributes:
      variant: see `losses.preference`.
      logp: see `losses.preference`.
      beta: see `losses.preference`.
    """

    variant: str
    logp: str
    beta: float


class Pair(NamedTuple):
    """Two answers to one prompt, each with the prompt before it."""

    chosen: sft.Example
    rejected: sft.Example

    @property
    def size(self) -> int:
        """The positions that the longer of the two takes."""
        return max(self.chosen.size, self.rejected.size)


def make(
    options: Options,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Reads, splits and encodes pairs of answers and returns the task.

    Args:
      options: how pairs are compared, and which rows are taken.
      model: the architecture; vocab_size 0 takes the tokenizer's.
      text: source is as `instructions.read` takes it, and
        each row has the columns "rejected" and "chosen" (or "output") as well. Chat
        messages end before the answer, or with the chosen one, which counts once.
      dropout: see `lm.make_loss`.
      progress: show how far reading is, and what was left out.

    Raises:
      ValueError: a setting or a row cannot be used.
    """
    seq_len = text.seq_len or model.context_length
    lm.check_window(seq_len, model.context_length)
    show = screen.Show(progress)
    rows = sft.rows_of(text, show, progress)
    if text.source.partition(":")[0] == "builtin":
        rows = mismatched(rows)
    parts = instructions.split(
        rows,
        how=text.split,
        val_fraction=text.val_fraction,
        test_fraction=options.test_fraction,
    )
    pairs = {
        name: both(parts[name], name, options.empty, show) for name in ("train", "val")
    }
    chosen_rows = [chosen for chosen, _ in pairs["train"]]
    tokenizer = sft.tokenizer_of(text, chosen_rows, options.template, progress)
    gpt = lm.make_model(model, tokenizer)
    encoded = {}
    for name, rows_of in pairs.items():
        chosen, rejected = (
            sft.encode(side, tokenizer, options.template, learn="answers", show=show)
            for side in zip(*rows_of, strict=True)
        )
        found = [
            Pair(_last(a), _last(b)) for a, b in zip(chosen, rejected, strict=True)
        ]
        encoded[name] = fitting(
            found, seq_len, name=name, too_long=options.too_long, show=show
        )
    longest = max(pair.size for part in encoded.values() for pair in part)
    width = min(seq_len, -(-longest // 8) * 8)
    ready = {name: Pairs(part, width) for name, part in encoded.items()}
    counts = ", ".join(f"{len(part)} ({name})" for name, part in ready.items())
    test = [row.fields for row in parts["test"]]
    show.say(f"pairs of answers: {counts}, {len(parts['test'])} kept for a test")
    return Task(
        model=gpt,
        tokenizer=tokenizer,
        loss=make_loss(
            gpt,
            variant=options.variant,
            logp=options.logp,
            beta=options.beta,
            loss_chunk=options.loss_chunk,
            dropout=dropout,
        ),
        train=ready["train"],
        evals={"val": ready["val"]},
        tokens=2 * width,
        fingerprint=sft.fingerprint(encoded, tokenizer, test),
        reference=options.variant not in WITHOUT_REFERENCE,
        test=test,
        prompt=partial(sft.prompt_ids, tokenizer=tokenizer, template=options.template),
        stop=tuple(chat.stop_ids(tokenizer, options.template)),
    )


def check(options: Options, text: Data) -> None:
    """Raises ValueError for options that cannot be; see `make`."""
    if not options.template:
        raise ValueError(
            f"task.template is empty: name the one that the model was tuned with, "
            f"{', '.join(chat.TEMPLATES)} or the text of a Jinja template"
        )
    chat.check(options.template)
    names.choose("task.variant", options.variant, [*losses.PREFERENCES])
    names.choose("task.logp", options.logp, LOGPS)
    sft.check_rows(options, text)
    if options.beta <= 0:
        raise ValueError(f"task.beta is {options.beta}: it must be above 0")
    if options.variant == "orpo" and options.logp == "sum":
        raise ValueError(
            "task.variant orpo is made of mean log-probabilities: set task.logp=mean"
        )


def make_loss(
    model: GPT,
    *,
    variant: str,
    logp: str,
    beta: float,
    loss_chunk: int,
    dropout: Collection[str],
):
    """Returns the preference loss of `model` as `(weights, frozen, ...) -> Sums`.

    Arguments are those of `losses.preference` and `lm.make_loss`. The sums are those of
    `losses.preference`. Dropout acts on the policy alone.
    """
    lm.check_chunk(loss_chunk)

    def logps(weights, batch, rates):  # [B, P] of batch arrays [B, P, T]; own losses
        rows = {name: x.reshape(-1, x.shape[-1]) for name, x in batch.items()}
        found = hidden(model, weights, rows["tokens"], dropout=rates)
        wanted = (rows["targets"], rows["mask"])
        each = scores(model, weights, found.x_BTD, *wanted, loss_chunk=loss_chunk)
        logp_R = losses.sequence_logp(each, rows["mask"])
        return logp_R.reshape(-1, 2), found.sums

    def loss(weights, frozen, batch, key, hyper):
        training = key is not None
        reference_BP = None
        if variant not in WITHOUT_REFERENCE:
            start = jax.lax.stop_gradient(adapters.reference(frozen))
            reference_BP, _ = logps(start, batch, None)
        logp_BP, own = logps(weights, batch, dropout_of(key, hyper, dropout))
        sums = losses.preference(
            logp_BP,
            reference_BP,
            batch["mask"].sum(-1),
            variant=variant,
            logp=logp,
            beta=beta,
            label_smoothing=hyper.label_smoothing if training else 0.0,
        )
        return with_own(sums, own) if training else sums

    return loss


def mismatched(rows: Sequence[instructions.Row]) -> list[instructions.Row]:
    """Returns rows without preferences as if the next row's answer were rejected."""
    others = [*rows[1:], *rows[:1]]
    return [
        row._replace(fields={**row.fields, "rejected": other.fields["output"]})
        for row, other in zip(rows, others, strict=True)
    ]


def both(
    rows: Sequence[instructions.Row], name: str, empty: str, show: screen.Show
) -> list[tuple[instructions.Row, instructions.Row]]:
    """Returns each row as two: with the chosen answer, and with the rejected one."""
    found, lost, answered = [], [], []
    for row in rows:
        given = (name for name in CHOSEN if row.fields.get(name) is not None)
        chosen = row.text(next(given, CHOSEN[0]), WANTED)
        rejected = row.text("rejected", WANTED)
        asked = _asked(row, chosen)
        answered += [row] * (asked is not row)
        pair = (_with_answer(asked, chosen), _with_answer(asked, rejected))
        (found if chosen.strip() and rejected.strip() else lost).append(pair)
    share = f"{len(lost)} of {len(rows)} pairs ({name})"
    if lost and empty == "refuse":
        raise ValueError(
            f"{share} have an empty answer, the first: {lost[0][0].where}; mend them, "
            "or leave them out with --config.task.empty=drop"
        )
    if lost:
        show.say(f"{share} left out: an answer is empty")
    if answered:
        log.warning(
            "the messages of %d of %d pairs (%s) end with the chosen answer, first in "
            "%s: it counts once",
            *(len(answered), len(rows), name, answered[0].where),
        )
    if not found:
        raise ValueError(f"no pair ({name}) has two answers to compare")
    return found


def fitting(
    pairs: Sequence[Pair],
    seq_len: int,
    *,
    name: str,
    too_long: str,
    show: screen.Show,
) -> list[Pair]:
    """Returns the pairs as they fit into a window of `seq_len` positions.

    What is left out or cut is counted and said. A pair of which an answer would have
    nothing left is left out.

    Raises:
      ValueError: one is too long under "refuse", or nothing remains.
    """
    long = [pair for pair in pairs if pair.size > seq_len]
    if long and too_long == "refuse":
        raise ValueError(
            f"{len(long)} of {len(pairs)} pairs ({name}) are longer than the window of "
            f"{seq_len} tokens, the longest has {max(p.size for p in long)}: raise "
            "data.seq_len (up to model.context_length), or choose what becomes of them "
            "with --config.task.too_long=drop or cut"
        )
    kept = [pair for pair in pairs if pair.size <= seq_len or too_long == "cut"]
    end = seq_len + 1
    kept = [
        Pair(*(sft.Example(e.ids[:end], e.learnt[:end]) for e in pair)) for pair in kept
    ]
    kept = [pair for pair in kept if all(e.learnt[1:].any() for e in pair)]
    lost = len(pairs) - len(kept)
    if long:
        show.say(
            f"{len(long)} of {len(pairs)} pairs ({name}) were longer than {seq_len} "
            f"tokens: {len(long) - lost} cut, {lost} left out"
        )
    if not kept:
        raise ValueError(
            f"no pair ({name}) of {len(pairs)} fits into {seq_len} tokens with its "
            "answers; use a longer context or a shorter template"
        )
    return kept


class Pairs:
    """Pairs as examples for batches: arrays [P, T], chosen and rejected.

    `tokens`, `targets` and `mask` are as in `data.Windows`; the mask is 1 where the
    target belongs to the answer.
    """

    def __init__(self, pairs: Sequence[Pair], width: int):
        self.pairs, self.width = pairs, width

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> data.Batch:
        kinds = {"tokens": np.int32, "targets": np.int32, "mask": np.float32}
        arrays = {name: np.zeros((2, self.width), kind) for name, kind in kinds.items()}
        for side, example in enumerate(self.pairs[index]):
            arrays["tokens"][side, : example.size] = example.ids[:-1]
            arrays["targets"][side, : example.size] = example.ids[1:]
            arrays["mask"][side, : example.size] = example.learnt[1:]
        return arrays


def _asked(row: instructions.Row, chosen: str) -> instructions.Row:
    """Returns a row whose messages end before the answer that is to be given."""
    turns = row.fields.get("messages") or []
    if not turns or turns[-1]["role"] != "assistant":
        return row
    if turns[-1]["content"].strip() != chosen.strip():
        raise ValueError(
            f"{row.where}: its messages end with an answer that is not the chosen one; "
            "let them end before the answers that are compared"
        )
    return row._replace(fields={**row.fields, "messages": turns[:-1]})


def _with_answer(row: instructions.Row, answer: str) -> instructions.Row:
    """Returns a row as `chat.messages_of` reads it, with this answer at its end."""
    if turns := row.fields.get("messages"):
        last = {"role": "assistant", "content": answer}
        return row._replace(fields={"messages": [*turns, last]})
    return row._replace(fields={**row.fields, "output": answer})


def _last(example: sft.Example) -> sft.Example:
    """Returns a conversation of which only the last answer counts.

    The answers before it are the same in both of a pair: a part of the prompt.
    """
    begins = np.flatnonzero(np.diff(example.learnt) > 0) + 1
    learnt = example.learnt.copy()
    learnt[: begins[-1] if len(begins) else 0] = 0
    return sft.Example(example.ids, learnt)


def reads(options: Options) -> tuple[str, ...]:
    """Returns the keys that not every task reads; see `task.Kind`."""
    smooth = ("hyper.label_smoothing",) if options.variant == "dpo" else ()
    return (*OF_THE_MODEL, *OF_ROWS, "data.skip_bad_docs", *smooth)


KIND = Kind(
    make=make,
    options=Options,
    check=check,
    reads=reads,
    config="configs/dpo.py",
    tuned=True,
)
