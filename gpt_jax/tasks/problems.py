"""Problems with one right answer, made on the fly, and examples of them.

A problem is a question and its answer: "abcd<" is to be continued with "dcba". Which
questions are kept for evaluation is decided by their text, so no run of any seed
trains on them.

Shapes: B problems  S tokens of a question and its answer  T = S - 1 positions that
predict the next token
"""

import hashlib
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from gpt_jax import names, tokenizers
from gpt_jax.tokenizers import EOS, Tokenizer

DRAWS = 1_000  # for each problem wanted, before there are said to be too few
CHARACTERS = string.ascii_letters + string.digits + "<>=^+"  # of all problems


class Problem(NamedTuple):
    """A question, which ends in the sign of its kind, and its only right answer."""

    question: str
    answer: str


class Kind(NamedTuple):
    """A kind of problem.

    Attributes:
      make: (rng, length) -> a Problem of that many letters or digits.
      question, answer: (length) -> the most characters that they have.
    """

    make: Callable[[np.random.Generator, int], Problem]
    question: Callable[[int], int]
    answer: Callable[[int], int]


def _letters(sign: str, change: Callable[[str], str]) -> Kind:
    def make(rng: np.random.Generator, length: int) -> Problem:
        picked = rng.integers(0, len(string.ascii_lowercase), length)
        letters = "".join(string.ascii_lowercase[i] for i in picked)
        return Problem(letters + sign, change(letters))

    return Kind(make, question=lambda n: n + 1, answer=lambda n: n)


def _sum(rng: np.random.Generator, length: int) -> Problem:
    a, b = (int("".join(map(str, rng.integers(0, 10, length)))) for _ in "ab")
    return Problem(f"{a}+{b}=", str(a + b))


KINDS = {
    "reverse": _letters("<", lambda letters: letters[::-1]),  # abc< cba
    "sort": _letters("^", lambda letters: "".join(sorted(letters))),  # cab^ abc
    "copy": _letters("=", str),  # abc= abc
    "upper": _letters(">", str.upper),  # abc> ABC
    "add": Kind(  # 12+7= 19
        _sum, question=lambda n: 2 * n + 2, answer=lambda n: n + 1
    ),
}


class Source(NamedTuple):
    """Where problems come from: training problem i is a function of i."""

    kind: Kind
    shortest: int
    longest: int
    val_fraction: float

    def training(self, i: int) -> Problem:
        """Returns training problem i."""
        return next(self.draws(np.random.default_rng([1, i]), DRAWS, kept=False))

    def kept(self, count: int) -> list[Problem]:
        """Returns `count` different problems that are never trained on, or all."""
        found: dict[str, Problem] = {}
        for problem in self.draws(np.random.default_rng(0), DRAWS * count, kept=True):
            found[problem.question] = problem
            if len(found) == count:
                break
        return list(found.values())

    def draws(
        self, rng: np.random.Generator, tries: int, *, kept: bool
    ) -> Iterator[Problem]:
        """Yields those of so many draws that are kept for evaluation, or the others."""
        for _ in range(tries):
            length = int(rng.integers(self.shortest, self.longest + 1))
            problem = self.kind.make(rng, length)
            digest = hashlib.sha256(problem.question.encode()).digest()
            share = int.from_bytes(digest[:4]) / 2**32
            if (share < self.val_fraction) == kept:
                yield problem


class Problems:
    """Problems as examples: random access, and nothing is stored."""

    def __init__(
        self,
        find: Callable[[int], Problem],
        count: int,
        tokenizer: Tokenizer,
        *,
        stop_id: int,
        prompt: int,
        completion: int,
    ):
        """Args: what makes problem i of `count`, what spells it, tokens of a row."""
        self.find, self.count = find, count
        self.tokenizer, self.stop_id = tokenizer, stop_id
        self.prompt, self.completion = prompt, completion

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return {name: x[0] for name, x in self.take([index]).items()}

    def take(self, indices: Sequence[int]) -> dict[str, np.ndarray]:
        """Returns arrays of B = len(indices) problems.

        Returns:
          tokens, targets int32 [B, T]: question, answer, end-of-text, zeros; and the
          same one further. mask float32 [B, T]: 1 where the target is of the answer.
          length int32 [B]: of the question. number int32 [B]: the indices.
        """
        size = self.prompt + self.completion
        ids_BS = np.zeros((len(indices), size), np.int32)
        mask_BS = np.zeros((len(indices), size), np.float32)
        length_B = np.zeros(len(indices), np.int32)
        for row, index in enumerate(indices):
            question, answer = self._encode(self.find(int(index)))
            both = question + answer
            ids_BS[row, : len(both)] = both
            mask_BS[row, len(question) : len(both)] = 1.0
            length_B[row] = len(question)
        return {
            "tokens": ids_BS[:, :-1],
            "targets": ids_BS[:, 1:],
            "mask": mask_BS[:, 1:],
            "length": length_B,
            "number": np.asarray(indices, np.int32),
        }

    def _encode(self, problem: Problem) -> tuple[list[int], list[int]]:
        tokenizer = self.tokenizer
        question = [*tokenizer.opening, *tokenizer.encode(problem.question)]
        return question, [*tokenizer.encode(problem.answer), self.stop_id]


def open_source(kind: str, shortest: int, longest: int, val_fraction: float) -> Source:
    """Returns the source, of which both training and evaluation get problems."""
    found = names.choose("task.kind", kind, KINDS)
    if not 1 <= shortest <= longest:
        raise ValueError(
            f"task.shortest is {shortest} and task.longest {longest}: they must be at "
            "least 1, in this order"
        )
    if not 0 < val_fraction < 1:
        raise ValueError(
            f"data.val_fraction is {val_fraction}; it must be above 0 and below 1"
        )
    source = Source(found, shortest, longest, val_fraction)
    for kept in (True, False):
        if not any(source.draws(np.random.default_rng(0), DRAWS, kept=kept)):
            what = "evaluate on" if kept else "train on"
            raise ValueError(
                f"of {DRAWS} problems none is left to {what}: data.val_fraction "
                f"{val_fraction} does not fit, or task.longest {longest} is too small"
            )
    return source


def open_tokenizer(spec: str) -> tuple[Tokenizer, int]:
    """Returns a tokenizer for problems and the id that ends an answer.

    Args:
      spec: the path of a tokenizer.json, or what `tokenizers.train` makes one of.

    Raises:
      ValueError: it has no end-of-text token, or cannot spell all problems.
    """
    if Path(spec).is_file():
        tokenizer = tokenizers.load(spec)
    else:
        tokenizer = tokenizers.train(spec, [CHARACTERS])
        if tokenizer.eos_id is None:
            tokenizer = tokenizer.add_special([EOS])
    if tokenizer.eos_id is None:
        raise ValueError(
            f"the tokenizer {spec} has no end-of-text token, which ends an answer: "
            "start from a run whose tokenizer has one, or without data.tokenizer=char"
        )
    for character in CHARACTERS:
        if tokenizer.decode(tokenizer.encode(character)) != character:
            raise ValueError(
                f"the tokenizer {spec} cannot spell {character!r}: use char, byte or "
                "bpe:<size>"
            )
    return tokenizer, tokenizer.eos_id
