"""Signals: a flag in time, an exit by force when the flag is not read."""

import os
import signal
import socket
import subprocess
import sys
import threading

import pytest

from gpt_jax import signals

FLAG = """
import os, signal, sys
from gpt_jax import signals
with signals.watch(60.0) as stop:
    assert not stop
    os.kill(os.getpid(), getattr(signal, sys.argv[1]))
    while not stop:
        pass
    sys.exit(stop.exit_code)
"""

# A main thread that never comes back to Python, as in a long compilation.
STUCK = """
import ctypes, os, signal, sys
from gpt_jax import signals
with signals.watch(float(sys.argv[1])):
    print("ready", flush=True)
    while True:
        ctypes.CDLL(None).sleep(60)
"""


def python(code, *args, **options):
    return subprocess.Popen([sys.executable, "-c", code, *args], text=True, **options)


@pytest.mark.fault(3)
@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGINT", 130)])
def test_a_signal_raises_the_flag_and_its_exit_code(name, code):
    assert python(FLAG, name).wait(timeout=60) == code


@pytest.mark.fault(3)
def test_a_process_that_does_not_read_the_flag_leaves_after_the_grace_time():
    process = python(STUCK, "0.2", stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=30) == 143


@pytest.mark.fault(3)
def test_a_second_signal_leaves_at_once():
    process = python(STUCK, "1000", stdout=subprocess.PIPE)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) in (130, 143)


def test_outside_the_main_thread_nothing_is_installed():
    found = []

    def enter():
        with signals.watch(1.0) as stop:
            found.append(bool(stop))

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join(timeout=10)
    assert found == [False]


def test_handlers_are_as_before_after_the_block():
    before = signal.getsignal(signal.SIGTERM)
    with signals.watch(1.0):
        assert signal.getsignal(signal.SIGTERM) is not before
    assert signal.getsignal(signal.SIGTERM) is before


# --- a door's process -----------------------------------------------------------------

# An exception that a handler raises is lost there, as in JAX's hook.
LOST = """
import gc, signal, sys, time
from gpt_jax import files, signals
signals.begin()
gc.callbacks.append(lambda phase, info: signal.raise_signal(int(sys.argv[1])))
with files.draft(sys.argv[2]) as part, files.draft_folder(sys.argv[3]):
    part.write_text("half")
    gc.collect()
    while True:
        time.sleep(60)
"""


@pytest.mark.fault(33)
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_nobody_is_in_charge_of_ends_a_door_without_leftovers(
    tmp_path, name
):
    number = getattr(signal, name)
    paths = [str(tmp_path / "file"), str(tmp_path / "folder")]
    process = python(LOST, str(int(number)), *paths, stderr=subprocess.PIPE)
    assert process.communicate(timeout=60)[1] == ""
    assert process.returncode == 128 + number
    assert not list(tmp_path.iterdir())


DOOR = """
import signal, sys
from gpt_jax import signals
signals.begin()
with signals.watch(60.0) as stop:
    with signals.at_once():
        if "building" in sys.argv:
            signal.raise_signal(signal.SIGINT)
            signal.pause()
    signal.raise_signal(signal.SIGHUP)
    signal.raise_signal(signal.SIGINT)
    while not stop:
        pass
print("saved")
if "late" in sys.argv:
    signal.raise_signal(signal.SIGTERM)
    signal.pause()
sys.exit(stop.exit_code)
"""


@pytest.mark.fault(33)
@pytest.mark.parametrize(
    "moment, code, said",
    [("building", 130, ""), ("", 130, "saved\n"), ("late", 143, "")],
)
def test_who_is_in_charge_is_told_and_else_the_door_leaves(moment, code, said):
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = python(DOOR, moment, **pipes)
    out, err = process.communicate(timeout=60)
    assert process.returncode == code and out.startswith(said)
    assert ("the terminal hung up: going on" in err) == (moment != "building")


IGNORED = """
import signal
from gpt_jax import signals
signals.begin()
signal.raise_signal(signal.SIGHUP)
"""


def test_nohup_is_obeyed():
    ignoring = ["sh", "-c", 'trap "" HUP; exec "$@"', "sh"]
    done = subprocess.run([*ignoring, sys.executable, "-c", IGNORED], timeout=60)
    assert done.returncode == 0


def test_another_loop_that_takes_the_wakeup_socket_loses_no_signal():
    """As asyncio's does on Windows."""
    theirs, other = socket.socketpair()
    theirs.setblocking(False)
    with signals.watch(60.0) as stop:
        ours = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        signal.raise_signal(signal.SIGTERM)
        for _ in range(1000):
            if stop:
                break
            threading.Event().wait(0.01)
        assert signal.set_wakeup_fd(ours) == theirs.fileno()
    assert stop.signal == signal.SIGTERM
    theirs.close(), other.close()


TYPING = """
from gpt_jax import signals
signals.begin()
try:
    with signals.raised():
        print("ready", flush=True)
        input()
except KeyboardInterrupt:
    print("dropped", flush=True)
input()
"""


def test_what_is_typed_can_be_dropped_and_then_ctrl_c_leaves():
    process = python(TYPING, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    for line in ("ready\n", "dropped\n"):
        assert process.stdout.readline() == line
        process.send_signal(signal.SIGINT)
    assert process.wait(timeout=60) == 130
    process.stdin.close()


PARENT = """
import sys, time
from gpt_jax import signals
signals.begin()
with signals.child([sys.executable, "-c", sys.argv[1]]) as process:
    print(process.pid, flush=True)
    process.wait()
"""
CHILD = """
import time
from gpt_jax import signals
with signals.watch(60.0) as stop:
    print("ready", flush=True)
    while not stop:
        time.sleep(0.01)
print("saved", flush=True)
"""


def test_a_child_is_told_once_when_its_parent_leaves():
    process = python(PARENT, CHILD, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout.readline().strip().isdecimal()
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.stdout.read() == "saved\n"
    assert process.wait(timeout=60) == 130


def test_windows_has_no_hang_up_and_sends_no_ctrl_c(monkeypatch):
    class Windows(subprocess.Popen):
        def send_signal(self, sig):
            if sig != signal.SIGTERM:
                raise ValueError(f"Unsupported signal: {sig}")
            super().send_signal(sig)

    monkeypatch.setattr(signals, "WATCHED", (signal.SIGTERM, signal.SIGINT))
    monkeypatch.setattr(signals, "HANG_UP", None)
    with Windows([sys.executable, "-c", "input()"], stdin=-1) as process:
        signals.send(process, signal.SIGINT)
        with signals.watch(60.0) as stop:
            assert not stop
        signals.send(process, signal.SIGTERM)
        assert process.wait(timeout=60) == -signal.SIGTERM
