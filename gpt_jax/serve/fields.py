"""Every field of a request: its name, kind, limits, default and meaning, once.

    asked = read(forms(limits)["chat"], body)   # every field, those left out by default

The parser (wire.py), the description for tools (openapi.py), the guide's table
(docs/guide/13-serving.md, by `table`) and every error read this table; tests hold them
to it. A field that a client sends and that is in no row is refused by its own name, and
null is the same as leaving a field out.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_jax import sampling
from gpt_jax.serve import tools
from gpt_jax.serve.batch import BIASED, TOP
from gpt_jax.serve.errors import bad
from gpt_jax.serve.kinds import (
    HUGE,
    Anything,
    ById,
    ByType,
    Either,
    Flag,
    Group,
    Ids,
    Kind,
    Many,
    Nothing,
    Number,
    Object,
    OneKey,
    OneOf,
    OneOrMany,
    Schema,
    Text,
    Unless,
    Whole,
    known,
    or_null,
    wrong,
)
from gpt_jax.serve.limits import Limits
from gpt_jax.serve.messages import Conversation, Input, Turn

STOPS, STOP_CHARS = 16, 256  # stop strings, and the longest: they cost time a token
TEXTS_MOST = 256  # texts of a choice


@dataclass(frozen=True)
class Field:
    """A field of a request.

    Attributes:
      kind: what it may be.
      told: one line for people.
      default: what it is when it is left out.
      required: it cannot be left out.
      listed: whether it does anything; else it is there to be passed over or refused.
    """

    kind: Kind
    told: str
    default: Any = None
    required: bool = False
    listed: bool = True

    def schema(self) -> Schema:
        """Returns it as JSON Schema."""
        found = self.kind.schema()
        found = found if self.required else or_null(found)
        words = {"description": self.told} if self.listed else {}
        no_default = self.default is None or self.default == []
        return found | words | ({} if no_default else {"default": self.default})


Form = Mapping[str, Field]


def read(form: Form, given: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of a request, those left out by their default.

    Args:
      form: of `forms`.
      given: the body's object.

    Raises:
      Refused: names the field that is not known, missing or not what it may be.
    """
    known(given, form)
    given = {name: value for name, value in given.items() if value is not None}
    for name, field in form.items():
        if field.required and name not in given:
            raise bad(f"{name} is missing: it must be {field.kind.wanted}", name)
    # In the table's order, so that of two that cannot be the weightier one is told.
    return {
        name: field.kind.read(given[name], name) if name in given else field.default
        for name, field in form.items()
    }


# ---------------------------------------------------------------- kinds of prompts


@dataclass(frozen=True)
class Prompts:
    """A text, token ids, or a list of either; read as a list of texts and ids."""

    most: int

    @property
    def wanted(self) -> str:
        return (
            "a text, a list of texts, a list of token ids or a list of such lists, "
            "none of them empty"
        )

    def read(self, value: Any, name: str) -> list[str | list[int]]:
        if value in ("", []):
            raise bad(
                f"{name} must be {self.wanted}; leave it out to begin a text", name
            )
        if not isinstance(value, str | list):
            raise wrong(self, value, name)
        prompts = [value] if isinstance(value, str) or self._ids(value) else value
        if len(prompts) > self.most:
            raise bad(f"{len(prompts)} prompts are more than {self.most}", name)
        for one in prompts:
            if not one or not (isinstance(one, str) or self._ids(one)):
                raise bad(f"{name} must be {self.wanted}", name)
        return prompts

    @staticmethod
    def _ids(value: Any) -> bool:
        return isinstance(value, list) and Ids().takes(value)

    def schema(self) -> Schema:
        one = [Text(1).schema(), Ids().schema()]
        many = {"type": "array", "items": {"anyOf": one}}
        return {"anyOf": [*one, many | {"minItems": 1, "maxItems": self.most}]}


# ---------------------------------------------------------------- the table


def _setting(setting: sampling.Setting) -> Field:
    if setting.kind is int:
        kind: Kind = Whole(int(setting.low), int(setting.high))
    else:
        high = setting.high if math.isfinite(setting.high) else HUGE
        kind = Number(setting.low, high, above=setting.above)
    return Field(kind, f"{setting.told} Else the model's own.")


def _passed(told: str = "Changes nothing here.") -> Field:
    return Field(Anything(), told, listed=False)


def _refused(*nothing: Any) -> Field:
    return Field(Nothing(nothing), "Not supported.", listed=False)


MODEL = Field(Text(), "Which of the models; may be left out where there is one.")
SAMPLING: Form = {name: _setting(each) for name, each in sampling.SETTINGS.items()}
SEED = Field(Whole(-(2**63), 2**64), "The same seed gives the same texts; else random.")
STOP: Form = {
    "stop": Field(
        OneOrMany(Text(1, STOP_CHARS), Many(Text(1, STOP_CHARS), 0, STOPS)),
        "Texts that end an answer and are cut off.",
        [],
    ),
    "stop_token_ids": Field(Ids(0, STOPS), "Tokens that end an answer.", []),
    "min_tokens": Field(
        Whole(0, sampling.MOST), "Before so many tokens nothing ends an answer.", 0
    ),
    "ignore_eos": Field(Flag(), "Write on beyond the end of the text.", False),
}
STREAM = Field(Flag(), "Send events as the text grows.", False)
TEXTS: Form = {
    "logit_bias": Field(
        ById(Number(-100, 100), BIASED), "Added to the logits of these token ids.", {}
    ),
    "stream": STREAM,
    "stream_options": Field(
        Group(
            {
                "include_usage": Flag(),
                "continuous_usage_stats": Flag(),
                "include_obfuscation": Nothing((False,)),
            }
        ),
        "Counts of tokens, in a last event (include_usage) or in every one.",
        {},
    ),
}
# Told by clients of others; they change no answer here.
PASSED: Form = {
    name: _passed()
    for name in (
        *("user", "metadata", "store", "service_tier", "safety_identifier"),
        *("prompt_cache_key", "prompt_cache_retention"),
    )
}
# What other servers do and this one does not. Of two that go together the first is
# told: without tools there is nothing to choose.
NO_TOOLS: Form = {
    "tools": _refused([], {}),
    "functions": _refused([]),
    "tool_choice": _refused("none", "auto"),
    "function_call": _refused("none", "auto"),
    "parallel_tool_calls": _refused(False, True),
}
CHOICES = OneOf(("none", "auto", "required"))
TOOLS: Form = {
    "tools": Field(
        Unless(({},), Many(tools.TOOL, 0, tools.MOST)), "What the model may call."
    ),
    "tool_choice": Field(
        Either(CHOICES, tools.NAMED),
        "Whether it must call one, or this one.",
        "auto",
    ),
    "parallel_tool_calls": Field(Flag(), "Whether it may call several.", True),
    "functions": _refused([]),
    "function_call": _refused("none", "auto"),
}
SHAPE: Mapping[str, Kind] = {  # of JSON that is wanted
    "name": Text(),
    "description": Text(),
    "schema": Object(),
    "strict": Flag(),
}
NOTHING = ([], {})  # what some clients send for nothing
GRAMMARS: Form = {
    "response_format": Field(
        Unless(
            NOTHING,
            ByType(
                {
                    "text": Group({}),
                    "json_object": Group({}),
                    "json_schema": Group(
                        {"json_schema": Group(SHAPE, required=("schema",))},
                        required=("json_schema",),
                    ),
                }
            ),
        ),
        "The answer is a text, a JSON object, or JSON of a schema.",
    ),
    "structured_outputs": Field(
        OneKey(
            {
                "json": Object(),
                "regex": Text(1),
                "choice": Many(Text(1), 1, TEXTS_MOST),
            }
        ),
        "The answer is JSON of a schema, what a regular expression matches, or a text "
        "of a list.",
    ),
}
TEXT_ONLY: Form = {
    "modalities": _refused(["text"]),
    "audio": _refused(),
    "prediction": _refused(),
    "web_search_options": _refused(),
    "reasoning_effort": _refused(),
    "verbosity": _refused(),
}


def _tokens(default: str, low: int = 0) -> Field:
    return Field(Whole(low, sampling.MOST), f"The most to write; {default}.")


def forms(limits: Limits) -> dict[str, Form]:
    """Returns the fields of each kind of request, by its name.

    completion, chat, response, embedding, tokenize, detokenize and look.
    """
    chat_room = "else half the context, and 1024 at most"
    texts = Field(Whole(1, limits.choices), "Texts for each prompt.", 1)
    top = Field(Whole(0, TOP), "How many of the likeliest tokens to tell.")
    text_format = ByType(
        {
            "text": Group({}),
            "json_object": Group({}),
            "json_schema": Group(SHAPE, required=("schema",)),
        }
    )
    include = ("message.output_text.logprobs",)
    return {
        "completion": {
            "model": MODEL,
            "prompt": Field(
                Prompts(limits.choices), "Texts or token ids; left out: a beginning."
            ),
            "max_tokens": Field(_tokens("").kind, "The most to write.", 16),
            **SAMPLING,
            "seed": SEED,
            **STOP,
            "n": texts,
            "best_of": Field(
                texts.kind, "Write so many, and answer with the n likeliest a token."
            ),
            **TEXTS,
            "logprobs": Field(top.kind, "Tell each token's, and of so many others."),
            "echo": Field(Flag(), "Begin the answer with the prompt.", False),
            **GRAMMARS,
            **NO_TOOLS,
            **TEXT_ONLY,
            "suffix": _refused(""),
            **PASSED,
        },
        "chat": {
            "model": MODEL,
            "messages": Field(
                Conversation(Turn()), "The conversation so far.", required=True
            ),
            "max_completion_tokens": _tokens(chat_room),
            "max_tokens": _tokens("an older name of max_completion_tokens"),
            **SAMPLING,
            "seed": SEED,
            **STOP,
            "n": texts,
            **TEXTS,
            "logprobs": Field(Flag(), "Tell each token's probability.", False),
            "top_logprobs": top,
            **GRAMMARS,
            **TOOLS,
            **TEXT_ONLY,
            "best_of": _refused(1),
            **PASSED,
        },
        "response": {
            "model": MODEL,
            "input": Field(Input(), "What to answer.", required=True),
            "instructions": Field(Text(), "A system message that stands before it."),
            "max_output_tokens": _tokens(chat_room, 1),
            **SAMPLING,
            "seed": SEED,
            **STOP,
            "logit_bias": TEXTS["logit_bias"],
            "stream": STREAM,
            "stream_options": Field(
                Group({"include_obfuscation": Nothing((False,))}),
                "Nothing yet.",
                {},
                listed=False,
            ),
            "include": Field(
                Many(OneOf(include)), "Whether to tell tokens' probabilities.", []
            ),
            "top_logprobs": top,
            "text": Field(
                Group({"format": text_format, "verbosity": Nothing(("medium",))}),
                "The form of the answer: a text, a JSON object, or JSON of a schema.",
                {},
            ),
            "tools": Field(
                Unless(({},), Many(tools.FLAT, 0, tools.MOST)), TOOLS["tools"].told
            ),
            "tool_choice": Field(
                Either(CHOICES, tools.FLAT_NAMED), TOOLS["tool_choice"].told, "auto"
            ),
            "parallel_tool_calls": TOOLS["parallel_tool_calls"],
            "max_tool_calls": _refused(),
            "previous_response_id": _refused(),
            "conversation": _refused(),
            "prompt": _refused(),
            "background": _refused(False),
            "truncation": _refused("disabled"),
            "reasoning": _refused({}),
            **PASSED,
        },
        "embedding": {
            "model": MODEL,
            "input": Field(
                Prompts(limits.choices), "Texts or token ids to embed.", required=True
            ),
            "encoding_format": Field(
                OneOf(("float", "base64")), "Numbers, or float32 bytes.", "float"
            ),
            "pooling": Field(
                OneOf(("mean", "last")), "Of which hidden states of the text.", "mean"
            ),
            "dimensions": _refused(),
            "user": PASSED["user"],
        },
        "tokenize": {
            "model": MODEL,
            "prompt": Field(Text(), "A text; or messages instead."),
            "messages": Field(Conversation(Turn()), "A conversation."),
            "add_special_tokens": Field(
                Flag(), "Begin a text as the model's prompts begin.", True
            ),
            "add_generation_prompt": Field(
                Flag(), "End a conversation where an answer begins.", True
            ),
            "return_token_strs": Field(Flag(), "Tell each token's text too.", False),
        },
        "detokenize": {
            "model": MODEL,
            "tokens": Field(Ids(0), "Token ids.", required=True),
        },
        "look": {
            "model": MODEL,
            "prompt": Field(Text(1), "The text that is looked at.", required=True),
            "against": Field(Text(), "Another of as many tokens, to patch into it."),
        },
    }


PATHS = {  # of each form
    "completion": "/v1/completions",
    "chat": "/v1/chat/completions",
    "response": "/v1/responses",
    "embedding": "/v1/embeddings",
    "tokenize": "/tokenize",
    "detokenize": "/detokenize",
    "look": "/v1/look",
}


def table(limits: Limits) -> str:
    """Returns the fields as a Markdown table, those that do something."""
    lines = ["| field | in | is | default | means |", "|---|---|---|---|---|"]
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, form in forms(limits).items():
        for key, field in form.items():
            if field.listed:
                default = "" if field.default in (None, [], {}) else field.default
                shown = str(default).lower() if default is not True else "true"
                row = (key, field.kind.wanted, shown, field.told)
                rows.setdefault(row, []).append(name)
    for (key, wanted, default, told), where in rows.items():
        places = ", ".join(where) if len(where) < 7 else "all"
        lines.append(f"| `{key}` | {places} | {wanted} | {default} | {told} |")
    return "\n".join(lines)
