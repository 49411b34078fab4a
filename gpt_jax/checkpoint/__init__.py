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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax

from gpt_jax import processes, stores
from gpt_jax.checkpoint import arrays, sealing
from gpt_jax.checkpoint.sealing import FORMAT, MANIFEST, Damaged
from gpt_jax.checkpoint.tables import (
    check_same,
    difference,
    digest,
    leaves,
    named,
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
        tree = arrays.mapping(tree)
        if not processes.first(lambda: self._is_new(step)):
            return False
        target = self.folder / str(int(step))
        note = {"step": int(step), "metric": _finite_or_none(metric), "meta": meta}
        note |= {"since": int(since)} if since else {}
        json.dumps(note)  # a meta that cannot be written is refused here, not later
        table, items = leaves(tree), arrays.snapshot(arrays.grouped(tree))
        try:
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
            write = arrays.writer(target, items)
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
                stores.complete(self.folder / str(s))
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
            step, lambda found, manifest: arrays.load(found, manifest, abstract)
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
            return arrays.load(found, manifest, None, only=only)

        return self._read(step, load)

    def save_frozen(self, tree: Any) -> str:
        """Stores weights that never change, once; returns their digest.

        Put the digest into the `meta` of every checkpoint that needs them.
        """
        assert self.keep is not None, "opened for reading only"
        tree = arrays.mapping(tree)
        name = digest(tree)
        target = self.folder.parent / "frozen" / name
        if processes.first(lambda: sealing.is_sound(target)):
            return name
        arrays.check_finite(named(tree))
        try:
            if jax.process_index() == 0:
                shutil.rmtree(target, ignore_errors=True)
                target.parent.mkdir(parents=True, exist_ok=True)
                sealing.clean(target.parent)
            arrays.writer(target, arrays.snapshot(arrays.grouped(tree)))()
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
            return arrays.load(target, manifest, abstract)
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
            stores.complete(found)
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


def _unused(path: Path) -> Path:
    """Returns `path`, or the first of path-2, path-3, ... that does not exist."""
    stem, number = path, 1
    while path.exists():
        number += 1
        path = stem.with_name(f"{stem.name}-{number}")
    return path
