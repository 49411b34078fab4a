"""Leaving in good order: SIGTERM, Ctrl-C and a terminal that hangs up.

A Python signal handler runs only when the main thread returns to Python. An exception
raised in one is lost in JAX's hook of the garbage collector, and while XLA compiles it
crashes the process. So handlers do nothing: the C-level one writes the signal's number
to a socket (`signal.set_wakeup_fd`) and a thread reads it, at once, even in the middle
of a compilation that takes a minute.

Who has taken charge is told: a loop that saves first (`watch`), a server. Where nobody
has, a door's process leaves there and then (`begin`), less what it was writing.
"""

import contextlib
import os
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpt_jax import files, screen

# Windows has no SIGHUP.
HANG_UP = getattr(signal, "SIGHUP", None)
WATCHED = tuple(filter(None, (signal.SIGTERM, signal.SIGINT, HANG_UP)))
TIDY_S = 2.0  # for removing what was being written, before the process is left by force

_in_charge: list[Callable[[int], None]] = []  # the last one is told
_children: list[subprocess.Popen] = []  # what is ended with this process
_watching = False


class Stop:
    """Whether somebody asked the process to stop; true once a signal came."""

    def __init__(self):
        self.signal, self.late = 0, False

    def __bool__(self) -> bool:
        return self.signal != 0

    @property
    def exit_code(self) -> int:
        """128 + the signal's number: 143 for SIGTERM, 130 for Ctrl-C."""
        return 128 + self.signal

    def look(self, late: bool = False) -> bool:
        """Notes whether the time is up; returns whether there was a signal.

        Several processes agree here: see processes.Together.
        """
        self.late = late
        return bool(self)


def begin() -> None:
    """Watches from here to the end of the process: for doors, before JAX is imported.

    A signal that nobody is in charge of ends the process, with 128 + its number.
    """
    _in_charge.append(leave)
    _Watch().start()


@contextlib.contextmanager
def told(who: Callable[[int], None]) -> Iterator[None]:
    """Has `who` called with the number of each signal while the block runs.

    It is called in another thread, while the main one may be anywhere. A hang-up is
    not told: what is in charge goes on without its terminal.

    Outside the main thread, where Python allows no handlers, nobody is called.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    watch = None if _watching else _Watch()
    _in_charge.append(who)
    if watch:
        watch.start()
    try:
        yield
    finally:
        _in_charge.pop()
        if watch:
            watch.end()


@contextlib.contextmanager
def watch(grace_s: float) -> Iterator[Stop]:
    """Takes charge of SIGTERM and Ctrl-C while the block runs; yields the flag.

    Args:
      grace_s: seconds from the first signal until the process is ended by force. A
        second signal ends it at once. What was saved before stays as it is.

    Outside the main thread, where Python allows no handlers, the flag never rises.
    """
    stop, done = Stop(), threading.Event()

    def come(number: int) -> None:
        if stop or done.is_set():
            leave(number)
        stop.signal = number
        threading.Thread(target=force, daemon=True).start()
        say("stopping, saving first; a second signal leaves at once")

    def force() -> None:
        if not done.wait(grace_s):
            say(f"not done within {grace_s:g} s (config.grace_s): leaving")
            leave(stop.signal)

    with told(come):
        try:
            yield stop
        finally:
            done.set()


@contextlib.contextmanager
def at_once() -> Iterator[None]:
    """Lets a door's process leave at once while the block runs: nothing is lost yet.

    For the time in which a run is being built. Elsewhere, as in a notebook, whoever is
    in charge stays so.
    """
    with told(leave) if leave in _in_charge else contextlib.nullcontext():
        yield


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """Lets Ctrl-C raise KeyboardInterrupt while the block runs.

    For the time in which a process waits for what somebody types, and nothing else.
    """

    def other(number: int) -> None:
        if number != signal.SIGINT:
            leave(number)

    with told(other):
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def child(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """Gives a process that hears of signals from this one alone, and once.

    It is killed at the end of the block, if it still runs.

    Args:
      command: its words.
      **options: as for `subprocess.Popen`.
    """
    process = subprocess.Popen(command, start_new_session=True, **options)
    _children.append(process)
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()
        _children.remove(process)


def send(process: subprocess.Popen, number: int) -> None:
    """Hands on a signal to a process, if it runs still.

    Windows knows no Ctrl-C for one process; its console has sent it to all already.
    """
    with contextlib.suppress(OSError, ValueError):
        process.send_signal(number)


def leave(number: int) -> None:
    """Ends the process for a signal: exit code 128 + its number, nothing half written.

    Not by an exception, which could be lost, but from the thread that is told.
    """
    # In a thread of its own: what hangs is left hanging.
    tidy = threading.Thread(target=_tidy, args=(number,), daemon=True)
    tidy.start()
    tidy.join(TIDY_S)
    os._exit(128 + number)


def say(text: str) -> None:
    """Writes a line to stderr, whatever the main thread is doing."""
    with contextlib.suppress(OSError):  # nobody may be reading any more
        os.write(2, f"{text}\n".encode())


def _tidy(number: int) -> None:
    for process in list(_children):
        send(process, signal.SIGTERM if number == HANG_UP else number)
    files.drop_drafts()
    screen.leave()


class _Watch:
    """The handlers and the thread; one at a time in a process."""

    def __init__(self):
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._before: dict[int, object] = {}

    def start(self) -> None:
        global _watching
        _watching = True
        for number in WATCHED:
            if number == HANG_UP and signal.getsignal(number) is signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, self._handle)
        handle = self._writer.fileno()
        self._wakeup = signal.set_wakeup_fd(handle, warn_on_full_buffer=False)
        self._thread.start()

    def end(self) -> None:
        global _watching
        signal.set_wakeup_fd(self._wakeup)
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        self._writer.close()
        self._thread.join()
        self._reader.close()
        _watching = False

    def _handle(self, number: int, _: object) -> None:
        """Does nothing, where the number has gone to our socket and not to another."""
        ours = self._writer.fileno()
        there = signal.set_wakeup_fd(ours, warn_on_full_buffer=False)
        if there != ours:  # asyncio on Windows takes the place for its own
            signal.set_wakeup_fd(there)
            self._writer.send(bytes([number]))

    def _read(self) -> None:
        while received := self._reader.recv(1):
            number = received[0]
            if number not in self._before:
                continue
            who = _in_charge[-1]
            if number == HANG_UP and who is not leave:
                say("the terminal hung up: going on without it")
            else:
                who(number)
