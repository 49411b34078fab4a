"""Leaving in good order: SIGTERM and Ctrl-C become a flag that the loop reads.

A Python signal handler runs only when the main thread returns to Python, and an
exception raised in one while XLA compiles crashes the process. So the C-level
handler writes the signal's number to a socket (`signal.set_wakeup_fd`) and a thread
reads it: the flag is up at once, even in the middle of a compilation that takes a
minute, and the process leaves by force when the grace time is over.
"""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterator

WATCHED = (signal.SIGTERM, signal.SIGINT)


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


@contextlib.contextmanager
def watch(grace_s: float) -> Iterator[Stop]:
    """Watches SIGTERM and Ctrl-C while the block runs; yields the flag.

    Args:
      grace_s: seconds from the first signal until the process is ended by force. A
        second signal ends it at once. What was saved before stays as it is.

    Outside the main thread, where Python allows no handlers, the flag never rises.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    done = threading.Event()

    def say(text):
        with contextlib.suppress(OSError):  # nobody may be reading any more
            os.write(2, f"{text}\n".encode())

    def read():
        while received := reader.recv(1):
            if received[0] not in WATCHED:
                continue
            if stop or done.is_set():
                os._exit(128 + received[0])
            stop.signal = received[0]
            threading.Thread(target=leave, daemon=True).start()
            say("stopping, saving first; a second signal leaves at once")

    def leave():
        if not done.wait(grace_s):
            say(f"not done within {grace_s:g} s (config.grace_s): leaving")
            os._exit(stop.exit_code)

    before = {number: signal.signal(number, lambda *_: None) for number in WATCHED}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    try:
        yield stop
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        done.set()
        writer.close()
        thread.join()
        reader.close()
