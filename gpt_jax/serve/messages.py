"""Conversations in requests: messages, what they say, which tools they called.

Read as `chat.Message`. What no message here can have is refused by its own name.
"""

import json
from collections.abc import Mapping, Sequence
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

TOLD: Mapping[str, Kind] = {"id": Anything(), "status": Anything()}  # of items
ELSEWHERE: Mapping[str, Kind] = {"caller": Nothing(), "namespace": Nothing()}
ITEM = Group(
    {
        "type": OneOf(("message",)),
        "role": OneOf(ROLES),
        "content": Content(),
        **TOLD,
    },
    required=("role", "content"),
)
ITEMS = {  # of a response, by their types
    "message": ITEM,
    "function_call": Group(
        {
            "type": OneOf(("function_call",)),
            "call_id": Text(1),
            "name": Name(),
            "arguments": Arguments(),
            **TOLD,
            **ELSEWHERE,
        },
        required=("type", "call_id", "name", "arguments"),
    ),
    "function_call_output": Group(
        {
            "type": OneOf(("function_call_output",)),
            "call_id": Text(1),
            "output": Content(),
            **TOLD,
            **ELSEWHERE,
        },
        required=("type", "call_id", "output"),
    ),
}


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
    """An item of a response: a message, a call of a tool, or what a tool said."""

    wanted: str = 'an object such as {"role": "user", "content": ...}'

    def read(self, value: Any, name: str) -> Message:
        kind = value.get("type") if isinstance(value, dict) else None
        if isinstance(kind, str) and kind not in ITEMS:
            place = f"{name}.type"
            raise bad(
                f"{place} {kind[:40]!r} is not supported by this server: items are "
                f"of the types {', '.join(ITEMS)}",
                place,
            )
        form = ITEMS[kind] if isinstance(kind, str) else ITEM
        said = form.read(value, name)
        if kind == "function_call":
            call = Call(said["name"], said["arguments"], id=said["call_id"])
            return Message("assistant", "", calls=(call,))
        if kind == "function_call_output":
            return Message("tool", said["output"], call_id=said["call_id"])
        return _message(said)

    def schema(self) -> Schema:
        return {"anyOf": [form.schema() for form in ITEMS.values()]}


def joined(items: Sequence[Message], name: str) -> list[Message]:
    """Returns the turns that items of a response make up.

    A text of the model and the calls behind it are one turn; what a tool said is told
    with the tool's name, which its call has.

    Raises:
      Refused: a tool said something that was not asked of it.
    """
    turns: list[Message] = []
    called: dict[str, str] = {}  # names of tools by the ids of their calls
    for i, item in enumerate(items):
        called |= {call.id: call.name for call in item.calls}
        if item.calls and turns and turns[-1].role == "assistant":
            turns[-1] = turns[-1]._replace(calls=(*turns[-1].calls, *item.calls))
        elif item.role != "tool":
            turns.append(item)
        elif item.call_id in called:
            turns.append(item._replace(name=called[item.call_id]))
        else:
            place = f"{name}[{i}].call_id"
            raise bad(
                f"{place} {item.call_id[:40]!r} is of no function_call before it", place
            )
    return turns


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
    """What /v1/responses answers: a text of the user, or items."""

    wanted: str = "a text or a list of items, not empty"

    def read(self, value: Any, name: str) -> list[Message]:
        if isinstance(value, str) and value:
            return [Message("user", value)]
        if not isinstance(value, list) or not value:
            raise wrong(self, value, name)
        return Conversation(Item()).read(value, name)

    def schema(self) -> Schema:
        return {"anyOf": [Text(1).schema(), Many(Item(), 1).schema()]}


def text(message: Message) -> str:
    """Returns all that a prompt may have of a message, as one text to be measured."""
    called = [json.dumps([call.name, call.arguments]) for call in message.calls]
    return "".join([message.content, message.call_id, message.name, *called])
