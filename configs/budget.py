"""The best model that a budget buys: sizes, batch and rates from written rules.

What: a budget is minutes of this machine, training tokens, or FLOPs. It decides the
  model's width and depth, the batch, the number of steps and the learning rate, by the
  rules below; --explain prints each choice with its rule. minutes asks for the
  machine's speed, which is measured once (experiments.calibrate), and the run then
  fits its steps to the time while it trains (fit_seconds).
Expected: in 3 minutes of 2 slow CPU cores 1.72 bits per byte of Python source, where
  the model of configs/quickstart.py reaches 1.83 (guide 17).
Time: what you say.
Command: python -m experiments.train --config=configs/budget.py:minutes=10
     or: python -m experiments.train --config=configs/budget.py:tokens=1e9 --explain
"""

import math

from configs import common

CONTEXT = 256  # tokens that a model of minutes sees at once
VOCABULARY = 2000
HEAD = 64  # features of a head; widths are multiples of it
TOKENS_PER_PARAMETER = 10.0  # Muon needs about half of what AdamW does
SPENT = 0.9  # of the time: the rest compiles, evaluates and saves
TRIES = ("minutes", "tokens", "flops")


def get_config(arg: str | None = None):
    config, _ = chosen(arg)
    return config


def explain(arg: str | None = None) -> list[tuple[str, str, str]]:
    """Returns (what, what was chosen, by which rule) for every choice."""
    return chosen(arg)[1]


def chosen(arg: str | None):
    """Returns the config that a budget buys, and its explanation."""
    options = common.options(arg, minutes="", tokens="", flops="", size="full")
    sizes = {"full": False, "tiny": True}
    tiny = common.choose(sizes, options["size"], "size")
    given = {key: _number(key, options[key]) for key in TRIES if options[key]}
    if tiny and not given:
        given = {"flops": 1e12}
    if len(given) != 1:
        raise ValueError(
            "a budget is one of minutes=10, tokens=1e8 and flops=1e15: "
            f"{len(given)} of them are given"
        )
    config, told = _buy(given)
    return (common.tiny(config) if tiny else config), told


def _buy(given: dict[str, float]):
    ((kind, amount),) = given.items()
    flops = tokens = 0.0
    if kind == "minutes":
        flops, words = _of_time(60 * amount)
        told = [("flops", f"{flops:.2g}", words)]
    else:
        flops, tokens = (amount, 0.0) if kind == "flops" else (0.0, amount)
        told = [(kind, f"{amount:.3g}", "as given")]
    layers, width = _shape(flops, tokens)
    tokens = tokens or flops / _flops_per_token(layers, width)
    flops = flops or tokens * _flops_per_token(layers, width)
    parameters = _parameters(layers, width)
    told += [
        (
            "parameters",
            f"{parameters:,} outside the embedding",
            f"the shape whose tokens per parameter are nearest {TOKENS_PER_PARAMETER:g}"
            f", here {tokens / parameters:.3g}: with Muon 8 to 10.5 (Karpathy 2026, "
            "nanochat discussion 420), with AdamW 20 (Hoffmann et al. 2022, table 3)",
        ),
        (
            "layers x width",
            f"{layers} x {width}, {width // HEAD} heads",
            "widths of 32 to 128 a layer train alike (Kaplan et al. 2020, figure 5); "
            f"heads of {HEAD}",
        ),
    ]
    batch = _batch(flops)
    steps = max(20, round(tokens / (batch * CONTEXT)))
    rate = 0.3118 * flops**-0.1250
    config = common.modern(common.base())
    config.model.update(n_layers=layers, d_model=width, n_heads=width // HEAD)
    config.model.context_length = CONTEXT
    config.data.tokenizer = f"bpe:{VOCABULARY}"
    config.update(batch_size=batch, steps=steps)
    config.hyper.lr = float(f"{rate:.2g}")
    config.hyper.warmup_steps = float(max(10, steps // 50))
    every = max(10, steps // 10)
    config.update(eval_every=every, checkpoint_every=every, eval_windows=128)
    config.log_every = max(1, min(10, every))
    if kind == "minutes":
        config.fit_seconds = 60 * amount
    told += [
        (
            "batch_size",
            f"{batch} windows of {CONTEXT} tokens",
            "0.292 C^0.3271 tokens for a compute of C FLOPs (DeepSeek-AI 2024, "
            "section 3.1), in twos",
        ),
        (
            "hyper.lr",
            f"{config.hyper.lr:g}",
            "0.3118 C^-0.125 (the same); of what AdamW takes",
        ),
        (
            "hyper.matrix_lr",
            f"{config.hyper.matrix_lr:g}",
            "Muon's updates are scaled by their shape, so its rate stays over widths "
            "(Jordan 2024; Bernstein 2025)",
        ),
        (
            "hyper.weight_decay",
            f"{config.hyper.weight_decay:g}",
            "a run that sees its text a few times does not overfit at this size",
        ),
        (
            "hyper.warmup_steps",
            f"{config.hyper.warmup_steps:g}",
            "a fiftieth of the steps, 10 at least",
        ),
        (
            "hyper.decay_fraction",
            f"{config.hyper.decay_fraction:g}",
            "the rate falls to 0 over the second half: in short runs more decay is "
            "better (Hagele et al. 2024, figure 5)",
        ),
        (
            "steps",
            f"{steps:,}" + (" or as many as fit" if config.fit_seconds else ""),
            f"{tokens:,.0f} tokens / the batch",
        ),
    ]
    return config, told


def _of_time(seconds: float) -> tuple[float, str]:
    """Returns the FLOPs that this machine trains with in so many seconds, and why."""
    if seconds < 60:
        raise ValueError(
            f"minutes={seconds / 60:g}: compiling and one evaluation take the better "
            "part of a minute; give 1 or more"
        )
    from gpt_jax import calibration  # which may measure: not where a config is listed

    speed = calibration.known(common.base().data.cache)
    words = f"{SPENT:.0%} of {seconds:g} s; {calibration.in_words(speed)}"
    return SPENT * seconds * speed.flops, words


def _shape(flops: float, tokens: float) -> tuple[int, int]:
    """Returns the layers and the width that a budget of FLOPs, or of tokens, buys."""
    shapes = [
        (layers, width)
        for width in range(HEAD, 8193, HEAD)
        for layers in range(2, 97)
        if width / 128 <= layers <= max(2, width / 32)
    ]

    def off(shape: tuple[int, int]) -> float:
        seen = tokens or flops / _flops_per_token(*shape)
        ratio = seen / _parameters(*shape) / TOKENS_PER_PARAMETER
        return abs(math.log(max(ratio, 1e-9)))

    return min(shapes, key=off)


def _parameters(layers: int, width: int) -> int:
    """Returns the parameters of the blocks and of the head."""
    return 12 * layers * width**2 + VOCABULARY * width


def _flops_per_token(layers: int, width: int) -> float:
    """Returns the FLOPs of training on a token: 6 N + 12 L D T (PaLM, appendix B)."""
    return 6.0 * _parameters(layers, width) + 12.0 * layers * width * CONTEXT


def _batch(flops: float) -> int:
    """Returns the windows of a batch, an even number."""
    return max(4, 2 * round(0.2920 * flops**0.3271 / CONTEXT / 2))


def _number(key: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise ValueError(f"{key}={text}: it must be a number above 0")
    return value
