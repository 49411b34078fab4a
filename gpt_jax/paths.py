"""Which files a glob means: each real one once, whatever links lead to it."""

import os
import re
import stat
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from gpt_jax.files import shown

MAGIC = re.compile(r"[*?\[]")  # what makes a path a pattern of paths


@dataclass
class Matches:
    """What a glob leads to.

    Attributes:
      files: each real one once, sorted by name.
      again: how often links led to a file or folder that is there already.
      unread: what could not be looked at, and why.
    """

    files: list[Path]
    again: int = 0
    unread: list[str] = field(default_factory=list)


def matching(pattern: Path) -> Matches:
    """Returns the files that a glob means; those below a folder for folder/**.

    Python's own follows links to folders for ever, 40 deep.
    """
    found = Matches([])
    parts = pattern.parts[bool(pattern.anchor) :]
    parts += ("*",) if parts[-1:] == ("**",) else ()
    places = [Path(pattern.anchor)]
    for part in parts:
        if part == "**":
            places = [below for place in places for below in _folders(place, found)]
        elif MAGIC.search(part):
            places = [
                place / entry.name
                for place in places
                for entry in _entries(place, found, hidden=part.startswith("."))
                if fnmatch(entry.name, part)
            ]
        else:
            places = [place / part for place in places if os.path.lexists(place / part)]
    real: dict[str, Path] = {}
    for path in sorted(set(places), key=lambda path: (_by_link(path), str(path))):
        why = unreadable(path)
        if not why:
            found.again += os.path.realpath(path) in real
            real.setdefault(os.path.realpath(path), path)
        elif not os.path.isdir(path):
            found.unread.append(why)
    found.files = sorted(real.values(), key=str)
    found.unread = sorted(set(found.unread))  # a folder is looked at more than once
    return found


def unreadable(path: Path) -> str:
    """Returns why a path is no file that can be read again and again; "" = it is."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return f"{shown(path)} is a link to nothing"
    except OSError as error:
        return f"{shown(path)} cannot be read: {error.strerror}"
    if stat.S_ISREG(mode):
        return ""
    what = "a folder" if stat.S_ISDIR(mode) else "a pipe or a device"
    return f"{shown(path)} is {what}: give a file, which can be read more than once"


def _folders(top: Path, found: Matches) -> Iterator[Path]:
    """Yields a folder and those below it, each real one once; those by links last."""
    seen: set[str] = set()
    own, linked = deque([top]), deque()
    while own or linked:
        folder = (own or linked).popleft()
        real = os.path.realpath(folder)
        if real in seen:
            found.again += 1
            continue
        seen.add(real)
        yield folder
        for entry in _entries(folder, found, hidden=False):
            if os.path.isdir(folder / entry.name):  # False for a link to itself
                (linked if entry.is_symlink() else own).append(folder / entry.name)


def _entries(folder: Path, found: Matches, *, hidden: bool) -> list[os.DirEntry]:
    """Returns what a folder holds, sorted; nothing for what is no folder."""
    try:
        with os.scandir(folder) as entries:
            there = [e for e in entries if hidden or not e.name.startswith(".")]
    except NotADirectoryError:
        return []
    except OSError as error:
        found.unread.append(
            f"the folder {shown(folder)} cannot be read: {error.strerror}"
        )
        return []
    return sorted(there, key=lambda entry: entry.name)


def _by_link(path: Path) -> bool:
    return os.path.realpath(path) != os.path.abspath(path)
