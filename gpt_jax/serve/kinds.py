"""What a value of JSON may be: each kind reads it, and describes itself to tools.

    kind.read(3, "n")      # the value, or Refused with a sentence that names the field
    kind.wanted            # the same in words
    kind.schema()          # the same as JSON Schema

Reader and schema stand side by side, so that neither takes what the other refuses;
tests/test_serve_fields.py holds them to it.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from gpt_jax import names, plaintext
from gpt_jax.serve.errors import Refused, bad

Schema = dict[str, Any]
DEEPEST = 60  # lists and objects within each other, where any may be
HUGE = 1e30  # the most that a number without a bound may be: float32 holds it


class Kind(Protocol):
    """What a value may be."""

    @property
    def wanted(self) -> str:
        """It in words, as in "a text"."""
        ...

    def read(self, value: Any, name: str) -> Any:
        """Returns the value of the field `name`, or raises Refused."""
        ...

    def schema(self) -> Schema:
        """Returns it as JSON Schema."""
        ...


def wrong(kind: Kind, value: Any, name: str) -> Refused:
    """Returns the error of a value that is not of a kind."""
    return bad(f"{name} must be {kind.wanted}, not {shown(value)}", name)


def shown(value: Any) -> str:
    """Returns a value as JSON, or what it is where that would be long."""
    if value in ([], {}):
        return "an empty list" if value == [] else "an empty object"
    if not isinstance(value, str | int | float):
        return plaintext.kind(value)
    text = json.dumps(value)
    return text if len(text) < 40 else f"{text[:40]}..."


@dataclass(frozen=True)
class Flag:
    """True or false."""

    wanted: str = "true or false"

    def read(self, value: Any, name: str) -> bool:
        if type(value) is not bool:
            raise wrong(self, value, name)
        return value

    def schema(self) -> Schema:
        return {"type": "boolean"}


@dataclass(frozen=True)
class Whole:
    """A whole number from `low` to `high`."""

    low: int
    high: int

    @property
    def wanted(self) -> str:
        return f"a whole number from {self.low} to {self.high}"

    def read(self, value: Any, name: str) -> int:
        if type(value) is not int or not self.low <= value <= self.high:
            raise wrong(self, value, name)
        return value

    def schema(self) -> Schema:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}


@dataclass(frozen=True)
class Number:
    """A number from `low` to `high`; `above`: the low end itself is outside."""

    low: float
    high: float
    above: bool = False

    @property
    def wanted(self) -> str:
        low = f"above {self.low:g}" if self.above else f"of at least {self.low:g}"
        high = "" if self.high >= HUGE else f" and at most {self.high:g}"
        return f"a number {low}{high}"

    def read(self, value: Any, name: str) -> float:
        whole = type(value) is int
        fits = whole or (type(value) is float and math.isfinite(value))
        beyond = fits and (value <= self.low if self.above else value < self.low)
        if not fits or beyond or value > min(self.high, HUGE):
            raise wrong(self, value, name)
        return float(value)

    def schema(self) -> Schema:
        least = "exclusiveMinimum" if self.above else "minimum"
        return {"type": "number", least: self.low, "maximum": min(self.high, HUGE)}


@dataclass(frozen=True)
class Text:
    """A text of `least` to `most` characters."""

    least: int = 0
    most: int | None = None

    @property
    def wanted(self) -> str:
        if self.most is None:
            return "a text" if not self.least else "a text that is not empty"
        return f"a text of {self.least} to {self.most} characters"

    def read(self, value: Any, name: str) -> str:
        most = math.inf if self.most is None else self.most
        if not isinstance(value, str) or not self.least <= len(value) <= most:
            raise wrong(self, value, name)
        return value

    def schema(self) -> Schema:
        ends = {"minLength": self.least or None, "maxLength": self.most}
        return {"type": "string"} | {k: v for k, v in ends.items() if v is not None}


@dataclass(frozen=True)
class Name:
    """A name as programs have: ASCII letters, digits, _ and -."""

    most: int = 64

    @property
    def wanted(self) -> str:
        return f"a name of 1 to {self.most} ASCII letters, digits, _ and -"

    def read(self, value: Any, name: str) -> str:
        if not isinstance(value, str) or not re.fullmatch(self._pattern, value):
            raise wrong(self, value, name)
        return value

    def schema(self) -> Schema:
        return {"type": "string", "pattern": f"^{self._pattern}$"}

    @property
    def _pattern(self) -> str:
        return f"[A-Za-z0-9_-]{{1,{self.most}}}"


@dataclass(frozen=True)
class OneOf:
    """One of a few values of JSON."""

    values: tuple[Any, ...]

    @property
    def wanted(self) -> str:
        *first, last = map(json.dumps, self.values)
        return f"{', '.join(first)} or {last}" if first else last

    def read(self, value: Any, name: str) -> Any:
        if not _among(value, self.values):
            raise wrong(self, value, name)
        return value

    def schema(self) -> Schema:
        return {"enum": [*self.values]}


@dataclass(frozen=True)
class Nothing:
    """What is not supported: only values that ask for nothing."""

    values: tuple[Any, ...] = ()
    wanted: str = "left out"

    def read(self, value: Any, name: str) -> None:
        if not _among(value, self.values):
            hint = ""
            if shown_ones := [json.dumps(x) for x in self.values if x not in ([], {})]:
                hint = f", or say {' or '.join(shown_ones)}"
            text = f"{name} is not supported by this server: leave it out{hint}"
            raise bad(text, name)

    def schema(self) -> Schema:
        return {"enum": [*self.values]}


def _among(value: Any, values: tuple[Any, ...]) -> bool:
    # To Python False is 0 and True is 1.
    truth = isinstance(value, bool)
    return any(isinstance(x, bool) == truth and x == value for x in values)


@dataclass(frozen=True)
class Anything:
    """What changes no answer here, whatever it is."""

    wanted: str = "anything"

    def read(self, value: Any, name: str) -> Any:
        return value

    def schema(self) -> Schema:
        return {}


@dataclass(frozen=True)
class Ids:
    """Token ids."""

    least: int = 1
    most: int | None = None
    high: int = 2**31 - 1  # what an array can hold

    @property
    def wanted(self) -> str:
        most = "" if self.most is None else f"at most {self.most} "
        return f"a list of {most}token ids"

    def read(self, value: Any, name: str) -> list[int]:
        if not isinstance(value, list) or not self.takes(value):
            raise wrong(self, value, name)
        return value

    def takes(self, values: list) -> bool:
        """Whether these are token ids, and as many as there may be."""
        most = math.inf if self.most is None else self.most
        if not self.least <= len(values) <= most:
            return False
        return all(type(i) is int and 0 <= i <= self.high for i in values)

    def schema(self) -> Schema:
        items = {"type": "integer", "minimum": 0, "maximum": self.high}
        ends = {"minItems": self.least or None, "maxItems": self.most}
        found = {"type": "array", "items": items}
        return found | {k: v for k, v in ends.items() if v is not None}


@dataclass(frozen=True)
class Many:
    """A list of `least` to `most` values of a kind."""

    item: Kind
    least: int = 0
    most: int | None = None

    @property
    def wanted(self) -> str:
        ends = " that is not empty" if self.least else ""
        ends = f" of {self.least} to {self.most}" if self.most is not None else ends
        return f"a list{ends}, each {self.item.wanted}"

    def read(self, value: Any, name: str) -> list:
        most = math.inf if self.most is None else self.most
        if not isinstance(value, list) or not self.least <= len(value) <= most:
            raise wrong(self, value, name)
        return [self.item.read(one, f"{name}[{i}]") for i, one in enumerate(value)]

    def schema(self) -> Schema:
        ends = {"minItems": self.least or None, "maxItems": self.most}
        found = {"type": "array", "items": self.item.schema()}
        return found | {k: v for k, v in ends.items() if v is not None}


@dataclass(frozen=True)
class OneOrMany:
    """A value of a kind, or a list of them; read as a list."""

    item: Kind
    many: Kind

    @property
    def wanted(self) -> str:
        return f"{self.item.wanted} or {self.many.wanted}"

    def read(self, value: Any, name: str) -> list:
        if isinstance(value, list):
            return self.many.read(value, name)
        return [self.item.read(value, name)]

    def schema(self) -> Schema:
        return {"anyOf": [self.item.schema(), self.many.schema()]}


@dataclass(frozen=True)
class ById:
    """An object with token ids as its keys, in digits, and numbers as its values."""

    number: Number
    most: int

    @property
    def wanted(self) -> str:
        return (
            f"an object of at most {self.most} token ids in digits, each with "
            f"{self.number.wanted}"
        )

    def read(self, value: Any, name: str) -> dict[int, float]:
        if value == []:  # what some clients of other languages send for no entries
            return {}
        if not isinstance(value, dict) or len(value) > self.most:
            raise wrong(self, value, name)
        found = {}
        for key, number in value.items():
            if not (key.isascii() and key.isdecimal() and len(key) <= 9):
                raise bad(f"{name} has the key {shown(key)}: it is no token id", name)
            found[int(key)] = self.number.read(number, f"{name}.{key}")
        return found

    def schema(self) -> Schema:
        whole = {"type": "object", "maxProperties": self.most}
        whole |= {"propertyNames": {"pattern": "^[0-9]{1,9}$"}}
        whole |= {"additionalProperties": self.number.schema()}
        return {"anyOf": [whole, {"enum": [[]]}]}


@dataclass(frozen=True)
class Group:
    """An object with these fields and no others; null is the same as leaving one out.

    Fields that must be there are in `required`.
    """

    fields: Mapping[str, Kind]
    required: Sequence[str] = ()

    @property
    def wanted(self) -> str:
        return f"an object with the keys {', '.join(self.fields)}"

    def read(self, value: Any, name: str) -> dict:
        if not isinstance(value, dict):
            raise wrong(self, value, name)
        known(value, self.fields, name)
        given = {key: one for key, one in value.items() if one is not None}
        if missing := [key for key in self.required if key not in given]:
            raise bad(f"{name} lacks {missing[0]}", f"{name}.{missing[0]}")
        return {
            key: self.fields[key].read(one, f"{name}.{key}")
            for key, one in given.items()
        }

    def schema(self) -> Schema:
        fields = {
            key: kind.schema() if key in self.required else or_null(kind.schema())
            for key, kind in self.fields.items()
        }
        found = {"type": "object", "properties": fields, "additionalProperties": False}
        return found | ({"required": [*self.required]} if self.required else {})


@dataclass(frozen=True)
class Object:
    """An object with any keys, nested no deeper than what reads it can follow."""

    wanted: str = "an object"

    def read(self, value: Any, name: str) -> dict:
        if not isinstance(value, dict):
            raise wrong(self, value, name)
        if deeper(value, DEEPEST):
            raise bad(f"{name} is nested more than {DEEPEST} deep", name)
        return value

    def schema(self) -> Schema:
        return {"type": "object"}


@dataclass(frozen=True)
class ByType:
    """An object whose `type` says which other keys it has."""

    types: Mapping[str, Group]

    @property
    def wanted(self) -> str:
        return f"an object of type {', '.join(map(json.dumps, self.types))}"

    def read(self, value: Any, name: str) -> dict:
        if not isinstance(value, dict):
            raise wrong(self, value, name)
        found = OneOf((*self.types,)).read(value.get("type"), f"{name}.type")
        return self._whole(found).read(value, name)

    def schema(self) -> Schema:
        return {"anyOf": [self._whole(name).schema() for name in self.types]}

    def _whole(self, name: str) -> Group:
        rest = self.types[name]
        fields = {"type": OneOf((name,)), **rest.fields}
        return Group(fields, ("type", *rest.required))


@dataclass(frozen=True)
class OneKey:
    """An object with just one of these keys; read as (key, value)."""

    fields: Mapping[str, Kind]

    @property
    def wanted(self) -> str:
        return f"an object with one of the keys {', '.join(self.fields)}"

    def read(self, value: Any, name: str) -> tuple[str, Any]:
        found = [*Group(self.fields).read(value, name).items()]
        if len(found) != 1:
            raise wrong(self, value, name)
        return found[0]

    def schema(self) -> Schema:
        return {"anyOf": [self._only(key).schema() for key in self.fields]}

    def _only(self, key: str) -> Group:
        nothing = dict.fromkeys(self.fields, Nothing())
        return Group({**nothing, key: self.fields[key]}, (key,))


@dataclass(frozen=True)
class Either:
    """A value of one kind if it is a text, else of another."""

    text: Kind
    other: Kind

    @property
    def wanted(self) -> str:
        return f"{self.text.wanted}, or {self.other.wanted}"

    def read(self, value: Any, name: str) -> Any:
        if not isinstance(value, str | dict):
            raise wrong(self, value, name)
        return (self.text if isinstance(value, str) else self.other).read(value, name)

    def schema(self) -> Schema:
        return {"anyOf": [self.text.schema(), self.other.schema()]}


@dataclass(frozen=True)
class Unless:
    """A value of a kind, or one that asks for nothing, which is read as None."""

    nothing: tuple[Any, ...]
    kind: Kind

    @property
    def wanted(self) -> str:
        return self.kind.wanted

    def read(self, value: Any, name: str) -> Any:
        return None if _among(value, self.nothing) else self.kind.read(value, name)

    def schema(self) -> Schema:
        return {"anyOf": [self.kind.schema(), {"enum": [*self.nothing]}]}


def deeper(value: Any, most: int) -> bool:
    """Whether lists and objects are nested more than so many deep."""
    level = [value]
    for _ in range(most + 1):
        inner = [x for x in level if isinstance(x, dict | list)]
        level = [y for x in inner for y in (x.values() if isinstance(x, dict) else x)]
    return bool(level)


def known(given: Mapping[str, Any], fields: Mapping[str, Any], where: str = "") -> None:
    """Refuses a key that is not among the fields, naming the nearest one."""
    for key in given:
        if key not in fields:
            path = f"{where}.{key[:40]}" if where else key[:40]
            hint = names.did_you_mean(key[:40], fields)
            raise bad(f"{path!r} is not a key that this server knows{hint}", path)


def or_null(schema: Schema) -> Schema:
    """Returns a schema that takes null too."""
    if "anyOf" in schema:
        return schema | {"anyOf": [*schema["anyOf"], {"type": "null"}]}
    if "enum" in schema:
        return schema | {"enum": [*schema["enum"], None]}
    if "type" in schema:
        return schema | {"type": [schema["type"], "null"]}
    return schema  # takes anything
