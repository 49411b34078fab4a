r"""A published model made one's own: SmolLM2-135M-Instruct, answers, taste, classes.

What: `run=` is the run folder of a published model, which experiments.convert makes of
  a GGUF file or a Hugging Face folder (guide 16); SmolLM2-135M-Instruct (Allal et al.
  2025) fits into 2 GB here, and any other language model goes as well. `stage=sft`
  teaches it the 1,100 instructions of chapter 7 of Raschka's "Build a Large Language
  Model (From Scratch)", in the model's own chat template; `stage=dpo` tells it which of
  two answers is the polite one; `stage=spam` sorts chapter 6's messages; `stage=start`
  teaches it to answer sums with nothing but the number, and `stage=grpo` goes on from
  there by rewards for the right ones. LoRA adapters move, and the published weights
  stay; `adapter=only` moves the last block, as chapter 6 does, and `adapter=full` all.
  `run=none` is random weights, to try things out. Your own file:
  --config.data.source=FILE.
Expected: answers in your style; of spam about 97 % is sorted rightly (the book's larger
  GPT-2 gets 95.67 to 98.33).
Time: on 2 CPU cores 6 minutes for spam with the last block, 13 with LoRA; 20 for sft, 8
  for dpo, 2 for start, 8 for grpo.
Command: python -m experiments.train --config=configs/smollm2.py:run=runs/smollm2 \
  --workdir=runs/assistant
"""

from configs import common


def sft(config):
    config.task = common.task_sft()
    config.task.template = ""  # the model's own
    config.data.update(source="instructions", val_fraction=0.05)
    config.batch_size = 4
    config.accumulate = 2  # two rows of 1,024 tokens at once: 17 GB with four
    config.steps = 40  # three epochs of 935 conversations
    config.eval_every = 20
    config.checkpoint_every = 20
    config.early_from = 0
    config.hyper.lr = 5e-4
    config.sample_every = 20
    config.sample.update(
        prompt="Convert 45 kilometers to meters.", temperature=0.0, max_new_tokens=40
    )


def dpo(config):
    config.task = common.task_dpo()
    config.data.update(source="preferences", val_fraction=0.05)
    config.batch_size = 4
    config.accumulate = 2
    config.steps = 40
    config.eval_every = 20
    config.early_from = 0
    config.checkpoint_every = 20
    config.hyper.lr = 2e-4


def spam(config):
    config.task = common.task_classify()
    config.task.balance = True
    config.task.buckets = (80, 128)  # of most batches no message is longer than 80
    config.early_from = 0
    config.data.update(source="sms_spam", seq_len=128)
    config.batch_size = 16
    config.steps = 130  # two epochs of the 1,045 messages
    config.eval_every = 65
    config.checkpoint_every = 65
    config.hyper.lr = 1e-3
    # The mean of the last 50 steps' weights: a test's figure is less a matter of luck.
    config.optimizer.ema = True
    config.hyper.ema_decay = 0.98


def sums(config):
    config.task.update(kind="add", shortest=1, longest=2, held_out=200)
    config.data.val_fraction = 0.1
    config.early_from = 0


def start(config):
    config.task = common.task_answers()
    sums(config)
    config.batch_size = 32
    config.steps = 60
    config.eval_every = 20
    config.hyper.lr = 1e-3


def grpo(config):
    config.task = common.task_grpo()
    sums(config)
    config.batch_size = 8  # sums, each answered 16 times
    config.steps = 60
    config.eval_every = 20
    config.checkpoint_every = 20
    config.hyper.lr = 2e-4


STAGES = {"sft": sft, "dpo": dpo, "spam": spam, "start": start, "grpo": grpo}


def get_config(arg: str | None = None):
    options = common.options(arg, run="", stage="sft", adapter="lora", size="run")
    config = common.base()
    common.choose(STAGES, options["stage"], "stage")(config)
    config.adapter = common.choose(common.ADAPTERS, options["adapter"], "adapter")()
    if options["adapter"] == "full":  # all weights at once move in smaller steps
        config.hyper.lr = config.hyper.lr / 20
    config.hyper.update(weight_decay=0.0, beta2=0.99, warmup_steps=10.0)
    sizes = {"run": lambda config: config, "tiny": tiny}
    config = common.choose(sizes, options["size"], "size")(config)
    run = options["run"] or ("none" if options["size"] == "tiny" else "")
    config = common.from_run(config, run)
    if "template" in config.task:
        config.task.template = config.task.template or "chatml"
    if options["adapter"] == "only":  # blocks have names where they are no loop
        config.model.scan_layers = False
        last = rf"block_{config.model.n_layers - 1}/"
        config.adapter.train = (last, *config.adapter.train)
    return config


def tiny(config):
    """Seconds on one core: what Python's own docstrings say."""
    config = common.tiny(config)
    config.data.val_fraction = 0.2
    config.model.context_length = 320
    if "too_long" in config.task:
        config.task.too_long = "cut"
    if config.task.name == "classify":
        config.task.balance = False
    return config
