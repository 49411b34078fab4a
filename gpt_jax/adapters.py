"""Which weights move: an adapter splits the start weights and joins them again."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Adapter(NamedTuple):
    """A pair of pure functions over parameter trees.

    Attributes:
      split: start weights -> (params that train, frozen trees by name).
      join: (params, frozen) -> the weights that the model is applied with.
    """

    split: Callable[[Any], tuple[Any, dict[str, Any]]]
    join: Callable[[Any, dict[str, Any]], Any]


def full() -> Adapter:
    """Every weight trains; nothing is frozen."""
    return Adapter(split=lambda weights: (weights, {}), join=lambda params, _: params)


TABLE: dict[str, Callable[..., Adapter]] = {"full": full}


def make(*, name: str, **options: Any) -> Adapter:
    """Returns the adapter called `name`.

    Raises:
      ValueError: there is no adapter of that name.
    """
    if name not in TABLE:
        raise ValueError(f"adapter {name!r} is not one of: {', '.join(TABLE)}")
    return TABLE[name](**options)
