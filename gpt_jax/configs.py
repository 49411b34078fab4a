"""The files of `configs/`, and your own, for programs and notebooks.

from gpt_jax import configs, train

config = configs.load("quickstart:size=tiny")
config.steps = 20
train.train(config, "runs/mine")
"""

import contextlib
import runpy
import sys
from collections.abc import Iterator

from gpt_jax import commands


def load(file_and_options: str):
    """Returns a config: "gpt2", "gpt2:size=medium", or "path/of/mine.py:option=1".

    The file is run, as every config file is.

    Returns:
      A `ml_collections.ConfigDict`, fresh, unlocked.

    Raises:
      ValueError: there is no such file or name, or it makes no config; whatever the
        file raises is passed on.
    """
    return _called(file_and_options, "get_config", "is no config")


def explain(file_and_options: str) -> list[tuple[str, str, str]]:
    """Returns (what, what was chosen, by which rule) of a config that chooses by rules.

    Raises:
      ValueError: as `load`, or the config has no rules.
    """
    return _called(file_and_options, "explain", "chooses nothing by rules")


def _called(file_and_options: str, name: str, told: str):
    file, options = commands.split(file_and_options)
    path = commands.find(commands.CONFIGS, file)
    with _beside():
        function = runpy.run_path(str(path)).get(name)
        if function is None:
            raise ValueError(f"{path} {told}: it has no function {name}")
        return function(options or None)


def base():
    """Returns every key with its default: what configs/common.py explains."""
    with _beside():
        return runpy.run_path(str(commands.ROOT / "configs" / "common.py"))["base"]()


@contextlib.contextmanager
def _beside() -> Iterator[None]:
    """Lets config files import `configs`, whatever else has that name here."""

    def own(name: str) -> bool:
        return name.partition(".")[0] == "configs"

    theirs = {name: sys.modules.pop(name) for name in [*filter(own, sys.modules)]}
    sys.path.insert(0, str(commands.ROOT))
    try:
        yield
    finally:
        sys.path.remove(str(commands.ROOT))
        for name in [*filter(own, sys.modules)]:
            del sys.modules[name]
        sys.modules.update(theirs)
