"""Signals: a flag in time, an exit by force when the flag is not read."""

import signal
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
