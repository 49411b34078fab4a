"""Doors as modules, for tests of their functions."""

import importlib
from types import ModuleType

from absl import flags


def load(name: str) -> ModuleType:
    """Returns a door; its flags are not defined, so others may have the same names."""
    defined = flags.FLAGS._flags()
    before = dict(defined)
    for flag in before:
        if str(flags.FLAGS.find_module_defining_flag(flag)).startswith("experiments."):
            del defined[flag]
    try:
        return importlib.import_module(f"experiments.{name}")
    finally:
        defined.clear()
        defined.update(before)
