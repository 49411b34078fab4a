"""What a model answers to the rows of a test file, and how good that is."""

import json
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import chat, checkpoint, files, sample
from gpt_jax.evaluate import scores
from gpt_jax.rows import Row
from gpt_jax.runs import Run


class Asked(NamedTuple):
    """A row of a test file as a model reads it.

    Attributes:
      number: where the row stands in the file, from 1.
      row: its fields as they stand there.
      question: what its last user asks.
      prompt: its ids, up to where an answer begins.
      reference: the answer that the row holds.
    """

    number: int
    row: dict[str, Any]
    question: str
    prompt: list[int]
    reference: str


class Answers(NamedTuple):
    """The contents of a file of answers.

    Attributes:
      made_with: what the answers depend on; another file is never gone on with.
      skipped: how many rows were left out, by reason.
      rows: the rows of the test file with "number" (see `Asked`), "question",
        "reference", "answer", "reason" (stop or length), "tokens" and
        "reference_tokens".
    """

    made_with: dict[str, Any]
    skipped: dict[str, int]
    rows: list[dict[str, Any]]


def ask(
    found: Sequence[Row],
    tokenizer,
    template: str,
    *,
    context: int,
    skip: bool,
) -> tuple[list[Asked], dict[str, int]]:
    """Returns the rows as prompts, and how many were skipped by reason.

    Args:
      found: rows that `chat.messages_of` understands, each with an answer.
      tokenizer: the model's.
      template: see `chat.render`.
      context: the model's context; a prompt must leave room for one token.
      skip: leave out rows that cannot be used, instead of raising.

    Raises:
      ValueError: a row cannot be used (names it), or none can; or the template fails.
    """
    asked, skipped = [], Counter()
    for row in found:
        try:
            asked.append(_asked(row, tokenizer, template, context))
        except _Unusable as error:
            if not skip:
                raise ValueError(
                    f"{row.where}: {error.args[1]}; mend it, or leave such rows out "
                    "with --skip_bad_rows"
                ) from error
            skipped[error.args[0]] += 1
    if not asked:
        raise ValueError(f"none of the {len(found)} rows can be used: {dict(skipped)}")
    return asked, dict(skipped)


def answer(
    run: Run,
    asked: Sequence[Asked],
    path: str | Path,
    *,
    template: str,
    skipped: dict[str, int],
    seed: int,
    settings: dict[str, Any],
    show: Callable[[int], None],
) -> Answers:
    """Writes the model's answers to a file, or goes on with one that was begun.

    Args:
      run: the model.
      asked: see `ask`.
      path: a JSON file; it is written anew after every few answers.
      template: what made the prompts; its stop tokens end an answer.
      skipped: see `ask`; kept in the file.
      seed: of the sampling.
      settings: temperature, top_k, ... max_new; see `sample.texts`.
      show: is told how many more answers are there.

    Raises:
      ValueError: the file holds something else, or answers to other rows, of other
        weights or with other settings.
    """
    whole = json.dumps([(a.number, a.row, a.prompt) for a in asked]).encode()
    made_with = {
        "run": str(run.folder),
        "step": run.step,
        "weights_sha256": checkpoint.digest(run.params),
        "template": template,
        "rows_sha256": files.digest(whole),
        "seed": seed,
        **settings,
    }
    answers = Answers(made_with, skipped, _begun(Path(path), made_with))
    stop = chat.stop_ids(run.tokenizer, template)
    done = len(answers.rows)
    show(done)
    for first in range(done, len(asked), sample.ROWS):
        group = asked[first : first + sample.ROWS]
        completions = sample.texts(
            model=run.model,
            params=run.params,
            tokenizer=run.tokenizer,
            prompts=[a.prompt for a in group],
            count=1,
            seed=seed,
            stop=stop,
            **settings,
        )
        for one, completion in zip(group, completions, strict=True):
            answers.rows.append(_row(one, completion, run.tokenizer))
        files.write_json(path, answers._asdict())
        show(len(group))
    return answers


def load(path: str | Path) -> Answers:
    """Returns what `answer` wrote.

    Raises:
      ValueError: the file holds something else.
    """
    try:
        return Answers(**json.loads(Path(path).read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} holds no answers of ours; name another --out"
        ) from error


def measure(answers: Answers) -> list[dict[str, float]]:
    """Returns the scores of each row by name; see `scores.rows`."""
    texts = [row["answer"] for row in answers.rows]
    return scores.rows(texts, [row["reference"] for row in answers.rows])


def summary(
    answers: Answers, found: Sequence[dict[str, float]], *, seed: int
) -> dict[str, Any]:
    """Returns what is told of a run's answers.

    Args:
      answers: see `answer`.
      found: scores by row, by name; all have the same names.
      seed: of the bootstrap.

    Returns:
      For each score its mean and 95 % interval; ended, the percentage of answers that
      ended by themselves; length, their mean tokens as a share of the references';
      empty, how many have no text; rows and skipped.
    """
    said = answers.rows
    lengths = sum(row["reference_tokens"] for row in said)
    return {
        "rows": len(said),
        **{
            name: scores.bootstrap([row[name] for row in found], seed=seed)._asdict()
            for name in found[0]
        },
        "ended": 100.0 * sum(row["reason"] == "stop" for row in said) / len(said),
        "length": sum(row["tokens"] for row in said) / max(lengths, 1),
        "empty": sum(not row["answer"].strip() for row in said),
        "skipped": answers.skipped,
    }


class _Unusable(ValueError):
    """Args: the reason in a few words, the sentence."""


def _asked(row: Row, tokenizer, template: str, context: int) -> Asked:
    try:
        messages = chat.messages_of(row.fields, template)
    except ValueError as error:
        raise _Unusable("unusable", str(error)) from error
    *before, last = messages
    if last.role != "assistant" or not last.content.strip():
        raise _Unusable("no reference", "it has no answer to compare with")
    if not before:
        raise _Unusable("unusable", "nothing stands before its answer")
    ids, _ = chat.render(before, tokenizer, template, reply=True)
    if len(ids) >= context:
        what = f"its prompt has {len(ids)} tokens, the model's context is {context}"
        raise _Unusable("too long", what)
    return Asked(row.number, row.fields, before[-1].content, ids, last.content)


def _row(one: Asked, completion: sample.Completion, tokenizer) -> dict[str, Any]:
    return {
        **one.row,
        "number": one.number,
        "question": one.question,
        "reference": one.reference,
        "answer": completion.text,
        "reason": completion.reason,
        "tokens": len(completion.ids),
        "reference_tokens": len(tokenizer.encode(one.reference)),
    }


def _begun(path: Path, made_with: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the answers that a file holds already."""
    if not path.is_file():
        return []
    before = load(path)
    other = [k for k in made_with if before.made_with.get(k) != made_with[k]]
    if other:
        raise ValueError(
            f"{path} was made with another {', '.join(other)}; name another --out, or "
            "remove it"
        )
    return before.rows
