"""Files and run folders in stores: gs://, s3://, whatever fsspec has a driver for.

An address is worked on in a folder of this machine (`fetched`). What becomes whole
there is copied back: while a process holds the run (`claim`), every few seconds; else
when the program ends (`put_back`). A store has no appending, no renaming and no locks,
so the order of copying has to do: a checkpoint is copied when it is sealed, its
manifest last, and loses that first. Whatever is killed, the store holds a run that can
go on, on this machine or another.

Text and token shards are not copied: `opened` and `Blob` read them where they are.
"""

import contextlib
import importlib.util
import json
import logging
import math
import os
import re
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import commands, files, screen

log = logging.getLogger(__name__)

ROOT = "~/.cache/gpt_jax/stores"  # where addresses are worked on
EVERY_S = 15.0  # between two looks at what is new in a folder that is claimed
STALE_S = 120.0  # a claim that was not renewed for so long is nobody's
GONE_S = 20.0  # for a folder that changes while it is fetched
PATIENCE_S = 300.0  # for a store that does not take the last of a run
AT_ONCE = 8  # files on their way together
CLAIM = "claim.json"
ADDRESS = "address.txt"  # beside a local folder: what it stands for
MANIFEST = "manifest.json"  # what makes a folder a checkpoint; checkpoint/sealing.py
# Stores whose objects appear whole; elsewhere a file is written beside its place.
WHOLE = ("gs", "gcs", "s3", "s3a", "az", "abfs", "abfss", "oci", "hf", "memory")
# What differs in each version of an object, by the names that drivers have for it.
VERSION = ("e_tag", "ETag", "etag", "md5Hash", "generation", "mtime", "created")
OBSTORE = ("s3", "s3a", "gs", "az", "abfs", "abfss")  # one driver for all of these
SEALED = re.compile(r"(.*?\b(?:checkpoints/(?:[a-z-]+\d+/)?\d+|frozen/[0-9a-f]{64}))/")
PASSING = re.compile(r"(\.tmp|\.lock|\.part)(/|$)|orbax-checkpoint-tmp")


class Copied(NamedTuple):
    """A file of a store: its version there, its stamp here; None: it stayed there."""

    version: str
    stamp: tuple[int, int] | None


def fetched(path: str | Path) -> Path:
    """Returns a local path for what a user named; an address is fetched for it.

    A program fetches an address once. What it changes in a fetched folder goes back
    by `claim` or `put_back`.

    Raises:
      ValueError: there is no driver for such addresses; says what to install.
      OSError: the store cannot be read.
    """
    if not files.is_address(path):
        return files.expand(path)
    address = str(path).rstrip("/")
    with _guard:
        if address not in _copies:
            copy = Copy(address)
            copy.pull()
            _copies[address] = copy
    return _copies[address].local


def matching(pattern: str) -> list[str]:
    """Returns the addresses that a pattern (`*`, `?`) means; itself, without one."""
    if not (files.is_address(pattern) and re.search(r"[*?\[]", pattern)):
        return [pattern]
    store, root = _store(pattern)
    with _told(pattern, "read"):
        store.invalidate_cache()
        found = sorted(map(str, store.glob(root)))
    return [store.unstrip_protocol(name) for name in found] or [pattern]


def address_of(path: str | Path) -> str:
    """Returns the address of what this program has fetched; "" for other paths."""
    for address, copy in _copies.items():
        if Path(path).is_relative_to(copy.local):
            below = Path(path).relative_to(copy.local).as_posix()
            return address if below == "." else f"{address}/{below}"
    return ""


def shown(path: str | Path) -> str:
    """Returns the address of what was fetched, for people; other paths as they are."""
    return address_of(path) or str(path)


def complete(folder: Path, names: Iterable[str] | None = None) -> None:
    """Fetches files of checkpoints, which stay in the store until they are read.

    Nothing happens to what is here, or was never fetched. It is known by its place, so
    that processes which a program starts can read what the program fetched.

    Args:
      folder: of a checkpoint, or of several.
      names: which of its files; None for all.
    """
    try:
        root, folder = files.expand(ROOT).absolute(), folder.absolute()
    except ValueError:  # there is no home folder, so nothing was ever fetched to it
        return
    if folder.is_relative_to(root):
        base = root / folder.relative_to(root).parts[0]
        Copy((base / ADDRESS).read_text("utf-8")).complete(folder, names)


def put_back() -> None:
    """Copies what this program has changed in fetched folders to where they are from.

    Raises:
      OSError: a store does not take it.
    """
    for copy in list(_copies.values()):
        copy.push(owner=False)


@contextlib.contextmanager
def claim(folder: Path) -> Iterator[None]:
    """Holds a fetched folder and keeps its address in step; nothing for other folders.

    A store has no lock: who claims leaves a note there and renews it. Two machines that
    begin within the same moment do not see each other at once; the one whose note did
    not stay stops copying when it notices.

    Raises:
      ValueError: another process holds it.
      OSError: the store does not take what the folder holds at the end.
    """
    held = next((copy for copy in _copies.values() if copy.local == folder), None)
    if held is None:
        yield
        return
    with files.lock(held.claim), held.claimed():
        yield


class Copy:
    """A file or folder of a store, and the local one that stands for it.

    Args:
      address: where it is; it need not be there yet.
    """

    def __init__(self, address: str):
        self.address = address
        self.store, self.root = _store(address)
        self.root = self.root.rstrip("/")
        base = files.expand(ROOT) / files.digest(address)[:16]
        name = files.shortened(self.root.rpartition("/")[2] or "root")
        self.local, self.index = base / "copy" / name, base / "index.json"
        self.busy, self.claim = base / "copying.lock", base / "claimed.lock"
        self.named, self.note = base / ADDRESS, base / CLAIM

    # --- from the store ---

    def pull(self) -> None:
        """Makes the local folder what the store holds, or leaves it where it is ahead.

        It is ahead when the store holds what was last copied there, or the note of a
        process of this machine: that was killed before it could copy the rest.
        """
        began = time.monotonic()
        while True:
            if self.claim.is_file() and files.holder(self.claim).get("alive"):
                return  # by a run of this machine, and nothing is newer than its folder
            with self._alone():
                gone = self._pull()
            if not gone:
                return
            if time.monotonic() - began > GONE_S:
                raise gone
            time.sleep(1.0)  # its owner has removed what was listed

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Waits until nobody else of this machine copies from or to the address."""
        with files.lock(self.busy, math.inf):
            yield

    def _pull(self) -> FileNotFoundError | None:
        """Returns the error of a file that was listed and is not there any more."""
        files.write(self.named, self.address, durable=False)
        with _told(self.address, "read"):
            there, claimer = self._there(), self._claimer()
        known, here = self._copied(), self._here()
        ours = here and claimer and claimer["by"]["host"] == files.host()
        moved = not ours and there != {n: c.version for n, c in known.items()}
        stale = {
            name
            for name, version in there.items()
            if name not in here
            or (moved and known.get(name) != Copied(version, here[name]))
        }
        if moved and known:
            stale |= here.keys() - there.keys()
        for name in stale & here.keys():
            self._path(name).unlink()
        late = {name for name in stale if _is_late(name)}
        now = {name: there[name] for name in (stale & there.keys()) - late}
        try:
            self._get(now)
        except FileNotFoundError as error:
            return error
        found = {name: known[name] for name in there.keys() & known.keys()}
        found |= {name: Copied(there[name], None) for name in late & there.keys()}
        found |= {n: Copied(there[n], stamp(self._path(n))) for n in now}
        if found != known:
            self._remember(found)
        return None

    def complete(self, folder: Path, names: Iterable[str] | None) -> None:
        """Fetches files of checkpoints; see the function of that name."""
        below = f"{folder.relative_to(self.local).as_posix()}/"
        asked = None if names is None else {f"{below}{name}" for name in names}
        with self._alone():
            known = self._copied()
            away = {
                name: copied.version
                for name, copied in known.items()
                if copied.stamp is None and name.startswith(below)
                if asked is None or name in asked
            }
            if not away:
                return
            self._get(away)
            for name, version in away.items():
                known[name] = Copied(version, stamp(self._path(name)))
            self._remember(known)

    def _get(self, versions: Mapping[str, str]) -> None:
        """Fetches files, and shows how far it is."""
        if not versions:
            return
        sizes = {name: _size(version) for name, version in versions.items()}
        total = sum(sizes.values())
        with screen.Show(True).bar(f"fetching {self.address}", total) as advance:

            def get(name: str) -> None:
                with files.draft(self._path(name), durable=False) as part:
                    self.store.get_file(self._key(name), str(part))
                advance(sizes[name])

            with _told(self.address, "read"):
                _each(get, sizes)

    # --- to the store ---

    def push(self, *, owner: bool) -> None:
        """Copies what is new here; the owner removes there what is gone here, too."""
        with self._alone():
            self._push(owner)

    def _push(self, owner: bool) -> None:
        known, here = self._copied(), self._here()
        new = [n for n, at in here.items() if n not in known or known[n].stamp != at]
        gone = sorted(known.keys() - here.keys()) if owner else []
        # The arrays that stayed there go with their checkpoint alone.
        gone = [name for name in gone if known[name].stamp or self._unsealed(name)]
        if not (new or gone):
            return

        with _told(self.address, "written"):
            _each(self._put, [name for name in new if not _is_last(name)])
            _each(self._put, [name for name in new if _is_last(name)])
            _each(self._remove, [name for name in gone if _is_last(name)])
            _each(self._remove, [name for name in gone if not _is_last(name)])
            there = self._there()
        stamps = {name: copied.stamp for name, copied in known.items()} | here
        both = there.keys() & stamps.keys()
        self._remember({name: Copied(there[name], stamps[name]) for name in both})

    def _remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self.store.rm_file(self._key(name))

    def _put(self, name: str) -> None:
        try:
            _put_whole(self.store, self._path(name), self._key(name))
        except FileNotFoundError:
            if self._path(name).exists():
                raise  # else it has gone meanwhile

    # --- whose it is ---

    @contextlib.contextmanager
    def claimed(self) -> Iterator[None]:
        """Leaves a note that this process works on the folder; copies meanwhile."""
        self._check_free()
        self._note()
        stop = threading.Event()
        follower = threading.Thread(
            target=self._follow, args=(stop,), name="gpt_jax-store", daemon=True
        )
        follower.start()
        failed = True
        try:
            yield
            failed = False
        finally:
            stop.set()
            follower.join()
            try:
                self._finish()
            except Exception as error:
                if not failed:
                    raise
                log.error("%s", error)  # what ended the run is told, and this as well

    def _follow(self, stop: threading.Event) -> None:
        told = ""
        while not stop.wait(EVERY_S):
            try:
                self._keep()
                told = ""
            except OSError as error:
                if str(error) != told:
                    log.warning("%s; it is kept in %s and tried again every %g s",
                                error, self.local, EVERY_S)  # fmt: skip
                told = str(error)
            except ValueError as error:  # told again at the end, which it is not yet
                log.error("%s", error)
                return

    def _keep(self) -> None:
        """Renews the note and copies what is new, if the note is ours still."""
        with _told(self.address, "read"):
            found = self._claimer()
        if found.get("by") != files.me():
            by = "pid {pid} on {host}".format(**found["by"]) if found else "nobody"
            raise ValueError(
                f"{self.address} was claimed by this process and is now by {by}: "
                f"nothing more is copied there; what was not is kept in {self.local}"
            )
        self._note()
        self.push(owner=True)

    def _finish(self) -> None:
        """Copies the last of it, with patience, and gives the folder free."""
        began = time.monotonic()
        while True:
            try:
                self._keep()
                with _told(self.address, "written"):
                    self.store.rm_file(self._key(CLAIM))
                return
            except OSError as error:
                if time.monotonic() - began > PATIENCE_S:
                    raise OSError(
                        f"{error}; what was not copied is kept in {self.local}, and "
                        "the same command goes on with it from this machine"
                    ) from error
            time.sleep(1.0)

    def _claimer(self) -> dict[str, Any]:
        """Returns who left the note that is there and when; {} for none of ours."""
        self.store.invalidate_cache()
        try:
            found = json.loads(self.store.cat_file(self._key(CLAIM)))
            who = {"host": str, "pid": int, "started": float}
            by = {key: kind(found["by"][key]) for key, kind in who.items()}
            return {"by": by, "time": float(found["time"])}
        except (FileNotFoundError, NotADirectoryError, ValueError, KeyError, TypeError):
            return {}

    def _check_free(self) -> None:
        with _told(self.address, "read"):
            found = self._claimer()
        if not found:
            return
        host, pid, started = found["by"].values()
        if host == files.host() and not files.is_running(pid, started):
            return
        ago = time.time() - found["time"]
        if ago > STALE_S:
            log.warning("took over %s from process %s on %s, which has not been heard "
                        "of for %.0f s", self.address, pid, host, ago)  # fmt: skip
            return
        raise ValueError(
            f"{self.address} is in use by process {pid} on {host}, which said so "
            f"{max(ago, 0):.0f} s ago; wait for it, stop it, or use another folder "
            f"(where it was killed, it counts as gone after {STALE_S:g} s)"
        )

    def _note(self) -> None:
        said = {"by": files.me(), "time": time.time()}
        files.write(self.note, json.dumps(said), durable=False)
        with _told(self.address, "written"):
            _put_whole(self.store, self.note, self._key(CLAIM))

    # --- what is where ---

    def _there(self) -> dict[str, str]:
        """Returns the version of each file of the store, by its name below."""
        self.store.invalidate_cache()
        found = {}
        for path, listed in self.store.find(self.root, detail=True).items():
            info = listed or self.store.info(path)  # some say nothing of a file alone
            name = path[len(self.root) :].strip("/")
            passing = name == CLAIM or PASSING.search(name) or path.endswith("/")
            if info["type"] == "file" and not passing:
                if ".." in name.split("/"):
                    raise ValueError(f"{self.address} names {name!r}, outside itself")
                found[name] = _version(info)
        return found

    def _here(self) -> dict[str, tuple[int, int]]:
        """Returns the stamps of the local files that are whole, by their names."""
        if self.local.is_file():
            return {"": stamp(self.local)}
        found = {}
        # Not rglob, which minds that a folder goes while it looks.
        for top, _, inside in os.walk(self.local):
            for path in (Path(top, name) for name in inside):
                name = path.relative_to(self.local).as_posix()
                if not (self._unsealed(name) or PASSING.search(name)):
                    with contextlib.suppress(FileNotFoundError):
                        found[name] = stamp(path)
        return found

    def _unsealed(self, name: str) -> bool:
        """Whether a file is of a checkpoint that is not here, or not whole."""
        folder = SEALED.match(f"{name}/")
        return bool(folder) and not (self.local / folder[1] / MANIFEST).is_file()

    def _copied(self) -> dict[str, Copied]:
        try:
            found = json.loads(self.index.read_text("utf-8"))
            return {
                name: Copied(version, tuple(at) if at else None)
                for name, (version, at) in found.items()
            }
        except (OSError, ValueError, TypeError, AttributeError):
            return {}  # it is compared anew

    def _remember(self, copied: Mapping[str, Copied]) -> None:
        files.write(self.index, json.dumps(copied), durable=False)

    def _path(self, name: str) -> Path:
        return self.local / name if name else self.local

    def _key(self, name: str) -> str:
        return f"{self.root}/{name}" if name else self.root


# --- what is read where it is ---------------------------------------------------------


class Blob:
    """The bytes of a file in a store, read in parts.

    Args:
      address: of the file.

    Raises:
      FileNotFoundError: it is not there.
    """

    def __init__(self, address: str):
        self.address = address
        self.store, self.key = _store(address)
        with _told(address, "read"):
            self.size = int(self.store.info(self.key)["size"])

    def read(self, start: int, stop: int) -> bytes:
        """Returns the bytes from start to stop."""
        with _told(self.address, "read"):
            return self.store.cat_file(self.key, start, stop)


@contextlib.contextmanager
def draft_folder(target: Any, *, last: str) -> Iterator[tuple[Path, Callable]]:
    """Gives a local folder to fill, whose files are then put below an address.

    Args:
      target: where, as `opened` returned it.
      last: the file that is put there last: without it there is nothing.

    Yields:
      The folder, and `put(file, name)`, which takes one of its files there at once.
    """
    store, root = _store(str(target))

    def put(file: Path, name: str) -> None:
        with _told(str(target), "written"):
            _put_whole(store, file, f"{root}/{name}")
        file.unlink()

    with tempfile.TemporaryDirectory(prefix="gpt_jax-") as folder:
        yield Path(folder), put
        found = [path for path in Path(folder).rglob("*") if path.is_file()]
        for path in sorted(found, key=lambda path: path.name == last):
            put(path, path.relative_to(folder).as_posix())


def listed(address: str) -> list[Any]:
    """Returns the files that an address means, as `opened` would: it, those below it.

    `*`, `?` and `**` are a pattern's. What begins with a dot is not looked at.
    """
    store, root = _store(address)
    with _told(address, "read"):
        store.invalidate_cache()
        if re.search(r"[*?\[]", address):
            found = [name for name in store.glob(root) if store.isfile(name)]
        else:
            found = list(store.find(root))
    below = re.split(r"[*?\[]", f"{root}/")[0].count("/")
    hidden = re.compile(r"(^|/)\.")
    return [
        opened(store.unstrip_protocol(name))
        for name in sorted(found)
        if not hidden.search("/".join(name.split("/")[below:]))
    ]


def stamp(path: Any) -> Any:
    """Returns what tells one version of a file, here or in a store, from the next."""
    if not files.is_address(path):
        found = path.stat()
        return found.st_size, found.st_mtime_ns
    store, key = _store(str(path))
    with _told(str(path), "read"):
        store.invalidate_cache()
        return _version(store.info(key))


def opened(path: str | Path) -> Any:
    """Returns a path, of an address too, that is used where it is: open, stat, ...

    Raises:
      ValueError: a package is missing; says which.
    """
    if not files.is_address(path):
        return files.expand(path)
    address = str(path).rstrip("/")
    try:
        from upath import UPath
    except ModuleNotFoundError:
        cure = commands.install("universal-pathlib")
        raise ValueError(f"reading {address} needs a package: {cure}") from None
    _store(address)  # says what is missing, and which driver is meant
    return UPath(address)


# --- drivers --------------------------------------------------------------------------


def _store(address: str) -> tuple[Any, str]:
    """Returns fsspec's file system for an address, and the path in it."""
    import fsspec

    scheme = address.partition("://")[0]
    if scheme in OBSTORE and importlib.util.find_spec("obstore"):
        importlib.import_module("obstore.fsspec").register(scheme)
    try:
        return fsspec.core.url_to_fs(address)
    except ImportError as error:
        cure = commands.install("obstore") if scheme in OBSTORE else str(error)
        raise ValueError(f"{address}: {scheme}:// needs a package: {cure}") from None
    except ValueError:
        raise ValueError(
            f"{address}: nothing is known of {scheme}://; gs://, s3://, az:// and "
            "others that fsspec has a driver for can be used"
        ) from None


@contextlib.contextmanager
def _told(address: str, what: str) -> Iterator[None]:
    """Makes a sentence of what drivers raise, which may be anything."""
    try:
        yield
    except (ValueError, NotImplementedError):
        raise
    except Exception as error:
        # Of pages of what was asked and answered the first line, or what S3 says.
        line = str(error).partition("\n")[0].partition(": <?xml")[0]
        said = re.search("<Message>(.*?)</Message>", str(error))
        why = (said[1] if said else line) or type(error).__name__
        kind = OSError
        for mistake in (FileNotFoundError, PermissionError):
            kind = mistake if isinstance(error, mistake) else kind
        if "credential" in f"{type(error).__name__} {why}".lower():
            kind = PermissionError
        if "NoSuchBucket" in str(error):
            kind = FileNotFoundError
        raise kind(f"{address} cannot be {what}: {why}") from error


def _each(do: Callable[[str], None], names: Iterable[str]) -> None:
    """Does something with several names at once; raises the first error."""
    with ThreadPoolExecutor(AT_ONCE) as pool:
        for _ in pool.map(do, names):
            pass


def _put_whole(store: Any, file: Path, target: str) -> None:
    """Copies a local file to a store, where it appears whole."""
    protocol = store.protocol
    names = {protocol} if isinstance(protocol, str) else {*protocol}
    if names & {*WHOLE}:
        store.put_file(str(file), target)
        return
    store.makedirs(target.rpartition("/")[0], exist_ok=True)
    store.put_file(str(file), f"{target}.part")
    store.mv(f"{target}.part", target)


def _version(info: Mapping[str, Any]) -> str:
    told = [f"{key}={info[key]}" for key in VERSION if info.get(key) is not None]
    return " ".join([str(info["size"]), *told[:1]])


def _size(version: str) -> int:
    return int(version.partition(" ")[0])


def _is_last(name: str) -> bool:
    """Whether a file is what makes a folder a checkpoint."""
    return bool(SEALED.match(f"{name}/")) and name.endswith(f"/{MANIFEST}")


def _is_late(name: str) -> bool:
    """Whether a file stays in its store until it is read: the arrays of checkpoints."""
    return bool(SEALED.match(f"{name}/")) and not _is_last(name)


_copies: dict[str, Copy] = {}
_guard = threading.Lock()
