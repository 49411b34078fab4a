"""What a client asks, read and checked, and how tokens are told: OpenAI's forms.

A body is checked whole before anything is done, field by field (fields.py) and then
what goes with what (here). What this server cannot do is refused by name, not passed
over.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt_jax import sampling
from gpt_jax.chat import Message
from gpt_jax.serve import fields, grammars, messages, tools
from gpt_jax.serve.errors import bad
from gpt_jax.serve.fields import Form
from gpt_jax.serve.grammars import Grammar
from gpt_jax.serve.limits import Limits
from gpt_jax.serve.texts import Spelling, Token
from gpt_jax.serve.tools import Tools

MESSAGE_BYTES = 16  # what a message counts besides its text: it costs time too

Spell = Callable[[int], Spelling]


@dataclass(frozen=True)
class Ask:
    """A request for texts.

    Attributes:
      form: completion, chat or response.
      model: its name, or None.
      prompts: of a completion: texts or ids.
      messages: of the others.
      settings: those of `sampling.SETTINGS` that are given.
      most: tokens to write at most; None = what the server finds sensible.
      seed: or None.
      stop, stop_ids: texts and tokens that end a text.
      least: tokens before which nothing ends it.
      bias: what is added to the logits of token ids.
      ignore_eos: the end of the text does not end it.
      grammar: what the text must be; None = anything.
      tools: what the model may call, in a chat or a response.
      n: texts for each prompt; drawn: so many are written, and the best n told.
      top: how many alternatives to tell with each token; None = no probabilities.
      echo: the prompt is a part of the text.
      stream, usage: events, and a last one with token counts.
      counted: every event tells the counts so far.
      given: what the body's other fields say, for answers that repeat them.
    """

    form: str
    model: str | None
    prompts: list[str | list[int]]
    messages: list[Message]
    settings: dict[str, Any]
    most: int | None
    seed: int | None
    stop: list[str]
    stop_ids: list[int]
    least: int
    bias: dict[int, float]
    ignore_eos: bool
    n: int
    drawn: int
    top: int | None
    echo: bool
    stream: bool
    usage: bool
    counted: bool = False
    grammar: Grammar | None = None
    tools: Tools = field(default_factory=Tools)
    given: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Embed:
    """A request for embeddings: how texts are pooled, and how numbers are sent."""

    model: str | None
    prompts: list[str | list[int]]
    pooling: str
    encoded: bool


def read(body: bytes) -> dict:
    """Returns the object that a body holds, or raises Refused."""

    def no_number(name):
        raise ValueError(f"{name} is no JSON number")

    try:
        found = json.loads(body, parse_constant=no_number)
    except RecursionError:
        raise bad("the body is nested too deeply") from None
    except ValueError as error:  # also bytes that are not UTF-8, and endless digits
        raise bad(f"the body is not JSON: {error}") from None
    if not isinstance(found, dict):
        raise bad('the body must be a JSON object, as in {"prompt": "Once"}')
    return found


def completion(form: Form, body: Mapping[str, Any], limits: Limits) -> Ask:
    """Returns what the body of /v1/completions asks for, or raises Refused."""
    asked = fields.read(form, body)
    prompts: list[str | list[int]] = asked["prompt"] or [[]]
    _check_size(prompts, limits, "prompt")
    n = asked["n"]
    drawn = n if asked["best_of"] is None else asked["best_of"]
    if drawn < n:
        raise bad(f"best_of {drawn} is less than n {n}: ask for more", "best_of")
    if drawn > n and asked["stream"]:
        raise bad(
            f"best_of {drawn} cannot be streamed, since which texts are the best is "
            "known at their end: leave stream out",
            "best_of",
        )
    if len(prompts) * drawn > limits.choices:
        param = "n" if drawn == n else "best_of"
        raise bad(
            f"{param} must be a whole number from 1 to "
            f"{max(1, limits.choices // len(prompts))} with {len(prompts)} prompts, "
            f"not {drawn}",
            param,
        )
    return Ask(
        form="completion",
        prompts=prompts,
        messages=[],
        most=asked["max_tokens"],
        n=n,
        drawn=drawn,
        top=asked["logprobs"],
        echo=asked["echo"],
        **_counts(asked["stream_options"]),
        grammar=_grammar(asked),
        **_shared(asked),
    )


def chat(form: Form, body: Mapping[str, Any], limits: Limits) -> Ask:
    """Returns what the body of /v1/chat/completions asks for, or raises Refused."""
    asked = fields.read(form, body)
    offered = tools.read(
        *(asked[name] for name in ("tools", "tool_choice", "parallel_tool_calls"))
    )
    grammar = _grammar(asked)
    _check_tools(offered, grammar, asked)
    _check_conversation(asked["messages"], limits, "messages", asked["tools"])
    names = ("max_completion_tokens", "max_tokens")
    most = {asked[name] for name in names} - {None}
    if len(most) > 1:
        raise bad(
            f"{names[0]} {asked[names[0]]} and {names[1]} {asked[names[1]]} are the "
            "same thing: leave one out",
            names[1],
        )
    if asked["top_logprobs"] is not None and not asked["logprobs"]:
        raise bad(
            "top_logprobs tells nothing without logprobs: set logprobs to true too",
            "top_logprobs",
        )
    return Ask(
        form="chat",
        prompts=[],
        messages=asked["messages"],
        most=most.pop() if most else None,
        n=asked["n"],
        drawn=asked["n"],
        top=(asked["top_logprobs"] or 0) if asked["logprobs"] else None,
        echo=False,
        **_counts(asked["stream_options"]),
        grammar=grammar,
        tools=offered,
        **_shared(asked),
    )


def response(form: Form, body: Mapping[str, Any], limits: Limits) -> Ask:
    """Returns what the body of /v1/responses asks for, or raises Refused."""
    asked = fields.read(form, body)
    offered = tools.read(
        *(asked[name] for name in ("tools", "tool_choice", "parallel_tool_calls")),
        flat=True,
    )
    conversation = messages.joined(asked["input"], "input")
    if asked["instructions"]:
        conversation = [Message("system", asked["instructions"]), *conversation]
    _check_conversation(conversation, limits, "input", asked["tools"])
    wanted = asked["text"].get("format")
    if wanted and wanted["type"] == "json_schema":
        grammar = grammars.schema(wanted["schema"], "text.format.schema")
    else:
        grammar = _object(wanted, "text.format")
    if grammar is not None:
        _check_ending(asked, "text.format")
    _check_tools(offered, grammar, asked)
    told = bool(asked["include"])
    if asked["top_logprobs"] is not None and not told:
        raise bad(
            "top_logprobs tells nothing unless include has "
            "message.output_text.logprobs",
            "top_logprobs",
        )
    if told and offered.described:
        raise bad(
            "include cannot have message.output_text.logprobs beside tools that may be "
            "called, of whose calls no probabilities are told: leave one out",
            "include",
        )
    return Ask(
        form="response",
        prompts=[],
        messages=conversation,
        most=asked["max_output_tokens"],
        n=1,
        drawn=1,
        top=(asked["top_logprobs"] or 0) if told else None,
        echo=False,
        usage=True,
        grammar=grammar,
        tools=offered,
        given=asked,
        **_shared(asked),
    )


def embedding(form: Form, body: Mapping[str, Any], limits: Limits) -> Embed:
    """Returns what the body of /v1/embeddings asks for, or raises Refused."""
    asked = fields.read(form, body)
    _check_size(asked["input"], limits, "input")
    encoded = asked["encoding_format"] == "base64"
    return Embed(asked["model"], asked["input"], asked["pooling"], encoded)


def tokenize(form: Form, body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Returns the fields of /tokenize's body, or raises Refused."""
    asked = fields.read(form, body)
    if (asked["prompt"] is None) == (asked["messages"] is None):
        raise bad("send a prompt or messages, and not both", "prompt")
    if asked["messages"] is None:
        _check_size([asked["prompt"]], limits, "prompt")
    else:
        _check_conversation(asked["messages"], limits, "messages")
    return asked


def detokenize(form: Form, body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Returns the fields of /detokenize's body, or raises Refused."""
    asked = fields.read(form, body)
    _check_size([asked["tokens"]], limits, "tokens")
    return asked


def look(form: Form, body: Mapping[str, Any], limits: Limits) -> dict[str, Any]:
    """Returns the fields of /v1/look's body, or raises Refused."""
    asked = fields.read(form, body)
    _check_size([asked["prompt"], asked["against"] or ""], limits, "prompt")
    return asked


READERS: dict[str, Callable[[Form, Mapping[str, Any], Limits], Any]] = {
    "completion": completion,
    "chat": chat,
    "response": response,
    "embedding": embedding,
    "tokenize": tokenize,
    "detokenize": detokenize,
    "look": look,
}


def _counts(streaming: Mapping[str, bool]) -> dict[str, bool]:
    """Returns which events of a stream tell the counts of tokens."""
    return {
        "usage": streaming.get("include_usage", False),
        "counted": streaming.get("continuous_usage_stats", False),
    }


def _shared(asked: Mapping[str, Any]) -> dict[str, Any]:
    names = ("model", "seed", "stop", "ignore_eos", "stream")
    return {
        **{name: asked[name] for name in names},
        "settings": {
            name: asked[name] for name in sampling.SETTINGS if asked[name] is not None
        },
        "stop_ids": asked["stop_token_ids"],
        "least": asked["min_tokens"],
        "bias": asked["logit_bias"],
    }


def _grammar(asked: Mapping[str, Any]) -> Grammar | None:
    """Returns what a text must be, or None; raises Refused."""
    form, given = asked["response_format"], asked["structured_outputs"]
    if form and form["type"] == "json_schema":
        schema = form["json_schema"]["schema"]
        found = grammars.schema(schema, "response_format.json_schema.schema")
    else:
        found = _object(form, "response_format")
    if given is None:
        if found is not None:
            _check_ending(asked, "response_format")
        return found
    param = f"structured_outputs.{given[0]}"
    if found is not None:
        raise bad(f"response_format and {param} are two forms of one text", param)
    _check_ending(asked, param)
    ways = {
        "json": grammars.schema,
        "regex": grammars.regex,
        "choice": grammars.choice,
    }
    return ways[given[0]](given[1], param)


def _object(form: Mapping[str, Any] | None, param: str) -> Grammar | None:
    """Returns the grammar of json_object, or None of a text."""
    if not form or form["type"] == "text":
        return None
    return grammars.schema({"type": "object"}, param)


def _check_ending(asked: Mapping[str, Any], param: str) -> None:
    """Refuses what moves the end of a text whose form says where that is."""
    for name in ("min_tokens", "ignore_eos"):
        if asked[name]:
            raise bad(f"{name} cannot be beside {param}, which ends the text", name)


def _check_tools(
    offered: Tools, grammar: Grammar | None, asked: Mapping[str, Any]
) -> None:
    """Refuses what cannot be beside tools that may be called."""
    if grammar is not None and offered.described:
        raise bad(
            f"{grammar.param} cannot be beside tools that may be called, whose calls "
            "are of another form: leave one out, or set tool_choice to none",
            grammar.param,
        )
    if offered.strict:
        _check_ending(asked, "tool_choice" if offered.must else "a strict tool")


def _check_conversation(
    conversation: Sequence[Message], limits: Limits, param: str, offered: Any = ()
) -> None:
    """Refuses messages and tools that are too long together."""
    texts = [*map(messages.text, conversation), *map(json.dumps, offered or ())]
    _check_size(texts, limits, param)


def _check_size(texts: Sequence[str | list[int]], limits: Limits, param: str) -> None:
    """Refuses texts that are too long together; a token counts as a byte."""
    more = MESSAGE_BYTES if param != "prompt" else 0
    size = sum(more + (_bytes(x) if isinstance(x, str) else len(x)) for x in texts)
    if size > limits.prompt_bytes:
        raise limits.too_long(param)


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


# ---------------------------------------------------------------- answers


def told_completion(tokens: Sequence[Token], start: int, spell: Spell) -> dict:
    """Returns tokens as the `logprobs` of a completion; `start`: where they begin."""
    offsets = []
    for token in tokens:
        offsets.append(start)
        start += len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [
            {_key(spell(i)): p for i, p in token.top}
            if token.logprob is not None
            else None
            for token in tokens
        ],
        "text_offset": offsets,
    }


def _key(spelling: Spelling) -> str:
    """Returns a token's text, or its bytes where that is half a character."""
    if "\ufffd" not in spelling.text:
        return spelling.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelling.bytes)


def told_chat(tokens: Sequence[Token], spell: Spell) -> dict:
    """Returns tokens as the `logprobs` of a chat."""

    def entry(token, text, logprob):
        return {"token": text, "logprob": logprob, "bytes": list(spell(token).bytes)}

    return {
        "content": [
            {
                **entry(token.id, token.text, token.logprob),
                "top_logprobs": [entry(i, spell(i).text, p) for i, p in token.top],
            }
            for token in tokens
        ],
        "refusal": None,
    }


def usage(prompt: int, written: int, cached: int) -> dict:
    """Returns token counts; `cached` are those of the prompt that were kept."""
    total = prompt + written
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": total,
        "prompt_tokens_details": {"cached_tokens": cached},
    }


def usage_of_response(prompt: int, written: int, cached: int) -> dict:
    """Returns token counts as /v1/responses tells them."""
    return {
        "input_tokens": prompt,
        "input_tokens_details": {"cached_tokens": cached},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": prompt + written,
    }


def usage_of_prompts(tokens: int) -> dict:
    """Returns token counts of what writes nothing."""
    return {"prompt_tokens": tokens, "total_tokens": tokens}
