"""What the sides read: a text of any size, its tokenizer, token shards. Made once."""

import random
from pathlib import Path

import numpy as np

from gpt_jax import corpora, data, files, tokenizers

PART_CHARS = 2000  # the text is made of pieces of about this size, shuffled
TRAIN_CHARS = 4_000_000  # a tokenizer is trained on so much of it
SHARD_IDS, SHARD_VOCAB = 2_000_000, 61  # random ids that every model here knows


def text_and_tokenizer(
    folder: str, *, source: str, megabytes: float, tokenizer: str
) -> tuple[Path, Path]:
    """Returns a text file of that size and the tokenizer trained on its beginning."""
    root = Path(folder)
    root.mkdir(parents=True, exist_ok=True)
    text = root / f"text-{megabytes:g}.txt"
    if not text.exists():
        with files.draft(text) as part:
            write_text(part, int(megabytes * 1e6), source)
    ready = root / f"tokenizer-{tokenizer.replace(':', '-')}.json"
    if not ready.exists():
        with text.open(encoding="utf-8") as file:
            tokenizers.train(tokenizer, [file.read(TRAIN_CHARS)]).save(ready)
    return text, ready


def write_text(path: Path, size: int, source: str) -> None:
    """Writes `size` bytes or a little more: a built-in corpus in shuffled pieces.

    Repeated as often as it takes, in another order each time.
    """
    rng = random.Random(0)
    corpus = corpora.open(source, field="text", cache="")
    pieces = [piece for text in corpus.documents() for piece in _pieces(text)]
    written = 0
    with path.open("w", encoding="utf-8") as file:
        while written < size:
            rng.shuffle(pieces)
            for piece in pieces:
                file.write(piece)
                written += len(piece.encode())
                if written >= size:
                    break


def _pieces(text: str) -> list[str]:
    pieces, held = [], ""
    for line in text.splitlines(keepends=True):
        held += line
        if len(held) >= PART_CHARS:
            pieces.append(held)
            held = ""
    return [*pieces, f"{held}\n"] if held else pieces


def shards(folder: Path) -> Path:
    """Returns a folder of token shards, random ids."""
    target = folder / "shards"
    if not target.exists():
        ids = np.random.default_rng(0).integers(0, SHARD_VOCAB, SHARD_IDS)
        data.write(
            [ids],
            target,
            vocab_size=SHARD_VOCAB,
            eos_id=None,
            meta={},
            shard_tokens=SHARD_IDS,
        )
    return target
