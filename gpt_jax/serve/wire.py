"""What a client may ask, checked, and how it is answered: OpenAI's two forms.

A body is checked whole before anything is done. What this server cannot do is refused
by name, not passed over; null is the same as leaving a key out.

Also understood: all of `sampling.SETTINGS`, and ignore_eos, which writes on beyond the
end of the text.
"""

import difflib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt_jax import plaintext, sampling
from gpt_jax.serve.batch import TOP
from gpt_jax.serve.texts import Spelling, Token

STOPS, STOP_CHARS = 16, 256  # stop strings, and the longest: they cost time a token

MESSAGE_BYTES = 16  # what a message counts besides its text: it costs time too

Spell = Callable[[int], Spelling]


class Refused(Exception):
    """An answer that is an error: status, sentence and what OpenAI's clients read."""

    def __init__(
        self, status: int, message: str, code: str, seconds: int | None = None
    ):
        super().__init__(message)
        self.status, self.code = status, code
        self.headers = {} if seconds is None else {"Retry-After": str(seconds)}

    def body(self) -> dict:
        """Returns the error as JSON's objects."""
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {
            "error": {
                "message": str(self),
                "type": kind,
                "param": None,
                "code": self.code,
            }
        }


@dataclass(frozen=True)
class Limits:
    """What one request may cost.

    Attributes:
      body_bytes: of a request's body.
      prompt_bytes: of all its texts together, counted before they are tokenized.
      choices: texts in one request: prompts times n.
      told: probabilities told of its prompts: tokens times alternatives and one.
      seconds: from its arrival to its last token; then 504.
      read_seconds: in which a request must have arrived; then 408.
      connections: open at once; beyond, 503.
    """

    body_bytes: int
    prompt_bytes: int
    choices: int
    told: int
    seconds: float
    read_seconds: float
    connections: int


@dataclass(frozen=True)
class Ask:
    """A request for texts.

    `prompts` are texts or ids, of a completion; `messages` are (role, content), of a
    chat. `top` is how many alternatives to tell with each token, None for none and no
    probabilities; max_new -1 is as many tokens as fit.
    """

    model: str | None
    prompts: list[str | list[int]]
    messages: list[tuple[str, str]]
    settings: dict[str, Any]
    seed: int | None
    stop: list[str]
    ignore_eos: bool
    n: int
    top: int | None
    echo: bool
    stream: bool
    usage: bool


def read(body: bytes) -> dict:
    """Returns the object that a body holds, or raises Refused."""

    def no_number(name):
        raise ValueError(f"{name} is no JSON number")

    try:
        fields = json.loads(body, parse_constant=no_number)
    except RecursionError:
        raise _bad("the body is nested too deeply") from None
    except ValueError as error:  # also bytes that are not UTF-8, and endless digits
        raise _bad(f"the body is not JSON: {error}") from None
    if not isinstance(fields, dict):
        raise _bad('the body must be a JSON object, as in {"prompt": "Once"}')
    return {name: value for name, value in fields.items() if value is not None}


SHARED = "model seed stop n stream stream_options max_tokens logprobs ignore_eos "
SHARED += " ".join(sampling.SETTINGS)
# Told by clients of others; they change no text here.
PASSED = "user metadata store service_tier safety_identifier prompt_cache_key"
# What other servers do and this one does not, and the values that ask for nothing.
NOTHING: dict[str, list[Any]] = {
    "frequency_penalty": [0, [], {}],
    "presence_penalty": [0, [], {}],
    "logit_bias": [{}, []],
    "best_of": [1, [], {}],
    "suffix": ["", [], {}],
    "tools": [[], {}],
    "functions": [[]],
    # Without tools there is nothing to choose.
    "tool_choice": ["none", "auto"],
    "function_call": ["none", "auto"],
    "parallel_tool_calls": [False, True],
    "modalities": [["text"]],
    "response_format": [{"type": "text"}, [], {}],
}
COMPLETION = {*f"{SHARED} {PASSED} prompt echo".split(), *NOTHING}
CHAT = {*f"{SHARED} {PASSED} messages top_logprobs".split(), *NOTHING}
CHAT.add("max_completion_tokens")
LOOK = {"model", "prompt", "against"}


def completion(fields: Mapping[str, Any], limits: Limits) -> Ask:
    """Returns what the body of /v1/completions asks for, or raises Refused."""
    _known(fields, COMPLETION)
    prompts = _prompts(fields.get("prompt"), limits)
    top = _whole(fields, "logprobs", None, 0, TOP)
    shared = _shared(fields, len(prompts), limits, max_new=16)
    echo = _flag(fields, "echo")
    return Ask(prompts=prompts, messages=[], top=top, echo=echo, **shared)


def chat(fields: Mapping[str, Any], limits: Limits) -> Ask:
    """Returns what the body of /v1/chat/completions asks for, or raises Refused."""
    _known(fields, CHAT)
    messages = _messages(fields.get("messages"))
    size = sum(MESSAGE_BYTES + _bytes(content) for _, content in messages)
    if size > limits.prompt_bytes:
        raise _long(limits)
    if "max_completion_tokens" in fields:
        fields = {**fields, "max_tokens": fields["max_completion_tokens"]}
    top = _whole(fields, "top_logprobs", 0, 0, TOP)
    top = top if _flag(fields, "logprobs") else None
    shared = _shared(fields, 1, limits, max_new=-1)
    return Ask(prompts=[], messages=messages, top=top, echo=False, **shared)


def look(fields: Mapping[str, Any], limits: Limits) -> tuple[str | None, str, str]:
    """Returns (model, prompt, against) of the body of /v1/look, or raises Refused."""
    _known(fields, LOOK)
    prompt, against = _text(fields, "prompt"), _text(fields, "against") or ""
    if not prompt:
        raise _bad("prompt must be a text that is not empty")
    if _bytes(prompt) + _bytes(against) > limits.prompt_bytes:
        raise _long(limits)
    return _text(fields, "model"), prompt, against


def _shared(fields, prompts: int, limits: Limits, *, max_new: int) -> dict[str, Any]:
    settings = {
        name: _whole(fields, name, setting.off, int(setting.low), int(setting.high))
        if setting.kind is int
        else _number(fields, name, setting.off)
        for name, setting in sampling.SETTINGS.items()
    }
    try:
        sampling.check(0, **settings)
    except ValueError as error:
        raise _bad(str(error)) from None
    settings["max_new"] = _whole(fields, "max_tokens", max_new, 0, sampling.MOST)
    options = fields.get("stream_options", {})
    if not isinstance(options, dict):
        raise _bad('stream_options must be an object, as in {"include_usage": true}')
    return {
        "model": _text(fields, "model"),
        "settings": settings,
        "seed": _whole(fields, "seed", None, -(2**63), 2**64),
        "stop": _stops(fields.get("stop", [])),
        "ignore_eos": _flag(fields, "ignore_eos"),
        "n": _whole(fields, "n", 1, 1, max(1, limits.choices // prompts)),
        "stream": _flag(fields, "stream"),
        "usage": _flag(options, "include_usage"),
    }


def _known(fields, names: set[str]) -> None:
    for name in fields:
        if name not in names:
            close = difflib.get_close_matches(name[:40], names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            raise _bad(f"{name[:40]!r} is not a key that this server knows{hint}")
    for name in NOTHING.keys() & fields.keys():
        # To Python False is 0 and True is 1.
        truth, value = isinstance(fields[name], bool), fields[name]
        if not any(isinstance(x, bool) == truth and x == value for x in NOTHING[name]):
            raise _bad(f"{name} is not supported by this server: leave it out")


def _prompts(prompt: Any, limits: Limits) -> list[str | list[int]]:
    """Returns the prompts as a list; no prompt is the beginning of a text."""
    if prompt is None:
        return [[]]
    wanted = "prompt must be a text, a list of texts, a list of token ids or a list of "
    wanted += "such lists, none of them empty"
    if prompt in ("", []) or not isinstance(prompt, str | list):
        raise _bad(f"{wanted}; leave it out to begin a text")
    prompts = [prompt] if isinstance(prompt, str) or _ids(prompt) else prompt
    if len(prompts) > limits.choices:
        raise _bad(f"{len(prompts)} prompts are more than {limits.choices}")
    for one in prompts:
        if not one or not (isinstance(one, str) or _ids(one)):
            raise _bad(wanted)
    size = sum(_bytes(one) if isinstance(one, str) else len(one) for one in prompts)
    if size > limits.prompt_bytes:
        raise _long(limits)
    return prompts


def _ids(value: Any) -> bool:
    """Whether this is a list of whole numbers that an array can hold."""
    if not isinstance(value, list) or not value or type(value[0]) is not int:
        return False
    return all(type(i) is int and 0 <= i < 2**31 for i in value)


def _messages(messages: Any) -> list[tuple[str, str]]:
    wanted = 'messages must be a list of {"role": ..., "content": ...}, not empty'
    if not isinstance(messages, list) or not messages:
        raise _bad(wanted)
    found = []
    for message in messages:
        if not isinstance(message, dict) or message.get("role") not in ROLES:
            raise _bad(f"{wanted}, with one of the roles {', '.join(ROLES)}")
        content = message.get("content")
        if isinstance(content, list):  # parts, of which only texts are understood
            parts = [p.get("text") if isinstance(p, dict) else None for p in content]
            texts = [part for part in parts if isinstance(part, str)]
            content = "".join(texts) if len(texts) == len(parts) else None
        if not isinstance(content, str):
            raise _bad("the content of a message must be a text")
        role = "system" if message["role"] == "developer" else message["role"]
        found.append((role, content))
    return found


ROLES = ("system", "developer", "user", "assistant")


def _stops(stop: Any) -> list[str]:
    stops = [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or len(stops) > STOPS:
        raise _bad(f"stop must be a text or a list of at most {STOPS}")
    if not all(isinstance(s, str) and 0 < len(s) <= STOP_CHARS for s in stops):
        raise _bad(f"a stop must be a text of 1 to {STOP_CHARS} characters")
    return stops


def _number(fields, name: str, default: float) -> float:
    value = fields.get(name, default)
    if type(value) not in (int, float) or not abs(value) < math.inf:
        raise _bad(f"{name} must be a number, not {_shown(value)}")
    return float(max(-1e30, min(value, 1e30)))


def _whole(fields, name: str, default, low: int, high: int):
    if name not in fields:
        return default
    value = fields[name]
    if type(value) is not int or not low <= value <= high:
        raise _bad(
            f"{name} must be a whole number from {low} to {high}, not {_shown(value)}"
        )
    return value


def _flag(fields, name: str) -> bool:
    value = fields.get(name)
    value = False if value is None else value
    if type(value) is not bool:
        raise _bad(f"{name} must be true or false, not {_shown(value)}")
    return value


def _text(fields, name: str) -> str | None:
    value = fields.get(name)
    if value is not None and not isinstance(value, str):
        raise _bad(f"{name} must be a text, not {_shown(value)}")
    return value


def _bytes(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode("utf-8", "surrogatepass"))


def _shown(value: Any) -> str:
    if not isinstance(value, str | int | float):
        return plaintext.kind(value)
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:40]}..."


def _bad(message: str) -> Refused:
    return Refused(400, message, "invalid_request")


def _long(limits: Limits) -> Refused:
    return Refused(
        413,
        f"the prompt is longer than {limits.prompt_bytes} bytes; shorten it",
        "prompt_too_long",
    )


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


def usage(prompt: int, written: int) -> dict:
    """Returns token counts."""
    total = prompt + written
    return {
        "prompt_tokens": prompt,
        "completion_tokens": written,
        "total_tokens": total,
    }
