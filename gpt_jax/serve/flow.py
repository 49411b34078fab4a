"""From what a client asks to the pieces of its texts, as they come."""

import asyncio
import contextlib
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gpt_jax import chat, sample
from gpt_jax.serve.engine import Closed, Engine, Full, Piece
from gpt_jax.serve.texts import Request
from gpt_jax.serve.wire import Ask, Limits, Refused

LATER = 1.0  # seconds after a deadline at which the engine is not waited for any more
ENDS = {  # how a text that was not finished is answered
    "cancelled": (503, "the server is leaving", "leaving"),
    "late": (504, "the request was not done in time; ask for less", "timeout"),
    "error": (500, "the model failed; the server's log says how", "failed"),
}


@dataclass(frozen=True)
class Served:
    """A model under its name.

    Attributes:
      engine: what writes.
      template: of conversations (see chat.py); None = it only continues texts.
      facts: what `/v1/models` tells besides.
      look: (prompt, against) -> the page of the microscope; None = it has none.
    """

    engine: Engine
    template: str | None
    facts: Mapping[str, Any]
    look: Callable[[str, str], str] | None = None


def requests_of(
    ask: Ask,
    served: Served,
    prompts: list[list[int]],
    limits: Limits,
    deadline: float,
) -> list[Request]:
    """Returns the requests for the engine: n texts of every prompt, in order."""
    engine = served.engine
    context = engine.model.cfg.context_length
    settings = dict(ask.settings)
    if settings["max_new"] > context:
        raise Refused(
            400,
            f"max_tokens {settings['max_new']} is more than the context of {context}",
            "invalid_request",
        )
    if settings["max_new"] < 0:
        settings["max_new"] = context
    told = ask.n * sum(map(len, prompts)) * (1 + (ask.top or 0))
    if ask.echo and ask.top is not None and told > limits.told:
        raise Refused(
            413,
            f"the prompts' probabilities would be {told} numbers, more than "
            f"{limits.told}: send fewer prompts at once, or ask for fewer logprobs",
            "prompt_too_long",
        )
    ends = list(engine.tokenizer.ends)
    if ask.messages and served.template:
        ends = chat.stop_ids(engine.tokenizer, served.template)
    stop = [*ask.stop, *(i for i in ends if not ask.ignore_eos)]
    seed = secrets.randbits(31) if ask.seed is None else ask.seed
    numbers, requests = Counter(), []
    for prompt in (tuple(ids) for ids in prompts for _ in range(ask.n)):
        requests.append(
            Request(
                ids=prompt,
                settings=settings,
                seed=seed,
                number=numbers[prompt],  # equal prompts get different texts too
                stop=stop,
                top=ask.top,
                score=ask.echo and ask.top is not None,
                deadline=deadline,
            )
        )
        numbers[prompt] += 1
    return requests


def prompt_ids(ask: Ask, served: Served) -> list[list[int]]:
    """Returns the ids of every prompt; raises Refused for one that cannot be."""
    tokenizer, cfg = served.engine.tokenizer, served.engine.model.cfg
    try:
        if not ask.messages:
            return [sample.prompt_ids(p, tokenizer, cfg) for p in ask.prompts]
        if served.template is None:
            raise ValueError(
                "this model only continues texts: ask /v1/completions, or serve a run "
                "that was tuned on conversations"
            )
        messages = [chat.Message(*message) for message in ask.messages]
        ids, _ = chat.render(messages, tokenizer, served.template, reply=True)
        return [sample.prompt_ids(ids, tokenizer, cfg)]
    except ValueError as error:
        long = "context" in str(error)
        code = "context_length_exceeded" if long else "invalid_request"
        raise Refused(400, str(error), code) from None


class Mail:
    """Carries pieces from engines' threads to the event loop, those of a step at once.

    To wake the loop costs a system call, after which the two threads contend for the
    interpreter: once a step is enough.
    """

    def __init__(self):
        """Belongs to the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._letters: deque[tuple[asyncio.Queue, Any]] = deque()

    def post(self, queue: asyncio.Queue, letter) -> None:
        """Takes a letter for a queue, from any thread; `flush` sends it."""
        self._letters.append((queue, letter))

    def flush(self) -> None:
        """Lets the loop hand out what was posted; from any thread."""
        if self._letters:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._hand_out)

    def _hand_out(self) -> None:
        while self._letters:
            queue, letter = self._letters.popleft()
            queue.put_nowait(letter)


class Flow:
    """The pieces of a request's texts, as they come to the event loop."""

    def __init__(self, engine: Engine, requests: Sequence[Request], mail: Mail):
        """Submits the requests; raises Refused when there is no room."""
        self._queue = asyncio.Queue()
        self._open = len(requests)
        self._end = max(request.deadline for request in requests) + LATER
        jobs = [
            (request, lambda piece, i=i: mail.post(self._queue, (i, piece)))
            for i, request in enumerate(requests)
        ]
        try:
            self._rows = engine.submit(jobs)
        except ValueError as error:
            raise Refused(400, str(error), "invalid_request") from None
        except Full as full:
            raise Refused(429, str(full), "overloaded", full.seconds) from None
        except Closed:
            failed = engine.failed is not None
            raise Refused(*ENDS["error" if failed else "cancelled"]) from None

    async def next(self) -> tuple[int, Piece] | None:
        """Returns (which text, its piece), or None when all have ended."""
        if not self._open:
            return None
        i, piece = self._queue.get_nowait() if self.more else await self._arrival()
        self._open -= bool(piece.reason)
        if piece.reason in ENDS:
            raise Refused(*ENDS[piece.reason])
        return i, piece

    @property
    def more(self) -> bool:
        """Whether `next` has something at once."""
        return not self._queue.empty()

    async def _arrival(self) -> tuple[int, Piece]:
        try:  # the engine itself ends what is late, but a step of it may hang
            async with asyncio.timeout(self._end - time.monotonic()):
                return await self._queue.get()
        except TimeoutError:
            raise Refused(*ENDS["late"]) from None

    @property
    def written(self) -> int:
        """Tokens chosen so far, of all texts."""
        return sum(row.written for row in self._rows)

    def close(self) -> None:
        """Ends what still runs, before the next decode step."""
        for row in self._rows:
            row.cancel()
