"""An estimate as text for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from gpt_jax.estimate.device import Device
from gpt_jax.screen import count, duration, size

LABELS = {
    "parameters": "parameters",
    "frozen": "frozen weights",
    "optimizer": "optimizer",
    "average": "moving average",
    "batch": "batch",
    "carried": "gradients added up",
    "gradients": "gradients",
    "activations": "activations",
    "casts": "weights in another form",
    "logits": "logits",
    "working": "one layer at work",
    "update": "new state",
}
KERNELS = {
    "__cudnn$fmhaSoftmax": "cuDNN attention",
    "__cudnn$fmhaSoftmaxBackward": "its gradient",
    "tpu_custom_call": "Pallas (splash attention)",
    "__cublas$gemm": "cuBLAS",
    "__cublas$lt$matmul": "cuBLASLt",
}
BOUNDS = {
    "products": "matrix products; a larger share of the peak needs larger ones",
    "memory": "memory bandwidth: element-wise work, norms, the optimizer, the cache",
    "launches": "launches of kernels: too little work in each; larger batches",
    "collectives": "the links between devices; another mesh, or larger batches",
}
MOMENTS = {
    "loss": "while the loss is computed",
    "backward": "in the backward pass",
    "update": "in the update",
}


def render(found: Mapping[str, Any], notes: Mapping[str, str]) -> str:
    """Returns an estimate as lines.

    Args:
      found: what `estimate` returned.
      notes: remarks beside the parts of the memory, by name.
    """
    return "\n".join([*_head(found), "", *_memory(found, notes), "", *_speed(found)])


def _head(found: Mapping[str, Any]) -> Iterator[str]:
    mesh, parts = found["mesh"], dict(found["parameters"])
    axes = ", ".join(f"{name} {length}" for name, length in mesh.items())
    devices = found["devices"]
    yield f"{count(devices, 'device')}: {axes}"
    total, trainable = parts.pop("total"), parts.pop("trainable")
    padding = parts.pop("padding")
    yield f"{total:,} parameters, {trainable:,} of them train"
    yield "  " + ", ".join(f"{name} {number:,}" for name, number in parts.items())
    if padding:
        yield f"  and {padding:,} to pad the vocabulary (model.vocab_multiple)"


def _memory(found: Mapping[str, Any], notes: Mapping[str, str]) -> Iterator[str]:
    yield "memory of one device"
    for name, amount in found["memory"].items():
        if amount >= 1000:
            line = f"  {LABELS[name]:<26}{size(amount):>8}  {notes.get(name, '')}"
            yield line.rstrip()
    moments = found["moments"]
    moment = max(moments, key=moments.__getitem__)
    yield f"  {'at most at once':<26}{size(found['peak']):>8}  {MOMENTS[moment]}"
    if "fits" in found:
        yield from _fits(found["fits"], found["peak"])
    kv = found["kv_cache"]
    rows = f"{count(kv['rows'], 'text')} of {kv['length']:,} tokens"
    yield f"to write text: a key-value cache of {size(kv['bytes'])} for {rows}"


def _fits(fits: Mapping[str, Any], peak: int) -> Iterator[str]:
    verdict = "fits into" if peak <= fits["memory"] else "DOES NOT FIT into"
    yield f"this {verdict} {size(fits['memory'])}"
    if fits["rows"]:
        yield (
            f"the largest batch that fits: {fits['rows']:,} rows on a device at a "
            f"time, batch_size={fits['batch_size']:,}"
        )
    else:
        yield "no batch fits: split the weights further (mesh.fsdp, mesh.tensor)"


def _speed(found: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"{found['flops_per_token']:.4g} FLOPs for a token, "
        f"{found['tokens_per_step']:,} tokens a step, {found['steps']:,} steps"
    )
    if "step_seconds" not in found:
        yield "no times: name a device whose speed is known (--device)"
        return
    yield (
        f"at {found['mfu']:.0%} of {found['peak_flops'] / 1e12:,.4g} TFLOP/s each: "
        f"{duration(found['step_seconds'])} a step, "
        f"{found['tokens_per_second']:,.0f} tokens/s, {duration(found['run_seconds'])} "
        "for the run"
    )


def of_dry_run(found: Mapping[str, Any]) -> str:
    """Returns what a dry run found as lines."""
    axes = ", ".join(f"{name} {length}" for name, length in found["mesh"].items())
    lines = [f"{count(found['devices'], 'virtual device')}: {axes}", ""]
    lines += ["memory of one device, as XLA plans it for a CPU"]
    lines += [f"  {name:<12}{size(n):>8}" for name, n in found["memory"].items()]
    lines += ["", "collectives of one step, as one device sees them"]
    for kind, total in sorted(found["collectives"].items()):
        lines += [f"  {kind:<20}{total['count']:>7,} x  {size(total['bytes']):>8}"]
    lines += [] if found["collectives"] else ["  none"]
    took = f"{duration(found['seconds'])} and {size(found['host_bytes'])} of memory"
    return "\n".join([*lines, "", f"compiled in {took} on this machine"])


# ------------------------------------------------------------- compiled programs


def of_program(
    found: Mapping[str, Any], own: Mapping[str, Any] | None, device: Device
) -> str:
    """Returns what a compiler said of one program as lines.

    Args:
      found: what `dry.on` yielded.
      own: our own estimate of the train step, None beside another program.
      device: one of the devices.
    """
    spent = found["seconds"]
    took = f"traced in {duration(spent['trace'])}, compiled in"
    lines = [f"{found['program']}: {took} {duration(spent['compile'])}", ""]
    if "needs" in found:
        lines += [f"this DOES NOT FIT: it needs {size(found['needs'])} of the"]
        lines[-1] += f" {size(found['has'])} that its compiler may use"
        return "\n".join(lines)
    lines += [*_two_memories(found["memory"], own, device), ""]
    lines += [*_products(found), *_kernels(found), *_collectives(found), ""]
    lines += _by_model(found, own)
    return "\n".join(lines)


def heading(own: Mapping[str, Any], devices: str) -> str:
    """Returns what stands above compiled programs: the devices, the mesh, the model."""
    _, *rest = _head(own)
    axes = ", ".join(f"{name} {length}" for name, length in own["mesh"].items())
    return "\n".join([f"{devices}: {axes}", *rest, ""])


def of_help(changes: Sequence[tuple[Mapping[str, Any], float]]) -> str:
    """Returns what would make a step fit as lines."""
    if not changes:
        return "no change of accumulate, remat or mesh makes it fit: take more devices"
    lines = [
        "it would fit with any of these, by our estimate set right by the compiler"
    ]
    for change, amount in changes:
        flags = " ".join(f"--config.{key}={value}" for key, value in change.items())
        lines.append(f"  {size(amount):>8}  {flags}")
    return "\n".join([*lines, ""])


def _two_memories(
    memory: Mapping[str, int], own: Mapping[str, Any] | None, device: Device
) -> Iterator[str]:
    beside = "   our estimate" if own else ""
    yield f"{'memory of one device':<24}{'compiler':>12}{beside}"
    parts = dict(own["memory"]) if own else {}
    there = ("parameters", "frozen", "optimizer", "average", "batch")
    lasting = {name: parts.pop(name) for name in there if parts.get(name)}
    ours = {"arguments": sum(lasting.values()), "peak": own["peak"] if own else 0}
    notes = {
        "arguments": ", ".join(f"{n} {size(x)}" for n, x in lasting.items()),
        "temporary": ", ".join(
            f"{LABELS[n]} {size(x)}" for n, x in parts.items() if x >= 1000
        ),
    }
    for name, amount in memory.items():
        label = {"peak": "at most at once"}.get(name, name)
        line = f"  {label:<22}{size(amount):>12}"
        if own:
            mine = size(ours[name]) if name in ours else ""
            line += f"{mine:>15}  {notes.get(name, '')}"
        yield line.rstrip()
    if device.memory:
        fits = memory["peak"] <= device.memory
        yield f"this {'fits' if fits else 'DOES NOT FIT'} into {size(device.memory)}"


def _products(found: Mapping[str, Any]) -> Iterator[str]:
    total = sum(found["products"].values()) or 1
    yield "matrix products, over all devices, but for those of written kernels"
    for dtype, flops in sorted(found["products"].items(), key=lambda x: -x[1]):
        yield f"  {dtype:<10}{flops / 1e12:>10,.4g} TFLOP  {flops / total:.1%}"
    wide = sorted(found["float32"].items(), key=lambda pair: -pair[1])
    if wide and len(found["products"]) > 1:
        yield f"  float32 most in: {', '.join(place for place, _ in wide[:3])}"


def _kernels(found: Mapping[str, Any]) -> Iterator[str]:
    known = {name: n for name, n in found["calls"].items() if name in KERNELS}
    if known:
        told = ", ".join(f"{KERNELS[name]} {n:,} x" for name, n in known.items())
        yield f"kernels: {told}"


def _collectives(found: Mapping[str, Any]) -> Iterator[str]:
    yield "collectives, as one device sees them"
    for kind, total in sorted(found["collectives"].items()):
        yield f"  {kind:<20}{total['count']:>7,} x  {size(total['bytes']):>8}"
    if not found["collectives"]:
        yield "  none"


def _by_model(found: Mapping[str, Any], own: Mapping[str, Any] | None) -> Iterator[str]:
    time = found["time"]
    kernels, collectives = time["kernels"], time["collectives"]
    by = ", ".join(
        f"{name} {duration(spent)}"
        for name, spent in sorted(time["by"].items(), key=lambda pair: -pair[1])
    )
    yield f"by the model: {duration(kernels)} of kernels ({by})"
    yield (
        f"  and {duration(collectives)} of collectives; {duration(kernels)} to "
        f"{duration(kernels + collectives)}, as they overlap"
    )
    shares = (f"{name} {x / kernels:.0%}" for name, x in found["parts"].items())
    yield f"  of the kernels: {', '.join(shares)}"
    yield f"  memory is read and written {size(time['traffic'])}"
    yield f"likely bound: {BOUNDS[time['bound']]}"
    if own and "peak_flops" in own:
        whole = found["tokens"] * own["flops_per_token"]
        least = whole / own["peak_flops"] / own["devices"]
        yield (
            f"MFU {least / (kernels + collectives):.0%} to {least / kernels:.0%}; our "
            f"estimate at {own['mfu']:.0%}: {duration(own['step_seconds'])}"
        )
