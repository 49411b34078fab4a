r"""Instruction tuning: a pretrained model learns to answer.

What: chapter 7 of Raschka's "Build a Large Language Model (From Scratch)": 1,100
  instructions, the first 85 % to train on, the next 10 % for a test, the rest for
  validation; the loss counts answers only, and their end is learnt. `run=` is the run
  folder of the base model (`none` = random weights, to try things out), `adapter=lora`
  trains thin matrices beside frozen weights, `template=` is alpaca, phi3, chatml, plain
  or the path of a Jinja chat template; by default the one that `run=` has, else alpaca.
  `set=alpaca` is Stanford's 52,002 instructions (needs a network once, 23 MB). Your
  own file: --config.data.source=FILE.json or FILE.jsonl, with the columns
  instruction, input and output, or messages.
Expected: from austen_15m.py:size=small with a context of 256, the loss of the
  validation answers falls from 7.9 to 3.1, and nearly all test answers end by
  themselves.
Time: about 2 minutes on 2 CPU cores for that model.
Command: python -m experiments.train --config=configs/sft.py:run=runs/austen
"""

from configs import common


def book(config):
    config.data.source = "instructions"
    config.steps = 400
    config.eval_every = 40
    config.checkpoint_every = 200


def alpaca(config):
    config.data.source = "alpaca"
    config.task.update(too_long="drop", empty="drop")
    config.data.split = "documents"
    config.data.val_fraction = 0.02
    config.task.test_fraction = 0.02
    config.batch_size = 32
    config.steps = 5000
    config.eval_every = 500
    config.checkpoint_every = 500


SETS = {"book": book, "alpaca": alpaca}
SIZES = {"run": lambda config: None, "tiny": common.tiny}


def get_config(arg: str | None = None):
    task = common.task_sft()
    options = common.options(
        arg, run="", set="book", adapter="full", template="", size="run"
    )
    config = common.base()
    config.task = task
    config.task.template = common.template(options["template"])
    config.data.val_fraction = 0.05
    config.batch_size = 8
    common.choose(SETS, options["set"], "set")(config)
    config.hyper.update(lr=1e-3, weight_decay=0.01, beta2=0.99, warmup_steps=20.0)
    config.sample_every = config.eval_every
    config.sample.update(
        prompt="Convert 45 kilometers to meters.", temperature=0.0, max_new_tokens=60
    )
    config.adapter = common.choose(common.ADAPTERS, options["adapter"], "adapter")()
    common.choose(SIZES, options["size"], "size")(config)
    if options["size"] == "tiny":
        # One core, seconds: what Python's own docstrings say.
        config.data.val_fraction = 0.2
        config.model.context_length = 320
        config.task.too_long = "cut"
    run = options["run"] or ("none" if options["size"] == "tiny" else "")
    config = common.from_run(config, run)
    config.task.template = config.task.template or "alpaca"
    return config
