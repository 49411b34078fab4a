"""Tools that a model may call: how they are described, held to, and found in its text.

    grammar = required(tools, form, specials, param=...)   # a text that is a call
    reader = Reader(tools, form)
    said = reader.push("Let me see. <tool_call>", last=False)  # its texts and calls

How a call is written is the template's affair (`chat.tool_form`): a mark, JSON with the
name and the arguments, another mark, as Hermes' and Qwen's do; several between two
marks, as Mistral's do; or the JSON alone.
"""

import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gpt_jax.chat import ToolForm
from gpt_jax.serve.errors import bad
from gpt_jax.serve.grammars import Grammar, json_of
from gpt_jax.serve.kinds import ByType, Flag, Group, Name, Object, Text, shown

MOST = 128  # tools of a request; OpenAI's most
PLAIN = ToolForm("", "arguments", "", False)  # where a template writes no calls

FUNCTION = {
    "name": Name(),
    "description": Text(),
    "parameters": Object(),
    "strict": Flag(),
}
# In a chat a function stands within its tool; in a response it is the tool.
INNER = Group(FUNCTION, required=("name",))
TOOL = ByType({"function": Group({"function": INNER}, required=("function",))})
FLAT = ByType({"function": INNER})
NAME = Group({"name": Name()}, required=("name",))
NAMED = ByType({"function": Group({"function": NAME}, required=("function",))})
FLAT_NAMED = ByType({"function": NAME})


@dataclass(frozen=True)
class Tools:
    """The tools of a request.

    Attributes:
      described: as OpenAI's API describes them; none where nothing may be called.
      must: names of which one is to be called; none = the model may write a text.
      strict: whether what it calls has the arguments that the schema describes.
      several: whether it may call more than one.
      inside: where a tool of the request has its function, for what is told of it.
    """

    described: Sequence[Mapping[str, Any]] = ()
    must: Sequence[str] = ()
    strict: bool = False
    several: bool = True
    inside: str = ".function"

    @property
    def names(self) -> list[str]:
        """What they are called."""
        return [tool["function"]["name"] for tool in self.described]


def read(
    described: Sequence[Mapping[str, Any]] | None,
    choice: Any,
    several: bool | None,
    *,
    flat: bool = False,
) -> Tools:
    """Returns what the fields of a request say of tools, or raises Refused.

    Args:
      described, choice, several: tools, tool_choice and parallel_tool_calls.
      flat: they are those of a response, whose tools are functions.
    """
    described, inside = described or [], "" if flat else ".function"
    if flat:
        described = [_nested(tool) for tool in described]
        choice = _nested(choice) if isinstance(choice, dict) else choice
    names = [tool["function"]["name"] for tool in described]
    for i, name in enumerate(names):
        if name in names[:i]:
            place = f"tools[{i}]{inside}.name"
            raise bad(f"{place} {name!r} is the name of an earlier tool", place)
        kind = described[i]["function"].get("parameters", {}).get("type", "object")
        if kind != "object":
            place = f"tools[{i}]{inside}.parameters.type"
            raise bad(f'{place} must be "object", not {shown(kind)}', place)
    if not described and choice not in (None, "none", "auto"):
        raise bad("tool_choice wants a call but there are no tools", "tool_choice")
    if isinstance(choice, dict) and choice["function"]["name"] not in names:
        raise bad(
            f"tool_choice names {choice['function']['name']!r}, but the tools are: "
            f"{', '.join(names)}",
            f"tool_choice{inside}.name",
        )
    if choice == "none" or not described:
        return Tools()
    must = names if choice == "required" else ()
    must = [choice["function"]["name"]] if isinstance(choice, dict) else must
    strict = any(tool["function"].get("strict") for tool in described)
    strict = bool(must) or strict
    return Tools(described, must, strict, several is not False, inside)


def _nested(tool: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a tool of a response as one of a chat."""
    function = {key: value for key, value in tool.items() if key != "type"}
    return {"type": tool["type"], "function": function}


def grammar(tools: Tools, form: ToolForm, specials: Mapping[str, int]) -> Grammar:
    """Returns the grammar of a text in which calls are as their schemas describe them.

    It is one call where one must be, else a text with calls in it.

    Args:
      tools: of the request, strict.
      form: how a call is written.
      specials: tokens that are no text, by their names.
    """
    param = "tool_choice" if tools.must else "tools"
    rules, names = [], []
    for i, tool in enumerate(tools.described):
        told = tool["function"]
        if tools.must and told["name"] not in tools.must:
            continue
        schema = {"type": "object", **told.get("parameters", EMPTY)}
        opened = f'{{"name": {json.dumps(told["name"])}, "{form.arguments}": '
        held = json_of(schema, f"tools[{i}]{tools.inside}.parameters")
        rules.append(f"call_{i}: {json.dumps(opened)} {held} {json.dumps('}')}")
        names.append(f"call_{i}")
    rules.append(f"call: {' | '.join(names)}")
    begin, end = _marks(form.begin, specials), _marks(form.end, specials)
    if tools.must:
        start = f"start: {begin} call {end}"
    elif not form.begin:  # JSON alone: a text that begins otherwise is no call
        rules.append(r"TEXT: /([^{\s](.|\n)*)?/")
        start = "start: call | TEXT"
    else:
        mark = form.begin.strip()
        first = next((name for name in specials if mark.startswith(name)), "")
        lazy = "" if first else "[lazy]"  # a text may hold no token that is no text
        rest = form.begin[len(first or mark) :]
        rules.append(r"TEXT: /(.|\n)*/")
        rules.append(f"opened{lazy}: TEXT {_marks(first or mark, specials)}")
        more = _marks(form.between, specials)
        listed = f"call ({more} call)*" if more and tools.several else "call"
        start = f"start: (opened {_marks(rest, specials)} {listed} {end})* TEXT"
    return Grammar("lark", "\n".join([start, *rules]), param)


EMPTY: Mapping[str, Any] = {"additionalProperties": False}  # no parameters


def _marks(text: str, specials: Mapping[str, int]) -> str:
    """Returns a text as a grammar writes it, tokens that are no text by their ids."""
    names = "|".join(map(re.escape, sorted(specials, key=len, reverse=True)))
    parts = re.split(f"({names})", text) if names else [text]
    return " ".join(
        f"<[{specials[part]}]>" if part in specials else json.dumps(part)
        for part in parts
        if part
    )


@dataclass(frozen=True)
class Called:
    """A call in a text; the arguments as they were written."""

    index: int
    id: str
    name: str
    arguments: str

    def told(self, *, streamed: bool) -> dict[str, Any]:
        """Returns it as OpenAI's API tells it."""
        place = {"index": self.index} if streamed else {}
        function = {"name": self.name, "arguments": self.arguments}
        return {**place, "id": self.id, "type": "function", "function": function}


@dataclass
class Reader:
    """Finds the calls in a text as it grows; what is no call stays text.

    Attributes:
      names: of the tools; a call of anything else is text.
      form: how a call is written.
      calls: what was called so far.
    """

    names: Sequence[str]
    form: ToolForm
    calls: list[Called] = field(default_factory=list)
    _held: str = ""
    _behind: bool = False  # a call, whose white space belongs to nothing
    _listed: bool = False  # behind a call of several that share marks
    _begun: bool = False  # with a text, behind which JSON alone is no call

    def push(self, fresh: str, *, last: bool) -> list[str | Called]:
        """Takes new text; returns what of it is certain, texts and calls in order."""
        self._held += fresh
        found: list[str | Called] = []
        certain = self._marked if self.form.begin.strip() else self._alone
        while True:
            if self._behind:
                self._held = self._held.lstrip()
            text = certain(last) if self._held else None
            if text is None:
                break
            found.append(text or self.calls[-1])
            self._behind &= not text
        return found

    def _alone(self, last: bool) -> str | None:
        """Takes a text, or JSON that is all there is; None to wait."""
        held = self._held
        if not (last or self._begun) and held.lstrip()[:1] in ("", "{"):
            return None
        found = _object(held, 0) if last and not self._begun else None
        self._begun = True
        end = self.form.end.strip()
        if found and held[found[1] :].strip() in ("", end) and self._call(found[0]):
            self._held = ""
            return ""
        return self._cut(len(held))

    def _marked(self, last: bool) -> str | None:
        """Takes a text up to a mark, or a call behind one; None to wait."""
        end, between = self.form.end.strip(), self.form.between.strip()
        begin = between if self._listed else self.form.begin.strip()
        held = self._held
        start = held.find(begin)
        if start:
            sure = len(held) - (0 if last else _overlap(held, begin))
            return self._cut(start if start > 0 else sure)
        found = _object(held, len(begin))
        rest = held[found[1] :].lstrip() if found else ""
        open_ = any(len(rest) < len(x) and x.startswith(rest) for x in (end, between))
        if not last and (not found or open_):
            return None
        goes_on = bool(between) and rest.startswith(between)
        closed = goes_on or rest.startswith(end) or end.startswith(rest)
        self._listed = False
        if found and closed and self._call(found[0]):
            self._held, self._behind = rest[0 if goes_on else len(end) :], True
            self._listed = goes_on
            return ""
        return self._cut(len(begin))  # what looked like a mark is text

    def _cut(self, size: int) -> str | None:
        text, self._held = self._held[:size], self._held[size:]
        return text or None

    def _call(self, members: Mapping[str, str]) -> bool:
        """Takes the call that an object is; returns whether it is one."""
        name = json.loads(members.get("name", "null"))
        arguments = members.get(self.form.arguments, "")
        if name not in self.names or not arguments.startswith("{"):
            return False
        # Nine characters: the templates of Mistral's models refuse others.
        number = secrets.token_hex(5)[:9]
        self.calls.append(Called(len(self.calls), number, name, arguments))
        return True


def split(found: Sequence[str | Called]) -> tuple[str, list[Called]]:
    """Returns the text and the calls of what was found."""
    calls = [part for part in found if isinstance(part, Called)]
    return "".join(part for part in found if isinstance(part, str)), calls


WHITE = re.compile(r"[ \t\n\r]*")


def _object(text: str, start: int) -> tuple[dict[str, str], int] | None:
    """Returns the members of the JSON object there, as written, and where it ends."""

    def no_number(name):
        raise ValueError(f"{name} is no JSON number")

    def white(at: int) -> int:
        found = WHITE.match(text, at)
        assert found
        return found.end()

    decode = json.JSONDecoder(parse_constant=no_number).raw_decode
    start = white(start)
    try:
        whole, end = decode(text, start)
    except (ValueError, RecursionError):
        return None
    if not isinstance(whole, dict):
        return {}, end
    members, at = {}, white(start + 1)
    while text[at] != "}":
        key, at = decode(text, white(at + (text[at] == ",")))
        begun = white(white(at) + 1)
        _, at = decode(text, begun)
        members[key] = text[begun:at]
        at = white(at)
    return members, end


def _overlap(text: str, mark: str) -> int:
    """Returns how many last characters may begin a mark."""
    most = min(len(mark) - 1, len(text))
    return next((n for n in range(most, 0, -1) if mark.startswith(text[-n:])), 0)
