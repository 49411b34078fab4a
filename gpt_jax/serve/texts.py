"""One text to write: what is asked for, and what is told of it as it grows."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any, NamedTuple

from gpt_jax import sample
from gpt_jax.serve.grammars import Guide


@dataclass(frozen=True)
class Request:
    """One text to write.

    Attributes:
      ids: the prompt, as `sample.prompt_ids` returns it.
      settings: those of `sample.check`, all of them.
      seed, number: with the prompt they decide the text, as in `sample.texts`.
      stop: strings that end the text, ids of tokens that do.
      least: tokens before which nothing ends it.
      bias: what is added to the logits of token ids.
      pool: whether the prompt's hidden states are wanted, and nothing is written:
        "mean", "last", or "" for no.
      grammar: what the text must be, at its beginning; None = anything.
      top: how many alternatives to tell with each token; None = no probabilities.
      score: whether to tell the prompt's tokens too.
      deadline: when it is late, in time.monotonic() seconds.
    """

    ids: Sequence[int]
    settings: dict[str, Any]
    seed: int
    number: int
    stop: Sequence[str | int]
    top: int | None
    score: bool
    deadline: float
    least: int = 0
    bias: Mapping[int, float] = field(default_factory=dict)
    pool: str = ""
    grammar: Guide | None = None


class Token(NamedTuple):
    """A token and how likely the model found it, in nats."""

    id: int
    text: str  # what it added; a character's bytes but the last add nothing
    logprob: float | None  # None for the first token of a prompt
    top: list[tuple[int, float]]  # the likeliest tokens there


class Spelling(NamedTuple):
    """A token by itself."""

    text: str
    bytes: bytes  # of half a character the text is U+FFFD, these tell which half


@lru_cache(maxsize=16)
def speller(tokenizer) -> Callable[[int], Spelling]:
    """Returns a function that spells ids, each of which it decodes once."""

    @cache  # at most an entry for each id of the vocabulary
    def spell(token: int) -> Spelling:
        try:
            return Spelling(tokenizer.decode([token]), tokenizer.bytes_of(token))
        except ValueError:  # published models have more ids than their tokenizers
            return Spelling("", b"")

    return spell


class Text:
    """A row's text as it grows; each token comes out with the text it begins in."""

    def __init__(self, tokenizer, request: Request):
        self._scribe = sample.Transcript(
            tokenizer, request.ids, request.stop, request.least
        )
        self._top, self._stop = request.top, set(request.stop)
        told = request.top is not None
        self._speller = sample.Transcript(tokenizer, request.ids if told else (), ())
        self._reader = sample.Transcript(tokenizer, (), ())  # spells the prompt
        self._opening = tokenizer.opening  # of a prompt; the echo does not show it
        self._length = 0  # characters of all tokens
        self._fresh = ""
        self._held: list[tuple[int, Token]] = []  # where it begins, the token
        self._prompt: list[Token] = []

    @property
    def stopped(self) -> bool:
        return self._scribe.stopped_by is not None

    def score(self, ids, start: int, told) -> None:
        """Takes the probabilities of the tokens after a piece of the prompt."""
        if not start:
            self._prompt.append(Token(ids[0], self._reader.push(ids[0]), None, []))
        after = ids[start + 1 : start + 1 + len(told.token_B)]
        for i, token in enumerate(after):
            self._prompt.append(self._token(token, self._reader, told, i))
        hidden = len(self._opening)
        if not start and list(ids[:hidden]) == list(self._opening):
            quiet = [token._replace(text="") for token in self._prompt[:hidden]]
            self._prompt[:hidden] = quiet

    def push(self, chosen, i: int) -> None:
        """Takes entry `i` of what was chosen."""
        token = int(chosen.token_B[i])
        self._fresh += self._scribe.push(token)
        if self._top is not None and token not in self._stop:
            self._held.append(
                (self._length, self._token(token, self._speller, chosen, i))
            )
            self._length += len(self._held[-1][1].text)

    def take(self, *, last: bool) -> tuple[str, list[Token], list[Token]]:
        """Returns the new text and tokens, and the prompt's, each once."""
        text = self._fresh + (self._scribe.flush() if last else "")
        cut = isinstance(self._scribe.stopped_by, str)
        shown = self._length + 1 if last and not cut else len(self._scribe.text)
        out = [token for begins, token in self._held if begins < shown]
        self._held = self._held[len(out) :]
        prompt, self._prompt, self._fresh = self._prompt, [], ""
        return text, out, prompt

    def _token(self, token: int, speller, told, i: int) -> Token:
        top = slice(self._top or 0)
        ids, logprobs = (
            told.top_BK[i, top].tolist(),
            told.top_logprob_BK[i, top].tolist(),
        )
        pairs = list(zip(ids, logprobs, strict=True))
        return Token(token, speller.push(token), float(told.logprob_B[i]), pairs)
