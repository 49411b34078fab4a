"""Programs by their shapes: compiled when first called, or before that beside the work.

programs.call(("step", 8, 256), jitted, params, batch, running)
programs.ahead([(("step", 8, 512), jitted, shapes), ...])     # in a thread of its own
"""

import logging
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

log = logging.getLogger(__name__)


Key = tuple[Any, ...]  # the program's name, and what decides its shapes


class Draft(NamedTuple):
    """A program that will be wanted: what it is called by, and how it is lowered."""

    key: Key
    lower: Callable[[], Any]  # jitted.lower of the shapes that it is for


class Programs:
    """The compiled programs of a server; what is compiled once is not compiled again.

    A call for which there is no program compiles it, or waits for the thread that does.
    """

    def __init__(self):
        self._lock = threading.Lock()
        self._found: dict[Key, Future] = {}
        self._closing = False

    def __iter__(self) -> Iterator[Key]:
        """Yields what there is, or is being compiled."""
        return iter([*self._found])

    def __len__(self) -> int:
        """How many programs there are, or are being compiled."""
        return len(self._found)

    def call(self, key: Key, jitted: Any, *args: Any, **static: Any) -> Any:
        """Runs the program of a key, which must say all that decides its shapes.

        Args:
          key: what it is called by.
          jitted: the function; its static arguments are `static`.
          *args: the others.
        """
        made = self._found.get(key)
        if made is None or not made.done():
            made = self._make(Draft(key, lambda: jitted.lower(*args, **static)))
        return made.result()(*args)

    def ahead(self, drafts: Iterable[Draft]) -> None:
        """Compiles what is not there yet, one after the other, until `close`."""
        for draft in drafts:
            if self._closing:
                return
            try:
                self._make(draft).result()
            except Exception:  # whoever calls it is told; nobody waits for this thread
                log.exception("a program was not compiled ahead: %s", draft.key)
                return

    def close(self) -> None:
        """Lets `ahead` end after the program that it is at."""
        self._closing = True

    def _make(self, draft: Draft) -> Future:
        """Returns a program, compiled here unless another thread does or did."""
        with self._lock:
            made = self._found.get(draft.key)
            mine = made is None
            if made is None:
                made = self._found[draft.key] = Future()
        if mine:
            try:
                made.set_result(draft.lower().compile())
            except BaseException as error:
                del self._found[draft.key]  # who wants it next may have more luck
                made.set_exception(error)
        return made
