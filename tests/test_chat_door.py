"""The chat's line: pastes, and what was typed in earlier sessions, on a terminal."""

import os
import subprocess
import sys

import pytest

pty = pytest.importorskip("pty", reason="no terminals of this kind")
pytest.importorskip("readline")
PROGRAM = "from experiments import chat\nfor x in chat.lines(): print('GOT', repr(x))"
UP, END = b"\x1b[A", b"\x04"  # the arrow key; Ctrl-D


class Session:
    """The door's reading of lines, on a terminal of its own."""

    def __init__(self, home):
        self.said = b""
        self.screen, terminal = pty.openpty()
        ends = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "HOME": str(home), "TERM": "xterm"},
            start_new_session=True,
            **ends,
        )
        os.close(terminal)
        self.until(b"")

    def until(self, words):
        """Reads until these words have come, and behind them the prompt."""
        while words not in self.said or not self.said.endswith(b"> "):
            self.said += os.read(self.screen, 4096)

    def type(self, keys, wanted):
        """Types, and waits for what the program says that it got."""
        os.write(self.screen, keys)
        self.until(b"GOT " + wanted)

    def leave(self):
        os.write(self.screen, END)
        assert self.process.wait(20) == 0
        os.close(self.screen)


def test_a_paste_of_several_lines_is_one_message(tmp_path):
    session = Session(tmp_path)
    paste = b"\x1b[200~def f():\n    pass\n\x1b[201~"
    session.type(paste + b"\r", rb"'def f():\n    pass\n'")
    session.type(b"one \\\rtwo\r", rb"'one \ntwo'")
    session.leave()


def test_what_was_typed_comes_back_in_the_next_session_for_this_user_alone(tmp_path):
    first = Session(tmp_path)
    first.type(b"hello\r", b"'hello'")
    first.leave()
    (kept,) = (tmp_path / ".cache/gpt_jax").iterdir()
    assert kept.stat().st_mode & 0o077 == 0
    second = Session(tmp_path)
    second.type(UP + b"\r", b"'hello'")
    second.leave()


def test_without_a_home_that_can_be_written_to_lines_are_read_all_the_same(tmp_path):
    home = tmp_path / "home"
    home.write_text("no folder")
    session = Session(home)
    session.type(b"hello\r", b"'hello'")
    session.leave()
