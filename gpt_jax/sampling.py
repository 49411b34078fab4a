"""How a token is chosen: every setting once, with its range and what it is for.

Checks, flags, the server's fields and their schema, and what is off everywhere else
read this table; the filters themselves are in sample/filters.py.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

MOST = 2**30  # of whole numbers: lengths must not overflow an int32


@dataclass(frozen=True)
class Setting:
    """A number that decides how tokens are chosen.

    Attributes:
      off: where it changes nothing; its type is that of the setting.
      low, high: the ends of its range.
      above: the low end itself is outside.
      told: one line for people.
    """

    off: float
    low: float
    high: float
    told: str
    above: bool = False

    @property
    def kind(self) -> type:
        """Of its values: float or int."""
        return type(self.off)

    @property
    def wanted(self) -> str:
        """Its range in words."""
        if self.high < math.inf and self.kind is float:
            first = (
                f"above {self.low:g} and at" if self.above else f"{self.low:g} to at"
            )
            words = f"{first} most {self.high:g}"
        else:
            words = f"above {self.low:g}" if self.above else f"{self.low:g} or more"
        return f"{words} ({self.off:g} is off)"

    def holds(self, value: float) -> bool:
        """Whether a value is in the range."""
        beyond = value <= self.low if self.above else value < self.low
        return not beyond and value <= self.high and abs(value) < math.inf


SETTINGS: Mapping[str, Setting] = {
    "temperature": Setting(
        *(1.0, 0, math.inf),
        "Below 1 safer, above 1 wilder; 0 = the likeliest token.",
    ),
    "top_k": Setting(0, 0, MOST, "Only the k likeliest tokens; 0 = off."),
    "top_p": Setting(
        *(1.0, 0, 1),
        "Only the fewest tokens that hold this probability; 1 = off.",
        above=True,
    ),
    "min_p": Setting(
        *(0.0, 0, 1),
        "Only tokens with this share of the best one's probability; 0 = off.",
    ),
    "repetition_penalty": Setting(
        *(1.0, 0, math.inf),
        "Above 1 makes tokens already there less likely; 1 = off.",
        above=True,
    ),
    "frequency_penalty": Setting(
        *(0.0, -2, 2),
        "Taken from a token's logit for each time it was written; 0 = off.",
    ),
    "presence_penalty": Setting(
        *(0.0, -2, 2),
        "Taken from a token's logit once it was written; 0 = off.",
    ),
}

OFF: Mapping[str, float] = {name: setting.off for name, setting in SETTINGS.items()}
# How texts of a run are written on the page and in the terminal where nobody says how
# (generation.py): a little safer than drawn from what the model says.
DEFAULTS: Mapping[str, float] = {**OFF, "temperature": 0.8}


def settings(max_new: int, **chosen: float) -> dict[str, Any]:
    """Returns all settings: those chosen, the others off.

    Args:
      max_new: tokens to write at most.
      **chosen: of SETTINGS.
    """
    if strange := chosen.keys() - OFF.keys():
        raise TypeError(f"no setting of sampling is called {min(strange)}")
    return {**OFF, **chosen, "max_new": max_new}


def check(max_new: int, **chosen: float) -> None:
    """Raises ValueError, naming the range, when a setting is outside its."""
    for name, value in chosen.items():
        if not SETTINGS[name].holds(value):
            raise ValueError(f"{name} is {value} but must be {SETTINGS[name].wanted}")
    if max_new < 0:
        raise ValueError(f"max_new is {max_new} but must be 0 or more")
