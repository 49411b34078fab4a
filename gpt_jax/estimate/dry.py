"""The programs of a config, compiled for devices that are not there.

Arguments are shapes with their placement, so no weight is ever made. `on_cpus` lets
XLA's CPU backend stand in for as many devices as wanted; `on` asks the compiler of the
devices themselves (targets.py).
"""

import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from ml_collections import ConfigDict

from gpt_jax import files, model, sample, sharding, train
from gpt_jax.estimate import plan as plans
from gpt_jax.estimate import program as programs
from gpt_jax.estimate import roofline, targets
from gpt_jax.mesh import AXES
from gpt_jax.model import GPT
from gpt_jax.serve import batch as serving

TELL_EVERY_S = 10.0
# Nothing will run, so code need not be fast: a tenth of the time to compile it.
OPTIONS = {"xla_backend_optimization_level": 0}
TRAIN = "train step"
PROMPT = 512  # tokens of the prompts whose prefill is compiled, at most
MANY = 2**31  # examples: more than a batch of an evaluation holds
# How XLA refuses a program: what it needs, in all or for temporaries alone, of what is.
EXHAUSTED = re.compile(
    r"(?:Used |HLO temporaries \()([\d.]+)([KMGT]?)"
    r"(?: of |\) exceeds available HBM \()([\d.]+)([KMGT]?)"
)


class Draft(NamedTuple):
    """A program that has not been traced yet.

    Attributes:
      name: what people call it.
      run: jitted.
      arguments: shapes, placed.
      tokens: how many it trains, reads or writes.
    """

    name: str
    run: Any
    arguments: tuple
    tokens: int


def on_cpus(
    config: ConfigDict, mesh: Mapping[str, int], *, tell: Callable[[str], Any]
) -> dict[str, Any]:
    """Compiles the train step of a config for a mesh of virtual CPU devices.

    Call it before anything else uses JAX: the number of devices is fixed then.

    Args:
      config: what `train.train` takes.
      mesh: the lengths of its axes.
      tell: is called with lines of progress.

    Returns:
      "memory": XLA's bytes of one device, by kind; "collectives": count, and bytes that
      one device sees in a step, by kind; "seconds", "host_bytes": what it took.

    Raises:
      ValueError: see `plan.make`; or JAX runs already, with fewer devices.
    """
    axes = {name: mesh[name] for name in AXES}
    count = axes["data"] * axes["fsdp"] * axes["tensor"]
    jax.config.update("jax_platforms", "cpu")
    sharding.set_cpu_devices(0, **axes, cpu_devices=count)
    rows = config.batch_size // config.accumulate
    plan = plans.make(config, sharding.make_mesh(rows, **axes, cpu_devices=0))
    tell(f"tracing the step for {count:,} devices ...")
    started = time.monotonic()
    draft = train_step(plan)
    lowered = draft.run.lower(*draft.arguments)
    tell(f"traced in {time.monotonic() - started:.0f} s; compiling ...")
    compiled = beside(lambda: lowered.compile(compiler_options=OPTIONS), tell)
    return {
        "mesh": axes,
        "devices": count,
        "memory": memory(compiled, on_cpu=True),
        "collectives": totals(programs.Program(compiled.as_text())),
        "seconds": time.monotonic() - started,
        "host_bytes": files.peak_memory(),
    }


def on(
    target: targets.Target,
    config: ConfigDict,
    mesh: Mapping[str, int],
    *,
    which: Sequence[str],
    rows: int,
    peak: float,
    out: str | Path,
    tell: Callable[[str], Any],
) -> Iterator[dict[str, Any]]:
    """Compiles programs of a config for devices that are not there, one by one.

    Args:
      target: the devices.
      config: what `train.train` takes.
      mesh: the lengths of its axes; they use all devices.
      which: of train, evaluate and decode.
      rows: texts that are written at once (decode).
      peak: FLOP/s of one device.
      out: a folder for the programs' texts; "" = none.
      tell: is called with lines of progress.

    Yields:
      of each program a dict: "program", "tokens", "seconds" (trace, compile), and
      "products" (FLOPs over all devices, by dtype), with those of float32 by place in
      "float32". Where it fits also "memory" (bytes of one device, by kind), "calls",
      "collectives" (count and bytes, by kind), "time" (seconds, by the model of
      roofline.py) and "parts" (seconds of kernels by part of the model); else "needs"
      and "has", bytes as the compiler says them.

    Raises:
      ValueError: see `plan.make`; or pmap is asked for, or XLA refuses a program for
        another reason.
    """
    if config.mesh.strategy == "pmap":
        raise ValueError(
            "mesh.strategy pmap runs on devices that are there: compile mesh, with "
            "the same losses, or take --dry_run"
        )
    lengths = (mesh["data"], mesh["fsdp"], mesh["tensor"])
    plan = plans.make(config, sharding.arranged(lengths, target.devices))
    for draft in drafts(plan, which, rows):
        tell(f"{draft.name}: tracing for {target.number:,} x {target.kind.device} ...")
        with targets.answers():
            found, compiled = build(draft, tell, out=out)
        if compiled is not None:
            found |= read(compiled, target.kind, peak)
        yield {"program": draft.name, "tokens": draft.tokens, **found}


def read(compiled: Any, kind: targets.Kind, peak: float) -> dict[str, Any]:
    """Returns what the text of a compiled program says; see `on`."""
    text = programs.Program(compiled.as_text())
    time_ = roofline.measure(text, kind, peak)
    return {
        "calls": dict(text.calls()),
        "collectives": totals(text),
        "time": {**time_._asdict(), "bound": time_.bound},
        "parts": roofline.parts(text, kind, peak),
    }


def build(
    draft: Draft, tell: Callable[[str], Any], *, out: str | Path
) -> tuple[dict[str, Any], Any]:
    """Returns what is known of a program, and the program: None if it does not fit."""
    started = time.monotonic()
    traced = draft.run.trace(*draft.arguments)
    lowered = traced.lower()
    spent = {"trace": time.monotonic() - started}
    tell(f"  traced in {spent['trace']:.0f} s; compiling ...")
    found = {**of_trace(traced.jaxpr), "seconds": spent}
    keep(out, draft.name, "stablehlo", lowered.as_text)
    started = time.monotonic()
    try:
        compiled = beside(lambda: lowered.compile(), tell)
    except jax.errors.JaxRuntimeError as error:
        spent["compile"] = time.monotonic() - started
        return found | refusal(draft.name, str(error)), None
    spent["compile"] = time.monotonic() - started
    keep(out, draft.name, "hlo", compiled.as_text)
    return found | {"memory": memory(compiled, on_cpu=False)}, compiled


def of_trace(jaxpr: Any) -> dict[str, Any]:
    """Returns the FLOPs of a trace's products by dtype, and of wide ones by place.

    What all layers have is one place.
    """
    by_dtype: dict[str, float] = {}
    wide: dict[str, float] = {}
    for one in programs.products(jaxpr):
        by_dtype[one.dtype] = by_dtype.get(one.dtype, 0.0) + one.flops
        if one.dtype == "float32":
            where = re.sub(r"\bblock_\d+\b", "block", one.where)
            wide[where] = wide.get(where, 0.0) + one.flops
    return {"products": by_dtype, "float32": wide}


def refusal(name: str, message: str) -> dict[str, float]:
    """Returns what a program needs and the device has, bytes, as XLA says it.

    Raises:
      ValueError: it was refused for another reason.
    """
    units = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
    found = EXHAUSTED.search(message)
    if found is None:
        line = message.strip().partition("\n")[0]
        raise ValueError(f"XLA does not compile {name}: {line}")
    needs, has = (float(found[i]) * units[found[i + 1]] for i in (1, 3))
    return {"needs": needs, "has": has}


def need(found: Mapping[str, Any], memory: int | None) -> tuple[float, float]:
    """Returns (bytes that a program needs, bytes that there are), 0 = not known."""
    if "needs" in found:
        return found["needs"], found["has"]
    return found["memory"]["peak"], memory or 0


def keep(out: str | Path, name: str, ending: str, text: Callable[[], Any]) -> None:
    """Writes a program's text into the folder `out`, if there is one."""
    if out:
        folder = Path(out)
        folder.mkdir(parents=True, exist_ok=True)
        stem = name.replace("'s", "").replace(" ", "-")
        path = folder / f"{stem}.{ending}.txt"
        path.write_text(text(), "utf-8")


# ------------------------------------------------------------- which programs


def drafts(plan: plans.Plan, which: Sequence[str], rows: int) -> Iterator[Draft]:
    """Yields the programs called train, evaluate and decode."""
    if "train" in which:
        yield train_step(plan)
    if "evaluate" in which:
        yield evaluation(plan)
    if "decode" in which:
        yield from decoding(plan, rows)


def train_step(plan: plans.Plan) -> Draft:
    """Returns the train step."""
    tokens = plan.rows * plan.accumulate * plan.task.tokens
    step: Any = plan.parts.step_fn
    if plan.config.mesh.strategy == "pmap":
        return Draft(TRAIN, _pmapped(plan), _copies(plan), tokens)
    state, *rest = arguments(plan)
    return Draft(
        TRAIN, step.run, (state._replace(frozen={}), state.frozen, *rest), tokens
    )


def arguments(plan: plans.Plan) -> tuple:
    """Returns the shapes, and the places, of what a train step takes."""
    state = placed(plan.state, plan.strategy.layout(plan.state))
    key = jax.eval_shape(lambda: jax.random.key(0))
    return state, plan.batch(), key, hyper(plan)


def hyper(plan: plans.Plan) -> Any:
    """Returns the shapes of the traced numbers."""
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.tree.map(lambda _: number, train.make_hyper(plan.config, plan.task))


def placed(tree: Any, places: Any) -> Any:
    """Returns shapes with their placement: a tree of shardings, or one for all."""
    if isinstance(places, jax.sharding.Sharding):
        places = jax.tree.map(lambda _: places, tree)
    return jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        tree,
        places,
    )


def _pmapped(plan: plans.Plan) -> Any:
    strategy = sharding.pmap_strategy(plan.mesh, plan.strategy.declared)
    step: Any = train.make_parts(plan.config, plan.task, strategy).step_fn
    return step.run


def _copies(plan: plans.Plan) -> tuple:
    """Returns what a pmapped step takes: a copy of the state for each device."""
    n = plan.mesh.size
    stacked = NamedSharding(Mesh(plan.mesh.devices.reshape(-1), ("data",)), P("data"))

    def copies(x):
        return jax.ShapeDtypeStruct((n, *x.shape), x.dtype, sharding=stacked)

    def rows(x):  # [A, B, ...] -> [n, A, B / n, ...]
        a, b, *rest = x.shape
        return jax.ShapeDtypeStruct((n, a, b // n, *rest), x.dtype)

    state = jax.tree.map(copies, plan.state)
    key = jax.eval_shape(lambda: jax.random.key(0))
    batch = jax.tree.map(rows, plan.batch())
    return state._replace(frozen={}), state.frozen, batch, key, hyper(plan)


def evaluation(plan: plans.Plan) -> Draft:
    """Returns the evaluation of one batch, between steps of training."""
    size = train.eval_rows(plan.config, plan.task, MANY, plan.mesh.size)
    where = NamedSharding(plan.mesh, sharding.ROWS)
    batch = {
        name: jax.ShapeDtypeStruct((1, size, *x.shape[2:]), x.dtype, sharding=where)
        for name, x in plan.batch().items()
    }
    frozen = placed(plan.state.frozen, plan.strategy.layout(plan.state.frozen))
    weights = plan.state.params
    if plan.state.frozen:
        weights = jax.eval_shape(plan.parts.join, weights, plan.state.frozen)
    weights = placed(weights, plan.strategy.layout(weights))
    arguments = (weights, frozen, batch, hyper(plan))
    return Draft("evaluation", plan.parts.eval_fn, arguments, size * plan.task.tokens)


def decoding(plan: plans.Plan, rows: int) -> Iterator[Draft]:
    """Yields the prefill of some prompts, a step for all, and the server's step.

    Text is written on the devices of one `tensor` row, served on one device.
    """
    cfg = replace(plan.cfg, scan_layers=False)
    gpt, context = GPT(cfg), plan.cfg.context_length
    mesh = sharding.arranged(
        (1, 1, plan.mesh.shape["tensor"]), list(plan.mesh.devices[0, 0])
    )
    everywhere = NamedSharding(mesh, P())
    state, frozen = plan.state.params, plan.state.frozen
    weights = jax.eval_shape(plan.parts.join, state, frozen) if frozen else state

    def laid_out(weights):
        return sample.laid_out(plan.task.model, weights, rows=rows)[1]

    weights = jax.eval_shape(sharding.within(mesh, laid_out), weights)
    declared = model.declared(cfg)

    def numbers(dtype, *more: int) -> Any:
        return jax.ShapeDtypeStruct((rows, *more), dtype, sharding=everywhere)

    settings = sample.Sampling(
        **{
            name: numbers(jnp.int32 if name in ("top_k", "max_new") else jnp.float32)
            for name in sample.Sampling._fields
        }
    )
    keys = placed(
        jax.eval_shape(lambda: jax.random.split(jax.random.key(0), rows)), everywhere
    )
    length = min(PROMPT, context)
    prompt = (numbers(jnp.int32, length), numbers(jnp.int32), settings, keys)
    fixed = {"model": gpt, "stop_id": 0}
    start = partial(sample.start, max_length=context, **fixed)
    begin = jax.jit(sharding.within(mesh, start))
    given = placed(weights, sharding.layout(declared, weights, mesh))
    yield Draft("prefill", begin, (given, *prompt), rows * length)

    state = jax.eval_shape(sharding.within(mesh, start), given, *prompt)
    state = placed(state, everywhere)._replace(cache=_cache(state.cache, mesh))
    advance = jax.jit(
        sharding.within(mesh, partial(sample.advance, **fixed)), donate_argnums=1
    )
    steps = jax.ShapeDtypeStruct((), jnp.int32)
    yield Draft("decode step", advance, (given, state, settings, keys, steps), rows)

    one = sharding.arranged((1, 1, 1), list(plan.mesh.devices[0, 0][:1]))
    alone = NamedSharding(one, P())
    held = jax.eval_shape(
        sharding.within(one, lambda: serving.empty(cfg, rows, context))
    )
    running = jax.ShapeDtypeStruct((rows,), jnp.bool_, sharding=alone)
    step = jax.jit(
        sharding.within(one, partial(serving.step, model=gpt)), donate_argnums=1
    )
    free = serving.allowed(rows, cfg.vocab_size, {})
    arguments = (placed(weights, alone), placed(held, alone), running)
    yield Draft("server's step", step, (*arguments, placed(free, alone)), rows)


def _cache(cache: Any, mesh: Mesh) -> Any:
    """Returns a cache's shapes with its heads split where they divide."""

    def place(x):
        split = x.ndim > 1 and x.shape[1] % mesh.shape["tensor"] == 0
        where = NamedSharding(mesh, P(None, "tensor") if split else P())
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    return jax.tree.map(place, cache)


# ------------------------------------------------------------- what it took


def memory(compiled: Any, *, on_cpu: bool) -> dict[str, int]:
    """Returns what XLA says of a compiled program's memory on one device, in bytes."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    peak = sum(parts.values())
    # A compiler that knows when each part is there says less. A CPU's leaves out what
    # is temporary.
    if not on_cpu and found.peak_memory_in_bytes:
        peak = min(peak, found.peak_memory_in_bytes)
    return {**parts, "peak": peak}


def totals(text: programs.Program) -> dict[str, dict[str, float]]:
    """Returns {"count", "bytes"} of each kind of collective in a program.

    What stands in a loop counts as often as the loop goes round. Bytes are those of
    the larger side, whole or gathered: what a device sends is about as much, and twice
    that for an all-reduce.
    """
    found: dict[str, dict[str, float]] = {}
    for one in text.collectives():
        total = found.setdefault(one.kind, {"count": 0, "bytes": 0})
        total["count"] += one.times
        total["bytes"] += one.times * one.bytes
    return found


def beside(work: Callable[[], Any], tell: Callable[[str], Any]) -> Any:
    """Returns `work()`, and tells every few seconds how long it has taken so far."""
    started = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        result = pool.submit(work)
        while True:
            try:
                return result.result(timeout=TELL_EVERY_S)
            except NotYet:
                tell(f"  {time.monotonic() - started:.0f} s")
