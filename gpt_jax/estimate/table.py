"""An estimate as text for people."""

from collections.abc import Iterator, Mapping
from typing import Any

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
