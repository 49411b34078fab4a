"""The package with holes: functions of it, to be written anew and compared with it.

    learn.start("attention", "learn")   a file with the signature and the docstring
    learn.check("attention", "learn")   values, shapes, gradients, jit, vmap
    learn.train("attention", "learn")   the quickstart with it, and both curves

A hole is declared beside the usual mistakes that are made in it (hole.py): text.py,
layers.py, training.py and tuning.py hold them; trained.py, where they stand in a run.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from gpt_jax import files, names
from gpt_jax.learn import layers, text, trained, training, tuning
from gpt_jax.learn.hole import Hole, Verdict
from gpt_jax.learn.trained import Trained

HOLES: dict[str, Hole] = {
    found.name: found
    for module in (text, layers, training, tuning)
    for found in vars(module).values()
    if isinstance(found, Hole)
}


def start(name: str, folder: str | Path, command: str) -> Path:
    """Writes the file in which a reader fills a hole; never over what they wrote.

    Args:
      name: of the hole.
      folder: where the file is to be.
      command: what the file says checks it.

    Raises:
      ValueError: there is no such hole, or it was begun and is being filled.
    """
    found: Hole = names.choose("the hole", name, HOLES)
    path = Path(folder) / f"{name}.py"
    source = found.source(f"Fill the hole, then: {command}")
    if path.exists() and path.read_text(encoding="utf-8") != source:
        raise ValueError(
            f"{path} is there already: check it, or move it away to begin anew"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, source)
    return path


def check(name: str, folder: str | Path) -> Verdict:
    """Compares what a reader wrote with the real function.

    Raises:
      ValueError: there is no such hole, no such file, or it cannot be run.
    """
    found, mine = _written(name, folder)
    return found.check(mine)


def train(name: str, folder: str | Path, *, steps: int = trained.STEPS) -> Trained:
    """Trains the quickstart (tiny) twice: with the real function, with a reader's.

    Writes both curves into `NAME.png` in the folder.

    Args:
      name: of the hole.
      folder: where the reader's file is.
      steps: of each run.

    Raises:
      ValueError: there is no such hole, no such file, it cannot be run, or no training
        goes through it.
    """
    picture = Path(folder) / f"{name}.png"
    return trained.both(*_written(name, folder), picture, steps=steps)


def _written(name: str, folder: str | Path) -> tuple[Hole, Callable]:
    """Returns a hole and the reader's function."""
    found: Hole = names.choose("the hole", name, HOLES)
    path = Path(folder) / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} is not there: start {name} first")
    if not callable(mine := getattr(_run(path), name, None)):
        raise ValueError(f"{path} has no function {name}")
    return found, mine


def _run(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"learn_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # whatever the reader's file raises
        where = f" in line {error.lineno}" if isinstance(error, SyntaxError) else ""
        raise ValueError(
            f"{path} cannot be run: {type(error).__name__}{where}: {error}"
        ) from error
    return module
