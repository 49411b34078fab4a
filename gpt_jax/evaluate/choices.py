"""Multiple-choice questions, answered by what the model finds likeliest."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import rows, stores
from gpt_jax.evaluate import likelihood, scores
from gpt_jax.plaintext import kind


class Question(NamedTuple):
    """A text, what may follow it, and which of that is right."""

    context: str
    choices: list[str]
    answer: int


class Pick(NamedTuple):
    """What a model thinks of a question's choices.

    Attributes:
      logp: log-probability of each choice, in nats.
      per_byte: the same divided by the UTF-8 bytes of the choice, so that long choices
        are not at a disadvantage (Brown et al. 2020, section 2.4, per token).
      raw: the choice with the largest logp.
      normed: the choice with the largest per_byte.
    """

    logp: list[float]
    per_byte: list[float]
    raw: int
    normed: int


def read(path: str | Path, bad: rows.Bad = None) -> list[Question]:
    """Returns the questions of a file of rows; see `rows.read` and `question`.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a row is no question, or none is.
    """

    def make(row: rows.Row) -> Question:
        try:
            return question(row.fields)
        except ValueError as error:
            raise ValueError(f"{row.where}: {error}") from None

    file = stores.fetched(path)
    return rows.usable(path, lambda bad: rows.read(file, bad=bad), make, bad)


def question(row: dict[str, Any]) -> Question:
    """Returns a row {"context", "choices", "answer"} as a question.

    The answer is a number, 0 being the first choice, or the text of a choice. Choices
    are appended to the context as they are: a space between belongs to one of them.

    Raises:
      ValueError: a column is missing or wrong; names it.
    """
    missing = [name for name in ("context", "choices", "answer") if name not in row]
    if missing:
        found = ", ".join(row) or "none"
        raise ValueError(f"it lacks {', '.join(missing)} (its columns: {found})")
    choices, answer = row["choices"], row["answer"]
    texts = isinstance(choices, list) and all(isinstance(c, str) and c for c in choices)
    if not texts or len(choices) < 2 or not isinstance(row["context"], str):
        raise ValueError(
            "context must be a text and choices two texts or more; they are "
            f"{kind(row['context'])} and {kind(choices)}"
        )
    if isinstance(answer, str) and choices.count(answer) == 1:
        answer = choices.index(answer)
    if type(answer) is not int or not 0 <= answer < len(choices):
        raise ValueError(
            f"its answer {answer!r} is neither one of the choices nor a number from 0 "
            f"to {len(choices) - 1}"
        )
    return Question(row["context"], choices, answer)


def pick(
    scorer: likelihood.Scorer,
    tokenizer,
    questions: Sequence[Question],
    *,
    show: Callable[[int], None],
) -> list[Pick]:
    """Returns what the model picks; `show` is told how many more choices are scored."""
    spans = [
        likelihood.fit(
            *likelihood.encode_pair(tokenizer, question.context, choice),
            scorer.model.cfg.context_length,
        )
        for question in questions
        for choice in question.choices
    ]
    found = likelihood.scores(scorer, spans, show)
    return [_pick([next(found).logp for _ in q.choices], q.choices) for q in questions]


def summary(
    questions: Sequence[Question], picks: Sequence[Pick], *, seed: int
) -> dict[str, Any]:
    """Returns the percentages of right picks with their 95 % intervals.

    Returns:
      questions; accuracy (by logp) and accuracy_per_byte, each with mean, low, high;
      chance, what guessing would give.
    """
    pairs = list(zip(questions, picks, strict=True))
    raw = [100.0 * (p.raw == q.answer) for q, p in pairs]
    normed = [100.0 * (p.normed == q.answer) for q, p in pairs]
    return {
        "questions": len(pairs),
        "accuracy": scores.bootstrap(raw, seed=seed)._asdict(),
        "accuracy_per_byte": scores.bootstrap(normed, seed=seed)._asdict(),
        "chance": sum(100.0 / len(q.choices) for q in questions) / len(pairs),
    }


def _pick(logp: list[float], choices: Sequence[str]) -> Pick:
    per_byte = [p / len(c.encode()) for p, c in zip(logp, choices, strict=True)]
    return Pick(logp, per_byte, _best(logp), _best(per_byte))


def _best(values: list[float]) -> int:
    return max(range(len(values)), key=values.__getitem__)
