"""The tokenizer of a Hugging Face folder, in and out, and the files that go with it."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

from gpt_jax import chat, generation, special, tokenizers
from gpt_jax.pretrained import files
from gpt_jax.tokenizers import Tokenizer

# What other software reads beside tokenizer.json: chat template, generation settings.
CHAT = "chat_template.jinja"
COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *(CHAT, "chat_template.json", "generation_config.json"),
)
GPT2_FILES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))


def load(folder: Path, vocab_size: int) -> Tokenizer:
    """Returns the tokenizer of a folder: tokenizer.json, or GPT-2's two files.

    Special tokens without a row in the model's embedding (Gemma 3 has one, for images)
    are left out: the model cannot read them.

    Args:
      folder: a Hugging Face folder.
      vocab_size: rows of the model's embedding.

    Raises:
      ValueError: there is no tokenizer, or it has more tokens than the model.
    """
    path = folder / "tokenizer.json"
    if path.is_file():
        found = tokenizers.load(path)
    else:
        pairs = [p for p in GPT2_FILES if all((folder / name).is_file() for name in p)]
        if not pairs:
            raise ValueError(
                f"{folder} has neither tokenizer.json nor GPT-2's vocab.json and "
                "merges.txt; save its tokenizer with transformers' save_pretrained"
            )
        found = tokenizers.gpt2(*(folder / name for name in pairs[0]))
        found = found.with_special(special.published(folder, found.vocab))
    return found if found.vocab_size <= vocab_size else _trimmed(found, vocab_size)


def save(folder: Path, tokenizer: Tokenizer, *, run: Path, context: int) -> None:
    """Writes tokenizer.json and its companions: those of the run, or new ones.

    The chat template is the run's, and writing ends where the run's answers do.

    Args:
      folder: exists.
      tokenizer: the model's.
      run: the run folder; the companions that an import left there are copied.
      context: the model's context length.
    """
    (folder / "tokenizer.json").write_text(tokenizer.json, encoding="utf-8")
    by_id = {i: name for name, i in tokenizer.specials.items()}
    said = tokenizer.special
    ids = {"eos": tokenizer.eos_id, "bos": tokenizer.bos_id}
    ids |= {"pad": said.pad} if said else {}
    named = {f"{k}_token": by_id[i] for k, i in ids.items() if i in by_id}
    ends = ends_of(tokenizer, run)
    made = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            **named,
        },
        "generation_config.json": {"eos_token_id": one(ends)} if ends else {},
    }
    for file, content in made.items():
        _write(folder / file, content)
    keep(run, folder)
    settings = files.read_json(folder / "generation_config.json")
    kept = settings.get("eos_token_id")
    if not {*ends} <= {*(kept if isinstance(kept, list) else [kept])}:
        _write(
            folder / "generation_config.json", settings | {"eos_token_id": one(ends)}
        )
    template = chat.template_of(run)
    if template is not None and chat.template_of(folder) != template:
        text = chat.as_jinja(template, tokenizer)
        (folder / CHAT).write_text(text, encoding="utf-8")


def ends_of(tokenizer: Tokenizer, run: Path) -> list[int]:
    """Returns the ids at which a run's texts end: its template's, its tokenizer's."""
    template = chat.template_of(run)
    return chat.stop_ids(tokenizer, template) if template else list(tokenizer.ends)


def ids_of(tokenizer: Tokenizer, run: Path) -> dict[str, int | list[int] | None]:
    """Returns the keys of special tokens that a config.json has.

    Each is there: where one is absent, transformers takes that of the family's first
    model, which this vocabulary may not even have.
    """
    said = tokenizer.special
    return {
        "bos_token_id": said.bos if said else None,
        "eos_token_id": one(ends_of(tokenizer, run)),
        "pad_token_id": said.pad if said else None,
    }


def one(ids: list[int]) -> int | list[int] | None:
    """Returns a single id as itself, none as None, as config.json spells them."""
    return (ids[0] if ids else None) if len(ids) < 2 else ids


def keep(source: Path, target: Path) -> None:
    """Copies the companions of a tokenizer from one folder to another.

    Raises:
      ValueError: one is not JSON, or says what no text can be written by.
    """
    generation.of(source)
    for name in COMPANIONS:
        if (source / name).is_file():
            files.read_json(source / name) if name.endswith(".json") else None
            shutil.copyfile(source / name, target / name)


def _write(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _trimmed(tokenizer: Tokenizer, size: int) -> Tokenizer:
    document = json.loads(tokenizer.json)
    own = max(document["model"]["vocab"].values(), default=0)
    if own >= size:
        raise ValueError(
            f"the tokenizer has {own + 1} tokens, but the model's embedding has {size} "
            "rows: they do not belong together"
        )
    added = document["added_tokens"]
    document["added_tokens"] = [token for token in added if token["id"] < size]
    known = replace(tokenizer, json=json.dumps(document, ensure_ascii=False, indent=2))
    said = tokenizer.special
    return known if said is None else known.with_special(special.within(said, size))
