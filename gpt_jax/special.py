"""Which tokens begin and end texts: what the files beside a tokenizer.json say.

A run folder says it in tokenizer.special.json, which `Tokenizer.save` writes.
A published folder says it in as many as four files; `published` reads them as
transformers does.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files

SUFFIX = ".special.json"


class Special(NamedTuple):
    """The ids of tokens that begin, end and fill texts.

    Attributes:
      bos: what a chat template may call bos_token; None = there is none.
      eos: the end of a text: it stands between documents and behind answers.
      pad: what fills rows; nothing here reads it, exports hand it on.
      ends: every token at which writing ends, `eos` the first.
    """

    bos: int | None
    eos: int | None
    pad: int | None
    ends: tuple[int, ...]

    def text(self) -> str:
        """Returns what tokenizer.special.json holds."""
        return json.dumps(self._asdict(), indent=1) + "\n"


def beside(path: Path) -> Path:
    """Returns the file that goes with a tokenizer.json."""
    return path.with_name(path.stem + SUFFIX)


def read(path: Path) -> Special | None:
    """Returns what the file beside a tokenizer.json says; None where there is none.

    Raises:
      ValueError: the file does not hold ids.
    """
    own = beside(path)
    if not own.is_file():
        return None
    found = files.read_json(own)
    try:
        bos, eos, pad = (_id(found[key]) for key in ("bos", "eos", "pad"))
        return Special(bos, eos, pad, _ids(found["ends"]))
    except (KeyError, TypeError) as error:
        raise ValueError(f"{own} does not hold the ids of special tokens") from error


def published(folder: Path, vocab: Mapping[str, int]) -> Special | None:
    """Returns what a published folder says of its tokenizer's tokens.

    The end of a text is the eos_token of tokenizer_config.json (or, older,
    special_tokens_map.json), else the first eos_token_id. Writing also ends at every
    eos_token_id of generation_config.json or, where that has none, of config.json.

    Args:
      folder: holds these files, or some of them.
      vocab: the ids of all tokens, by name.

    Returns:
      None where no file says anything.

    Raises:
      ValueError: a file is not JSON, or names a token by something that is no id.
    """
    names = ("config.json", "generation_config.json")
    config, generation = (_published(folder / name) for name in names)
    names = ("special_tokens_map.json", "tokenizer_config.json")
    called = {k: v for name in names for k, v in _published(folder / name).items()}
    found: dict[str, tuple[int, ...]] = {}
    for token in ("bos", "eos", "pad"):
        key = f"{token}_token_id"
        try:
            ids = _ids(generation.get(key)) or _ids(config.get(key))
        except TypeError as error:
            raise ValueError(f"{folder}: {key} is not the id of a token") from error
        name = called.get(f"{token}_token")
        name = name.get("content") if isinstance(name, Mapping) else name
        if isinstance(name, str) and name in vocab:
            ids = (vocab[name], *ids)
        known = {*vocab.values()}
        found[token] = tuple(i for i in dict.fromkeys(ids) if i in known)
    if not any(found.values()):
        return None
    first = {token: (ids[0] if ids else None) for token, ids in found.items()}
    return Special(**first, ends=found["eos"])


def within(special: Special, size: int) -> Special:
    """Returns the same without the ids that a vocabulary of `size` does not have."""
    bos, eos, pad = (i if i is not None and i < size else None for i in special[:3])
    return Special(bos, eos, pad, tuple(i for i in special.ends if i < size))


def is_published(folder: Path) -> bool:
    """Whether the files of a folder are another's: runs have a config.json as well."""
    config = folder / "config.json"
    return not config.is_file() or "model_type" in files.read_json(config)


def write(path: Path, special: Special | None) -> None:
    """Writes the file that goes with the tokenizer.json at `path`; None, no file."""
    if special is None:
        beside(path).unlink(missing_ok=True)
    else:
        files.write(beside(path), special.text())


def _published(path: Path) -> dict[str, Any]:
    return files.read_json(path) if path.is_file() else {}


def _id(value: Any) -> int | None:
    if value is not None and type(value) is not int:
        raise TypeError
    return value


def _ids(value: Any) -> tuple[int, ...]:
    """Returns one id or several as a tuple; -1, as LLaMA 1 wrote it, is none."""
    values = value if isinstance(value, list) else [value]
    return tuple(i for i in map(_id, values) if i is not None and i >= 0)
