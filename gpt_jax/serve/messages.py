"""Conversations in requests: messages, what they say, which tools they called.

Read as `chat.Message`. What no message here can have is refused by its own name.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from gpt_jax.chat import Call, Message
from gpt_jax.serve.errors import bad
from gpt_jax.serve.kinds import (
    DEEPEST,
    Anything,
    Group,
    Kind,
    Many,
    Name,
    Nothing,
    OneOf,
    Schema,
    Text,
    deeper,
    wrong,
)

ROLES = ("system", "developer", "user", "assistant")

# A part of a message; other types of parts are refused by their own name.
PART = Group(
    {
        "type": OneOf(("text", "input_text", "output_text")),
        "text": Text(),
        "annotations": Nothing(([],)),
        "logprobs": Nothing(([],)),
    },
    required=("text",),
)


@dataclass(frozen=True)
class Content:
    """What a message says: a text, or parts that are texts; read as one text."""

    wanted: str = "a text or a list of parts that are texts"

    def read(self, value: Any, name: str) -> str:
        if isinstance(value, str):
            return value
        if not isinstance(value, list):
            raise wrong(self, value, name)
        for i, part in enumerate(value):
            kind = part.get("type") if isinstance(part, dict) else None
            if isinstance(kind, str) and kind not in PART.fields["type"].values:  # type: ignore[attr-defined]
                place = f"{name}[{i}].type"
                raise bad(
                    f"{place} {kind[:40]!r} is not supported by this server: only "
                    "texts are",
                    place,
                )
        return "".join(part["text"] for part in Many(PART).read(value, name))

    def schema(self) -> Schema:
        return {"anyOf": [Text().schema(), Many(PART).schema()]}


@dataclass(frozen=True)
class Arguments:
    """The arguments of a call: a text that is an object of JSON; read as that."""

    wanted: str = "a text that is a JSON object"

    def read(self, value: Any, name: str) -> dict[str, Any]:
        if not isinstance(value, str):
            raise wrong(self, value, name)
        try:
            found = json.loads(value) if value.strip() else {}
        except (ValueError, RecursionError):
            found = None
        if not isinstance(found, dict) or deeper(found, DEEPEST):
            raise wrong(self, value, name)
        return found

    def schema(self) -> Schema:
        return {"type": "string"}


CALL = Group(
    {
        "id": Text(),
        "type": OneOf(("function",)),
        "function": Group(
            {"name": Name(), "arguments": Arguments()}, ("name", "arguments")
        ),
        "index": Anything(),  # what streams had, sent back
    },
    required=("function",),
)
EMPTY: Mapping[str, Kind] = {  # what clients send back of earlier answers, empty
    "refusal": Nothing(),
    "audio": Nothing(),
    "annotations": Nothing(([],)),
    "function_call": Nothing(),
    "name": Nothing(),
}
SAID = Group(
    {
        "role": OneOf(ROLES),
        "content": Content(),
        "tool_calls": Nothing(([],)),
        **EMPTY,
    },
    required=("role", "content"),
)
CALLED = Group(
    {
        "role": OneOf(("assistant",)),
        "content": Content(),
        "tool_calls": Many(CALL, 1),
        **EMPTY,
    },
    required=("role", "tool_calls"),
)
HEARD = Group(
    {
        "role": OneOf(("tool",)),
        "content": Content(),
        "tool_call_id": Text(),
        "name": Text(),
    },
    required=("role", "content"),
)

ITEM = Group(
    {
        "type": OneOf(("message",)),
        "role": OneOf(ROLES),
        "content": Content(),
        "id": Anything(),
        "status": Anything(),
    },
    required=("role", "content"),
)


@dataclass(frozen=True)
class Turn:
    """A message of a chat."""

    wanted: str = 'an object such as {"role": "user", "content": ...}'

    def read(self, value: Any, name: str) -> Message:
        if not isinstance(value, dict):
            raise wrong(self, value, name)
        role, form = value.get("role"), SAID
        if role is not None:
            OneOf((*ROLES, "tool")).read(role, f"{name}.role")
        if role == "tool":
            form = HEARD
        elif role == "assistant" and value.get("tool_calls") not in (None, []):
            form = CALLED
        return _message(form.read(value, name))

    def schema(self) -> Schema:
        return {"anyOf": [SAID.schema(), CALLED.schema(), HEARD.schema()]}


@dataclass(frozen=True)
class Item:
    """A message of a response."""

    wanted: str = 'an object such as {"role": "user", "content": ...}'

    def read(self, value: Any, name: str) -> Message:
        return _message(ITEM.read(value, name))

    def schema(self) -> Schema:
        return ITEM.schema()


def _message(said: Mapping[str, Any]) -> Message:
    """Returns a message that was read; a developer is what once was a system."""
    role = "system" if said["role"] == "developer" else said["role"]
    calls = tuple(
        Call(**call["function"], id=call.get("id", ""))
        for call in said.get("tool_calls") or ()
    )
    told = (said.get("tool_call_id", ""), said.get("name") or "")
    return Message(role, said.get("content", ""), 1, calls, *told)


@dataclass(frozen=True)
class Conversation:
    """Messages."""

    item: Kind

    @property
    def wanted(self) -> str:
        return 'a list of {"role": ..., "content": ...}, not empty'

    def read(self, value: Any, name: str) -> list[Message]:
        if not isinstance(value, list) or not value:
            raise wrong(self, value, name)
        return Many(self.item).read(value, name)

    def schema(self) -> Schema:
        return Many(self.item, 1).schema()


@dataclass(frozen=True)
class Input:
    """What /v1/responses answers: a text of the user, or items that are messages."""

    wanted: str = "a text or a list of messages, not empty"

    def read(self, value: Any, name: str) -> list[Message]:
        if isinstance(value, str) and value:
            return [Message("user", value)]
        if not isinstance(value, list) or not value:
            raise wrong(self, value, name)
        for i, item in enumerate(value):
            kind = item.get("type", "message") if isinstance(item, dict) else "message"
            if isinstance(kind, str) and kind != "message":
                place = f"{name}[{i}].type"
                raise bad(
                    f"{place} {kind[:40]!r} is not supported by this server: only "
                    "messages are",
                    place,
                )
        return Conversation(Item()).read(value, name)

    def schema(self) -> Schema:
        return {"anyOf": [Text(1).schema(), Many(Item(), 1).schema()]}


def text(message: Message) -> str:
    """Returns all that a prompt may have of a message, as one text to be measured."""
    called = [json.dumps([call.name, call.arguments]) for call in message.calls]
    return "".join([message.content, message.call_id, message.name, *called])
