"""A dry run: the real train step, compiled for devices that are not there.

XLA's CPU backend stands in for as many devices as wanted. Arguments are shapes with
their placement, so no weight is ever made.
"""

import re
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from typing import Any

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

from gpt_jax import files, sharding, train
from gpt_jax.estimate import plan as plans

TELL_EVERY_S = 10.0
# Nothing will run, so code need not be fast: a tenth of the time to compile it.
OPTIONS = {"xla_backend_optimization_level": 0}
KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    "collective-permute",
)
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s64": 8, "u64": 8, "f64": 8}


def run(
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
    axes = {name: mesh[name] for name in sharding.AXES}
    count = axes["data"] * axes["fsdp"] * axes["tensor"]
    jax.config.update("jax_platforms", "cpu")
    sharding.set_cpu_devices(0, **axes, cpu_devices=count)
    started = time.monotonic()
    rows = config.batch_size // config.accumulate
    plan = plans.make(config, sharding.make_mesh(rows, **axes, cpu_devices=0))
    tell(f"tracing the step for {count:,} devices ...")
    step: Any = plan.parts.step_fn
    lowered = step.lower(*arguments(plan))
    traced = time.monotonic() - started
    tell(f"traced in {traced:.0f} s; compiling ...")
    compiled = beside(lambda: lowered.run.compile(compiler_options=OPTIONS), tell)
    return {
        "mesh": axes,
        "devices": count,
        "memory": memory(compiled),
        "collectives": collectives(compiled.as_text()),
        "seconds": time.monotonic() - started,
        "host_bytes": files.peak_memory(),
    }


def arguments(plan: plans.Plan) -> tuple:
    """Returns the shapes, and the places, of what a train step takes."""
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        plan.state,
        plan.strategy.layout(plan.state),
    )
    key = jax.eval_shape(lambda: jax.random.key(0))
    number = jax.ShapeDtypeStruct((), jnp.float32)
    hyper = jax.tree.map(lambda _: number, train.make_hyper(plan.config, plan.task))
    return state, plan.batch(), key, hyper


def memory(compiled: Any) -> dict[str, int]:
    """Returns what XLA says of a compiled program's memory on one device, in bytes."""
    found = compiled.memory_analysis()
    parts = {
        "arguments": found.argument_size_in_bytes,
        "results": found.output_size_in_bytes - found.alias_size_in_bytes,
        "temporary": found.temp_size_in_bytes,
    }
    return {**parts, "peak": sum(parts.values())}


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


# ------------------------------------------------------------- the program's text

COMPUTATION = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%?[\w.\-]+ = (.*?) ([a-z\-]+)\((.*)$")
CALLED = re.compile(r"(?:body|calls|to_apply|branch_computations)=\{?([^,}]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
ARRAY = re.compile(r"(\w+)\[([\d,]*)\]")


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Returns {"count", "bytes"} of each kind of collective in a program's text.

    What stands in a loop counts as often as the loop goes round. Bytes are those of
    the larger side, whole or gathered: what a device sends is about as much, and twice
    that for an all-reduce.
    """
    bodies, entry = _computations(text)
    totals: dict[str, dict[str, int]] = defaultdict(lambda: {"count": 0, "bytes": 0})

    def walk(name: str, times: int) -> None:
        for shape, kind, rest in bodies.get(name, ()):
            kind = kind.removesuffix("-start")
            if kind in KINDS:
                totals[kind]["count"] += times
                totals[kind]["bytes"] += times * _bytes(shape, rest)
            trips = TRIPS.search(rest) if kind == "while" else None
            for called in CALLED.findall(rest):
                for inner in re.findall(r"%?([\w.\-]+)", called):
                    walk(inner, times * int(trips[1] if trips else 1))

    walk(entry, 1)
    return dict(totals)


def _computations(text: str) -> tuple[dict[str, list[tuple[str, str, str]]], str]:
    """Returns the instructions (shape, kind, rest) by computation, and the entry."""
    bodies: dict[str, list[tuple[str, str, str]]] = {}
    entry, here = "", []
    for line in text.splitlines():
        if match := COMPUTATION.match(line):
            here = bodies.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif match := INSTRUCTION.match(line):
            here.append((match[1], match[2], match[3]))
    return bodies, entry


def _bytes(result: str, rest: str) -> int:
    """Returns the bytes of an instruction's result or of its operands, the more."""

    def total(shapes: str) -> int:
        return sum(
            BYTES.get(kind, 4) * _product(lengths)
            for kind, lengths in ARRAY.findall(shapes)
        )

    operands = rest.partition("), ")[0]
    return max(total(result), total(operands))


def _product(lengths: str) -> int:
    number = 1
    for length in filter(None, lengths.split(",")):
        number *= int(length)
    return number
