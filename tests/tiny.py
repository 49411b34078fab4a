"""The config of a run of seconds on a text of one sentence."""

from pathlib import Path

from ml_collections import ConfigDict

from configs import common

TEXT = "the quick brown fox jumps over the lazy dog. " * 300


def on_text(folder: Path) -> ConfigDict:
    """Returns a config whose text, shards and downloads lie in a folder."""
    (folder / "text.txt").write_text(TEXT)
    config = common.tiny(common.base())
    config.data.update(source=str(folder / "text.txt"), tokenizer="char")
    config.data.update(folder=str(folder / "data"), cache=str(folder / "cache"))
    config.model.update(context_length=16, n_layers=1)
    config.update(compile_cache="", tensorboard=False)
    return config
