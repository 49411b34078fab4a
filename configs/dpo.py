r"""Preferences: a tuned model learns which of two answers people like better.

What: direct preference optimisation (DPO, Rafailov et al. 2023) of an instruction-tuned
  run, on the 1,100 pairs of chapter 7's bonus of Raschka's "Build a Large Language
  Model (From Scratch)", where the rejected answers are impolite; the same rows train
  as in sft.py. `run=` is the tuned run, whose template is used (`none` = random
  weights, to try things out); `adapter=lora` trains thin matrices and needs no second
  copy of the weights; `variant=ipo` and `orpo` are other losses. Your own file:
  --config.data.source=FILE.json or FILE.jsonl, with the columns instruction, input,
  rejected, and chosen or output.
Expected: the first loss is log(2) = 0.6931, the validation loss falls below 0.66, and
  the margin between the rewards of chosen and rejected answers grows (margins.png).
Time: minutes on 2 CPU cores for a model of 5M parameters.
Command: python -m experiments.train --config=configs/dpo.py:run=runs/sft
"""

from configs import common


def dpo(config):
    config.task.update(variant="dpo", logp="sum", beta=0.1)


def ipo(config):
    config.task.update(variant="ipo", logp="mean", beta=0.1)


def orpo(config):
    config.task.update(variant="orpo", logp="mean", beta=0.1)


VARIANTS = {"dpo": dpo, "ipo": ipo, "orpo": orpo}
RATES = {"full": 1e-4, "only": 1e-4, "lora": 1e-3}


def get_config(arg: str | None = None):
    options = common.options(arg, run="", adapter="full", variant="dpo", size="run")
    config = common.base()
    config.task = common.task_dpo()
    common.choose(VARIANTS, options["variant"], "variant")(config)
    config.data.update(source="preferences", val_fraction=0.05)
    config.batch_size = 8
    config.steps = 240
    config.eval_every = 40
    config.checkpoint_every = 120
    config.adapter = common.choose(common.ADAPTERS, options["adapter"], "adapter")()
    config.hyper.lr = RATES[options["adapter"]]
    config.hyper.update(weight_decay=0.0, beta2=0.99, warmup_steps=20.0)
    sizes = {"run": lambda config: config, "tiny": tiny}
    config = common.choose(sizes, options["size"], "size")(config)
    run = options["run"] or ("none" if options["size"] == "tiny" else "")
    config = common.from_run(config, run)
    config.task.template = config.task.template or "alpaca"
    return config


def tiny(config):
    """Seconds on one core: answers of Python's docstrings to the wrong questions."""
    config = common.tiny(config)
    config.data.val_fraction = 0.2
    config.model.context_length = 320
    config.task.too_long = "cut"
    return config
