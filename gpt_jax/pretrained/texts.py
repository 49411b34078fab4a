"""The tokenizer of a Hugging Face folder, in and out, and the files that go with it."""

import json
import shutil
from pathlib import Path

from gpt_jax import tokenizers
from gpt_jax.pretrained import files
from gpt_jax.tokenizers import Tokenizer

# What other software reads beside tokenizer.json: chat template, generation settings.
COMPANIONS = (
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "generation_config.json"),
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
    return found if found.vocab_size <= vocab_size else _trimmed(found, vocab_size)


def save(folder: Path, tokenizer: Tokenizer, *, run: Path, context: int) -> None:
    """Writes tokenizer.json and its companions: those of the run, or new ones.

    Args:
      folder: exists.
      tokenizer: the model's.
      run: the run folder; the companions that an import left there are copied.
      context: the model's context length.
    """
    tokenizer.save(folder / "tokenizer.json")
    eos = tokenizer.eos_id
    name = next((t for t, i in tokenizer.specials.items() if i == eos), None)
    made = {
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": context,
            "clean_up_tokenization_spaces": False,
            **({"eos_token": name} if name else {}),
        },
        "generation_config.json": {"eos_token_id": eos} if name else {},
    }
    for file, content in made.items():
        (folder / file).write_text(json.dumps(content, indent=2) + "\n", "utf-8")
    keep(run, folder)


def keep(source: Path, target: Path) -> None:
    """Copies the companions of a tokenizer from one folder to another."""
    for name in COMPANIONS:
        if (source / name).is_file():
            files.read_json(source / name) if name.endswith(".json") else None
            shutil.copyfile(source / name, target / name)


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
    return Tokenizer(json.dumps(document, ensure_ascii=False, indent=2))
