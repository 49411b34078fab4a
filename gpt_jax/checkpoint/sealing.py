"""The file that is written last, and makes a folder a checkpoint."""

import json
import logging
import shutil
from pathlib import Path

from gpt_jax import files, stores

log = logging.getLogger(__name__)

MANIFEST = "manifest.json"
FORMAT = 1


class Damaged(ValueError):
    """The files of a checkpoint are not those that its manifest names."""


def seal(target: Path, note: dict) -> None:
    """Writes the manifest: after every other byte is on the disk, and atomically."""
    found = {}
    for path in sorted(target.rglob("*")):
        files.sync(path)  # of a folder, the names in it
        if path.is_file():
            found[path.relative_to(target).as_posix()] = files.digest_of(path)
    body = {"format": FORMAT, **note, "files": found}
    text = json.dumps({**body, "sha256": _body_hash(body)}, indent=1)
    files.write(target / MANIFEST, text)
    files.sync(target.parent)


def read(found: Path) -> dict:
    """Returns the manifest of a checkpoint.

    Raises:
      FileNotFoundError: there is none.
      Damaged: it does not match its own sha256.
    """
    try:
        body = json.loads((found / MANIFEST).read_bytes())
        stated = body.pop("sha256")
    except FileNotFoundError:
        raise FileNotFoundError(f"{found} is not a finished checkpoint") from None
    except (ValueError, KeyError, AttributeError, TypeError):
        stated, body = None, {}
    if stated != _body_hash(body):
        raise Damaged(f"{found / MANIFEST} is not as it was written")
    if body["format"] != FORMAT:
        raise ValueError(
            f"{found} has checkpoint format {body['format']}, this code reads {FORMAT}"
        )
    return body


def _body_hash(body: dict) -> str:
    return files.digest(json.dumps(body, sort_keys=True))


def verify(found: Path, manifest: dict, items: set[str] | None) -> None:
    """Raises Damaged, naming the file, when one is not as the manifest says.

    Of a checkpoint in a store these files are fetched first.
    """
    wanted = {}
    for name, stated in manifest["files"].items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise Damaged(f"{found / MANIFEST} names {name}, which is not beside it")
        top, inside, _ = name.partition("/")
        if not inside or items is None or top in items:
            wanted[name] = stated
    stores.complete(found, wanted)
    for name, stated in wanted.items():
        if not (found / name).is_file():
            raise Damaged(f"{found / name} is missing")
        if files.digest_of(found / name) != stated:
            raise Damaged(f"{found / name} does not match its sha256")


def is_sound(found: Path) -> bool:
    """Whether a checkpoint is finished and as its manifest says."""
    try:
        verify(found, read(found), None)
    except (FileNotFoundError, Damaged):
        return False
    return True


def clean(folder: Path) -> None:
    """Removes what a killed process left: it was never a checkpoint."""
    leftovers = [p for p in folder.iterdir() if ".orbax-checkpoint-tmp" in p.name]
    cut = unfinished(folder)
    finished = any(folder.glob(f"[0-9]*/{MANIFEST}"))
    if finished or not cut[1:]:  # else they are lost: see Checkpoints.damaged
        leftovers += cut
    for path in sorted(filter(Path.is_dir, leftovers)):
        log.warning("removed the unfinished checkpoint %s", path)
        shutil.rmtree(path)


def unfinished(folder: Path) -> list[Path]:
    """Returns the folders of checkpoints, or of frozen weights, without a manifest."""
    named = [p for p in folder.iterdir() if p.name.isdecimal() or len(p.name) == 64]
    return [p for p in named if p.is_dir() and not (p / MANIFEST).exists()]
