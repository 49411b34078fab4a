"""What a text must be: JSON of a schema, a regular expression, one of some texts.

    grammar = schema({"type": "object"}, param="response_format")
    guide = begin(grammar, tokenizer, vocabulary, ends)
    guide.mask_W          # which tokens may come next
    guide.push(token)     # the one that did: "" to go on, or why not

The tokens that go on within a grammar are found by llguidance, an optional package
(the extra `structured`), which also says what of JSON Schema it knows; what it does not
know is refused, so that an answer is always what was asked for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from gpt_jax import commands
from gpt_jax.serve.errors import Refused, bad

# JSON is written on one line, with a space behind a comma or a colon or without: where
# any white space may stand a model may write nothing else until it has no room.
SPACING = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "lenient": False,
    "coerce_one_of": False,
}

# What following a form may cost: the others wait meanwhile. A third or less of what
# llguidance allows by itself, which schemas of hundreds of keys do not need.
FUEL: Mapping[str, Any] = {
    "initial_lexer_fuel": 300_000,
    "step_lexer_fuel": 50_000,
    "max_lexer_states": 50_000,
}


@dataclass(frozen=True)
class Grammar:
    """What a text must be.

    Attributes:
      kind: how it is written: lark (llguidance's variant of Lark) or regex.
      text: it.
      param: the field that asks for it.
    """

    kind: str
    text: str
    param: str


def schema(found: Mapping[str, Any], param: str) -> Grammar:
    """Returns the grammar of JSON that a schema describes."""
    return Grammar("lark", f"start: {json_of(found, param)}", param)


def regex(pattern: str, param: str) -> Grammar:
    """Returns the grammar of texts that a regular expression matches as a whole."""
    return Grammar("regex", pattern, param)


def choice(texts: Sequence[str], param: str) -> Grammar:
    """Returns the grammar of some texts."""
    return Grammar("lark", f"start: {' | '.join(map(json.dumps, texts))}", param)


def json_of(found: Mapping[str, Any], param: str) -> str:
    """Returns what stands for JSON of a schema within a grammar of the kind lark."""
    if "x-guidance" in found:  # how JSON is spaced, and what of a schema is passed over
        raise bad(f"{param}.x-guidance is not supported: leave it out", param)
    try:
        return f"%json {json.dumps({**found, 'x-guidance': SPACING})}"
    except RecursionError:
        raise bad(f"{param} is nested too deeply", param) from None


class Guide:
    """Where a text is within its grammar.

    Attributes:
      mask_W: uint32, a bit for each token that may come next, the lowest first.
      complete: whether the text may end here.
    """

    def __init__(self, matcher: Any, vocabulary: int):
        self._matcher, self._vocabulary = matcher, vocabulary
        self._look()

    def copy(self) -> "Guide":
        """Returns another text that is as far as this."""
        return Guide(self._matcher.deep_copy(), self._vocabulary)

    def push(self, token: int) -> str:
        """Takes the token that came; returns "" or why the text does not go on.

        That is "stop" where its grammar has ended, and "lost" where no token of the
        vocabulary goes on in it, or finding out would take too long.
        """
        self._matcher.consume_token(token)
        if self._matcher.is_stopped():
            self.complete = not self._matcher.is_error()
            return "stop" if self.complete else "lost"
        self._look()
        if self.mask_W.any():
            return ""
        return "stop" if self.complete else "lost"

    def _look(self) -> None:
        found = np.frombuffer(self._matcher.compute_bitmask(), "<u4")
        self.mask_W = found[: -(-self._vocabulary // 32)].copy()
        beyond = self._vocabulary % 32  # where the tokenizer has no end of a text, one
        if beyond:  # is made up behind the vocabulary
            self.mask_W[-1] &= np.uint32((1 << beyond) - 1)
        if self._matcher.is_error():
            self.mask_W[:] = 0
        self.complete = not self._matcher.is_error() and self._matcher.is_accepting()


def begin(
    grammar: Grammar, tokenizer, vocabulary: int, ends: Sequence[int] = ()
) -> Guide:
    """Returns the beginning of a text; each text has a `copy` of it.

    Args:
      grammar: what it must be.
      tokenizer: a `tokenizers.Tokenizer`.
      vocabulary: how many tokens the model knows.
      ends: tokens that end a text, once it may end.

    Raises:
      Refused: the package is missing, the grammar is none, or no token can begin it.
    """
    param = grammar.param
    try:
        from llguidance import LLMatcher, LLParserLimits
    except ImportError:
        raise bad(
            f"{param} needs the package llguidance, which is not installed where this "
            f"server runs ({commands.install('llguidance')}): leave it out",
            param,
        ) from None
    written = {
        "lark": LLMatcher.grammar_from_lark,
        "regex": LLMatcher.grammar_from_regex,
    }[grammar.kind](grammar.text)
    try:
        lexicon = _lexicon(tokenizer, vocabulary, tuple(ends))
    except ValueError as error:
        text = f"{param} cannot be had of this model: its tokenizer is not understood"
        raise bad(f"{text} ({error})", param) from None
    limits = LLParserLimits(**FUEL, verbose_errors=False)
    matcher = LLMatcher(lexicon, written, log_level=0, limits=limits)
    if matcher.is_error():
        raise _not_understood(param, matcher.get_error())
    guide = Guide(matcher, vocabulary)
    if matcher.is_error() and "NoExtension" not in matcher.get_error():
        raise _not_understood(param, matcher.get_error())
    if not guide.mask_W.any():
        raise bad(
            f"{param} cannot be had of this model: no token of its vocabulary begins "
            "such a text",
            param,
        )
    return guide


def _not_understood(param: str, error: str) -> Refused:
    lines = error.strip().splitlines() or ["no reason is given"]
    first = re.sub(
        r"^(at )?\d+\(\d+\): (failed to compile JSON schema: )?", "", lines[0]
    )
    more = next((line for line in lines[1:] if line.startswith("error: ")), "")
    return bad(f"{param} is not understood: {first[:300]} {more[:200]}".strip(), param)


@lru_cache(maxsize=8)
def _lexicon(tokenizer, vocabulary: int, ends: tuple[int, ...]):
    """Returns a tokenizer as llguidance knows it; takes up to a second."""
    from llguidance import LLTokenizer, TokenizerWrapper

    if tokenizer.kind == "other":  # what a token stands for depends on its neighbours
        return LLTokenizer(
            tokenizer.json, n_vocab=vocabulary, eos_token=[*ends] or None
        )
    spelled = TokenizerWrapper(_Spelled(tokenizer, vocabulary, ends))
    return LLTokenizer(spelled, eos_token=[*ends] or None)


class _Spelled:
    """A tokenizer as bytes of its tokens, with the attributes that llguidance reads."""

    bos_token_id = None

    def __init__(self, tokenizer, vocabulary: int, ends: tuple[int, ...]):
        self._tokenizer = tokenizer
        self.eos_token_id = ends[0] if ends else None
        self.special_token_ids = [*tokenizer.specials.values()]
        self.tokens = [b""] * vocabulary
        for token in tokenizer.vocab.values():
            self.tokens[token] = tokenizer.bytes_of(token)

    def __call__(self, text: str) -> list[int]:
        """Returns the ids of a text, which only the choice between spellings needs."""
        try:
            return self._tokenizer.encode(text)
        except ValueError:  # something of it is not in the vocabulary
            return []
