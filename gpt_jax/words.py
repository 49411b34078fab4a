"""Words: how many of those that a model writes are words of the text that it learnt."""

import re
from collections.abc import Collection, Iterator, Sequence

WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")  # letters; don't is one word
CHUNK = 1 << 20  # tokens decoded at a time
BACK = 1000  # tokens among which a place between two words is looked for


def known(tokens, tokenizer) -> frozenset[str]:
    """Returns the words of a text, in small letters.

    Args:
      tokens: its ids, a sequence with a length that gives arrays for slices.
      tokenizer: the `tokenizers.Tokenizer` that they are of.
    """
    found: set[str] = set()
    for text in _texts(tokens, tokenizer):
        found.update(word.lower() for word in WORD.findall(text))
    return frozenset(found)


def share(texts: Sequence[tuple[str, str]], words: Collection[str]) -> float | None:
    """Returns the share of the words in some texts that are known; None without words.

    Args:
      texts: (prompt, what was written after it). A word that the prompt began counts, a
        last one that may have been cut off does not.
      words: see `known`.
    """
    found = [word for prompt, text in texts for word in _written(prompt, text)]
    return sum(word in words for word in found) / len(found) if found else None


def _written(prompt: str, text: str) -> Iterator[str]:
    whole = prompt + text
    for match in WORD.finditer(whole):
        if len(prompt) < match.end() < len(whole):
            yield match[0].lower()


def _texts(tokens, tokenizer) -> Iterator[str]:
    """Yields a text in parts, cut between words."""
    start = 0
    while start < len(tokens):
        ids = [int(id) for id in tokens[start : start + CHUNK]]
        end = len(ids)
        if start + end < len(tokens):
            places = range(end - 1, max(0, end - BACK), -1)
            end = next((i for i in places if _begins(ids[i], tokenizer)), end)
        yield tokenizer.decode(ids[:end])
        start += end


def _begins(id: int, tokenizer) -> bool:
    return id in tokenizer.ends or tokenizer.decode([id])[:1].isspace()
