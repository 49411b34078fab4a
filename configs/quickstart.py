"""A GPT for Python source, trained on the standard library of the running Python.

What: a small modern GPT on about 9 MB of real text that every machine has, so it
needs no download; a BPE vocabulary of 2,000 tokens is trained on it first.
Expected: a validation loss near 3.5 (1.64 bits per byte) and samples that look like
  Python.
Time: 3 minutes on 2 CPU cores.
Command: make demo
     or: python -m experiments.train --config=configs/quickstart.py
Your own text: add --config.data.source=FILE.txt --workdir=runs/mine, and for samples
  that begin as it does --config.sample.prompt="Once upon"
"""

from configs import common


def get_config(arg: str | None = None):
    options = common.options(arg, size="small")
    config = common.modern(common.base())
    config.model.update(n_layers=4, d_model=192, n_heads=3, context_length=256)
    config.batch_size = 8
    config.steps = 900
    config.log_every = 10
    config.eval_every = 100
    config.eval_windows = 128
    config.checkpoint_every = 300
    config.sample_every = 300
    config.sample.prompt = "def __init__(self"
    config.sample.update(max_new_tokens=120, count=2, top_p=0.95)
    sizes = {"small": lambda: config, "tiny": lambda: common.tiny(config)}
    return common.choose(sizes, options["size"], "size")()
