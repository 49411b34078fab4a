"""Learning to reverse letters from nothing but being told whether it was right (GRPO).

What: first a short supervised start (`stage=start`), which gets a few answers in a
  hundred right; then rewards alone (`stage=rl,run=<the start>`; `run=none` is random
  weights, which are never right). Problems are made on the fly: config.task.kind may
  also be sort, copy, upper or add.
Expected: exact match on held-out questions of 0.1 to 0.2 after the start, 0.9 to 1
  after 1,000 steps of rewards (docs/guide/11-rewards.md has three seeds).
Time: seconds for the start, then 0.2 seconds a step on 2 CPU cores.
Command: python -m experiments.train --config=configs/grpo.py --workdir=runs/start
     and: python -m experiments.train --config=configs/grpo.py:run=runs/start \
  --workdir=runs/grpo
"""

from configs import common


def start(config):
    config.task = common.task_answers()
    config.batch_size = 64
    config.steps = 68
    config.eval_every = 68


def rl(config):
    config.task = common.task_grpo()
    config.batch_size = 32  # questions, each answered 16 times
    config.steps = 1000
    config.eval_every = 50
    # Slowly up: at first hardly an answer is right, and a step is mostly noise.
    config.hyper.update(lr=1.5e-3, matrix_lr=5e-3, warmup_steps=200.0)
    config.hyper.decay_fraction = 0.4


STAGES = {"start": start, "rl": rl}


def get_config(arg: str | None = None):
    options = common.options(arg, size="small", stage="", run="")
    stage = options["stage"] or ("rl" if options["run"] else "start")
    config = common.modern(common.base())
    config.data.tokenizer = "char"
    config.model.update(n_layers=4, d_model=96, n_heads=3, context_length=32)
    config.log_every = 5
    config.eval_batch_size = 250
    common.choose(STAGES, stage, "stage")(config)
    sizes = {"small": lambda: config, "tiny": lambda: common.tiny(config)}
    config = common.choose(sizes, options["size"], "size")()
    random = "none" if options["size"] == "tiny" and stage == "rl" else ""
    return common.from_run(config, options["run"] or random)
