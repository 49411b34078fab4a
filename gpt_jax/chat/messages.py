"""Conversations: messages, and the rows of data that hold them."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from gpt_jax import names
from gpt_jax.chat.templates import TEMPLATES
from gpt_jax.plaintext import kind

ROLES = ("system", "user", "assistant")
# What others' conversations may ask for and no template here writes or no task learns.
ASKED = ("tool_calls", "function_call", "tool_call_id", "train")


class Call(NamedTuple):
    """The call of a tool, as an answer holds it."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


class Message(NamedTuple):
    """One turn of a conversation; the role is one of ROLES, or "tool".

    An answer of weight 0 is a part of what is answered later, and not learnt itself.
    """

    role: str
    content: str
    weight: int = 1
    calls: tuple[Call, ...] = ()  # of an answer
    call_id: str = ""  # of what a tool says: to which call
    name: str = ""  # likewise: which tool


def messages_of(row: Mapping[str, Any], template: str) -> list[Message]:
    """Returns the conversation of a row of data.

    Args:
      row: {"messages": [{"role", "content"}, ...]}, where a "weight" of 0 keeps an
        answer from being learnt (OpenAI's form), or {"instruction", "output"} with or
        without "input" (Alpaca); without "output" there is no answer at the end.
      template: the way an instruction and its input are joined is a part of it.

    Raises:
      ValueError: a column is missing or something is not text; names it.
    """
    if row.get("messages") is not None:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            empty = "an empty list" if turns == [] else kind(turns)
            raise ValueError(
                f"its messages are {empty}, not a list of role and content"
            )
        return [_message(turn) for turn in turns]
    if "instruction" not in row:
        raise ValueError(
            f"it has the columns {', '.join(map(repr, row)) or '(none)'}, but wanted "
            "are 'messages', or 'instruction' and 'output' (and 'input')"
        )
    texts = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"its {name} is {kind(text)}, not text")
    join = TEMPLATES[template].input if template in TEMPLATES else "\n"
    request = join.join(filter(None, (texts["instruction"], texts["input"])))
    messages = [Message("user", request)]
    if texts["output"] is not None:
        messages.append(Message("assistant", texts["output"]))
    return messages


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a message is {kind(turn)}, not an object")
    for name in ("role", "content"):
        if name not in turn:
            there = ", ".join(map(repr, turn)) or "nothing"
            raise ValueError(f"a message lacks its {name}; it has: {there}")
    for name in ASKED:
        if turn.get(name) is not None:
            raise ValueError(f"a message has {name!r}, which nothing here does")
    role, content, weight = turn["role"], turn["content"], turn.get("weight")
    names.choose("role", role, ROLES)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is {kind(content)}, not text")
    if weight is None:
        return Message(role, content)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"the weight of a message is {weight!r}: 1 learns an answer, 0 does not"
        )
    if weight and role != "assistant":
        raise ValueError(
            f"a message of the role {role} has the weight 1, but answers alone are "
            "learnt: remove the weight"
        )
    return Message(role, content, int(weight))
