"""The two streams: what fails to be written is dropped, and told once.

A run tells its story on stdout. Where stdout holds a product, as a text that was asked
for, the story is on stderr, and who does not take the product is an error (`Product`).
"""

import errno
import functools
import os
import re
import shutil
import sys
from collections.abc import Iterable, Sequence
from typing import Any

from gpt_jax.screen.tables import visible, width

# A stream that failed like this does not come back; a full disk may.
GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO, errno.ESTALE)
_told: set[str] = set()  # what was said of the streams


class ReaderGone(BrokenPipeError):
    """Nobody reads the product of this process any more."""


class Steady:
    """A text stream that does not fail: what cannot be shown is dropped, told once."""

    def __init__(self, stream: Any, name: str):
        """Args: the stream, None for nobody; what it is called."""
        self._stream, self._name = stream or _nobody(), name

    def write(self, text: str) -> int:
        """Writes what the stream takes; letters that it does not know become "?"."""
        try:
            self._write(text)
        except (OSError, ValueError) as error:  # ValueError: it is closed
            self._failed(error)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Writes one text after the other."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Hands on what was written."""
        try:
            self._stream.flush()
        except (OSError, ValueError) as error:
            self._failed(error)

    def _write(self, text: str) -> None:
        try:
            self._stream.write(text)
        except UnicodeEncodeError:
            encoding = self._stream.encoding
            _tell(
                f"{self._name} is in {encoding}, which lacks some of the letters: they "
                'become "?" there (PYTHONIOENCODING=utf-8 has all)'
            )
            self._stream.write(text.encode(encoding, "replace").decode(encoding))

    def _failed(self, error: Exception) -> None:
        if not isinstance(error, OSError) or error.errno in GONE:
            self._stream = _nobody()
        why = error.strerror if isinstance(error, OSError) else error
        _tell(f"{self._name} cannot be written ({why}): going on without", self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class Product(Steady):
    """The stream of what was asked for: not to be able to write it is an error."""

    def _failed(self, error: Exception) -> None:
        if isinstance(error, BrokenPipeError):  # `head`, say, has seen enough
            self._stream = _nobody()
            raise ReaderGone(*error.args)
        raise error


def out() -> Steady:
    """Returns stdout, made steady."""
    return _steady(sys.stdout, "stdout")


def err() -> Steady:
    """Returns stderr, made steady."""
    return _steady(sys.stderr, "stderr")


def story() -> Steady:
    """Returns where lines and progress go: stdout, or stderr beside a product."""
    return err() if isinstance(sys.stdout, Product) else out()


def take_over(*, product: bool) -> None:
    """Makes the streams of this process steady, for everything that prints: for doors.

    Args:
      product: stdout holds what was asked for; else it tells how a run goes.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        # A file opened later would get the number of a stream that is closed, and
        # what compilers print would be written into it.
        try:
            os.fstat(number)
        except OSError:
            nobody = os.open(os.devnull, os.O_RDWR)
            if nobody != number:
                os.dup2(nobody, number)
                os.close(nobody)
        if getattr(sys, name) is None:
            stream = open(os.devnull, "r+", encoding="utf-8")  # noqa: SIM115
            setattr(sys, name, stream)
    sys.stderr = err()
    sys.stdout = (Product if product else Steady)(sys.stdout, "stdout")


def say(text: str) -> None:
    """Prints a line of the story."""
    print(text, file=story(), flush=True)


class Words:
    """Writes a text to stdout as it comes: on a terminal without broken words."""

    def __init__(self):
        self._stream = out()
        terminal = self._stream.isatty()
        self._columns = shutil.get_terminal_size().columns if terminal else 0
        self._column, self._held = 0, ""

    def write(self, piece: str) -> None:
        """Writes what can be written: a word on a terminal when it has ended."""
        if not self._columns:
            print(piece, end="", file=self._stream, flush=True)
            return
        *parts, self._held = re.split(r"(\s)", self._held + visible(piece))
        self._put(parts)
        if width(self._held) >= self._columns:  # it fits into no line
            self._put([self._held])
            self._held = ""

    def end(self) -> None:
        """Writes the last word and ends the line."""
        if self._held:
            self._put([self._held])
        self._held = ""
        print(file=self._stream, flush=True)
        self._column = 0

    def _put(self, parts: Sequence[str]) -> None:
        for part in parts:
            if self._column and self._column + width(part) > self._columns:
                print(file=self._stream)
                self._column = 0
                part = "" if part == " " else part
            print(part, end="", file=self._stream)
            here = 8 - self._column % 8 if part == "\t" else width(part)
            self._column = 0 if part == "\n" else (self._column + here) % self._columns
        self._stream.flush()


def _steady(stream: Any, name: str) -> Steady:
    return stream if isinstance(stream, Steady) else Steady(stream, name)


@functools.cache
def _nobody() -> Any:
    return open(os.devnull, "w", encoding="utf-8")


def _tell(text: str, besides: str = "") -> None:
    """Says a sentence about the streams once, on stderr unless it is about that."""
    if text not in _told and besides != "stderr":
        _told.add(text)
        print(text, file=err(), flush=True)
