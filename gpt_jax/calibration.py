"""How fast this machine trains: a few steps, measured once and kept.

The speed is that of the train step itself, of a model as small as those that a budget
of minutes has room for: FLOPs as metrics.flops_per_token counts them, per second.
"""

import json
import subprocess
import tempfile
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gpt_jax import commands, files, metrics, model, runs, screen, tokenizers, train

STEPS = 24
KEYS = ("flops", "seconds", "parameters", "machine")


class Speed(NamedTuple):
    """What was measured.

    Attributes:
      flops: FLOP/s of training, over all devices.
      seconds: of one of the steps that were measured.
      parameters: of their model.
      machine: its devices, in words.
    """

    flops: float
    seconds: float
    parameters: int
    machine: str


def known(cache: str | Path) -> Speed:
    """Returns the speed of this machine, measured in a process of its own if need be.

    A process that measures has started JAX, on devices that a run would choose
    otherwise.

    Raises:
      ValueError: it could not be measured.
    """
    if found := kept(cache):
        return found
    screen.say("measuring how fast this machine trains: once, a few seconds ...")
    words = [*commands.argv("calibrate"), f"--cache={cache}"]
    done = subprocess.run(words, capture_output=True, text=True)
    if found := kept(cache):
        return found
    raise ValueError(
        "how fast this machine trains could not be measured: "
        f"{done.stderr.strip().splitlines()[-1] if done.stderr.strip() else 'no word'}"
    )


def kept(cache: str | Path) -> Speed | None:
    """Returns the speed that is kept for this machine; None where there is none."""
    try:
        found = json.loads(_path(cache).read_text(encoding="utf-8"))
        return Speed(**{key: found[key] for key in KEYS})
    except (OSError, ValueError, KeyError, TypeError):
        return None


def measure(cache: str | Path, config: Any) -> Speed:
    """Measures the speed with a few steps of a small model's config, and keeps it."""
    config.update(steps=STEPS, log_every=STEPS // 3, eval_every=0, sample_every=0)
    config.update(checkpoint_every=0, tensorboard=False)
    config.data.source = "builtin:json"
    with tempfile.TemporaryDirectory(prefix="calibrate-") as folder:
        config.data.folder = str(Path(folder) / "data")
        train.train(config, Path(folder) / "run")
        found = speed_of(Path(folder) / "run")
    _path(cache).parent.mkdir(parents=True, exist_ok=True)
    files.write_json(_path(cache), found._asdict())
    return found


def speed_of(run: Path) -> Speed:
    """Returns the speed that a run has recorded last."""
    config = runs.read_config(run)
    cfg = runs.model_config(config, tokenizers.load(run / "tokenizer.json"))
    rates = [row["tokens_per_second"] for row in metrics.read(run)
             if "tokens_per_second" in row]  # fmt: skip
    each = metrics.flops_per_token(
        model.count(cfg),
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        head_dim=cfg.head_dim,
        seq_len=cfg.context_length,
    )
    device = jax.devices()[0]
    return Speed(
        flops=each * rates[-1],
        seconds=config.batch_size * cfg.context_length / rates[-1],
        parameters=model.count(cfg),
        machine=f"{jax.device_count()} x {device.device_kind}",
    )


def in_words(speed: Speed) -> str:
    """Returns a speed as a line."""
    return (
        f"{speed.machine}: {speed.flops / 1e9:,.0f} GFLOP/s while it trains "
        f"{speed.parameters:,} parameters ({speed.seconds:.3g} s a step)"
    )


def _path(cache: str | Path) -> Path:
    text = f"{files.host()} {files.cpu()} {files.cores()} {metadata.version('jax')}"
    return files.expand(cache) / "speed" / f"{files.digest(text)[:16]}.json"
