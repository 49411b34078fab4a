"""What a group of settings may hold: its keys, their types, and no number but finite.

Who owns a group declares its keys where it takes them: as the fields of a class, or as
the keyword arguments of a function. Their annotations are the types.
"""

import dataclasses
import functools
import math
import numbers
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

from gpt_jax import names

WORDS = {
    bool: "True or False",
    int: "a whole number",
    float: "a finite number",
    str: "text",
    type(None): "None",
}
NUMBERS: dict[Any, type] = {int: numbers.Integral, float: numbers.Real}


@functools.cache
def declared(owner: Any, without: Sequence[str] = ()) -> Mapping[str, Any]:
    """Returns key -> type of what a class or a function declares, less some keys."""
    found = typing.get_type_hints(owner)
    return {key: hint for key, hint in found.items() if key not in (*without, "return")}


def fit(
    group: str, given: Mapping[str, Any], wanted: Mapping[str, Any], advice: str = ""
) -> None:
    """Refuses a group of settings that are not what their owner declares.

    Args:
      group: what stands before their names, as in model.d_model; "" = nothing.
      given: key -> value.
      wanted: key -> type, see `declared`: bool, int, float (finite), str, tuples and
        sequences of these, dataclasses (as mappings), and unions.
      advice: what to do where keys are missing or are those of another variant.

    Raises:
      ValueError: names the key, what it may be, and the value found.
    """
    if not isinstance(given, Mapping):
        raise ValueError(
            f"{group} is {given!r:.80}: it is a group of settings, which are set one "
            f"by one, as in {group}.{next(iter(wanted), 'key')}"
        )
    if unknown := [key for key in given if key not in wanted]:
        near = names.did_you_mean(unknown[0], wanted)
        raise ValueError(
            f"there is no setting {_dotted(group, unknown[0])}{advice or near}"
        )
    if absent := [key for key in wanted if key not in given]:
        raise ValueError(f"{group or 'the config'} has no {', '.join(absent)}{advice}")
    for key, value in given.items():
        if told := wrong(_dotted(group, key), value, wanted[key]):
            raise ValueError(told)


def wrong(name: str, value: Any, hint: Any) -> str:
    """Returns a sentence on a value that is not of the type; "" where it is."""
    if hint in WORDS and _is_a(value, hint):  # most are, of the thousands in a sweep
        return ""
    told = f"{name} is {value!r:.80}: it must be {in_words(hint)}"
    if isinstance(hint, types.UnionType):
        said = [wrong(name, value, kind) for kind in typing.get_args(hint)]
        nested = [word for word in said if not word.startswith(f"{name} is ")]
        return "" if "" in said else next(iter(nested), told)
    if _is_many(hint) and isinstance(value, tuple | list):
        kinds = _kinds(hint, len(value))
        parts = zip(value, kinds, strict=len(kinds) == len(value))
        said = (wrong(f"{name}[{at}]", *part) for at, part in enumerate(parts))
        return next(filter(None, said), "" if len(kinds) == len(value) else told)
    if dataclasses.is_dataclass(hint) and isinstance(value, Mapping):
        known = declared(hint)
        if strange := [key for key in value if key not in known]:
            return f"{name} has {strange[0]!r}: its keys are {', '.join(known)}"
        said = (wrong(f"{name}[{key!r}]", x, known[key]) for key, x in value.items())
        return next(filter(None, said), "")
    return "" if _is_a(value, hint) else told


def in_words(hint: Any) -> str:
    """Returns what a type is called in a sentence."""
    if hint in WORDS:
        return WORDS[hint]
    inner = typing.get_args(hint)
    if isinstance(hint, types.UnionType):
        return " or ".join(map(in_words, inner))
    if _is_many(hint) and (len(inner) == 1 or inner[-1] is Ellipsis):
        return f"a tuple, each part of it {in_words(inner[0])}"
    if _is_many(hint):
        return f"a tuple of {len(inner)}: {', '.join(map(in_words, inner))}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with the keys {', '.join(declared(hint))}"
    return getattr(hint, "__name__", str(hint))


def _is_a(value: Any, hint: Any) -> bool:
    """Whether a value is of a type that has no parts."""
    if hint is Any or _is_many(hint):
        return hint is Any
    if type(value) is hint:
        return hint is not float or math.isfinite(value)
    if isinstance(value, bool) and hint in NUMBERS:
        return False
    kind: Any = NUMBERS.get(hint, hint)
    fits = isinstance(value, kind)
    return fits and (hint is not float or _finite(value))


def _kinds(hint: Any, count: int) -> Sequence[Any]:
    """Returns the types of so many parts of a tuple or a sequence."""
    inner = typing.get_args(hint)
    alike = len(inner) == 1 or inner[-1] is Ellipsis
    return inner[:1] * count if alike else inner


@functools.cache
def _is_many(hint: Any) -> bool:
    return typing.get_origin(hint) in (tuple, list, Sequence)


def _finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number beyond every float
        return False


def _dotted(group: str, key: str) -> str:
    return f"{group}.{key}" if group else str(key)
