"""A 15M-parameter GPT on Jane Austen's six novels.

What: 4 MB of one author, a BPE vocabulary of 4,096 tokens, the modern block.
  `size=small` is a 3M-parameter version for a CPU.
Expected: words of the novels soon, her sentences later; by step 5,000 nearly every
  sampled word is one that she used.
Time: size=15m minutes on a GPU; size=small about an hour on 2 CPU cores.
Command: python -m experiments.train --config=configs/austen_15m.py
"""

from configs import common


def large(config):
    config.model.update(n_layers=7, d_model=384, n_heads=6, context_length=256)
    config.batch_size = 64


def small(config):
    config.model.update(n_layers=4, d_model=192, n_heads=3, context_length=128)
    config.batch_size = 16


SIZES = {"15m": large, "small": small, "tiny": small}


def get_config(arg: str | None = None):
    options = common.options(arg, size="15m")
    config = common.modern(common.base())
    config.data.update(source="austen", tokenizer="bpe:4096")
    common.choose(SIZES, options["size"], "size")(config)
    config.steps = 5000
    config.sample_every = 500
    config.eval_every = 500
    config.checkpoint_every = 500
    config.sample.words = True
    config.sample.prompt = "It was"
    config.sample.max_new_tokens = 200
    config.sample.top_k = 200
    return common.tiny(config) if options["size"] == "tiny" else config
