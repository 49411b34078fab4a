"""Sort texts into classes: a pretrained model learns to tell spam from ham.

What: chapter 6 of Raschka's "Build a Large Language Model (From Scratch)": the SMS Spam
  Collection (Almeida et al. 2011), 747 messages of each class, 70 % to learn from, 10 %
  to choose by, 20 % to be judged with once. `run=` is the run folder of the model to
  start from; without it the weights are random and a BPE vocabulary is made of the
  messages. `adapter=lora` trains thin matrices beside frozen weights; `train=head`
  moves only the new head, `train=last1` also the last block and the final norm,
  `train=last2` two blocks, and so on. `pool=` says whose features are classified (last,
  first, mean, end), `epochs=` how often every message is seen. `size=mini`, `small`,
  `medium`, `large` are models without `run=`. Your own table:
  --config.data.source=FILE.csv (or .tsv, .jsonl, hf:<dataset>), with the columns text
  and label or --config.task.text_column=... --config.task.label_column=...
Expected: 94 to 96 % of the test messages are sorted rightly (docs/guide/8-classify.md).
Time: two to three minutes on 2 CPU cores.
Command: python -m experiments.train --config=configs/classify.py:run=runs/austen
"""

from configs import common

SIZES = {
    "mini": {"n_layers": 2, "d_model": 128, "n_heads": 2},
    "small": {"n_layers": 4, "d_model": 192, "n_heads": 3},
    "medium": {"n_layers": 5, "d_model": 256, "n_heads": 4},
    "large": {"n_layers": 6, "d_model": 320, "n_heads": 5},
    "tiny": {},
}


def still(train: str, n_layers: int) -> tuple[str, ...]:
    """Returns regexes of the weights that do not move."""
    if train == "all":
        return ()
    if train == "head":
        return (r"^(?!classifier/)",)
    count = train.removeprefix("last")
    if not count.isdecimal() or not 0 < int(count) <= n_layers:
        raise ValueError(
            f"train {train!r} is not one of: all, head, last1 to last{n_layers}"
        )
    first = [f"^block_{i}/" for i in range(n_layers - int(count))]
    return (r"^(embed|positions|embed_norm)/", *first)


def get_config(arg: str | None = None):
    task = common.task_classify()
    options = common.options(
        arg,
        **{"run": "", "adapter": "full", "train": "all", "pool": task.pool},
        **{"size": "small", "epochs": "8"},
    )
    if not options["epochs"].isdecimal():
        raise ValueError(f"epochs {options['epochs']!r} is not one of: 1, 2, 3, ...")
    config = common.modern(common.base())
    config.task = task
    config.task.update(balance=True, pool=options["pool"])
    config.data.update(source="sms_spam", tokenizer="bpe:1000", seq_len=128)
    config.model.update(common.choose(SIZES, options["size"], "size"))
    config.model.context_length = 256
    config.optimizer.update(name="adamw", schedule="linear")
    config.hyper.update(lr=1e-3, weight_decay=0.05, beta2=0.99, warmup_steps=20.0)
    # Few messages are learnt by heart soon: dropout and the mean of the last 50 steps'
    # weights make what an evaluation finds less a matter of luck.
    config.hyper.update(dropout_embed=0.1, dropout_residual=0.1, ema_decay=0.98)
    config.optimizer.ema = True
    config.batch_size = 16
    config.eval_every = 65  # an epoch of the 1,045 messages
    config.steps = config.eval_every * int(options["epochs"])
    config.checkpoint_every = 130
    if options["size"] == "tiny":
        common.tiny(config)
        config.task.balance = False
    common.from_run(config, options["run"])
    config.model.scan_layers = False  # blocks by name, for train=last1
    config.optimizer.freeze = still(options["train"], config.model.n_layers)
    config.adapter = common.choose(common.ADAPTERS, options["adapter"], "adapter")()
    if options["adapter"] == "lora":  # thin matrices learn slower than what they adapt
        config.adapter.update(rank=16, alpha=32.0)
        config.hyper.lr = 3e-3
    return config
