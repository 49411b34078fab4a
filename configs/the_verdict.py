"""The book's first training run: GPT-2 small on one short story.

What: chapter 5 of Raschka's "Build a Large Language Model (From Scratch)" (124M
shape, context 256, batch 2, 10 epochs of The Verdict) with `recipe=chapter5`; its
appendix D (15 epochs, warm-up, cosine decay, clipping) with `recipe=appendix_d`.
Expected: chapter5 ends with a training loss below 1 (0.78) and a validation loss of
  6.2 (after 5 epochs) to 6.6 (at the end): a model this large learns 5,145 tokens by
  heart, as the book says.
Time: about 10 minutes on 2 CPU cores; 8 GB of memory.
Command: python -m experiments.train --config=configs/the_verdict.py
"""

from configs import common


def chapter5(config):
    config.steps = 90  # 10 epochs of 9 batches
    config.hyper.update(lr=4e-4, warmup_steps=0.0, clip=0.0)
    config.optimizer.schedule = "constant"


def appendix_d(config):
    config.steps = 135  # 15 epochs of 9 batches
    config.hyper.update(lr=1e-3, warmup_steps=27.0, clip=1.0)
    config.hyper.update(initial_lr_ratio=3e-5 / 1e-3, final_lr_ratio=1e-6 / 1e-3)
    config.optimizer.schedule = "cosine"


RECIPES = {"chapter5": chapter5, "appendix_d": appendix_d}


def get_config(arg: str | None = None):
    options = common.options(arg, size="small", recipe="chapter5")
    config = common.base()
    config.data.update(source="the_verdict", tokenizer="gpt2")
    config.model.update(
        n_layers=12,
        d_model=768,
        n_heads=12,
        context_length=256,
        qkv_bias=False,
        tie_embeddings=False,
        init="torch_default",  # the book's curve depends on it
    )
    config.batch_size = 2
    # torch.optim.AdamW's defaults; it decays every parameter.
    config.hyper.update(beta1=0.9, beta2=0.999, weight_decay=0.1)
    config.hyper.update(dropout_embed=0.1, dropout_attn=0.1, dropout_residual=0.1)
    config.optimizer.decay = ((r".*", True),)
    config.log_every = 3
    config.eval_every = 9  # an epoch
    config.checkpoint_every = 45
    config.mesh.cpu_devices = 1  # copies of 163M weights cost more than they bring
    config.keep = 1  # a checkpoint of this shape holds 2 GB
    config.sample_every = 9
    config.sample.prompt = "Every effort moves you"
    config.sample.max_new_tokens = 50
    config.sample.temperature = 0.0  # the book prints greedy samples
    sizes = {"small": lambda: config, "tiny": lambda: common.tiny(config)}
    common.choose(RECIPES, options["recipe"], "recipe")(config)
    return common.choose(sizes, options["size"], "size")()
