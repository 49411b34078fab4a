"""Make a text ready for training: tokenizer and token shards, kept and found again.

  python -m experiments.prepare
  python -m experiments.prepare --config.data.source=my_book.txt
  python -m experiments.prepare --config=configs/shakespeare_char.py
  python -m experiments.prepare --config.data.source='texts/**/*.md' \\
      --config.data.tokenizer=bpe:8000 --config.data.val_fraction=0.05

Training does this by itself when it is needed; this door does it ahead of time, and
shows what the text becomes. Only config.data matters here (configs/common.py explains
its keys). Sources are "builtin", tinyshakespeare, the_verdict, austen, tinystories,
openwebtext, fineweb-edu, a file, a glob, hf:<dataset>, or a mixture "a*3 + b*1".
"""

from experiments import door

CONFIG = door.define_config("configs/quickstart.py")


def main(_: list[str]) -> None:
    """Prepares the config's text and prints where it is and what it holds."""
    from gpt_jax import screen
    from gpt_jax.prepare import prepare

    options = CONFIG.value.data.to_dict()
    for key in ("seq_len", "stride"):  # these choose windows, later
        options.pop(key)
    prepared = prepare(**options, progress=True)
    tokenizer = prepared.tokenizer
    print(f"folder      {prepared.folder}")
    print(f"tokenizer   {tokenizer.kind}, {tokenizer.vocab_size:,} tokens")
    for name, tokens in (("training", prepared.train), ("validation", prepared.val)):
        index = tokens.index
        characters = index.meta["characters"]
        print(
            f"{name:<11} {characters:,} characters, {len(tokens):,} tokens "
            f"({characters / len(tokens):.2f} characters each), "
            f"{screen.count(index.documents, 'document')}"
        )
    shown = [tokenizer.decode([i]) for i in prepared.train[:16].tolist()]
    print(f"begins      {' '.join(map(repr, shown))}")


if __name__ == "__main__":
    door.run(main, __doc__)
