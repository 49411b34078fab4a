"""Continuous batching: requests join and leave between two decode steps.

One thread owns the device. It takes requests from a bounded queue, runs their prompts
piece by piece between decode steps, and gives every running row one token a step. So
a request waits for no other to end, and one that nobody wants any more is gone before
the next step.
"""

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from gpt_jax import mesh
from gpt_jax.model import GPT
from gpt_jax.serve import slots
from gpt_jax.serve.compiled import Programs
from gpt_jax.serve.grammars import Guide
from gpt_jax.serve.texts import Request, Text, Token

log = logging.getLogger(__name__)


class Full(Exception):
    """The queue is full; `seconds` is when it is worth while to try again."""

    def __init__(self, seconds: int):
        super().__init__(f"the queue is full; try again in {seconds} s")
        self.seconds = seconds


class Closed(Exception):
    """The engine takes no requests: it leaves, or it broke."""


class Piece(NamedTuple):
    """What a step brought to a request.

    `reason` is "" while it goes on; the last piece has stop, length (also of what was
    being written at its deadline), cancelled (by `Row.cancel`, or the engine closes),
    late (its deadline came before its first token), lost (no token of the vocabulary
    goes on in its grammar) or error.
    """

    text: str
    tokens: list[Token]  # where probabilities are wanted
    prompt: list[Token]  # likewise, once, where the prompt's are
    reason: str
    vector: Any = None  # float32 [D], with the last piece, where states are pooled


@dataclass(eq=False)
class Row:
    """A request on its way; `cancel` may be called from any thread."""

    request: Request
    deliver: Callable[[Piece], None]  # called by the engine's thread
    cancelled: bool = False
    begun: float = 0.0  # when its prompt began to run
    done: int = 0  # tokens of the prompt that have run
    written: int = 0  # tokens chosen
    text: Text | None = None
    guide: Guide | None = None  # where the text is within its grammar
    chosen: list[int] = field(default_factory=list)
    cached: int = 0  # tokens of the prompt that were kept of earlier ones
    pooled: Any = 0.0  # sum of the prompt's hidden states, or the last of them

    def cancel(self) -> None:
        """Ends the request before the next step."""
        self.cancelled = True

    def over(self, now: float) -> str:
        """Returns why the request need not go on, or ""."""
        if self.cancelled:
            return "cancelled"
        if self.request.deadline > now:
            return ""
        return "length" if self.written else "late"


class Engine:
    """A model that writes many texts at once.

    Attributes:
      model, tokenizer: as given; the model's layers unrolled.
      most: how many requests run at once.
      tokens: tokens chosen so far; prompted: prompt tokens run; cached: those that
        were kept of earlier prompts; steps: decode steps.
      ready: set when the first request can be answered.
      compiled: set when no request can want a program that there is not.
      failed: what broke the thread, or None.
      ahead: as given.
      flush: called by the thread when it has delivered what a step brought.
    """

    def __init__(
        self,
        *,
        model: GPT,
        params,
        tokenizer,
        sizes: Sequence[int],
        queue: int,
        share: slots.Share = lambda tree: tree,
        ahead: bool = False,
        prefix_bytes: int = 0,
        programs: Programs | None = None,
    ):
        """Makes an engine; `start` starts it.

        Args:
          model: the model; scanned layers are unrolled first.
          params: its weights.
          tokenizer: makes text of ids.
          sizes: how many rows a decode step may have; the last is `most`. One size
            alone makes a row's numbers the same to the last bit, whoever is there.
          queue: how many more requests may wait.
          share: gives arrays that equal these and are held already; else these.
          ahead: compile every program that can be wanted, beside the first requests;
            else each when it is.
          prefix_bytes: for what prompts begin with, so that it is not computed again.
          programs: shared with engines of models of the same shape.
        """
        if queue < 0:
            raise ValueError(f"queue {queue} is below 0")
        self._slots = slots.Slots(
            *(model, params, sizes, share),
            prefix_bytes=prefix_bytes,
            programs=programs,
        )
        self.model, self.tokenizer = self._slots.model, tokenizer
        self.most, self._queue = self._slots.sizes[-1], queue
        self.ready, self.compiled = threading.Event(), threading.Event()
        self.failed = None
        self.flush: Callable[[], None] = lambda: None
        self.tokens = self.prompted = self.cached = self.steps = 0
        self._wake = threading.Condition()
        self._waiting: deque[Row] = deque()
        self._filling: Row | None = None  # its prompt is running
        self._pace = 1.0  # seconds that a request takes, a moving average
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.ahead, self._ahead = ahead, None
        if ahead:
            work = self._compile_ahead
            self._ahead = threading.Thread(target=work, name="ahead", daemon=True)

    def start(self) -> None:
        """Starts the thread, which compiles and then sets `ready`."""
        self._thread.start()

    def close(self, timeout: float) -> bool:
        """Ends every request and the thread; returns whether it ended in time."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._slots.close()
        threads = [x for x in (self._thread, self._ahead) if x and x.is_alive()]
        end = time.monotonic() + timeout
        for thread in threads:
            thread.join(max(0.0, end - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    @property
    def running(self) -> int:
        """How many requests have a slot, or are about to."""
        rows = {row for _, row in self._slots.taken()}  # one that joins is in both
        return len(rows | ({self._filling} if self._filling else set()))

    @property
    def waiting(self) -> int:
        """How many requests wait for one."""
        return len(self._waiting)

    def submit(
        self, jobs: Sequence[tuple[Request, Callable[[Piece], None]]]
    ) -> list[Row]:
        """Queues requests, all or none; pieces come by the functions beside them.

        Raises:
          ValueError: there would never be room for all of them.
          Full: there is no room for all of them now.
          Closed: the engine takes no more.
        """
        rows = [Row(request, deliver) for request, deliver in jobs]
        if len(rows) > self.most + self._queue:
            raise ValueError(
                f"{len(rows)} texts are more than this server can take at once: "
                f"{self.most} that run and {self._queue} that wait; ask for fewer"
            )
        with self._wake:
            if self._closing:
                raise Closed(str(self.failed or "the server is leaving"))
            ahead = len(self._waiting) + self.running + len(rows) - self.most
            if ahead > self._queue:
                raise Full(max(1, round(ahead / self.most * self._pace)))
            self._waiting.extend(rows)
            self._wake.notify()
        return rows

    # ------------------------------------------------------------ the thread

    def _run(self) -> None:
        try:
            self._slots.compile()
            if self._ahead and mesh.platform() == "cpu":
                self._ahead.start()
            elif self._ahead:  # a compiler that times kernels wants to be alone
                self._compile_ahead()
            self.ready.set()
            while self._await_work():
                self._drop()
                self._fill()
                self.flush()  # scores and vectors do not wait for the step
                self._step()
                self.flush()
        except BaseException as error:  # the thread's edge: nobody else would hear
            log.exception("the engine broke")
            self.failed = error
        with self._wake:
            self._closing = True
            rows = [*self._waiting, *(row for _, row in self._slots.taken())]
            rows += [self._filling] if self._filling else []
            self._waiting.clear()
        for row in dict.fromkeys(rows):  # one that joins is in two places
            with self._only(row):
                self._tell(row, reason="error" if self.failed else "cancelled")
        self.flush()

    def _compile_ahead(self) -> None:
        self._slots.ahead()
        self.compiled.set()

    @contextlib.contextmanager
    def _only(self, row: Row) -> Iterator[None]:
        """Ends this row, and no other, with "error" when the block fails."""
        try:
            yield
        except Exception:
            log.exception("a request failed")
            for slot, owner in self._slots.taken():
                if owner is row:
                    self._slots.leave(slot)
            if self._filling is row:
                self._filling = None
            with contextlib.suppress(Exception):
                row.deliver(Piece("", [], [], "error"))

    def _await_work(self) -> bool:
        """Waits until there is something to do; False when it is time to leave."""
        if not self.running:
            self._slots.fit(0)  # whoever comes next may be alone
        with self._wake:
            while not (self._closing or self._waiting or self.running):
                self._wake.wait()
            return not self._closing

    def _drop(self) -> None:
        """Ends what was cancelled or is late, whether it waits or runs."""
        now = time.monotonic()
        with self._wake:
            gone = [row for row in self._waiting if row.over(now)]
            for row in gone:
                self._waiting.remove(row)
        for slot, row in self._slots.taken():
            if row.over(now):
                self._slots.leave(slot)
                gone.append(row)
        if self._filling and self._filling.over(now):
            gone.append(self._filling)
            self._filling = None
        for row in gone:
            with self._only(row):
                self._tell(row, reason=row.over(now))

    def _fill(self) -> None:
        """Runs prompts while there are slots, up to a piece before the next step."""
        with self._wake:
            rows = min(self.most, self.running + len(self._waiting))
        self._slots.fit(rows)
        spent = 0
        while spent < slots.PIECE and (row := self._next()):
            before = row.done
            pool = row.request.pool
            row.done, told, states_TD = self._slots.prompt(
                row.request.ids, row.done, score=row.request.score, states=bool(pool)
            )
            if pool:
                row.pooled = (
                    states_TD[-1] if pool == "last" else row.pooled + states_TD.sum(0)
                )
            spent += row.done - before
            self.prompted += row.done - before
            with self._only(row):
                assert row.text is not None
                if told is not None:
                    row.text.score(row.request.ids, before, told)
            if row is self._filling and row.done == len(row.request.ids):
                self._join(row)

    def _next(self) -> Row | None:
        """Returns the row whose prompt is to run, if one is and a slot is free."""
        with self._wake:
            if self._filling is None and self._waiting and self.running < self.most:
                self._filling = self._waiting.popleft()
                self._filling.begun = time.monotonic()
        row = self._filling
        if row and row.text is None:
            with self._only(row):
                row.text = Text(self.tokenizer, row.request)
                row.guide = row.request.grammar and row.request.grammar.copy()
                if not (row.request.score or row.request.pool):
                    row.done = row.cached = self._slots.recall(row.request.ids)
                    self.cached += row.cached
        return self._filling

    def _join(self, row: Row) -> None:
        """Gives a row whose prompt has run a slot and its first token."""
        request, room = row.request, self._slots.room
        if not request.settings["max_new"] or len(request.ids) >= room:
            self._filling = None
            with self._only(row):
                self._tell(row, reason="length")
            return
        entry = slots.entry(request, room)
        mask = row.guide and row.guide.mask_W
        slot, chosen = self._slots.join(entry, row, len(request.ids), mask)
        self._filling = None  # before its first token is told: it may be the last
        with self._only(row):
            self._push(slot, row, chosen, 0)
        self.flush()  # a first token waits for nothing that is not its own
        if (slot, row) in self._slots.taken():  # who has left is remembered already
            self._slots.remember(request.ids, slot)

    def _step(self) -> None:
        """Gives every running row a token."""
        taken = self._slots.taken()
        if not taken:
            return
        told = any(row.request.top is not None for _, row in taken)
        masks = {slot: row.guide.mask_W for slot, row in taken if row.guide}
        chosen = self._slots.step(told=told, masks=masks)
        self.steps += 1
        for slot, row in taken:
            with self._only(row):
                self._push(slot, row, chosen, slot)

    def _push(self, slot: int, row: Row, chosen, i: int) -> None:
        """Takes entry `i` of what was chosen as a row's next token."""
        row.written += 1
        self.tokens += 1
        request, text = row.request, row.text
        assert text is not None
        text.push(chosen, i)
        full = len(request.ids) + row.written >= self._slots.room
        row.chosen.append(int(chosen.token_B[i]))
        reason = "stop" if text.stopped else ""
        if not reason and row.guide:
            reason = row.guide.push(row.chosen[-1])
        if not reason and (full or row.written >= request.settings["max_new"]):
            reason = "length"
        if reason:
            self._slots.remember([*request.ids, *row.chosen], slot, rest=True)
            self._slots.leave(slot)
            self._pace += (time.monotonic() - row.begun - self._pace) / 8
        self._tell(row, reason=reason)

    def _tell(self, row: Row, *, reason: str) -> None:
        """Delivers what is new of a row; with a reason, for the last time."""
        text, tokens, prompt = (
            row.text.take(last=bool(reason)) if row.text else _NOTHING
        )
        if text or tokens or prompt or reason:
            vector = row.pooled if row.request.pool and reason == "length" else None
            row.deliver(Piece(text, tokens, prompt, reason, vector))


_NOTHING: tuple[str, list[Token], list[Token]] = ("", [], [])
