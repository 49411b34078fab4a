"""Published weights in and out: Hugging Face folders, GGUF, StableHLO.

    source = pretrained.find("gpt2")            # a folder, downloaded where needed,
                                                # or a GGUF file
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

from gpt_jax import chat, model, stores
from gpt_jax.files import draft_folder, write
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import (
    card,
    config_json,
    files,
    gguf,
    gguf_file,
    gguf_tokenizer,
    peft,
    stablehlo,
    texts,
    vocabulary,
    weights,
)
from gpt_jax.tokenizers import Tokenizer

__all__ = [
    "fields",
    "find",
    "gguf",
    "keep",
    "load",
    "peft",
    "save",
    "stablehlo",
    "template",
    "tokenizer",
    "vocabulary",
    "whole",
]

PATTERNS = ("*.safetensors", "*.json", "merges.txt", "vocab.bpe", "*.jinja")
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


def find(spec: str) -> Path:
    """Returns where a model is: its folder, a GGUF file, or a download.

    Args:
      spec: a folder, a file, or a Hugging Face id such as gpt2 or
        HuggingFaceTB/SmolLM2-135M.

    Raises:
      ValueError: it is neither, or the download failed.
    """
    folder = stores.fetched(spec)
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{folder} is not a Hugging Face folder: no config.json{_hint(folder)}"
            )
        return folder
    if folder.is_file() and folder.suffix == gguf_file.SUFFIX:
        return folder
    if folder.is_file():
        raise ValueError(
            f"{folder} is a file, not a Hugging Face folder{_hint(folder)}"
        )
    if not HUB_ID.fullmatch(spec):
        raise ValueError(f"there is no folder {spec}, and it is no Hugging Face id")
    return _download(spec)


def fields(folder: Path) -> dict[str, Any]:
    """Returns the fields of GPTConfig that a folder's config.json, or a file, means.

    Raises:
      ValueError: the model type or an option is not supported.
    """
    gguf_ = folder.suffix == gguf_file.SUFFIX
    path = folder if gguf_ else folder / "config.json"
    try:
        return config_json.fields(_config(folder))
    except ValueError as error:
        if str(path) in str(error):
            raise
        raise ValueError(f"{path}: {error}") from error


def load(folder: Path, cfg: GPTConfig, **options) -> dict:
    """Returns a folder's or file's weights for `cfg`, unrolled; see `weights.load`.

    A model with rotary positions may be given a shorter context than it has.

    Raises:
      ValueError: `cfg` is another architecture, or a file is damaged.
    """
    wanted = fields(folder)
    if cfg.position == "rope" and cfg.context_length < wanted["context_length"]:
        wanted["context_length"] = cfg.context_length
    if wrong := config_json.difference(cfg, wanted):
        raise ValueError(
            f"the weights in {folder} are of another model: {'; '.join(wrong)}"
        )
    file = folder.suffix == gguf_file.SUFFIX
    tensors = gguf_file.read(folder).tensors if file else files.tensors(folder)
    return weights.load(_config(folder), tensors, cfg, folder=folder, **options)


def tokenizer(folder: Path) -> Tokenizer:
    """Returns a folder's or file's tokenizer; see `texts.load`."""
    if folder.suffix == gguf_file.SUFFIX:
        return gguf_tokenizer.tokenizer(gguf_file.read(folder))
    return texts.load(folder, fields(folder)["vocab_size"])


def template(source: Path) -> str | None:
    """Returns the chat template that a folder or file comes with, if it has one."""
    if source.suffix == gguf_file.SUFFIX:
        return gguf_tokenizer.template(gguf_file.read(source))
    return chat.template_of(source)


def keep(source: Path, target: Path) -> None:
    """Copies what goes with a tokenizer, its chat template too, to a run folder."""
    if source.is_dir():
        texts.keep(source, target)
    keep_template(source, target)


def keep_template(source: Path, target: Path) -> None:
    """Copies a chat template of its own to a run folder, wherever the source has it."""
    found = template(source)
    if found and found not in chat.TEMPLATES:
        write(target / texts.CHAT, found)


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
        tokens = texts.ids_of(tokenizer, run)
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


# What else people have, by a file's name, and what to do with it.
FOREIGN = (
    (r"adapter_config\.json", "an adapter (PEFT), not a model: --from_peft=FOLDER of "
     "convert makes a run of it and its base"),
    (r"consolidated.*\.(safetensors|pth)|params\.json", "in its maker's own form (of "
     "Meta or Mistral): get the version for transformers, with config.json"),
    (r".*\.gguf", "a GGUF file: name the file itself, gguf:FILE or --from_gguf=FILE"),
    (r".*\.(pth|pt|bin|ckpt)", "a pickle of PyTorch's, which can run code and is not "
     "read: save the model with transformers' save_pretrained"),
    (r".*\.safetensors", "weights alone: the folder also needs their config.json"),
)  # fmt: skip


def _hint(path: Path) -> str:
    """Returns what a path is that is no Hugging Face folder, where its names tell."""
    names = sorted(p.name for p in path.iterdir()) if path.is_dir() else [path.name]
    for pattern, told in FOREIGN:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f"; {found[0]} is {told}"
    return ""


def _config(source: Path) -> dict[str, Any]:
    if source.suffix == gguf_file.SUFFIX:
        return gguf_file.read(source).config
    return files.read_json(source / "config.json")


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
