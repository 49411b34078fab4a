r"""Character-level Shakespeare: nanoGPT's classic, and the modern way to do it.

What: tinyshakespeare (1,115,394 characters, 65 symbols). `recipe=nanogpt` keeps
nanoGPT's architecture and numbers; `recipe=modern` changes the block and the
optimizer, with the same data and tokens a step.
Expected: validation loss in nats per character, over all of the last 10 %:
  size=cpu,recipe=nanogpt   1.90 after 2,000 steps
  size=cpu,recipe=modern    1.87 after 250 steps
  size=gpu,recipe=nanogpt   1.47 (nanoGPT's own figure) after 5,000 steps, at its best
Time: size=cpu about 2 minutes (nanogpt) and 20 seconds (modern) on 2 CPU cores.
Command: python -m experiments.train \
  --config=configs/shakespeare_char.py:size=cpu,recipe=modern
"""

from configs import common


def nanogpt(config):
    config.model.update(
        activation="gelu",
        norm_bias=False,
        qkv_bias=False,
        attn_bias=False,
        mlp_bias=False,
    )
    config.hyper.update(lr=1e-3, final_lr_ratio=0.1, beta2=0.99, weight_decay=0.1)
    # nanoGPT's warm-up is (step + 1) / (warmup + 1).
    config.hyper.update(warmup_steps=100.0, initial_lr_ratio=1 / 101)


def modern(config):
    common.modern(config)
    config.steps = config.steps // 4


def modern_in_250_steps(config):
    """Numbers searched for a run this short; docs/performance.md shows what each adds.

    Low momentum and a long decay suit few steps; two wide heads are faster than four
    and no worse.
    """
    common.modern(config)
    config.steps = 250
    config.model.n_heads = 2
    config.hyper.update(lr=6e-3, matrix_lr=0.042, momentum=0.82, beta1=0.75, beta2=0.96)
    config.hyper.update(warmup_steps=5.0, decay_fraction=0.8)


def cpu(config):
    config.model.update(n_layers=4, n_heads=4, d_model=128, context_length=64)
    config.sample.max_new_tokens = 60
    config.batch_size = 12
    config.steps = 2000


def gpu(config):
    config.model.update(n_layers=6, n_heads=6, d_model=384, context_length=256)
    config.model.dtype = "bfloat16"
    config.sample.max_new_tokens = 250
    config.batch_size = 64
    config.steps = 5000
    config.hyper.update(dropout_embed=0.2, dropout_attn=0.2, dropout_residual=0.2)


SIZES = {"cpu": cpu, "gpu": gpu, "tiny": cpu}
RECIPES = {  # at a CPU's size, at a GPU's
    "nanogpt": (nanogpt, nanogpt),
    "modern": (modern_in_250_steps, modern),
}


def get_config(arg: str | None = None):
    options = common.options(arg, size="cpu", recipe="modern")
    config = common.base()
    config.data.update(source="tinyshakespeare", tokenizer="char", stride=1)
    config.eval_every = 250
    config.checkpoint_every = 250
    config.sample_every = 250
    config.sample.words = True
    config.sample.prompt = "\n"
    common.choose(SIZES, options["size"], "size")(config)
    recipes = common.choose(RECIPES, options["recipe"], "recipe")
    recipes[options["size"] == "gpu"](config)
    return common.tiny(config) if options["size"] == "tiny" else config
