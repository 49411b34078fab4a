"""The project's commands: where their files are, how they are typed and started here.

In a clone, `configs/` and `experiments/` stand beside the package, and a command is
`python -m experiments.train`. An installed package holds both, in `_root`; there it is
`gpt-jax train`. Both run the same files. `python -m gpt_jax train` works everywhere.
"""

import ast
import re
import shutil
import sys
from pathlib import Path

from gpt_jax import names

PACKAGE = Path(__file__).parent
INSTALLED = (PACKAGE / "_root").is_dir()
ROOT = PACKAGE / "_root" if INSTALLED else PACKAGE.parent  # of configs and experiments

CONFIGS, DOORS, SWEEPS = "configs", "experiments", "experiments/sweeps"
# What nobody calls by its name: what the others share, and what a sweep starts.
NO_NAMES = ("__init__", "common", "door", "trial")


def enter() -> None:
    """Lets this process import `configs` and `experiments`, ours before all others."""
    sys.path.insert(0, str(ROOT))


def known(folder: str) -> list[str]:
    """Returns the names in CONFIGS, DOORS or SWEEPS."""
    found = sorted(path.stem for path in (ROOT / folder).glob("*.py"))
    return [name for name in found if name not in NO_NAMES]


def first_line(folder: str, name: str) -> str:
    """Returns what a file says of itself, without running it."""
    tree = ast.parse((ROOT / folder / f"{name}.py").read_text(encoding="utf-8"))
    return (ast.get_docstring(tree) or "").partition("\n")[0]


def find(folder: str, name: str) -> Path:
    """Returns the file of a config or a sweep: your own by its path, ours by its name.

    `quickstart`, `quickstart.py` and `configs/quickstart.py` are ours, wherever this
    runs, unless there is a file of that path.

    Raises:
      ValueError: there is neither; says which names are near.
    """
    path = Path(name)
    if path.is_file():
        return path
    there = known(folder)
    ours = path.parent in (Path(), Path(folder)) and path.suffix in ("", ".py")
    if ours and path.stem in there:
        return ROOT / folder / f"{path.stem}.py"
    kind = "sweep" if folder == SWEEPS else "config"
    raise ValueError(
        f"there is no {kind} file {name}; {folder}/ has {', '.join(there)}"
        f"{names.did_you_mean(path.stem, there)}"
    )


def split(file_and_options: str) -> tuple[str, str]:
    """Returns file and options of FILE.py:options.

    The colon of a drive, or of an address (gs://), is another.
    """
    begins = re.match(r"[A-Za-z]:[\\/]|[a-z][a-z0-9+.-]+://", file_and_options)
    drive = begins.end() if begins else 0
    file, _, options = file_and_options[drive:].partition(":")
    return file_and_options[:drive] + file, options


def typed(door: str) -> str:
    """Returns the beginning of a command as a person types it here."""
    if not INSTALLED and Path.cwd() == ROOT.resolve():
        return f"python -m experiments.{door}"
    return f"{'gpt-jax' if shutil.which('gpt-jax') else 'python -m gpt_jax'} {door}"


def here(text: str) -> str:
    """Returns a text, such as a door's help, with its commands as they are typed."""
    doors = "|".join(known(DOORS))
    return re.sub(
        rf"(?:python -m )?\bexperiments\.({doors})\b(?!\.)",
        lambda found: typed(found[1]),
        text,
    )


def argv(door: str) -> list[str]:
    """Returns the words that start a door in a process of its own."""
    return [sys.executable, "-m", "gpt_jax", door]


def install(*packages: str) -> str:
    """Returns the command that adds packages to what is installed here."""
    locks = "" if INSTALLED else "-r requirements.txt -c requirements-extras.txt "
    return f"pip install {locks}{' '.join(packages)}"
