"""Well-known models on well-known meshes, compiled for a kind of device: a table.

Lines are JSON, one for each program, written as soon as it is compiled; those that are
there already are not compiled again. The page is written from them.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from gpt_jax import configs, files, names, screen
from gpt_jax.devices import ACCELERATORS
from gpt_jax.estimate import abstract, device, dry, estimate, targets
from gpt_jax.estimate import make as make_plan
from gpt_jax.mesh import AXES

BEGIN, END = "<!-- compiled -->", "<!-- end of compiled -->"
TEXTS = 8  # that are written at once, where decoding is compiled
PLAN = "configs/gpt2.py:size="
# Of what `dry.on` can compile, the program that comes last.
LAST = {"train": dry.TRAIN, "evaluate": "evaluation", "decode": "server's step"}

# Shapes that other projects publish, in GPT-2's recipe. Deep ones scan their layers.
MODERN = {
    **{"position": "rope", "norm": "rmsnorm", "activation": "silu", "gated": True},
    **{"qkv_bias": False, "attn_bias": False, "mlp_bias": False, "vocab_multiple": 1},
    **{"context_length": 2048, "scan_layers": True, "remat": "full"},
}
LLAMA_1B = MODERN | {
    **{"vocab_size": 128_256, "n_layers": 16, "d_model": 2048, "n_heads": 32},
    **{"n_kv_heads": 8, "d_ff": 8192},
}
LLAMA_7B = MODERN | {
    **{"vocab_size": 32_000, "n_layers": 32, "d_model": 4096, "n_heads": 32},
    **{"d_ff": 11_008, "tie_embeddings": False},
}
QWEN3 = MODERN | {
    **{"vocab_size": 151_936, "n_layers": 28, "d_model": 1024, "n_heads": 16},
    **{"n_kv_heads": 8, "head_dim": 128, "d_ff": 3072, "qk_norm": True},
}


class Row(NamedTuple):
    """One model on one mesh.

    Attributes:
      model: as people call it.
      size: of configs/gpt2.py, which it begins with.
      fields: of config.model, that differ.
      axes: data, fsdp, tensor.
      rows: examples of a device.
      which: programs, see `dry.on`.
    """

    model: str
    size: str
    fields: Mapping[str, Any]
    axes: tuple[int, int, int]
    rows: int
    which: tuple[str, ...] = ("train",)


SMALL, XL = ("GPT-2 small", "small", {}), ("GPT-2 XL", "xl", {})
LLAMA, QWEN = ("Llama 3.2 1B", "small", LLAMA_1B), ("Qwen3 0.6B", "small", QWEN3)
SEVEN = ("Llama 2 7B", "small", LLAMA_7B)
SCAN, FULL = {"scan_layers": True}, {"remat": "full"}
ROWS = {
    "small-alone": Row(*SMALL, (1, 1, 1), 16, ("train", "evaluate", "decode")),
    "small-scan": Row("GPT-2 small, scanned", "small", SCAN, (1, 1, 1), 16),
    "small-scan-full": Row(
        "GPT-2 small, scanned, remat full", "small", SCAN | FULL, (1, 1, 1), 16
    ),
    "small-full": Row("GPT-2 small, remat full", "small", FULL, (1, 1, 1), 16),
    "small-float32": Row(
        "GPT-2 small, float32", "small", {"dtype": "float32"}, (1, 1, 1), 16
    ),
    "small-data": Row(*SMALL, (8, 1, 1), 8),
    "small-fsdp": Row(*SMALL, (1, 8, 1), 8),
    "qwen-fsdp": Row(*QWEN, (1, 8, 1), 2),
    "llama-fsdp": Row(*LLAMA, (1, 8, 1), 2),
    "xl-fsdp": Row(*XL, (1, 8, 1), 4),
    "small-2x2x2": Row(*SMALL, (2, 2, 2), 16),
    "qwen-2x2x2": Row(*QWEN, (2, 2, 2), 4),
    "llama-tensor": Row(*LLAMA, (1, 2, 4), 8),
    "7b-fsdp": Row(*SEVEN, (1, 256, 1), 1),
}


def find(wanted: Sequence[str], count: int) -> list[str]:
    """Returns the names of the rows that so many devices compile.

    Raises:
      ValueError: a name is not one of ROWS, or its mesh has another size.
    """
    for name in wanted:
        size = math.prod(names.choose("--rows", name, ROWS).axes)
        if size != count:
            raise ValueError(
                f"--rows={name} is a mesh of {size} devices, and --device names {count}"
            )
    fitting = [name for name, row in ROWS.items() if math.prod(row.axes) == count]
    if not fitting:
        sizes = sorted({math.prod(row.axes) for row in ROWS.values()})
        raise ValueError(
            f"--survey has no row for {count} devices, but for "
            f"{', '.join(map(str, sizes))}"
        )
    return list(wanted) or fitting


def compile(
    target: targets.Target,
    wanted: Sequence[str],
    path: str | Path,
    *,
    mfu: float,
    tell: Callable[[str], Any],
) -> None:
    """Compiles rows for devices and adds a line to a file for each program.

    Args:
      target: the devices.
      wanted: names of rows, see `find`.
      path: of the JSONL file.
      mfu: see `estimate.estimate`.
      tell: is called with lines of progress.
    """
    own = device.find(target.kind.device, "")
    done = {key(line) for line in read(path)} if Path(path).is_file() else set()
    for name in wanted:
        row = ROWS[name]
        config = configs.load(f"{PLAN}{row.size}")
        config.model.update(dict(row.fields))
        mesh: dict[str, int] = dict(zip(AXES, row.axes, strict=True))
        config.mesh.update(mesh)
        config.accumulate = 1
        config.batch_size = row.rows * row.axes[0] * row.axes[1]
        plan = make_plan(config, abstract(config, 0))
        ours = estimate(plan, own, mfu=mfu, rows=TEXTS)
        base = {"row": name, "model": row.model, "device": target.name, "mesh": mesh}
        base |= {"batch": config.batch_size, "jax": jax.__version__}
        which = [w for w in row.which if (name, target.name, LAST[w]) not in done]
        tell(f"{name} on {target.name}{'' if which else ': there already'}")
        found = dry.on(
            target,
            config,
            mesh,
            which=which,
            rows=TEXTS,
            peak=own.peak_flops or 0.0,
            out="",
            tell=tell,
        )
        for one in found:
            line = base | one | {"host_bytes": files.peak_memory()}
            line["flops_per_token"] = ours["flops_per_token"]
            line["estimate"] = {"peak": ours["peak"]}
            with Path(path).open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")


def key(line: Mapping[str, Any]) -> tuple[str, str, str]:
    """Returns what a line is of: row, devices, program."""
    return line["row"], line["device"], line["program"]


def read(path: str | Path) -> list[dict[str, Any]]:
    """Returns the newest line of each program.

    Raises:
      FileNotFoundError: there is no such file.
      ValueError: a line is not one of ours.
    """
    lines: dict[tuple, dict] = {}
    for number, text in enumerate(Path(path).read_text("utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
            lines[key(line)] = line
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{path} line {number} is not a line of a survey: {text[:60]!r}"
            ) from error
    return list(lines.values())


# ------------------------------------------------------------- the page


def rewrite(path: str | Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Puts the tables between the marks of a Markdown file.

    Raises:
      ValueError: the file lacks one of the marks; nothing was written.
    """
    files.write_between(path, BEGIN, END, page(lines))


def page(lines: Iterable[Mapping[str, Any]]) -> str:
    """Returns the tables: what trains, and what evaluates or writes."""
    kinds, order = list(ROWS), list(targets.KINDS)

    def place(line):
        kind = line["device"].rpartition("x")[2].partition("-")[0]
        return kinds.index(line["row"]), order.index(kind)

    lines = sorted(lines, key=place)
    trained = [line for line in lines if line["program"] == dry.TRAIN]
    others = [line for line in lines if line["program"] != dry.TRAIN]
    versions = sorted({line["jax"] for line in lines})
    heads = ("model", "data x fsdp x tensor", "rows", "device", "memory", "collectives")
    heads += ("step by the model", "MFU by it")
    tables = [
        f"Compiled with jax {' and '.join(versions)}; no device was used.",
        screen.table(heads, [_trained(line) for line in trained]),
    ]
    if others:
        heads = ("program", "model", "device", "memory", "read and written", "by it")
        tables.append(screen.table(heads, [list(_other(line)) for line in others]))
    return "\n\n".join(tables)


def _trained(line: Mapping[str, Any]) -> list[str]:
    mesh = " x ".join(str(line["mesh"][axis]) for axis in AXES)
    cells = [line["model"], mesh, f"{line['batch']:,}", line["device"]]
    if "needs" in line:
        return [*cells, f"does not fit: {screen.size(line['needs'])}", "–", "–", "–"]
    sent = sum(total["bytes"] for total in line["collectives"].values())
    kernels = line["time"]["kernels"]
    whole = kernels + line["time"]["collectives"]
    count = math.prod(line["mesh"].values())
    peak = ACCELERATORS[kind_of(line).device].flops * count
    least = line["tokens"] * line["flops_per_token"] / peak
    return [
        *(*cells, screen.size(line["memory"]["peak"]), screen.size(sent)),
        f"{1e3 * kernels:,.1f} to {1e3 * whole:,.1f} ms",
        f"{least / whole:.0%} to {least / kernels:.0%}",
    ]


def _other(line: Mapping[str, Any]) -> Iterator[str]:
    texts = line["tokens"] if "step" in line["program"] else ""
    yield line["program"] + (f", {texts} texts" if texts else "")
    yield line["model"]
    yield line["device"]
    if "needs" in line:
        yield from (f"does not fit: {screen.size(line['needs'])}", "–", "–")
        return
    yield screen.size(line["memory"]["peak"])
    yield screen.size(line["time"]["traffic"])
    yield f"{1e3 * line['time']['kernels']:,.2f} ms"


def kind_of(line: Mapping[str, Any]) -> targets.Kind:
    """Returns the kind of a line's devices."""
    return targets.parse(line["device"])[0]
