"""The other sides: Hugging Face GPT-2 and plain PyTorch, tokenizers, nanoGPT's loader.

As fast as their own settings make them: all cores, SDPA, fused AdamW. Each function
prepares and warms up, and returns (go, facts), like those of ours.py.
"""

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.benches import nanogpt
from experiments.benches.worker import peak_mb, require, timed

Go = Callable[[], dict[str, Any]]
GROUP_CHARS = 1 << 20  # of text that tokenizers get at once: memory stays bounded
TEXT_CHARS = 10_000  # in each text of such a group


def _gpt2(shape: Mapping[str, int]) -> Any:
    """Returns a random Hugging Face GPT-2 with SDPA attention and no dropout."""
    require("torch", "transformers")
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": "sdpa"}
    config = GPT2Config(
        **options,
        vocab_size=shape["vocab_size"],
        n_positions=shape["context"],
        n_embd=shape["d_model"],
        n_layer=shape["n_layers"],
        n_head=shape["n_heads"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def train_step_rate(
    *, shape: Mapping[str, int], batch: int, seconds
) -> tuple[Go, dict]:
    """Trained tokens per second of Hugging Face GPT-2, eager, float32.

    Args:
      shape: vocab_size, context (T), n_layers, n_heads, d_model.
      batch: B.
      seconds: what `go` takes, about; 0 = one step.
    """
    model = _gpt2(shape).train()
    import torch.nn.functional as F

    weights = dict(model.named_parameters())
    plan = nanogpt.Recipe(steps=1_000_000, batch=batch, beta2=0.95)
    optimizer = nanogpt.make_optimizer(weights, plan)

    def loss(weights, tokens_BT, targets_BT, training):
        logits_BTV = model(input_ids=tokens_BT, use_cache=False).logits
        return F.cross_entropy(logits_BTV.flatten(0, 1), targets_BT.flatten())

    step = nanogpt.make_step(loss, weights, optimizer, plan)
    count = sum(w.numel() for w in weights.values())
    go = _rate(step, shape["vocab_size"], batch, shape["context"], seconds, "cpu")
    return go, {"parameters": count, **_threads()}


def plain_step_rate(
    *, shape: Mapping[str, Any], batch: int, seconds, device: str, compiled: bool
) -> tuple[Go, dict]:
    """Trained tokens per second of GPT-2 in plain PyTorch, compiled, bf16 on a GPU."""
    require("torch")
    fixed = nanogpt.Shape(**shape)
    weights = nanogpt.init(fixed, device)
    plan = nanogpt.Recipe(steps=1_000_000, batch=batch, beta2=0.95)
    optimizer = nanogpt.make_optimizer(weights, plan)
    loss = nanogpt.on_device(nanogpt.make_loss(fixed), device, compiled=compiled)
    step = nanogpt.make_step(loss, weights, optimizer, plan)
    go = _rate(step, fixed.vocab_size, batch, fixed.seq_len, seconds, device)
    return go, {"parameters": sum(w.numel() for w in weights.values()), **_threads()}


def _threads() -> dict:
    import torch

    return {"threads": torch.get_num_threads()}


def _rate(step, vocab: int, batch: int, seq_len: int, seconds, device: str) -> Go:
    import torch

    windows = torch.randint(vocab, (4, batch, seq_len + 1), device=device)
    number = 0

    def measure(count: int) -> float:
        nonlocal number
        started = time.perf_counter()
        value = None
        for _ in range(count):
            window = windows[number % 4]
            value = step(window[:, :-1], window[:, 1:], number)
            number += 1
        assert value is not None
        value.item()  # waits for a GPU
        return time.perf_counter() - started

    measure(2)
    steps = max(1, int(seconds / measure(3)) + 1) * 3 if seconds else 1

    def go() -> dict:
        spent = measure(steps)
        rate = steps * batch * seq_len / spent
        return {"value": rate, "ms": 1e3 * spent / steps, "peak_mb": peak_mb()}

    return go


def first_step(*, shape: Mapping[str, int], batch: int) -> tuple[Go, dict]:
    """From nothing to the first step of Hugging Face GPT-2 done."""
    go, _ = train_step_rate(shape=shape, batch=batch, seconds=0)
    return go, {"peak_mb": peak_mb()}


def decode_rate(
    *, shape: Mapping[str, int], batch: int, prompt: int, new: int, device: str
) -> tuple[Go, dict]:
    """New tokens per second of Hugging Face `generate`, greedy, with its cache."""
    model = _gpt2(shape).eval().to(device)
    import torch

    if device != "cpu":
        model = model.to(torch.bfloat16)
    prompt_BT = torch.randint(shape["vocab_size"], (batch, prompt), device=device)
    settings: dict[str, Any] = {"do_sample": False, "use_cache": True}
    settings |= {"pad_token_id": 0, "attention_mask": torch.ones_like(prompt_BT)}
    settings |= {"min_new_tokens": new, "max_new_tokens": new, "eos_token_id": None}

    def write() -> None:
        with torch.inference_mode():
            ids = model.generate(prompt_BT, **settings)
        assert ids.shape == (batch, prompt + new), ids.shape

    write()

    def go() -> dict:
        return {"value": batch * new / timed(write), "peak_mb": peak_mb()}

    return go, _threads()


def encode_rate(*, folder: str, text: Mapping[str, Any]) -> tuple[Go, dict]:
    """MB of text per second through tokenizers' batch encoding, ids kept as arrays."""
    require("tokenizers")
    import tokenizers

    from experiments.benches import texts

    file, ready = texts.text_and_tokenizer(folder, **text)
    backend = tokenizers.Tokenizer.from_file(str(ready))

    def encode() -> None:
        kept = []
        with file.open(encoding="utf-8") as stream:
            while group := stream.read(GROUP_CHARS):
                parts = range(0, len(group), TEXT_CHARS)
                batch = [group[i : i + TEXT_CHARS] for i in parts]
                found = backend.encode_batch_fast(batch, add_special_tokens=False)
                kept += [np.array(encoding.ids, np.uint16) for encoding in found]
        np.concatenate(kept)

    def go() -> dict:
        size = file.stat().st_size / 1e6
        return {"value": size / timed(encode), "peak_mb": peak_mb()}

    return go, {}


def loader_rate(
    *, folder: str, seq_len: int, batch: int, count: int
) -> tuple[Go, dict]:
    """Batches per second of windows from a memory map, stacked as nanoGPT does."""
    require("torch")
    from experiments.benches import texts

    path = texts.shards(Path(folder)) / "shard-00000.bin"

    def batches() -> None:
        for _ in range(count):
            ids = np.memmap(path, np.uint16, mode="r")  # anew each time, as there
            nanogpt.random_windows(ids, batch, seq_len, "cpu")

    return lambda: {"value": count / timed(batches)}, {}
