"""By what runs are ranked: a metric, which way is better, what evaluation counts."""

import re
from collections.abc import Sequence
from typing import NamedTuple

from gpt_jax import names

DIRECTIONS = ("minimize", "maximize")
AT = re.compile(r"best|last( [1-9]\d*)?")


class Criterion(NamedTuple):
    """By what runs are ranked.

    Attributes:
      metric: a name in metrics.jsonl.
      direction: minimize or maximize it.
      at: the evaluation that counts: "best"; "last"; or "last 3", the mean of the last
        three, which chance moves less.
    """

    metric: str = "val_loss"
    direction: str = "minimize"
    at: str = "best"

    def check(self) -> None:
        """Raises ValueError for a direction or an evaluation that there is not."""
        names.choose("direction", self.direction, DIRECTIONS)
        if not AT.fullmatch(self.at):
            raise ValueError(
                f"at is {self.at!r}: give best, last, or as in 'last 3' the mean of "
                "how many of the last evaluations counts"
            )

    @property
    def fewest(self) -> int:
        """How many evaluations a run must have."""
        return int(self.at.partition(" ")[2] or 1)

    @property
    def words(self) -> str:
        """What counts, in words; "" where it is the best evaluation."""
        if self.at == "best":
            return ""
        many = f"mean of the last {self.fewest} evaluations"
        return "last evaluation" if self.fewest == 1 else many

    def of(self, points: Sequence[tuple[int, float]]) -> tuple[float, int]:
        """Returns the value of at least one (step, value), and the step it is of."""
        if self.at == "best":
            choose = min if self.direction == "minimize" else max
            step, value = choose(points, key=lambda point: point[1])
            return value, step
        last = [value for _, value in points[-self.fewest :]]
        return sum(last) / len(last), points[-1][0]
