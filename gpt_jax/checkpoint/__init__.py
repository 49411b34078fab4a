"""Checkpoints that are whole, or are not used.

A checkpoint is a folder named after its step. Orbax writes the arrays, which carry no
checksum of their own; `manifest.json` is written last and holds the sha256 of every
file, so a folder without one is unfinished and a folder that disagrees with it is
damaged. Layout, for a run folder `runs/a`:

    runs/a/checkpoints/500/params/...      the weights, readable without the rest
    runs/a/checkpoints/500/state/...       every other key of the saved tree
    runs/a/checkpoints/500/manifest.json   step, metric, since, meta, leaves, files
    runs/a/checkpoints/aside-750/750/...   set aside by `rewind`
    runs/a/checkpoints/damaged-500/...     set aside by `restore`
    runs/a/frozen/<digest>/...             weights that never change, stored once
"""

import json
import logging
import math
import os
import re
import shutil
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import processes
from gpt_jax.checkpoint import sealing
from gpt_jax.checkpoint.sealing import FORMAT, MANIFEST, Damaged
from gpt_jax.checkpoint.tables import (
    check_same,
    difference,
    digest,
    leaves,
    named,
    refuse_other,
)

__all__ = [
    "FORMAT",
    "MANIFEST",
    "Checkpoints",
    "Damaged",
    "check_same",
    "difference",
    "digest",
    "leaves",
]

log = logging.getLogger(__name__)

ALONE = ("params", "ema")  # top-level keys with a folder of their own
REST = "state"  # the folder of all other keys
# Orbax numbers its operations without a lock: two saves at once in one process may
# wait for each other's folders for five minutes, and then fail (seen with 0.12.8).
ONE_AT_A_TIME = threading.Lock()
FINITE = ("params", "ema", "opt_state")  # top-level keys that never hold NaN or Inf


class Checkpoints:
    """The checkpoints of one run, saved in the background.

    Args:
      folder: where they are; frozen trees go beside it, into `../frozen`.
      keep: how many of the newest are kept, besides the best. None opens the folder
        for reading only: nothing in it is created, removed or renamed.

    Use it in a `with` block, or call `close`: that waits for the last save and raises
    its error. Without it, an interpreter that exits during a save cuts it short.
    """

    def __init__(self, folder: str | Path, *, keep: int | None):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is {keep}; at least one checkpoint must be kept")
        self.folder = Path(folder).absolute()
        self.keep = keep
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        if keep is not None and jax.process_index() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            sealing.clean(self.folder)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            self.close()
        except Exception:
            if error is None:
                raise
            log.exception("the last checkpoint failed as well")

    def steps(self) -> list[int]:
        """Returns the finished steps, oldest first."""
        if not self.folder.is_dir():
            return []
        found = [path for path in self.folder.iterdir() if path.name.isdecimal()]
        return sorted(int(p.name) for p in found if (p / MANIFEST).is_file())

    def damaged(self) -> list[Path]:
        """Returns the folders of checkpoints that are lost.

        Those that `restore` has set aside, and several without a manifest where none
        has one: a killed process leaves one at most, so these were finished once.
        """
        lost = sealing.unfinished(self.folder) if not self.steps() else []
        return sorted([*self.folder.glob("damaged-*"), *(lost if lost[1:] else [])])

    def latest(self) -> int | None:
        """Returns the newest finished step, None when there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the lowest metric (the earliest of equals), or None.

        Metrics of steps before the latest `since` take no part: see `save`.
        """
        notes = {step: self._note(step) for step in self.steps()}
        since = max((note.get("since", 0) for note in notes.values()), default=0)
        metrics = {s: note.get("metric") for s, note in notes.items() if s >= since}
        known = {step: value for step, value in metrics.items() if value is not None}
        return min(known, key=lambda step: (known[step], step), default=None)

    def save(
        self,
        step: int,
        tree: Any,
        *,
        metric: float | None,
        meta: dict,
        since: int = 0,
    ) -> bool:
        """Copies `tree` to the host, then writes it in the background.

        The copy is complete when this returns, so the arrays may be donated at once.

        Args:
          step: names the checkpoint; newer than every finished one.
          tree: a mapping (or NamedTuple) of pytrees of arrays: params, opt_state, ...
            Numpy arrays are not copied: leave them as they are until `wait`.
          metric: what `best` minimises; None (or not finite) when there is none.
          meta: anything JSON can hold; comes back from `restore`.
          since: the first step whose metric was measured as this one is, on the same
            data: others do not compare with it.

        Returns:
          False when the step is finished already; then nothing is written.

        Raises:
          OSError: the previous save failed; names its path and the free bytes.
          FloatingPointError: the previous save would have held NaN or Inf.
        """
        assert self.keep is not None, "opened for reading only"
        self.wait()
        tree = _mapping(tree)
        if not processes.first(lambda: self._is_new(step)):
            return False
        target = self.folder / str(int(step))
        note = {"step": int(step), "metric": _finite_or_none(metric), "meta": meta}
        note |= {"since": int(since)} if since else {}
        json.dumps(note)  # a meta that cannot be written is refused here, not later
        table, items = leaves(tree), _snapshot(_grouped(tree))
        try:
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
            write = _writer(target, items)
        except Exception as error:
            raise self._failed(target, error) from error
        self._thread = threading.Thread(
            target=self._finish, args=(target, write, {**note, "leaves": table})
        )
        self._thread.start()
        return True

    def check(self) -> None:
        """Raises the error of a save that has failed; never waits."""
        if self._thread is None or not self._thread.is_alive():
            self.wait()

    def wait(self) -> None:
        """Waits until the running save is finished; raises its error once."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error

    def close(self) -> None:
        """The same as `wait`: the last save is on the disk, or its error is raised."""
        self.wait()

    def rewind(self, step: int) -> list[int]:
        """Sets every checkpoint newer than `step` aside; returns their steps."""
        self.wait()
        newer = [s for s in self.steps() if s > step]
        if newer and jax.process_index() == 0:
            aside = _unused(self.folder / f"aside-{newer[0]}")
            aside.mkdir()
            for s in newer:
                os.replace(self.folder / str(s), aside / str(s))
            log.warning("checkpoints %s are newer than step %d: %s", newer, step, aside)
        return newer

    def restore(self, abstract: Any, step: int | None = None) -> tuple:
        """Returns (tree, meta, step) of a checkpoint whose files are all sound.

        Args:
          abstract: the wanted tree, with anything that has shape, dtype and (maybe)
            sharding as leaves; containers come back as given. None: the saved tree as
            nested dicts and lists on this process's first device.
          step: which; None = the newest sound one. A damaged one is then renamed to
            `damaged-<step>`, named in a warning, and the one before it is used.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: it is damaged, or it is of another model (the leaves are named).
        """
        return self._read(
            step, lambda found, manifest: _load(found, manifest, abstract)
        )

    def load(self, *, only: Sequence[str], step: int | None = None) -> tuple:
        """Returns (tree, meta, step) with the top-level keys `only`, as saved.

        Files that hold none of these keys are neither read nor verified.
        """

        def load(found: Path, manifest: dict) -> dict:
            names = sorted({name.split("/")[0] for name in manifest["leaves"]})
            if missing := [key for key in only if key not in names]:
                raise ValueError(
                    f"{found} holds {', '.join(names)}, but not {', '.join(missing)}"
                )
            return _load(found, manifest, None, only=only)

        return self._read(step, load)

    def save_frozen(self, tree: Any) -> str:
        """Stores weights that never change, once; returns their digest.

        Put the digest into the `meta` of every checkpoint that needs them.
        """
        assert self.keep is not None, "opened for reading only"
        tree = _mapping(tree)
        name = digest(tree)
        target = self.folder.parent / "frozen" / name
        if processes.first(lambda: sealing.is_sound(target)):
            return name
        _check_finite(named(tree))
        try:
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                sealing.clean(target.parent)
            _writer(target, _snapshot(_grouped(tree)))()
            note = {"meta": {"digest": name}, "leaves": leaves(tree)}
            processes.first(lambda: sealing.seal(target, note))
        except Exception as error:
            raise self._failed(target, error) from error
        return name

    def load_frozen(self, name: str, abstract: Any = None) -> Any:
        """Returns the frozen tree of that digest; `abstract` as for `restore`.

        Raises:
          ValueError: it is missing, damaged, another one, or of another model.
        """
        if not re.fullmatch("[0-9a-f]{64}", name):  # it would lead elsewhere
            raise ValueError(f"{name!r} is not the digest of frozen weights")
        target = self.folder.parent / "frozen" / name
        try:
            manifest = processes.first(lambda: sealing.read(target), Damaged)
            if manifest["meta"].get("digest", name) != name:
                raise Damaged(f"{target} holds {manifest['meta']['digest']}")
            return _load(target, manifest, abstract)
        except (FileNotFoundError, Damaged) as error:
            raise ValueError(
                f"the frozen weights of this run cannot be used: {error}; copy the "
                f"folder back from where the run was made"
            ) from error

    def _read(self, step: int | None, load: Callable) -> tuple:
        self.wait()
        if step is not None:
            processes.first(lambda: self._check_finished(step))
            found = self.folder / str(step)
            manifest = processes.first(lambda: sealing.read(found), Damaged)
            return load(found, manifest), manifest["meta"], step
        damaged: list[int] = []
        while left := [s for s in processes.first(self.steps) if s not in damaged]:
            found = self.folder / str(left[-1])
            try:
                manifest = processes.first(partial(sealing.read, found), Damaged)
                return load(found, manifest), manifest["meta"], left[-1]
            except (FileNotFoundError, Damaged) as error:
                if not (found / MANIFEST).exists():
                    continue  # removed by the run's own retention as it was being read
                damaged.append(left[-1])
                self._quarantine(found, error)
        if damaged:
            raise ValueError(
                f"no checkpoint in {self.folder} is sound: {damaged} are not"
            )
        raise FileNotFoundError(
            f"there is no finished checkpoint in {self.folder}; train this run first, "
            "or let it reach its first --config.checkpoint_every"
        )

    def _is_new(self, step: int) -> bool:
        """Returns whether `step` is not finished; refuses one older than the newest."""
        finished = self.steps()
        if finished and step not in finished and step < finished[-1]:
            raise ValueError(
                f"step {step} is older than checkpoint {finished[-1]} in "
                f"{self.folder}; call rewind({step}) before saving"
            )
        return step not in finished

    def _check_finished(self, step: int) -> None:
        if step in self.steps():
            return
        found = self.folder / str(step)
        state = "is unfinished" if found.is_dir() else "does not exist"
        have = ", ".join(map(str, self.steps())) or "none"
        raise FileNotFoundError(f"{found} {state}; finished steps: {have}")

    def _quarantine(self, found: Path, error: Exception) -> None:
        moved = ""
        if self.keep is not None and jax.process_index() == 0:
            target = _unused(found.with_name(f"damaged-{found.name}"))
            os.replace(found, target)
            moved = f"; moved to {target}"
        log.warning("checkpoint %s is damaged: %s%s", found, error, moved)

    def _finish(self, target: Path, write: Callable[[], None], note: dict) -> None:
        """The background part: write, then the manifest, and only then prune."""
        try:
            write()
            if jax.process_index() == 0:
                sealing.seal(target, note)
                self._prune()
        except Exception as error:
            self._error = self._failed(target, error)
            log.error("%s", self._error)  # nobody may come to ask for it

    def _failed(self, target: Path, error: Exception) -> Exception:
        if isinstance(error, FloatingPointError):
            return error
        if told := processes.lost(error):
            return ConnectionError(told)
        for path in (target, *self.folder.glob(f"{target.name}.orbax-checkpoint-tmp*")):
            if not (path / MANIFEST).exists():
                shutil.rmtree(path, ignore_errors=True)
        try:
            free = f"{shutil.disk_usage(self.folder).free:,} bytes are free there"
        except OSError:
            free = "the folder is gone"
        failed = OSError(f"checkpoint {target} was not saved: {error}; {free}")
        failed.__cause__ = error
        return failed

    def _prune(self) -> None:
        """Removes all but the newest and the best; they are on the disk by now."""
        kept = {*self.steps()[-(self.keep or 1) :], self.best()}
        for step in set(self.steps()) - kept:
            try:
                # Without its manifest it counts as unfinished, whenever this stops.
                (self.folder / str(step) / MANIFEST).unlink()
                shutil.rmtree(self.folder / str(step))
            except OSError as error:
                log.warning("an old checkpoint could not be removed: %s", error)

    def _note(self, step: int) -> dict[str, Any]:
        """Returns the manifest of a step; {} when it cannot be read."""
        try:
            return sealing.read(self.folder / str(step))
        except (FileNotFoundError, Damaged):
            return {}


def _finite_or_none(metric: float | None) -> float | None:
    return float(metric) if metric is not None and math.isfinite(metric) else None


def _grouped(tree: Mapping) -> dict[str, Any]:
    """Returns what goes into which folder of a checkpoint."""
    items = {key: tree[key] for key in ALONE if key in tree}
    rest = {key: value for key, value in tree.items() if key not in ALONE}
    items |= {REST: rest} if rest else {}
    # Orbax refuses an item without arrays.
    return {key: value for key, value in items.items() if jax.tree.leaves(value)}


def _snapshot(tree: Any) -> Any:
    """Returns a copy that later donation cannot touch.

    One process gathers everything to numpy. Several cannot, there Orbax copies what
    each process holds before it returns; on CPU it would alias, so copy first.
    """
    leaves = jax.tree.leaves(tree)
    if any(jnp.issubdtype(x.dtype, jax.dtypes.prng_key) for x in leaves):
        raise ValueError("a typed random key cannot be saved; save its key_data")
    if jax.process_count() > 1:
        cpu = jax.default_backend() == "cpu"
        return jax.tree.map(lambda x: x.copy() if cpu else x, tree)
    for leaf in leaves:
        if isinstance(leaf, jax.Array):
            leaf.copy_to_host_async()
    # On CPU numpy would look into JAX's own memory; elsewhere asarray is the copy.
    copy = np.array if jax.default_backend() == "cpu" else np.asarray
    # A numpy array cannot be donated; one as large as a model is not held twice.
    return jax.tree.map(lambda x: x if isinstance(x, np.ndarray) else copy(x), tree)


def _writer(target: Path, items: dict) -> Callable[[], None]:
    """Returns the function that finishes writing `items`, for a background thread."""
    if jax.process_count() > 1:  # Orbax's barriers belong on the calling thread
        _refuse_non_finite(items)
        ocp, context = _saving()
        with context:
            return ocp.save_checkpointables_async(str(target), items).result

    def write() -> None:
        _refuse_non_finite(items)
        ocp, context = _saving()
        with ONE_AT_A_TIME, context:
            ocp.save_checkpointables(str(target), items)

    return write


def _saving() -> tuple:
    from orbax.checkpoint import v1 as ocp  # takes a second or two to import

    # Weights hardly compress (8%), and compression competes with training for cores.
    context = ocp.Context()
    context.array.saving.use_compression = False
    # Made in its own threads, a folder that cannot be made keeps them (and the end of
    # the process) waiting for 20 minutes; this is a background thread already.
    context.asynchronous.create_directories_asynchronously = False
    return ocp, context


def _refuse_non_finite(items: Mapping) -> None:
    rows = {**items, **items.get(REST, {})}
    _check_finite(named({key: rows[key] for key in FINITE if key in rows}))


def _check_finite(named: list[tuple[str, Any]]) -> None:
    found = [(name, x) for name, x in named if jnp.issubdtype(x.dtype, np.floating)]
    for name, finite in zip([name for name, _ in found], _finite(found), strict=True):
        if not finite:
            raise FloatingPointError(
                f"{name} holds NaN or Inf: this checkpoint was not saved"
            )


def _finite(found: list[tuple[str, Any]]) -> Any:
    """Returns which of the named arrays are finite; several processes ask together."""
    arrays = [x for _, x in found]
    if jax.process_count() == 1 or not arrays:
        return [np.isfinite(x).all() for x in arrays]
    return np.asarray(_each_finite(arrays))


@jax.jit
def _each_finite(arrays: list[jax.Array]) -> jax.Array:
    return jnp.stack([jnp.isfinite(x).all() for x in arrays])


def _load(
    found: Path,
    manifest: dict,
    abstract: Any,
    only: Sequence[str] | None = None,
) -> Any:
    from orbax.checkpoint import v1 as ocp

    shape, abstract = abstract, None if abstract is None else _mapping(abstract)
    if abstract is not None:
        refuse_other(f"{found} is", leaves(abstract), manifest["leaves"])
    items = {name.split("/")[0] for name in manifest["files"] if "/" in name}
    if only is not None:
        items &= {key if key in ALONE else REST for key in only}
    processes.first(lambda: sealing.verify(found, manifest, items), Damaged)
    context = ocp.Context()
    if abstract is None:
        # The sharding on the disk names the devices of the process that saved it.
        saved = ocp.checkpointables_metadata(str(found)).metadata
        wanted = {item: _place(saved[item], moved=True) for item in items}
        if only is not None and REST in wanted:
            context.pytree.loading.partial_load = True
            wanted[REST] = {k: v for k, v in wanted[REST].items() if k in only}
    else:
        wanted = _place(_grouped(abstract), moved=False)
    with context:
        tree = ocp.load_checkpointables(str(found), wanted)
    rest = tree.pop(REST, {})
    if abstract is None:
        return {**tree, **rest}
    merged = {**abstract, **tree, **rest}  # what has no arrays is not on the disk
    return merged if isinstance(shape, Mapping) else type(shape)(**merged)


def _mapping(tree: Any) -> Mapping:
    """Returns the top level of a tree as a mapping; a NamedTuple is one too."""
    return tree if isinstance(tree, Mapping) else tree._asdict()


def _place(tree: Any, *, moved: bool) -> Any:
    """Returns ShapeDtypeStructs; on this process's first device where not said."""
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])

    def leaf(x) -> jax.ShapeDtypeStruct:
        sharding = None if moved else getattr(x, "sharding", None)
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or here)

    return jax.tree.map(leaf, tree)


def _unused(path: Path) -> Path:
    """Returns `path`, or the first of path-2, path-3, ... that does not exist."""
    stem, number = path, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path
