"""The grammar of the pages: fenced blocks, their marks, what is quoted, links."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/guide"

FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.M | re.S)
QUOTED = re.compile(r"# ((?:gpt_jax|configs|experiments)/\S+\.py)\n")
MARK = re.compile(r"<!-- (not run|varies): ([^>]+) -->\s*\Z")
LINK = re.compile(r"(!?\[[^\]]*\])\(([^)\s]+)\)")
SHELL = ("bash", "sh")


class Block(NamedTuple):
    """A piece of a page.

    Attributes:
      language: of a fenced block ("" where it names none); None = prose.
      body: what stands in it, without its fence and its mark.
      mark: "not run", "varies" or "".
    """

    language: str | None
    body: str
    mark: str


def quoted(code: str) -> str | None:
    """Returns the file that a block says it is quoted from."""
    match = QUOTED.match(code)
    return match[1] if match else None


def blocks(text: str) -> Iterator[Block]:
    """Yields prose and fenced blocks in their order."""
    end = 0
    for fence in FENCE.finditer(text):
        prose = text[end : fence.start()]
        mark = MARK.search(prose)
        yield Block(None, prose[: mark.start()] if mark else prose, "")
        yield Block(fence[1], fence[2], mark[1] if mark else "")
        end = fence.end()
    yield Block(None, text[end:], "")


def relinked(text: str, page: Path, to: Callable[[str, Path, str], str]) -> str:
    """Returns a text with its relative links replaced, but for those in code.

    Args:
      text: Markdown.
      page: the file that it is from, which its links begin at.
      to: takes "[words]" or "![words]", the file and "#heading" or ""; returns what
        stands there instead.
    """

    def one(link: re.Match) -> str:
        name, hash_, anchor = link[2].partition("#")
        if re.match(r"[a-z]+:", name) or not name:
            return link[0]
        return to(link[1], (page.parent / name).resolve(), hash_ + anchor)

    pieces, end = [], 0
    for fence in FENCE.finditer(text):
        pieces += [LINK.sub(one, text[end : fence.start()]), fence[0]]
        end = fence.end()
    return "".join([*pieces, LINK.sub(one, text[end:])])
