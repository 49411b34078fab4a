"""The peer of training to a loss: nanoGPT's published recipe, in PyTorch.

Written from the facts that nanoGPT's README and configs state; nothing of it is needed.
Torch is imported inside functions: it is an extra.

B batch  T time  D width  H heads  K head dim  V vocabulary
"""

import json
import math
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

EVAL_TOKENS = 16_384  # in one batch of an evaluation, as in our loop


class Shape(NamedTuple):
    """The architecture: GPT-2's, exact GELU and no biases unless `bias`."""

    vocab_size: int
    seq_len: int
    n_layers: int
    n_heads: int
    d_model: int
    dropout: float = 0.0
    bias: bool = False


class Recipe(NamedTuple):
    """AdamW under a cosine, as nanoGPT's shakespeare_char configs have it."""

    steps: int
    batch: int
    lr: float = 1e-3
    min_lr: float = 1e-4
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.99
    weight_decay: float = 0.1
    clip: float = 1.0


def init(shape: Shape, device: str) -> dict[str, Any]:
    """Returns GPT-2's random weights: N(0, 0.02), residual projections / sqrt(2 L)."""
    import torch

    D, scale = shape.d_model, 0.02 / math.sqrt(2 * shape.n_layers)
    sizes = {"embed": ((shape.vocab_size, D), 0.02)}
    sizes["positions"] = ((shape.seq_len, D), 0.02)
    for i in range(shape.n_layers):
        sizes[f"{i}.qkv"] = ((3 * D, D), 0.02)
        sizes[f"{i}.out"] = ((D, D), scale)
        sizes[f"{i}.up"] = ((4 * D, D), 0.02)
        sizes[f"{i}.down"] = ((D, 4 * D), scale)
    weights = {k: std * torch.randn(size) for k, (size, std) in sizes.items()}
    if shape.bias:
        linear = [
            k for k in weights if k.split(".")[-1] in ("qkv", "out", "up", "down")
        ]
        weights |= {f"{k}.bias": torch.zeros(len(weights[k])) for k in linear}
    norms = [f"{i}.norm{j}" for i in range(shape.n_layers) for j in (1, 2)]
    for name in [*norms, "norm"]:
        weights[name] = torch.ones(D)
        if shape.bias:
            weights[f"{name}.bias"] = torch.zeros(D)
    return {k: w.to(device).requires_grad_() for k, w in weights.items()}


def make_loss(shape: Shape) -> Callable:
    """Returns (weights, tokens [B, T], targets [B, T], training) -> mean nats."""
    import torch.nn.functional as F

    D, H, rate = shape.d_model, shape.n_heads, shape.dropout
    approximate = "tanh" if shape.bias else "none"  # GPT-2's, nanoGPT's

    def loss(weights, tokens_BT, targets_BT, training: bool):
        def norm(x, name):
            return F.layer_norm(x, (D,), weights[name], weights.get(f"{name}.bias"))

        def linear(x, name):
            return F.linear(x, weights[name], weights.get(f"{name}.bias"))

        def drop(x):
            return F.dropout(x, rate, training) if rate else x

        B, T = tokens_BT.shape
        x_BTD = F.embedding(tokens_BT, weights["embed"]) + weights["positions"][:T]
        x_BTD = drop(x_BTD)
        for i in range(shape.n_layers):
            qkv_BTE = linear(norm(x_BTD, f"{i}.norm1"), f"{i}.qkv")
            q_BHTK, k_BHTK, v_BHTK = (
                part.view(B, T, H, D // H).transpose(1, 2)
                for part in qkv_BTE.split(D, dim=2)
            )
            y_BHTK = F.scaled_dot_product_attention(
                q_BHTK,
                k_BHTK,
                v_BHTK,
                dropout_p=rate if training else 0.0,
                is_causal=True,
            )
            y_BTD = y_BHTK.transpose(1, 2).reshape(B, T, D)
            x_BTD = x_BTD + drop(linear(y_BTD, f"{i}.out"))
            h_BTF = linear(norm(x_BTD, f"{i}.norm2"), f"{i}.up")
            h_BTF = F.gelu(h_BTF, approximate=approximate)
            x_BTD = x_BTD + drop(linear(h_BTF, f"{i}.down"))
        logits_BTV = F.linear(norm(x_BTD, "norm"), weights["embed"])
        return F.cross_entropy(
            logits_BTV.reshape(-1, shape.vocab_size).float(), targets_BT.reshape(-1)
        )

    return loss


def make_optimizer(weights: Mapping[str, Any], recipe: Recipe):
    """Returns fused AdamW; matrices and embeddings decay, vectors do not."""
    import torch

    matrices = [w for w in weights.values() if w.dim() >= 2]
    vectors = [w for w in weights.values() if w.dim() < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": recipe.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=recipe.lr,
        betas=(recipe.beta1, recipe.beta2),
        fused=True,
    )


def rate(step: int, recipe: Recipe) -> float:
    """Returns the learning rate of update number `step` (from 0)."""
    if step < recipe.warmup:
        return recipe.lr * (step + 1) / (recipe.warmup + 1)
    done = (step - recipe.warmup) / max(1, recipe.steps - recipe.warmup)
    share = 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))
    return recipe.min_lr + share * (recipe.lr - recipe.min_lr)


def make_step(loss: Callable, weights: Mapping[str, Any], optimizer, recipe: Recipe):
    """Returns (tokens, targets, step number): forward, backward, clip, update."""
    import torch

    def step(tokens_BT, targets_BT, number: int):
        for group in optimizer.param_groups:
            group["lr"] = rate(number, recipe)
        value = loss(weights, tokens_BT, targets_BT, True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return value

    return step


def on_device(loss: Callable, device: str, *, compiled: bool) -> Callable:
    """Returns the loss as it runs fastest: compiled, and in bfloat16 on a GPU."""
    import torch

    fast = torch.compile(loss) if compiled else loss
    if device == "cpu":
        return fast
    torch.set_float32_matmul_precision("high")

    def mixed(*args):
        with torch.autocast(device, dtype=torch.bfloat16):
            return fast(*args)

    return mixed


def train(
    *,
    text: str,
    folder: str,
    shape: Mapping[str, Any],
    recipe: Mapping[str, Any],
    eval_every: int,
    stop_at: float,
    device: str,
    compiled: bool,
    seed: int,
) -> None:
    """Trains characters of a text and writes metrics.jsonl, as our own runs do.

    Args:
      text: a file; its last tenth is for validation.
      folder: where metrics.jsonl goes.
      shape: the fields of Shape, less vocab_size.
      recipe: the fields of Recipe.
      eval_every: steps between two evaluations over all windows, each target once.
      stop_at: ends at the first evaluation with a loss of at most this.
      device: cpu or cuda.
      compiled: use torch.compile.
      seed: of weights, batches and dropout.
    """
    import torch

    torch.manual_seed(seed)
    characters = Path(text).read_text(encoding="utf-8")
    table = {c: i for i, c in enumerate(sorted(set(characters)))}
    ids = np.array([table[c] for c in characters], np.int64)
    cut = int(len(ids) * 0.9)
    fixed, plan = Shape(vocab_size=len(table), **shape), Recipe(**recipe)
    weights = init(fixed, device)
    loss = on_device(make_loss(fixed), device, compiled=compiled)
    step = make_step(loss, weights, make_optimizer(weights, plan), plan)
    started = time.monotonic()
    with (Path(folder) / "metrics.jsonl").open("w", encoding="utf-8") as record:
        for number in range(plan.steps + 1):
            if number % eval_every == 0 or number == plan.steps:
                value = evaluate(loss, weights, ids[cut:], fixed.seq_len, device)
                seconds = time.monotonic() - started
                row = {"step": number, "seconds": seconds, "val_loss": value}
                record.write(json.dumps(row) + "\n")
                record.flush()
                if value <= stop_at or number == plan.steps:
                    return
            step(*random_windows(ids[:cut], plan.batch, fixed.seq_len, device), number)


def random_windows(ids: np.ndarray, batch: int, seq_len: int, device: str):
    """Returns tokens and targets [B, T] of windows that begin anywhere."""
    import torch

    places = torch.randint(len(ids) - seq_len, (batch,)).tolist()
    chosen = [
        torch.from_numpy(ids[i : i + seq_len + 1].astype(np.int64)) for i in places
    ]
    window = torch.stack(chosen)
    if device != "cpu":
        window = window.pin_memory().to(device, non_blocking=True)
    return window[:, :-1], window[:, 1:]


def evaluate(loss: Callable, weights, ids: np.ndarray, seq_len: int, device: str):
    """Returns the mean loss over all windows that do not overlap, each target once."""
    import torch

    full = (len(ids) - 1) // seq_len
    total, size = 0.0, max(1, EVAL_TOKENS // seq_len)
    spans = [(i, min(i + size, full)) for i in range(0, full, size)]
    parts = [(ids[a * seq_len : b * seq_len + 1], seq_len) for a, b in spans]
    rest = ids[full * seq_len :]
    if len(rest) > 1:
        parts.append((rest, len(rest) - 1))
    with torch.no_grad():
        for part, width in parts:
            x = torch.from_numpy(part.astype(np.int64)).to(device)
            tokens, targets = x[:-1].view(-1, width), x[1:].view(-1, width)
            total += float(loss(weights, tokens, targets, False)) * targets.numel()
    return total / (len(ids) - 1)
