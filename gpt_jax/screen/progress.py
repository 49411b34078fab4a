"""What is drawn over and over: how far something is, with lines above it."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gpt_jax.screen.streams import Steady, err, out, say, story
from gpt_jax.screen.tables import clock, size, visible

LINE_EVERY_S = 5.0  # the least time between two lines of progress in a log
NOTEBOOK_EVERY_S = 0.5  # between two states of it in a notebook
TERMINAL_EVERY_S = 0.1  # and on a terminal
BAR = 40  # columns of a bar
SHOW_CURSOR = "\x1b[?25h"
NUMBERS = {  # those of a run that are shown beside its bar, in this order
    "members": "{:,} members",
    "best": "best {:.4f}",
    "train_reward": "reward {:.3f}",
    "train_loss": "loss {:.4f}",
    "tokens_per_second": "{:,.0f} tok/s",
    "mfu": "MFU {:.1%}",
}
_on_terminals: list["Area"] = []  # what is drawn now


class Area:
    """A place that is drawn over and over, with lines above it.

    Drawn on a terminal; one output that changes in a notebook; in a log a line from
    time to time.
    """

    def __init__(
        self, stream: Steady, *, transient: bool, line_every_s: float | None = None
    ):
        """Opens it.

        Args:
          stream: where.
          transient: it vanishes in the end, and short work leaves no line in a log.
          line_every_s: the least time between two lines there; None = LINE_EVERY_S.
        """
        from rich.console import Console  # takes a tenth of a second to import
        from rich.live import Live

        self._stream, self._transient = stream, transient
        self._line_every_s = LINE_EVERY_S if line_every_s is None else line_every_s
        file: Any = stream
        self._console = Console(
            file=file, highlight=False, markup=False, soft_wrap=True
        )
        self._live = self._output = None
        self._state: tuple[Callable[[], str], Callable[[], Any]] | None = None
        if _in_notebook():
            self._output = _Output()
        elif self._console.is_terminal:
            self._live = Live(
                console=self._console,
                transient=transient,
                refresh_per_second=4,
                # Others' lines appear above, but what goes to a file stays there.
                redirect_stdout=out().isatty(),
                redirect_stderr=err().isatty(),
            )
            self._live.start()
            _on_terminals.append(self)
        # Short work is worth a look on a terminal, but no line in a log.
        waits = transient and not self._live
        self._shown = time.monotonic() if waits else float("-inf")

    @property
    def width(self) -> int:
        """Columns of the terminal."""
        return self._console.width

    def show(
        self, line: Callable[[], str], draw: Callable[[], Any], *, last: bool = False
    ) -> None:
        """Shows a state, or keeps it for later where one was shown just now.

        Args:
          line: makes one line of it.
          draw: makes what `rich` draws of it on a terminal.
          last: the work is done: a log has this line however soon it comes.
        """
        self.keep(line, draw)
        if last or time.monotonic() - self._shown >= self._every_s:
            self._shown = time.monotonic()
            self._draw()

    def keep(self, line: Callable[[], str], draw: Callable[[], Any]) -> None:
        """Keeps a state that `close` is to leave, where it leaves one."""
        self._state = line, draw

    def _draw(self) -> None:
        if self._state is None:
            return
        line, draw = self._state
        if self._live:
            self._live.update(draw())
        elif self._output:
            self._output.show(line())
        else:
            self.print(line())

    def print(self, text: str) -> None:
        """Prints lines above what is drawn; words that do not fit begin a new line."""
        if self._live:
            self._console.print(visible(text), soft_wrap=False, no_wrap=False)
        else:
            print(text, file=self._stream, flush=True)

    def close(self) -> None:
        """Leaves the last state, unless it is transient; a second call does nothing."""
        if (self._live or self._output) and not self._transient:
            self._draw()
        if self._live:
            self._live.stop()
            _on_terminals.remove(self)
        if self._output and self._transient:
            self._output.show("")
        self._live = self._output = None

    @property
    def _every_s(self) -> float:
        if self._live:
            return TERMINAL_EVERY_S
        return NOTEBOOK_EVERY_S if self._output else self._line_every_s


class Progress:
    """How far something is, how fast it goes, and the time left."""

    def __init__(
        self,
        what: str,
        *,
        total: int | None,
        start: int = 0,
        unit: Callable[[float], str] = "{:,.0f}".format,
        stream: Steady | None = None,
        transient: bool = False,
    ):
        """Begins to show it.

        Args:
          what: is done, counted or measured: "step", "tokenizing".
          total: how much there is; None = unknown.
          start: how much was done before.
          unit: writes such a number; with `size` the speed is shown too.
          stream: where; None = with the story.
          transient: see Area.
        """
        self._what, self._total, self._unit = what, total, unit
        self._done = self._first = start
        self._made = time.monotonic()
        self._began: float | None = None  # a run's with its first update: it compiled
        self._area = Area(stream or story(), transient=transient)
        self._transient = transient

    def update(self, done: float, **numbers: Any) -> None:
        """Shows how much is done and, of a run's numbers, those in NUMBERS."""
        now = time.monotonic()
        if self._began is None:
            self._began, self._first = now, done
        self._done = done
        last = not self._transient and self._total is not None and done >= self._total
        texts = [_described(numbers), self._speed(now), self._left(now)]
        self._show(texts, last=last)

    def doing(self, what: str) -> None:
        """Shows what goes on between two updates: an evaluation, say."""
        self._show([what])

    def advance(self, more: float) -> None:
        """Shows that so much more is done."""
        self._began = self._began or self._made
        self.update(self._done + more)

    def print(self, text: str) -> None:
        """Prints lines above the bar."""
        self._area.print(text)

    def close(self) -> None:
        """Leaves the bar where it stands; a second call does nothing."""
        self._area.close()

    def _show(self, texts: list[str], *, last: bool = False) -> None:
        head = f"{self._what} {self._unit(self._done)}"
        head += f"/{self._unit(self._total)}" if self._total else ""
        self._area.show(
            lambda: "  ".join(filter(None, (head, *texts))),
            lambda: self._drawn(head, texts),
            last=last,
        )

    def _speed(self, now: float) -> str:
        if self._unit is not size or not self._began or now <= self._began:
            return ""
        return f"{size((self._done - self._first) / (now - self._began))}/s"

    def _left(self, now: float) -> str:
        done, began = self._done - self._first, self._began
        if not self._total or not 0 < done < self._total - self._first:
            return ""
        if began is None or now <= began:
            return ""
        return f"{clock((now - began) / done * (self._total - self._done))} left"

    def _drawn(self, head: str, texts: list[str]) -> Any:
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        after = "  ".join(filter(None, texts))
        room = self._area.width - len(head) - len(after) - 4
        if not self._total or room < 5:
            line = f"{head}  {after}".rstrip()
            return Text(line, no_wrap=True, overflow="ellipsis")
        grid = Table.grid(padding=(0, 2, 0, 0))
        bar = ProgressBar(self._total, self._done, width=min(BAR, room))
        grid.add_row(Text(head), bar, Text(after))
        return grid


class Silence:
    """A Progress that shows nothing, a metrics.Writer that writes nothing.

    Of a run among many, whose progress is shown, and of all processes but the first.
    """

    def write(self, step: int, **numbers: Any) -> None:
        """Does nothing."""

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Does nothing."""

    def update(self, done: float, **numbers: Any) -> None:
        """Does nothing."""

    def advance(self, more: float) -> None:
        """Does nothing."""

    def doing(self, what: str) -> None:
        """Does nothing."""

    def print(self, text: str) -> None:
        """Does nothing."""


class Show:
    """The lines and the progress of a preparation, or nothing where none is wanted."""

    def __init__(self, wanted: bool):
        self.wanted = wanted

    def say(self, line: str) -> None:
        """Prints a line."""
        if self.wanted:
            say(line)

    def bar(
        self, what: str, total: int | None
    ) -> contextlib.AbstractContextManager[Callable[[int], None]]:
        """Returns what is told how many bytes more are done."""
        return counted(what, total, unit=size, wanted=self.wanted)


@contextlib.contextmanager
def counted(
    what: str,
    total: int | None,
    *,
    unit: Callable[[float], str] = "{:,.0f}".format,
    wanted: bool = True,
) -> Iterator[Callable[[float], None]]:
    """Shows how many of `total` things are done, while the block runs.

    Yields:
      A function that is told how many more there are.
    """
    if not wanted:
        yield lambda more: None
        return
    bar = Progress(what, total=total, unit=unit, transient=True)
    try:
        yield bar.advance
    finally:
        bar.close()


def leave() -> None:
    """Gives terminals back their cursors: the process is about to leave by force."""
    for area in list(_on_terminals):
        area._stream.write(SHOW_CURSOR + "\n")
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()


class _Output:
    """One output of a notebook, whose text changes."""

    def __init__(self):
        self._handle: Any = None

    def show(self, line: str) -> None:
        from IPython.display import display  # type: ignore[import-not-found]

        data = {"text/plain": line}
        if self._handle:
            self._handle.update(data, raw=True)
        else:
            self._handle = display(data, raw=True, display_id=True)


def _in_notebook() -> bool:
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return hasattr(shell, "kernel")


def _described(numbers: dict[str, Any]) -> str:
    if "train_reward" in numbers:  # the loss beside it is near 0, whatever is learnt
        numbers = {**numbers, "train_loss": None}
    known = [(text, numbers.get(name)) for name, text in NUMBERS.items()]
    return "  ".join(text.format(value) for text, value in known if value is not None)
