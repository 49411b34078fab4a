"""Files that are whole or not there; systems that refuse what Linux allows."""

import builtins
import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import psutil
import pytest

from gpt_jax import files, memory


@contextlib.contextmanager
def refused(monkeypatch, name, error):
    """A function of os that raises, as it does on other systems."""

    def refuse(*args, **kwargs):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files.os, name, refuse)
        yield


@pytest.fixture
def windows(monkeypatch):
    """Windows as Python shows it: no fcntl, no resource, no users, folders shut.

    What `locked` holds is locked by another process.
    """
    opened, locked = os.open, set()
    real = builtins.__import__

    def open_(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return opened(path, flags, *args, **kwargs)

    def import_(name, *args, **kwargs):
        if name in ("fcntl", "resource", "pwd"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    def locking(handle, mode, size):
        if os.fstat(handle).st_ino in locked:
            raise PermissionError(errno.EACCES, "Permission denied")
        assert os.lseek(handle, 0, os.SEEK_CUR) >= files.FAR and size == 1

    def kill(pid, number):
        raise AssertionError("on Windows this ends the process")

    monkeypatch.setattr(files.os, "open", open_)
    monkeypatch.setattr(files.os, "kill", kill)
    monkeypatch.delattr(files.os, "getuid")
    monkeypatch.delattr(files.os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(builtins, "__import__", import_)
    msvcrt = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    monkeypatch.setitem(sys.modules, "msvcrt", msvcrt)
    return locked


# --- whole ----------------------------------------------------------------------------


def test_a_file_is_written_whole_with_its_folder_and_nothing_beside_it(tmp_path):
    path = tmp_path / "new" / "a.txt"
    files.write(path, "über")
    files.write(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert list(path.parent.iterdir()) == [path]


def test_an_error_leaves_the_old_file_and_no_draft(tmp_path):
    path = tmp_path / "a"
    files.write(path, "old")
    with pytest.raises(ZeroDivisionError), files.draft(path) as part:
        part.write_text("half")
        _ = 1 / 0
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_name_appears_when_its_content_is_on_the_disk(tmp_path, monkeypatch):
    told = []
    sync, replace = os.fsync, os.replace

    def fsync(handle):
        where = os.readlink(f"/proc/self/fd/{handle}")
        told.append("folder" if os.path.isdir(where) else "file")
        sync(handle)

    def renamed(*args):
        told.append("name")
        replace(*args)

    monkeypatch.setattr(files.os, "fsync", fsync)
    monkeypatch.setattr(files.os, "replace", renamed)
    files.write(tmp_path / "a", "x")
    assert told == ["file", "name", "folder"]
    told.clear()
    with files.draft_folder(tmp_path / "b") as part:
        (part / "inside").write_text("x")
    assert told == ["file", "folder", "name", "folder"]


def test_a_folder_is_whole_or_not_there(tmp_path):
    path = tmp_path / "data"
    with pytest.raises(ZeroDivisionError), files.draft_folder(path) as part:
        (part / "a").write_text("half")
        _ = 1 / 0
    assert not list(tmp_path.iterdir())
    with files.draft_folder(path) as part:
        (part / "a").write_text("whole")
        assert not path.exists()
    assert (path / "a").read_text() == "whole" and list(tmp_path.iterdir()) == [path]


def test_the_folder_of_a_quicker_process_stays(tmp_path):
    path = tmp_path / "data"
    with files.draft_folder(path) as part:
        (part / "a").write_text("late")
        path.mkdir()
        (path / "a").write_text("quick")
    assert (path / "a").read_text() == "quick" and list(tmp_path.iterdir()) == [path]


def test_folders_that_ended_processes_left_are_removed_others_stay(tmp_path):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    beside = "data[1].{}-{}.tmp"
    left = tmp_path / beside.format(files.host(), ended.pid)
    busy = tmp_path / beside.format(files.host(), os.getppid())
    elsewhere = tmp_path / beside.format("another-host", ended.pid)
    for folder in (left, busy, elsewhere):
        folder.mkdir()
    with files.draft_folder(tmp_path / "data[1]"):
        assert not left.exists()
    assert busy.exists() and elsewhere.exists()


def test_what_is_being_written_can_be_dropped_before_leaving_by_force(tmp_path):
    with files.draft(tmp_path / "a") as part, files.draft_folder(tmp_path / "b"):
        part.write_text("half")
        files.drop_drafts()
        left = list(tmp_path.iterdir())
        part.write_text("so that the blocks can end")
        files.begin_folder(tmp_path / "b")
    assert not left


@pytest.mark.fault(35)
@pytest.mark.parametrize("name", ["a" * 255, "ä" * 127, "b" * 255 + ".txt", "short"])
def test_names_as_long_as_a_file_system_takes_can_be_written(tmp_path, name):
    name = files.shortened(name)
    assert len(os.fsencode(name)) <= 255
    files.write(tmp_path / name, "x")
    with files.draft_folder(tmp_path / f"{name[:-1]}/"):
        pass
    assert len(list(tmp_path.iterdir())) == 2


def test_long_names_that_differ_at_their_end_stay_different():
    one, other = ("x" * 300 + end for end in "ab")
    assert files.shortened(one) != files.shortened(other)
    assert files.shortened("x" * 255) == "x" * 255
    assert len(files.shortened("x" * 255, room=20)) == 235


def test_the_digests_are_sha256():
    empty = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    assert files.digest("") == files.digest(b"") == empty
    assert files.digest("ü") == files.digest("ü".encode())


def test_the_digest_of_a_file_is_that_of_its_bytes(tmp_path):
    files.write(tmp_path / "a", b"\x00" * 70_000)
    assert files.digest_of(tmp_path / "a") == files.digest(b"\x00" * 70_000)


# --- homes and other people -----------------------------------------------------------


def test_a_tilde_is_the_home_folder_and_only_at_the_beginning(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert files.expand("~/runs/a") == tmp_path / "runs" / "a"
    assert files.expand("runs/~a") == Path("runs/~a")


@pytest.mark.fault(35)
def test_no_home_is_a_sentence(monkeypatch):
    import pwd

    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(ValueError, match=r"^~/runs begins with ~ but .*: set HOME in"):
        files.expand("~/runs")
    assert files.expand("/runs") == Path("/runs")


@pytest.mark.fault(35)
def test_a_private_folder_is_private_with_its_parents_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        files.private_folder(tmp_path / "a" / "b")
    finally:
        os.umask(before)
    for folder in (tmp_path / "a", tmp_path / "a" / "b"):
        assert folder.stat().st_mode & 0o777 == 0o700
        assert files.open_to_others(folder) == ""


# --- locks ----------------------------------------------------------------------------


def test_a_lock_is_held_once_and_names_its_holder(tmp_path):
    path = tmp_path / "new" / "a.lock"
    with files.lock(path) as before:
        assert before == {} and files.holder(path)["alive"]
        with pytest.raises(files.Held, match=f"process {os.getpid()} on "):
            files.lock(path).__enter__()
    assert files.holder(path) == {}
    with files.lock(path):
        pass


def test_who_has_patience_gets_the_lock_when_it_is_free(tmp_path):
    path, order = tmp_path / "a.lock", []
    waits = threading.Event()

    def wait():
        waits.set()
        with files.lock(path, patience_s=60.0):
            order.append("second")

    with files.lock(path):
        other = threading.Thread(target=wait)
        other.start()
        assert waits.wait(60)
        with pytest.raises(files.Held):  # longer than a try takes
            files.lock(path, patience_s=3 * files.LOCK_POLL_S).__enter__()
        order.append("first")
    other.join(60)
    assert order == ["first", "second"] and files.holder(path) == {}


def test_without_locks_the_process_that_the_file_names_decides(tmp_path, monkeypatch):
    fcntl = types.SimpleNamespace(LOCK_EX=1, LOCK_NB=2)

    def flock(handle, how):
        raise OSError(errno.ENOLCK, "No locks available")

    fcntl.flock = flock
    monkeypatch.setitem(sys.modules, "fcntl", fcntl)
    path = tmp_path / "a.lock"
    mine = files.me()
    for change, free in (({}, False), ({"started": 1.0}, True), ({"host": "?"}, True)):
        path.write_text(json.dumps({**mine, **change}))
        with contextlib.suppress(files.Held), files.lock(path):
            assert free
            continue
        assert not free


def test_a_lock_of_version_0_1_is_read(tmp_path):
    """It noted the start of a process in the kernel's clock ticks, as a text."""
    path = tmp_path / "a.lock"
    path.write_text(json.dumps({**files.me(), "started": "12345"}))
    assert files.holder(path)["alive"]


def test_a_running_process_is_told_from_an_ended_one_and_from_a_later_one():
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=-1)
    began = psutil.Process(process.pid).create_time()
    assert files.is_running(process.pid) and files.is_running(process.pid, began)
    assert not files.is_running(process.pid, began - 60)
    process.send_signal(signal.SIGKILL)
    psutil.wait_procs([psutil.Process(process.pid)], timeout=10)
    assert not files.is_running(process.pid)
    process.communicate()
    assert not files.is_running(process.pid)
    for wrong in (-1, 2**40, 2**70):
        assert not files.is_running(wrong)


# --- Windows, and file systems that refuse --------------------------------------------


def test_windows_opens_no_folders_and_files_are_written_all_the_same(windows, tmp_path):
    files.write(tmp_path / "a", "x")
    with files.draft_folder(tmp_path / "b") as part:
        (part / "c").write_text("y")
    assert (tmp_path / "a").read_text() + (tmp_path / "b/c").read_text() == "xy"


def test_windows_has_a_lock_of_its_own(windows, tmp_path):
    path = tmp_path / "a.lock"
    with files.lock(path):
        noted = path.read_text()
    path.write_text(json.dumps({**json.loads(noted), "pid": 1, "started": 1.0}))
    with files.lock(path):  # of a process that is gone
        pass
    windows.add(path.stat().st_ino)
    with pytest.raises(files.Held):
        files.lock(path).__enter__()


def test_on_windows_nobody_is_killed_to_see_whether_they_live(windows):
    assert files.is_running(os.getpid()) and not files.is_running(2**30)


def test_windows_tells_what_a_machine_has(windows, monkeypatch, tmp_path):
    assert files.open_to_others(tmp_path) == ""
    assert files.cores() >= 1 and memory.of_machine() > 1e6
    info = types.SimpleNamespace(peak_wset=12345)
    me = types.SimpleNamespace(memory_info=lambda: info)
    monkeypatch.setattr(files.psutil, "Process", lambda: me)
    assert files.peak_memory() == 12345


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP])
def test_a_file_system_that_cannot_sync_is_written_to(tmp_path, monkeypatch, number):
    with refused(monkeypatch, "fsync", OSError(number, "no")):
        files.write(tmp_path / "a", "x")
    assert (tmp_path / "a").read_text() == "x"


def test_a_disk_that_fails_to_sync_is_an_error_and_the_old_file_stays(
    tmp_path, monkeypatch
):
    files.write(tmp_path / "a", "old")
    broken = OSError(errno.EIO, "broken")
    with (
        refused(monkeypatch, "fsync", broken),
        pytest.raises(OSError, match="broken"),
    ):
        files.write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


# --- the machine ----------------------------------------------------------------------


def test_the_peak_memory_rises_with_what_is_held():
    """In a process of its own: that of the tests holds much."""
    code = (
        "from gpt_jax import files\n"
        "before = files.peak_memory()\n"
        "held = bytearray(before + 50_000_000)\n"
        "assert files.peak_memory() >= len(held) > before\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "text, told",
    [
        ("[1]", "should hold a JSON object"),
        ("{", "is not JSON"),
        ("[" * 10**5, "not JSON"),
    ],
)
def test_only_a_json_object_is_read_as_one(tmp_path, text, told):
    path = tmp_path / "a.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=rf"a\.json .*{told}"):
        files.read_json(path)
    path.write_text('{"b": 1}')
    assert files.read_json(path) == {"b": 1}
