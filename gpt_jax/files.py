"""Files that are whole or not there, and what differs between systems.

Whatever others read is written beside its place, put on the disk, and only then given
its name: a kill at any moment leaves the old file or the new one. Linux, macOS and
Windows differ in here and nowhere else.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import socket
import stat
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

NAME_BYTES = 255  # the longest name of a file, on all file systems in common use
SAME_START_S = 2.0  # two readings of when a process began differ by less
# What fsync answers where a file system has no such thing (FUSE, SMB, some of macOS).
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.ENOSYS, errno.EPERM)
# Errors that a path is the cause of, whatever was to be done with it.
OF_A_PATH = (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
# Of the byte that Windows locks: others may not read it, so it lies beyond the text.
FAR = 1 << 30
LOCK_POLL_S = 0.05  # between two tries of who waits for a lock

_drafts: set[Path] = set()  # what is being written now


# --- names ----------------------------------------------------------------------------


def expand(path: str | Path) -> Path:
    """Returns a path with a `~` at its beginning replaced by the home folder.

    Raises:
      ValueError: nobody says where that is: HOME is not set and the user is unknown;
        or it is an address, gs://bucket/a, where a folder of this machine is needed.
    """
    if is_address(path):
        raise ValueError(
            f"{path} is an address, and this has to be on a disk of this machine: "
            "name a folder, or mount the store as one"
        )
    try:
        return Path(path).expanduser()
    except RuntimeError as error:
        raise ValueError(
            f"{path} begins with ~ but nothing says where the home folder is: set HOME "
            "in the environment, or write the whole path"
        ) from error


def is_address(path: Any) -> bool:
    """Whether a text is the address of something in a store: gs://bucket/runs/a."""
    return bool(re.match(r"[a-z][a-z0-9+.-]+://", str(path)))


def shortened(name: str, room: int = 0) -> str:
    """Returns a name that a file system takes, with `room` bytes to spare.

    The end of a longer one becomes a few digits of its sha256, so that two names that
    differ stay different.
    """
    data = os.fsencode(name)
    if len(data) + room <= NAME_BYTES:
        return name
    kept = data[: NAME_BYTES - room - 13].decode("utf-8", "ignore")
    return f"{kept}-{digest(data)[:12]}"


def shown(path: str | Path) -> str:
    r"""Returns a path for people: a byte of it that is not UTF-8 is written as \xff."""
    return os.fsencode(str(path)).decode("utf-8", "backslashreplace")


# --- whole files and folders ----------------------------------------------------------


def write(path: str | Path, content: str | bytes, *, durable: bool = True) -> None:
    """Writes a file whole or not at all; text as UTF-8. Makes the folder.

    Args:
      path: the file.
      content: all of it.
      durable: wait for the disk; without it a power cut may leave an empty file.
    """
    data = content.encode() if isinstance(content, str) else content
    with draft(path, durable=durable) as part:
        part.write_bytes(data)


def write_between(path: str | Path, begin: str, end: str, text: str) -> None:
    """Puts tables between the lines `begin` and `end` of a Markdown file.

    Raises:
      ValueError: the file lacks one of the marks; nothing was written.
    """
    before, first, rest = Path(path).read_text("utf-8").partition(begin)
    _, last, after = rest.partition(end)
    if not first or not last:
        raise ValueError(f"{path} has no place for tables: the lines {begin} and {end}")
    write(path, f"{before}{begin}\n{text}\n{end}{after}")


def write_json(path: str | Path, value: Any) -> None:
    """Writes a value as JSON, whole or not at all; letters stay as they are."""
    write(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> dict[str, Any]:
    """Returns the object of a JSON file.

    Raises:
      ValueError: the file holds none; names it.
    """
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} should hold a JSON object, not a {type(found)}")
    return found


@contextlib.contextmanager
def draft(path: str | Path, *, durable: bool = True) -> Iterator[Path]:
    """Gives a path to write to, which then becomes `path`, or is removed on an error.

    Nothing is at `path` before the whole content is on the disk (if `durable`).
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = f".{threading.get_native_id()}.tmp"
    part = path.with_name(shortened(path.name, len(ending)) + ending)
    _drafts.add(part)
    try:
        yield part
        if durable:
            sync(part)
        os.replace(part, path)
        if durable:
            sync(path.parent)
    finally:
        part.unlink(missing_ok=True)
        _drafts.discard(part)


@contextlib.contextmanager
def draft_folder(path: str | Path) -> Iterator[Path]:
    """Gives a new folder to fill, which then becomes `path`, or is removed on an error.

    Those that ended processes of this machine have left beside it are removed. Where
    another process was quicker its folder stays, and this one is removed.
    """
    path = Path(path)
    part = begin_folder(path)
    try:
        yield part
        finish_folder(part, path)
    finally:
        drop_folder(part)


def begin_folder(path: Path) -> Path:
    """Makes the folder that `finish_folder` will call `path`; see `draft_folder`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    ending = f"{os.getpid()}.tmp"
    host = f".{socket.gethostname()}-"
    name = shortened(path.name, len(os.fsencode(host)) + 12) + host
    for left in path.parent.glob(f"{_literally(name)}*.tmp"):
        pid = left.name.removeprefix(name).removesuffix(".tmp")
        if not (pid.isdecimal() and is_running(int(pid))):
            shutil.rmtree(left, ignore_errors=True)
    part = path.with_name(name + ending)
    shutil.rmtree(part, ignore_errors=True)  # of a process that had our number
    part.mkdir()
    _drafts.add(part)
    return part


def finish_folder(part: Path, path: Path) -> None:
    """Puts a folder on the disk and gives it its name, unless that is there already."""
    for inside in part.rglob("*"):
        sync(inside)
    sync(part)
    try:
        os.replace(part, path)
    except OSError:
        if not path.is_dir():
            raise
    sync(path.parent)
    drop_folder(part)


def drop_folder(part: Path) -> None:
    """Removes what `begin_folder` made, if it is there still."""
    shutil.rmtree(part, ignore_errors=True)
    _drafts.discard(part)


def drop_drafts() -> None:
    """Removes what is being written now: for a process that is about to leave."""
    for part in list(_drafts):
        shutil.rmtree(part, ignore_errors=True)
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)


def sync(path: str | Path) -> None:
    """Puts a file, or the names in a folder, on the disk, where the system can.

    Windows opens no folders and syncs no file that was opened for reading only, and
    some file systems know of no syncing; there nothing happens.
    """
    folder = os.path.isdir(path)
    try:
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
    except PermissionError:
        return
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
    finally:
        os.close(handle)


def private_folder(path: Path) -> None:
    """Makes a folder, and those above it that are missing, for this user alone."""
    if path.is_dir():
        return
    if path.exists():
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory", str(path))
    private_folder(path.parent)
    path.mkdir(mode=0o700, exist_ok=True)


def open_to_others(path: Path) -> str:
    """Returns why others can write to a folder, as the end of a sentence; "" = not."""
    if not hasattr(os, "getuid"):  # Windows: a user's folders are the user's own
        return ""
    found = path.stat()
    if found.st_uid != os.getuid():
        return f"belongs to another user (id {found.st_uid})"
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        return f"can be written to by others (mode {found.st_mode & 0o777:o})"
    return ""


# --- hashes ---------------------------------------------------------------------------


def digest(content: str | bytes) -> str:
    """Returns the sha256 of bytes, or of text as UTF-8, as hexadecimal digits."""
    data = content.encode() if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()


def digest_of(path: str | Path) -> str:
    """Returns the sha256 of a file as hexadecimal digits."""
    with open(path, "rb") if isinstance(path, str) else path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- one process at a time ------------------------------------------------------------


class Held(ValueError):
    """Another process holds a lock.

    Attributes:
      holder: its "host", "pid" and when it "started"; {} while it is only starting.
    """

    def __init__(self, path: Path, holder: dict[str, Any]):
        pid, host = holder.get("pid", "(starting)"), holder.get("host", "this host")
        super().__init__(f"{path} is held by process {pid} on {host}")
        self.holder, self.pid, self.host = holder, pid, host


@contextlib.contextmanager
def lock(path: str | Path, patience_s: float = 0.0) -> Iterator[dict[str, Any]]:
    """Holds a lock file, which one process at a time can, and notes there who does.

    The kernel frees it when its holder dies, by whatever signal. Where the file system
    cannot lock, the process named in the file is looked for instead.

    Args:
      path: the file.
      patience_s: for how many seconds to wait for another process.

    Yields:
      Who held it before and did not free it, {} for nobody.

    Raises:
      Held: another process holds it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, began = os.open(path, os.O_RDWR | os.O_CREAT, 0o644), time.monotonic()
    try:
        while True:
            alone, before = _try_lock(handle), _noted(handle)
            if alone and not (before and _runs_here(before)):
                break
            if time.monotonic() - began >= patience_s:
                raise Held(path, before)
            time.sleep(LOCK_POLL_S)
        _note(handle, json.dumps(me()))
        try:
            yield before
        finally:
            _note(handle, "")  # removing the file would let two hold two files
    finally:
        os.close(handle)


def holder(path: str | Path) -> dict[str, Any]:
    """Returns host, pid and whether it is `alive` of who holds, or held, a lock file.

    {} when nobody does. Of a process on another host nothing is known but the file.
    """
    with open(path, "rb") as file:
        found = _noted(file.fileno())
    return {**found, "alive": _runs_here(found)} if found else {}


def is_running(pid: int, started: float | None = None) -> bool:
    """Whether a process of that number runs here, and where told, began then.

    Args:
      pid: its number.
      started: when it began, in seconds since 1970: it tells a process from a later
        one that was given the same number.
    """
    # Not os.kill(pid, 0), which ends the process on Windows.
    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return False
        return started is None or abs(process.create_time() - started) < SAME_START_S
    except psutil.AccessDenied:
        return True
    except (psutil.Error, ValueError, OverflowError):
        return False


def _try_lock(handle: int) -> bool:
    """Returns False where another process has the lock; True also where none can."""
    if fcntl := _import("fcntl"):
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:
            pass  # no locks here: what the file says decides
    elif msvcrt := _import("msvcrt"):  # Windows
        os.lseek(handle, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
    return True


def _import(name: str) -> Any:
    """Returns a module that only some systems have, or None."""
    try:
        return __import__(name)
    except ImportError:
        return None


def me() -> dict[str, Any]:
    """Returns the host, the pid and the start of this process."""
    started = psutil.Process().create_time()
    return {"host": host(), "pid": os.getpid(), "started": started}


def _noted(handle: int) -> dict[str, Any]:
    os.lseek(handle, 0, os.SEEK_SET)
    try:
        found = json.loads(os.read(handle, 4096))
        return {key: found[key] for key in ("host", "pid", "started")}
    except (ValueError, TypeError, KeyError):
        return {}  # empty, or its writer died in the middle


def _note(handle: int, text: str) -> None:
    os.ftruncate(handle, 0)
    os.lseek(handle, 0, os.SEEK_SET)
    os.write(handle, text.encode())


def _runs_here(noted: dict[str, Any]) -> bool:
    """Whether the named process runs here; of other hosts only the lock knows."""
    if noted["host"] != host():
        return False
    started = noted["started"]  # 0.1 wrote the kernel's clock ticks, as text
    return is_running(noted["pid"], started if isinstance(started, float) else None)


# --- this machine and this process ----------------------------------------------------


def open_most(wanted: int) -> int:
    """Lets this process have so many files open, if it may; returns how many."""
    resource = _import("resource")
    if resource is None:  # Windows, where handles are plenty
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if limit <= soft:
        return soft
    with contextlib.suppress(OSError, ValueError):  # macOS has a limit of its own
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, hard))
        return limit
    return soft


def host() -> str:
    """Returns what this machine is called."""
    return socket.gethostname()


def cores() -> int:
    """Returns the CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # Linux
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cpu() -> str:
    """Returns what CPU this is: compiled code may not run on another.

    Its model and, on Linux, the instructions that it has; they do not follow from the
    model where a virtual machine hides some.
    """
    told = [platform.machine(), platform.processor()]
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text("utf-8", "replace").splitlines()
        names = ("model name", "flags", "Features", "CPU part", "isa")
        told += sorted({line for line in lines if line.startswith(names)})
    return "\n".join(told)


def peak_memory() -> int:
    """Returns the most bytes of memory that this process has held."""
    found: Any = psutil.Process().memory_info()
    if hasattr(found, "peak_wset"):  # Windows
        return found.peak_wset
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss begins with that of who forked
        lines = status.read_text("utf-8", "replace").splitlines()
        line = next(line for line in lines if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024
    import resource

    used = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return used if sys.platform == "darwin" else used * 1024


def _literally(name: str) -> str:
    """Returns a pattern that `glob` matches with this name alone."""
    return "".join(f"[{letter}]" if letter in "*?[" else letter for letter in name)
