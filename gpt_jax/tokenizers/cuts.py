"""Where a long text may be cut, so that its parts have the tokens of the whole."""

import re
from collections.abc import Iterator, Sequence

# Long texts are cut where no token can span, so that all cores encode one text and
# memory stays bounded. A token of the word rule or of GPT-2's rule never runs from a
# letter or one of these marks into the whitespace behind it.
CUT = re.compile(r"(?<=[\w.,;:!?。])(?=[ \n])")
CUT_CHARS = 1 << 12  # encodes a sixth faster than 1 << 16: the work stays in the cache
GROUP_CHARS = 1 << 22


def cut_up(text: str, *, uncut: int = 0) -> Iterator[str]:
    """Yields the parts of a text, cut where no token spans.

    Where there is no such place within `uncut` characters it is cut after so many; 0
    leaves it whole, however long it is.
    """
    start = 0
    while len(text) - start > CUT_CHARS:
        limit = start + CUT_CHARS + uncut if uncut else len(text)
        place = CUT.search(text, start + CUT_CHARS, limit)
        if place is None and limit >= len(text):
            break
        end = place.start() if place else limit
        yield text[start:end]
        start = end
    yield text[start:]


def groups(texts: Sequence[str], *, cut: bool) -> Iterator[list[tuple[int, str]]]:
    """Yields (index of the text, part of it) in groups of bounded size."""
    group, size = [], 0
    for owner, text in enumerate(texts):
        for piece in cut_up(text) if cut else [text]:
            group.append((owner, piece))
            size += len(piece)
            if size >= GROUP_CHARS:
                yield group
                group, size = [], 0
    if group:
        yield group
