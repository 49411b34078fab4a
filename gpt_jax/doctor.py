"""What is wrong here, and what to do: the installation, the machine, a run folder.

Everything is looked at and nothing is changed. `installation` and `run` yield findings
one by one, as they are made.
"""

import itertools
import json
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from packaging.requirements import Requirement

from gpt_jax import (
    checkpoint,
    commands,
    downloads,
    files,
    metrics,
    model,
    runs,
    tokenizers,
)
from gpt_jax.checkpoint import arrays

OK, WARNING, PROBLEM = "ok", "warning", "problem"
LOCK = "requirements.txt"
INSTALL = "pip install" if commands.INSTALLED else f"pip install -r {LOCK}"
PROJECT = "gpt-jax"
WRONG = 1e-3  # the relative error of a matrix product that is no rounding
PROBE_SECONDS = 120.0  # a driver that hangs must not hang the doctor
# Run in a process of its own, since a broken driver may take its process down.
PROBE = """
import json, jax, numpy as np
x = np.random.default_rng(0).standard_normal((256, 256)).astype(np.float32)
found, wanted = [], x.astype(np.float64) @ x
for device in jax.devices():
    y = jax.device_put(x, device)
    error = np.abs(np.asarray(jax.numpy.matmul(y, y, precision="highest")) - wanted)
    found.append([device.platform, device.device_kind, float(error.max())])
print(json.dumps(found))
"""


class Finding(NamedTuple):
    """What was found in one place.

    Attributes:
      about: what was looked at.
      level: "ok"; "warning", which can wait; "problem", which something will fail of.
      found: what there is, in a sentence.
      cure: what to do; "" where nothing is to be done.
    """

    about: str
    level: str
    found: str
    cure: str = ""


# --- the installation -----------------------------------------------------------------


def installation(
    root: Path, *, compile_cache: str, downloads: str, min_free_gb: float
) -> Iterator[Finding]:
    """Yields what is to be said of this Python, its packages and this machine.

    Args:
      root: the folder of pyproject.toml and the locks, where there are any.
      compile_cache: the folder of compiled programs; "" = none is kept.
      downloads: the folder of downloaded texts.
      min_free_gb: the free disk space, in 10^9 bytes, below which there is a warning.
    """
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("python", OK, f"{version} at {sys.executable}")
    yield from packages(root)
    yield devices()
    yield from disk([Path.cwd(), files.expand(downloads)], min_free_gb)
    yield cache(compile_cache)
    yield from downloaded(files.expand(downloads))


def packages(root: Path) -> Iterator[Finding]:
    """Yields how the installed packages differ from the lock, then the extras.

    Without a lock, as in an installed package, its own metadata says what it needs.
    """
    if not (root / LOCK).is_file():
        yield from _declared()
        return
    locked = _pins(root / LOCK)
    found = {name: _installed(name) for name in locked}
    for name in sorted(name for name in locked if not found[name]):
        yield Finding("packages", PROBLEM, f"{name} is not installed", INSTALL)
    for name in sorted(name for name in locked if found[name]):
        if found[name] != locked[name]:
            what = f"{name} is {found[name]}, tested is {locked[name]}"
            yield Finding("packages", WARNING, what, INSTALL)
    same = sum(found[name] == locked[name] for name in locked)
    level = OK if same == len(locked) else WARNING
    yield Finding("packages", level, f"{same} of {len(locked)} are those of {LOCK}")
    if (root / "pyproject.toml").is_file():
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))
        extras = project["project"]["optional-dependencies"]
        yield from _extras({e: list(map(Requirement, extras[e])) for e in extras})


def _declared() -> Iterator[Finding]:
    """Yields how the installed packages differ from what the package asks for."""
    try:
        asked = [Requirement(wish) for wish in metadata.requires(PROJECT) or ()]
        extras = metadata.metadata(PROJECT).get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        where = f"{PROJECT} is neither installed nor in its repository"
        yield Finding("packages", WARNING, where, "run the doctor in the repository")
        return

    def of(extra: str) -> list[Requirement]:
        given = {"extra": extra}
        return [w for w in asked if w.marker is None or w.marker.evaluate(given)]

    wanted = of("")
    for wish in wanted:
        if not _satisfied(wish):
            there = _installed(wish.name) or "not installed"
            what = f"{wish.name} is {there}, wanted is {wish}"
            yield Finding("packages", PROBLEM, what, f'{INSTALL} "{wish}"')
    right = sum(map(_satisfied, wanted))
    level = OK if right == len(wanted) else PROBLEM
    told = f"{right} of {len(wanted)} are as {PROJECT} asks"
    yield Finding("packages", level, told)
    yield from _extras({e: [w for w in of(e) if w not in wanted] for e in extras})


def _extras(extras: Mapping[str, list[Requirement]]) -> Iterator[Finding]:
    """Yields a line for each extra: what it would take to have it."""
    for extra, wanted in extras.items():
        wanted = [Requirement(str(w).partition(";")[0]) for w in wanted]
        missing = [str(wish) for wish in wanted if not _installed(wish.name)]
        old = [
            str(wish)
            for wish in wanted
            if (there := _installed(wish.name)) and there not in wish.specifier
        ]
        names = [f'"{name}"' for name in [*missing, *old]]
        cure = commands.install(*names) if names else ""
        if extra in ("gpu", "tpu"):
            continue  # of these the devices tell
        if old:
            yield Finding(f"extra {extra}", WARNING, f"too old for {old}", cure)
        elif missing:
            yield Finding(f"extra {extra}", OK, "not installed; if you want it:", cure)
        else:
            yield Finding(f"extra {extra}", OK, "installed")


def devices() -> Finding:
    """Returns what JAX computes with, and whether a matrix product is right there."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", PROBE],
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        what = f"JAX did not compute within {PROBE_SECONDS:g} s"
        cure = "end what holds the accelerator; JAX_PLATFORMS=cpu does without it"
        return Finding("devices", PROBLEM, what, cure)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        cure = "look at the driver; JAX_PLATFORMS=cpu does without the accelerator"
        return Finding("devices", PROBLEM, f"JAX cannot start: {lines[-1]}", cure)
    return judge(json.loads(done.stdout.splitlines()[-1]), _accelerator())


def judge(found: list[tuple[str, str, float]], accelerator: str) -> Finding:
    """Returns what devices are worth.

    Args:
      found: (platform, kind, largest error of a product of matrices) of each.
      accelerator: the extra that this machine's hardware wants; "" = none.
    """
    kinds = sorted({f"{platform} ({kind})" for platform, kind, _ in found})
    what = f"{len(found)} x {', '.join(kinds)}"
    # Not Python's max, which a NaN that is not the first would not stop.
    worst = float(np.max([error for *_, error in found])) / 256**0.5
    if not worst < WRONG:
        what += f"; a matrix product is wrong by {worst:.1g} of its size"
        return Finding(
            "devices", PROBLEM, what, "update the driver and jax, or cool it"
        )
    if accelerator and all(platform == "cpu" for platform, *_ in found):
        what += ", though there is an accelerator"
        return Finding("devices", WARNING, what, f'{INSTALL} "jax[{accelerator}]"')
    return Finding("devices", OK, f"{what}; a matrix product is right")


def _accelerator() -> str:
    """Returns the extra of jax that this machine's hardware wants, or ""."""
    if shutil.which("nvidia-smi") and any(Path("/dev").glob("nvidia[0-9]*")):
        return "cuda13"
    return "tpu" if any(Path("/dev").glob("accel[0-9]*")) else ""


def disk(folders: Iterable[Path], min_free_gb: float) -> Iterator[Finding]:
    """Yields the free space of each file system that is written to."""
    seen = set()
    for folder in folders:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        if there.stat().st_dev in seen:
            continue
        seen.add(there.stat().st_dev)
        free = shutil.disk_usage(there).free / 1e9
        few = free < min_free_gb
        cure = "make room: a checkpoint holds 12 bytes a parameter" if few else ""
        what = f"{free:,.1f} GB are free at {there}"
        yield Finding("disk", WARNING if few else OK, what, cure)


def cache(folder: str) -> Finding:
    """Returns whether compiled programs can be kept in a folder."""
    about, path = "compile cache", files.expand(folder)
    if not folder:
        return Finding(about, OK, "none is kept: every run compiles anew")
    if not path.exists():
        return Finding(about, OK, f"{path} is made when it is first used")
    if fault := files.open_to_others(path):
        cure = f"empty it and chmod 700 {path}, or set config.compile_cache"
        return Finding(about, PROBLEM, f"{path} {fault}: it is not used", cure)
    kept = [entry for entry in path.iterdir() if entry.is_file()]
    size = sum(entry.stat().st_size for entry in kept) / 1e6
    return Finding(about, OK, f"{path}: {len(kept):,} files, {size:,.0f} MB")


def downloaded(folder: Path) -> Iterator[Finding]:
    """Yields which downloads are there, and those that are not what they should be."""
    sound = 0
    for name, item in downloads.DOWNLOADS.items():
        for path in (folder / file for file in item.names):
            if not path.is_file():
                continue
            wanted = "" if item.changes else item.sha256
            if wanted and files.digest_of(path) != wanted:
                what = f"{path} is not the file called {name}"
                cure = "delete it; it is downloaded again when it is needed"
                yield Finding("downloads", WARNING, what, cure)
            else:
                sound += 1
    yield Finding("downloads", OK, f"{sound} texts in {folder}")


def _pins(lock: Path) -> dict[str, str]:
    """Returns name -> version of a lock's lines that this Python and system need."""
    lines = lock.read_text(encoding="utf-8").splitlines()
    pins = [Requirement(line) for line in lines if line[:1].isalnum()]
    here = [pin for pin in pins if pin.marker is None or pin.marker.evaluate()]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in here}


def _installed(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _satisfied(wish: Requirement) -> bool:
    there = _installed(wish.name)
    return bool(there) and there in wish.specifier


# --- a run folder ---------------------------------------------------------------------


def run(folder: Path) -> Iterator[Finding]:
    """Yields what is to be said of a run folder: every file of it is read."""
    try:
        config = runs.read_config(folder)
        tokenizer = tokenizers.load(folder / "tokenizer.json")
        cfg = runs.model_config(config, tokenizer, runs.read_classes(folder))
    except (ValueError, TypeError, KeyError, OSError) as error:
        cure = "put the file back from a copy of the run"
        yield Finding("config", PROBLEM, _words(error), cure)
        cfg = None
    else:
        what = f"{model.count(cfg):,} parameters, {tokenizer.kind} tokenizer of "
        yield Finding("config", OK, f"{what}{tokenizer.vocab_size:,} tokens")
    yield holder(folder)
    yield record(folder)
    yield from checkpoints(folder, cfg)
    yield from leftovers(folder)


def holder(folder: Path) -> Finding:
    """Returns who trains here, as the lock says."""
    path = folder / runs.LOCK
    found = files.holder(path) if path.is_file() else {}
    if not found:
        return Finding("lock", OK, "no process trains here")
    what = f"process {found['pid']} on {found['host']}"
    if found["alive"]:
        return Finding("lock", OK, f"{what} trains here")
    cure = "nothing: the command that trained takes over"
    return Finding("lock", WARNING, f"{what} has died or is elsewhere", cure)


def record(folder: Path) -> Finding:
    """Returns whether metrics.jsonl can be read and only goes forward."""
    path = folder / metrics.FILE
    if not path.is_file():
        return Finding("metrics", OK, "nothing was measured")
    try:
        steps = [row["step"] for row in metrics.read(folder)]
    except (ValueError, KeyError, TypeError) as error:
        cure = "remove the line; the weights do not depend on it"
        return Finding("metrics", WARNING, f"{path}: {_words(error)}", cure)
    if steps != sorted(steps):
        at = next(b for a, b in itertools.pairwise(steps) if b < a)
        what = f"{path} goes back to step {at}"
        return Finding("metrics", WARNING, what, "two runs may have written to it")
    return Finding("metrics", OK, f"{len(steps)} lines, up to step {max(steps or [0])}")


def checkpoints(folder: Path, cfg: model.GPTConfig | None) -> Iterator[Finding]:
    """Yields whether each checkpoint is as it was written, finite, and of this model.

    Args:
      folder: the run folder.
      cfg: the model that its config describes; None where that is not known.
    """
    store = checkpoint.Checkpoints(folder / "checkpoints", keep=None)
    steps = store.steps()
    if not steps:
        cure = "train: nothing can be read from this run before its first one"
        yield Finding("checkpoints", WARNING, "there is none that is finished", cure)
    for number, step in enumerate(steps, start=1):
        about, newest = f"checkpoint {step}", number == len(steps)
        try:
            tree, meta, _ = store.restore(None, step=step)
            bad = _not_finite(tree)
            if frozen := meta.get("frozen"):
                bad += _not_finite({"frozen": store.load_frozen(frozen)})
            if cfg is not None:
                _check_model(folder, step, cfg)
        except (ValueError, OSError) as error:
            if step not in store.steps():  # a process that trains here has removed it
                continue
            cure = "the next command sets it aside and takes the one before"
            if not newest:
                cure = f"delete {store.folder / str(step)}"
            if not isinstance(error, checkpoint.Damaged):
                cure = (
                    "put back the config.json, tokenizer.json and frozen/ of this run"
                )
            yield Finding(about, PROBLEM, _words(error), cure)
            continue
        if bad:
            cure = f"delete {store.folder / str(step)}"
            yield Finding(about, PROBLEM, f"{bad[0]} holds NaN or Inf", cure)
            continue
        best = ", the best" * (step == store.best())
        yield Finding(about, OK, f"every file as it was written, finite{best}")


def leftovers(folder: Path) -> Iterator[Finding]:
    """Yields what nobody needs: set aside, damaged, unfinished, without an owner."""
    inside = folder / "checkpoints"
    store = checkpoint.Checkpoints(inside, keep=None)
    named = {str(step) for step in store.steps()}
    for path in sorted(inside.iterdir()) if inside.is_dir() else []:
        if path.name in named or not path.is_dir():
            continue
        aside = path.name.startswith(("aside-", "damaged-"))
        why = "was set aside" if aside else "is no finished checkpoint"
        cure = f"rm -r {path}" if aside else "the next training removes it"
        yield Finding("leftovers", WARNING, f"{path} {why}, {_size(path)}", cure)
    for path in sorted(folder.glob("*.tmp")):
        yield Finding("leftovers", WARNING, f"{path} was never finished", f"rm {path}")


def _check_model(folder: Path, step: int, cfg: model.GPTConfig) -> None:
    """Raises ValueError, naming leaves, unless a checkpoint is of this model."""
    opened = runs.open(folder, step=step)
    first = partial(model.init, opened.model.cfg)
    checkpoint.check_same(jax.eval_shape(first, jax.random.key(0)), opened.params)
    if opened.model.cfg.vocab_size != cfg.vocab_size:
        raise ValueError(f"its vocabulary has {opened.model.cfg.vocab_size} tokens")


def _not_finite(tree: Mapping[str, Any]) -> list[str]:
    """Returns the paths of weights and optimizer memory that hold NaN or Inf."""
    kept = {k: v for k, v in tree.items() if k in (*arrays.FINITE, "frozen")}
    return [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, leaf in jax.tree_util.tree_flatten_with_path(kept)[0]
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all()
    ]


def _size(path: Path) -> str:
    total = sum(p.stat().st_size for p in path.rglob("*") if p.is_file())
    return f"{total / 1e6:,.1f} MB"


def _words(error: BaseException) -> str:
    return " ".join(str(error).split())
