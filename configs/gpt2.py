"""GPT-2 in its four sizes, on OpenWebText, with nanoGPT's training numbers.

What: OpenAI's architecture exactly (tied head, biases, learned positions, context
1,024), half a million tokens a step, AdamW with a cosine schedule.
Expected: size=small reaches a validation loss near 2.85 after 600,000 steps (nanoGPT's
  figure for this recipe); the other sizes go lower.
Time: size=small about 4 days on 8 A100 (nanoGPT's figure). `size=tiny` takes seconds.
Command: python -m experiments.train --config=configs/gpt2.py:size=small
  on 8 GPUs add --config.accumulate=5, so that a micro-batch divides over them
Needs: pip install -r requirements.txt datasets (OpenWebText is streamed)
"""

from configs import common

SIZES = {
    "small": {"n_layers": 12, "d_model": 768, "n_heads": 12},
    "medium": {"n_layers": 24, "d_model": 1024, "n_heads": 16},
    "large": {"n_layers": 36, "d_model": 1280, "n_heads": 20},
    "xl": {"n_layers": 48, "d_model": 1600, "n_heads": 25},
    "tiny": {},
}
# A scanned stack keeps what its layers need of the whole depth in one array and copies
# it: for 12 layers a step takes 1.4 times as long on a TPU v5e (compiled cycles), but
# compiles four times as fast. Deep models scan, and compute their layers again.
DEEP = ("large", "xl")


def get_config(arg: str | None = None):
    options = common.options(arg, size="small")
    config = common.base()
    config.data.update(source="openwebtext", tokenizer="gpt2", val_fraction=0.0005)
    config.data.split = "documents"
    config.model.update(common.choose(SIZES, options["size"], "size"))
    config.model.update(
        vocab_multiple=128,
        context_length=1024,
        dtype="bfloat16",
    )
    if options["size"] in DEEP:
        config.model.update(scan_layers=True, remat="full")
    config.batch_size = 480
    config.accumulate = 40
    config.steps = 600_000
    config.eval_every = 1000
    config.eval_windows = 2400
    config.checkpoint_every = 1000
    config.hyper.update(lr=6e-4, weight_decay=0.1, beta2=0.95, warmup_steps=2000.0)
    return common.tiny(config) if options["size"] == "tiny" else config
