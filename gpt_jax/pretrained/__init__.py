"""Published weights in and out: Hugging Face folders, GGUF, StableHLO.

    source = pretrained.find("gpt2")            # a folder, downloaded where needed
    fields = pretrained.fields(source)          # what it is, as fields of GPTConfig
    params = pretrained.load(source, cfg)       # its weights, unrolled
    pretrained.save(folder, params, cfg, tokenizer, run=..., shard_bytes=...)

Only safetensors are read: nothing in a folder is ever executed.
"""

import contextlib
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from gpt_jax import model
from gpt_jax.files import draft_folder, expand
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import card, config_json, files, gguf, stablehlo, texts, weights
from gpt_jax.pretrained.texts import keep
from gpt_jax.tokenizers import Tokenizer

__all__ = [
    "fields",
    "find",
    "gguf",
    "keep",
    "load",
    "save",
    "stablehlo",
    "tokenizer",
    "whole",
]

PATTERNS = ("*.safetensors", "*.json", "merges.txt", "vocab.bpe", "*.jinja")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def find(spec: str) -> Path:
    """Returns the folder of a model: itself, or the download of a Hugging Face id.

    Args:
      spec: a folder, or an id such as gpt2 or HuggingFaceTB/SmolLM2-135M.

    Raises:
      ValueError: it is neither, or the download failed.
    """
    folder = expand(spec)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(f"{folder} is not a Hugging Face folder: no config.json")
        return folder
    if not HUB_ID.fullmatch(spec):
        raise ValueError(f"there is no folder {spec}, and it is no Hugging Face id")
    return _download(spec)


def fields(folder: Path) -> dict[str, Any]:
    """Returns the fields of GPTConfig that a folder's config.json means.

    Raises:
      ValueError: the model type or an option is not supported.
    """
    path = folder / "config.json"
    try:
        return config_json.fields(files.read_json(path))
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def load(folder: Path, cfg: GPTConfig, **options) -> dict:
    """Returns a folder's weights for `cfg`, unrolled; see `weights.load`.

    Raises:
      ValueError: `cfg` is another architecture, or a file is damaged.
    """
    wanted = fields(folder)
    if wrong := config_json.difference(cfg, wanted):
        raise ValueError(
            f"the weights in {folder} are of another model: {'; '.join(wrong)}"
        )
    return weights.load(folder, cfg, **options)


def tokenizer(folder: Path) -> Tokenizer:
    """Returns a folder's tokenizer; see `texts.load`."""
    return texts.load(folder, fields(folder)["vocab_size"])


def save(
    folder: Path,
    params: Mapping,
    cfg: GPTConfig,
    tokenizer: Tokenizer,
    *,
    run: Path,
    shard_bytes: int,
) -> None:
    """Writes a Hugging Face folder that transformers loads, whole or not at all.

    Args:
      folder: does not exist yet.
      params: the weights, layers unrolled.
      cfg: their model.
      tokenizer: its tokenizer.
      run: the run folder: its chat template where it has one, and what README.md,
        the model card, says of it.
      shard_bytes: the most bytes of a file of weights.

    Raises:
      ValueError: no architecture of transformers computes this model.
      FileExistsError: `folder` exists.
    """
    with whole(folder) as draft:
        tokens = {"bos_token_id": None, "eos_token_id": tokenizer.eos_id}
        weights.save(draft, params, cfg, tokens=tokens, shard_bytes=shard_bytes)
        texts.save(draft, tokenizer, run=run, context=cfg.context_length)
        if (run / "config.json").is_file():
            count = model.count(params)
            card.write(draft, run, cfg, name=folder.name, parameters=count)


@contextlib.contextmanager
def whole(target: Path) -> Iterator[Path]:
    """Gives a folder to fill, which becomes `target` if nothing goes wrong."""
    if target.exists():
        raise FileExistsError(f"{target} exists already; name a new one, or remove it")
    with draft_folder(target) as part:
        yield part


def _download(name: str) -> Path:
    try:
        import huggingface_hub
    except ImportError as error:
        raise ValueError(
            f"{name} would be downloaded with huggingface_hub, which is not there: "
            "pip install huggingface_hub"
        ) from error
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=[*PATTERNS]))
    except Exception as error:  # the errors of four libraries, most of them network's
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"there is no folder {name}, and no Hugging Face model of that name could "
            f"be downloaded ({reason}); without a network give a folder that holds it"
        ) from error
