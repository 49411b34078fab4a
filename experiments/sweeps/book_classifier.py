"""The nineteen variants of the book's spam classifier, on a model that fits two cores.

What: the bonus of chapter 6 of "Build a Large Language Model (From Scratch)" asks what
  each choice does: which token is read, which layers train, how large the model is,
  random weights, LoRA, padding, the causal mask. Row n here answers its row n, for the
  model of `configs/austen_15m.py:size=small` instead of GPT-2 small. Only that one is
  pretrained, so the other sizes (rows 6 to 9 and 12) start from random weights. Row 18
  leaves padding out of the loss: no label is ever padding, so it is row 1.
Expected: the table in docs/guide/8-classify.md: it matters most that the token that is
  read has seen the text, and that more than the head trains.
Time: about 20 minutes on 2 CPU cores, after the model to start from:
  python -m experiments.train --config=configs/austen_15m.py:size=small \\
      --config.model.context_length=256 --config.steps=1500 --workdir=runs/austen
Command: python -m experiments.sweep --sweep=experiments/sweeps/book_classifier.py
"""

# pool=end: the book's last token is the last position of the padded row.
config = "configs/classify.py:run=runs/austen,pool=end,epochs=2"
metric = "val_accuracy"
direction = "maximize"
fixed = {"checkpoint_every": 10_000, "tensorboard": False}
# As in the book: no dropout where two epochs are all, no averages of weights.
fixed |= {"hyper.dropout_embed": 0.0, "hyper.dropout_residual": 0.0}
fixed |= {"optimizer.ema": False}

_WIDTHS = (16, 32, 48, 64, 80, 96, 112)
_ONE_BY_ONE = {"batch_size": 1, "steps": 2090, "eval_every": 1045, "hyper.lr": 2e-4}
_LORA = {"adapter.rank": 8, "adapter.alpha": 16.0, "hyper.lr": 1e-3}
_ROWS = [
    ("train=last1", {}),
    ("train=last1,pool=first", {}),
    ("train=head", {}),
    ("train=last2", {}),
    ("train=all", {}),
    ("train=last1,run=,size=mini", {}),
    ("train=last1,run=,size=medium", {}),
    ("train=last1,run=,size=large", {}),
    ("train=all,run=,size=large", {}),
    ("train=all,run=,size=small", {}),
    ("adapter=lora", _LORA),
    ("adapter=lora,run=,size=large", _LORA),
    ("train=last1", {"data.seq_len": 256}),
    ("train=last1,pool=last", {"task.buckets": _WIDTHS, **_ONE_BY_ONE}),
    ("train=last1,pool=last", {"task.buckets": _WIDTHS, "accumulate": 16}),
    ("train=last1,pool=last", {}),
    ("train=last1", {"task.causal": False}),
    # Row 18 is row 1.
    ("train=last1,pool=mean", {}),
]


def points():
    return [{"config": row, **change} for row, change in _ROWS]
