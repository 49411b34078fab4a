"""Our sides. Each function prepares and warms up, and returns (go, facts).

B batch  T time  S the longest row
"""

import math
import shutil
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benches import texts
from experiments.benches.worker import peak_mb, timed
from gpt_jax import (
    adapters,
    data,
    metrics,
    model,
    optimizer,
    prepare,
    programs,
    quantised,
    sample,
    sampling,
    sharding,
)
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.model import GPT, GPTConfig, hidden, logits
from gpt_jax.step import start, train_step
from gpt_jax.tasks import lm

Go = Callable[[], dict[str, Any]]
MS = 1e3


class Trainer(NamedTuple):
    """A model that trains on random tokens, built as `train.build` builds it."""

    cfg: GPTConfig
    strategy: sharding.Strategy
    state: Any
    step_fn: Callable
    key: jax.Array
    hyper: optimizer.Hyper


def trainer(
    recipe: Mapping[str, Any], *, batch: int, accumulate: int, device: Any = None
) -> Trainer:
    """Returns a trainer of `recipe`: model, optimizer, hyper and task of a config.

    It trains on one `device`, from weights that the CPU draws; on all, where none is
    given.
    """
    micro = batch // accumulate
    sharding.set_cpu_devices(micro, data=-1, fsdp=1, tensor=1, cpu_devices=0)
    cfg = GPTConfig(**recipe["model"])
    axes = {"data": -1, "fsdp": 1, "tensor": 1, "cpu_devices": 0}
    declared = model.declared(cfg)
    if device is None:
        strategy = sharding.make(micro, declared, strategy="mesh", **axes)
    else:
        strategy = sharding.mesh_strategy(
            sharding.arranged((1, 1, 1), [device]), declared
        )
    options = {k: v for k, v in recipe["optimizer"].items() if k != "ema"}
    tx = optimizer.make(declared, **options, spread=strategy.spread)
    loss = lm.make_loss(
        GPT(cfg),
        np.ones(cfg.vocab_size, np.int32),
        loss_chunk=recipe["task"]["loss_chunk"],
        dropout=(),
    )
    init_key, key = jax.random.split(jax.random.key(0))
    fresh = jax.jit(
        lambda k: start(model.init(cfg, k), {}, tx, ema=False),
        compiler_options=programs.options_for_one_run(model.count(cfg)),
    )
    step_fn = partial(train_step, loss=loss, join=adapters.full(declared).join, tx=tx)
    hyper = {name: jnp.float32(value) for name, value in recipe["hyper"].items()}
    drawn_on = jax.devices("cpu")[0] if device is not None else None
    with jax.default_device(drawn_on):
        state = fresh(init_key)
    return Trainer(
        cfg=cfg,
        strategy=strategy,
        state=strategy.place(state),
        step_fn=strategy.compile(step_fn),
        key=key,
        hyper=optimizer.Hyper(**hyper),
    )


def random_batches(vocab: int, seq_len: int, *, batch: int, accumulate: int) -> list:
    """Returns a few host batches [A, B, T] of random tokens."""
    rng = np.random.default_rng(0)
    shape = (accumulate, batch // accumulate, seq_len + 1)
    tokens = [rng.integers(0, vocab, shape, np.int32) for _ in range(4)]
    return [
        {
            "tokens": np.ascontiguousarray(x[..., :-1]),
            "targets": np.ascontiguousarray(x[..., 1:]),
            "mask": np.ones(x[..., 1:].shape, np.float32),
        }
        for x in tokens
    ]


def run_steps(job: Trainer, state, batches, count: int):
    """Takes `count` steps as the training loop does and waits for the last."""
    for i in range(count):
        batch = job.strategy.put(batches[i % len(batches)])
        state, _, info = job.step_fn(state, batch, job.key, job.hyper)
        sharding.wait_on_cpu(info)
    jax.block_until_ready(state)
    return state


def train_step_rate(
    *, recipe: Mapping[str, Any], seq_len: int, batch: int, accumulate: int, seconds
) -> tuple[Go, dict]:
    """Trained tokens per second; `go` takes about so many seconds (0 = one step)."""
    job = trainer(recipe, batch=batch, accumulate=accumulate)
    batches = random_batches(
        job.cfg.vocab_size, seq_len, batch=batch, accumulate=accumulate
    )
    state = run_steps(job, job.state, batches, 2)
    job = job._replace(state=None)

    def measure(count: int) -> float:
        nonlocal state
        started = time.perf_counter()
        state = run_steps(job, state, batches, count)
        return time.perf_counter() - started

    steps = steps_for(measure, seconds)

    def go() -> dict:
        spent = measure(steps)
        rate = steps * batch * seq_len / spent
        return {"value": rate, "ms": MS * spent / steps, "peak_mb": peak_mb()}

    cfg, parameters = job.cfg, model.count(job.cfg)
    flops = metrics.flops_per_token(
        parameters,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        head_dim=cfg.head_dim,
        seq_len=seq_len,
    )
    devices = job.strategy.mesh.size
    return go, {"flops": flops, "parameters": parameters, "devices": devices}


def steps_for(measure: Callable[[int], float], seconds: float) -> int:
    """Returns how many steps take about `seconds`; `measure(n)` times n of them."""
    return max(1, math.ceil(seconds / measure(3))) * 3 if seconds else 1


def first_step(
    *, recipe: Mapping[str, Any], seq_len: int, batch: int, cache: str
) -> tuple[Go, dict]:
    """From nothing to the first step done; the facts hold where the time went.

    "compile": seconds of XLA, or of reading its result from `cache`; "trace": those of
    tracing and lowering, which no cache spares. "" = no cache.
    """
    spent: dict[str, float] = {}

    def listen(event: str, duration_secs: float, **_) -> None:
        spent[event] = spent.get(event, 0.0) + duration_secs

    jax.monitoring.register_event_duration_secs_listener(listen)
    programs.use_cache(cache)
    job = trainer(recipe, batch=batch, accumulate=1)
    batches = random_batches(job.cfg.vocab_size, seq_len, batch=batch, accumulate=1)
    run_steps(job, job.state, batches, 1)
    base = "/jax/core/compile/"
    compiling = spent[base + "backend_compile_duration"]
    tracing = sum(v for k, v in spent.items() if k.startswith(base)) - compiling
    facts = {"compile": compiling, "trace": tracing, "peak_mb": peak_mb()}
    return lambda: {"value": compiling}, facts


def decode_rate(
    *,
    recipe: Mapping[str, Any],
    batch: int,
    prompt: int,
    new: int,
    cached: bool,
    bits: int = 0,
) -> tuple[Go, dict]:
    """New tokens per second, greedy, prompt included; checked against no cache.

    `cached=False` is the plain way: the whole text through the model for every token.
    Weights of few `bits` are not checked so: rounded activations may turn a near tie.
    """
    cfg = GPTConfig(**recipe["model"])
    gpt = GPT(cfg)
    params = jax.jit(partial(model.init, cfg))(jax.random.key(0))
    if bits:
        params = model.unstack(params, cfg)
        params = quantised.weights(params, model.declared(cfg), bits=bits)
    gpt, params = sample.laid_out(gpt, params, rows=batch)
    prompt_BT = random_batches(cfg.vocab_size, prompt, batch=batch, accumulate=1)
    prompt_BT = prompt_BT[0]["tokens"][0]
    write = writer(gpt, params, new) if cached else _uncached(gpt, params, new)
    tokens_BS = write(prompt_BT)

    def go() -> dict:
        spent = timed(lambda: write(prompt_BT))
        return {"value": batch * new / spent, "peak_mb": peak_mb()}

    # Every step reads every weight; rows share the reading.
    if bits:
        read = sum(x.nbytes for x in jax.tree.leaves(params)) / batch
        return go, {"bytes": read}
    same = bool((tokens_BS == greedy_again(gpt, params, tokens_BS, prompt)).all())
    read = 4.0 * model.count(cfg) / batch
    return go, {"bytes": read, "same_as_uncached": same}


def writer(gpt: GPT, params, new: int) -> Callable:
    """Returns prompt_BT -> tokens_BS: greedy texts of `new` tokens more."""
    generate = jax.jit(sample.generate, static_argnames=("model", "max_length"))

    def write(prompt_BT) -> np.ndarray:
        rows, width = prompt_BT.shape
        settings = sampling.settings(new, temperature=0.0)
        tokens_BS, _, _ = generate(
            params,
            prompt_BT,
            np.full(rows, width, np.int32),
            sample.rows_of([settings] * rows),
            jax.random.split(jax.random.key(0), rows),
            model=gpt,
            max_length=width + new,
            stop_id=-1,
        )
        return np.asarray(tokens_BS)

    return write


def _uncached(gpt: GPT, params, new: int) -> Callable:
    """The text grows in a buffer whose size doubles, so that programs stay few."""

    @jax.jit
    def likeliest(params, tokens_BS, length):
        x_BSD = hidden(gpt, params, tokens_BS).x_BTD
        return logits(gpt, params, x_BSD[:, length - 1]).argmax(-1)

    def write(prompt_BT) -> np.ndarray:
        rows, length = prompt_BT.shape
        end = length + new
        tokens_BS = np.zeros((rows, end), np.int32)
        tokens_BS[:, :length] = prompt_BT
        for n in range(length, end):
            size = min(1 << (n - 1).bit_length(), end)
            tokens_BS[:, n] = likeliest(params, tokens_BS[:, :size], n)
        return tokens_BS

    return write


def greedy_again(gpt: GPT, params, tokens_BS, prompt: int) -> np.ndarray:
    """Returns the rows with every token after the prompt chosen without a cache.

    One pass over the finished rows does: with a causal model, what stands at a place
    depends on what is before it only, so the first difference shows.
    """
    forward: Any = jax.jit(gpt.apply)
    logits_BSV, _ = forward({"params": params}, jnp.asarray(tokens_BS))
    best_BS = np.asarray(logits_BSV.argmax(-1))
    again_BS = np.array(tokens_BS)
    again_BS[:, prompt:] = best_BS[:, prompt - 1 : -1]
    return again_BS


def prepare_rate(
    *, folder: str, text: Mapping[str, Any], workers: int
) -> tuple[Go, dict]:
    """MB of text per second from a file to verified shards, as training does it."""
    file, ready = texts.text_and_tokenizer(folder, **text)
    target = Path(folder) / "prepared"

    def go() -> dict:
        shutil.rmtree(target, ignore_errors=True)
        spent = timed(lambda: _prepare(file, ready, target, workers))
        return {"value": file.stat().st_size / 1e6 / spent, "peak_mb": peak_mb()}

    return go, {}


def prepare_peak(
    *, folder: str, text: Mapping[str, Any], workers: int
) -> tuple[Go, dict]:
    """Prepares once; the facts hold the peak memory of the process."""
    file, ready = texts.text_and_tokenizer(folder, **text)
    target = Path(folder) / "prepared"
    shutil.rmtree(target, ignore_errors=True)
    before = peak_mb()
    _prepare(file, ready, target, workers)
    shutil.rmtree(target)
    facts = {"peak_mb": peak_mb(), "before_mb": before}
    return lambda: {"value": facts["peak_mb"]}, facts


def _prepare(text: Path, tokenizer: Path, folder: Path, workers: int) -> None:
    prepare.prepare(
        source=str(text),
        field="text",
        tokenizer=str(tokenizer),
        folder=folder,
        cache=folder,
        val_fraction=0.1,
        split="fraction",
        workers=workers,
        skip_bad_docs=False,
        progress=False,
    )


def loader_rate(
    *, folder: str, seq_len: int, batch: int, count: int
) -> tuple[Go, dict]:
    """Batches per second, shuffled windows from memory-mapped shards."""
    batches = _batches(Path(folder), seq_len=seq_len, batch=batch)

    def go() -> dict:
        return {"value": count / timed(lambda: [next(batches) for _ in range(count)])}

    return go, {}


def data_wait(**options) -> tuple[Go, dict]:
    """The share of training time, in %, that the device is without a batch.

    At most: the whole time of taking and placing a batch counts when the step had
    ended by then. What it costs where host and device share the cores is `data_cost`.
    """
    steps, walk = _walk(**options)

    def go() -> dict:
        spent, late = walk(fresh=True)
        return {"value": 100 * late / spent, "ms": MS * late / steps}

    return go, {}


def data_cost(**options) -> tuple[Go, dict]:
    """What fresh batches add to a training step, in %, over using one batch again."""
    steps, walk = _walk(**options)

    def go() -> dict:
        before, fresh, after = (walk(fresh=fresh)[0] for fresh in (False, True, False))
        again = (before + after) / 2  # a machine may grow slower or faster
        return {"value": 100 * (fresh / again - 1), "ms": MS * (fresh - again) / steps}

    return go, {}


def _walk(
    *, recipe: Mapping[str, Any], folder: str, seq_len: int, batch: int, steps: int
) -> tuple[int, Callable]:
    """Returns `walk(fresh)`: the seconds of so many steps, and of late batches."""
    job = trainer(recipe, batch=batch, accumulate=1)
    batches = _batches(Path(folder), seq_len=seq_len, batch=batch)
    placed = job.strategy.put(next(batches))
    state, job = job.state, job._replace(state=None)

    def walk(*, fresh: bool) -> tuple[float, float]:
        nonlocal state, placed
        late, started = 0.0, time.perf_counter()
        for _ in range(steps):
            state, _, info = job.step_fn(state, placed, job.key, job.hyper)
            asked = time.perf_counter()
            if fresh:  # while the step computes, as in training
                placed = job.strategy.put(next(batches))
            if info["grad_norm"].is_ready():
                late += time.perf_counter() - asked
            sharding.wait_on_cpu(info)
        jax.block_until_ready(state)
        return time.perf_counter() - started, late

    walk(fresh=True)
    return steps, walk


def _batches(folder: Path, *, seq_len: int, batch: int) -> data.Batches:
    windows = data.Windows(
        data.open(texts.shards(folder)), seq_len=seq_len, stride=1, tail=False
    )
    return data.batches(
        windows,
        batch_size=batch,
        accumulate=1,
        seed=0,
        start=0,
        rows=range(batch),
        timeout_s=300.0,
    )


def checkpoint_stall(
    *, recipe: Mapping[str, Any], folder: str, wait: bool
) -> tuple[Go, dict]:
    """Seconds that the training loop is held up by a save; `wait` for its end or not.

    The background write of a save that does not wait ends before the next one begins.
    """
    job = trainer(recipe, batch=1, accumulate=1)
    state = sharding.local(job.state)
    name = "sync" if wait else "async"
    shutil.rmtree(Path(folder) / name, ignore_errors=True)
    saves = Checkpoints(Path(folder) / name / "checkpoints", keep=1)
    step = 0

    def save() -> None:
        saves.save(step, state, metric=None, meta={})
        if wait:
            saves.wait()

    def go() -> dict:
        nonlocal step
        step += 1
        spent = timed(save)
        saves.wait()
        return {"value": spent}

    go()  # Orbax is imported at the first save
    size = sum(x.nbytes for x in jax.tree.leaves(state))
    return go, {"state_mb": size / 1e6}
