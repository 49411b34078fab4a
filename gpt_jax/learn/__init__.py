"""The package with holes: functions of it, to be written anew and compared with it.

    learn.start("attention", "learn")   a file with the signature and the docstring
    learn.check("attention", "learn")   values, shapes, gradients, jit, vmap

A hole is declared beside the usual mistakes that are made in it (hole.py): text.py,
layers.py, training.py and tuning.py hold them.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

from gpt_jax import files, names
from gpt_jax.learn import layers, text, training, tuning
from gpt_jax.learn.hole import Hole, Verdict

HOLES: dict[str, Hole] = {
    found.name: found
    for module in (text, layers, training, tuning)
    for found in vars(module).values()
    if isinstance(found, Hole)
}


def start(name: str, folder: str | Path, command: str) -> Path:
    """Writes the file in which a reader fills a hole; never over one that is there.

    Args:
      name: of the hole.
      folder: where the file is to be.
      command: what the file says checks it.

    Raises:
      ValueError: there is no such hole, or the file is there.
    """
    found: Hole = names.choose("the hole", name, HOLES)
    path = Path(folder) / f"{name}.py"
    if path.exists():
        raise ValueError(
            f"{path} is there already: check it, or move it away to begin anew"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    files.write(path, found.source(f"Fill the hole, then: {command}"))
    return path


def check(name: str, folder: str | Path) -> Verdict:
    """Compares what a reader wrote with the real function.

    Raises:
      ValueError: there is no such hole, no such file, or it cannot be run.
    """
    found: Hole = names.choose("the hole", name, HOLES)
    path = Path(folder) / f"{name}.py"
    if not path.is_file():
        raise ValueError(f"{path} is not there: start {name} first")
    module = _run(path)
    if not callable(mine := getattr(module, name, None)):
        raise ValueError(f"{path} has no function {name}")
    return found.check(mine)


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
