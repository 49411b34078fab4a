"""From what a client asks to the pieces of its texts, as they come."""

import asyncio
import contextlib
import json
import secrets
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from gpt_jax import __version__, chat, files, sample, sampling
from gpt_jax.generation import OWN, Generation
from gpt_jax.serve import grammars, tools
from gpt_jax.serve.batch import ENDING
from gpt_jax.serve.engine import Closed, Engine, Full, Piece
from gpt_jax.serve.errors import Refused, bad
from gpt_jax.serve.fields import STOPS
from gpt_jax.serve.grammars import Guide
from gpt_jax.serve.limits import Limits
from gpt_jax.serve.texts import Request
from gpt_jax.serve.wire import Ask, Embed

ROOM = 1024  # tokens of an answer whose request does not say how many
MOST = {  # what the number of tokens to write is called
    "completion": "max_tokens",
    "chat": "max_completion_tokens",
    "response": "max_output_tokens",
}
LATER = 1.0  # seconds after a deadline at which the engine is not waited for any more
ENDS = {  # how a text that was not finished is answered
    "cancelled": (503, "the server is leaving", "leaving"),
    "late": (
        504,
        "the request was not begun in time; come again, or ask for less",
        "timeout",
    ),
    "lost": (
        400,
        "the answer cannot go on in the form that was asked for: no token of this "
        "model's vocabulary does, or to find it takes too long",
        "form_lost",
    ),
    "error": (500, "the model failed; the server's log says how", "failed"),
}


@dataclass(frozen=True)
class Served:
    """A model under its name.

    Attributes:
      engine: what writes.
      template: of conversations (see chat/); None = it only continues texts.
      facts: what `/v1/models` tells besides.
      look: (prompt, against) -> the page of the microscope; None = it has none.
      generation: how its texts are written where nobody says otherwise.
    """

    engine: Engine
    template: str | None
    facts: Mapping[str, Any]
    look: Callable[[str, str], str] | None = None
    generation: Generation = OWN

    @property
    def fingerprint(self) -> str:
        """What decides, besides a request and its seed, which text comes."""
        decides = [self.template, dict(self.facts), self.settings({})]
        return (
            f"fp_{files.digest(json.dumps([__version__, *decides], default=str))[:12]}"
        )

    def settings(self, given: Mapping[str, float]) -> dict[str, float]:
        """Returns all settings of a request: those given, the others by default.

        That is what the model's makers say, else off, as OpenAI documents it: what a
        client of the API does not ask for changes no probability.
        """
        own = self.generation.settings if self.generation.published else sampling.OFF
        return {**own, **given}


def requests_of(
    ask: Ask,
    served: Served,
    prompts: list[list[int]],
    limits: Limits,
    deadline: float,
) -> list[Request]:
    """Returns the requests for the engine: the texts of every prompt, in order."""
    engine = served.engine
    context = engine.model.cfg.context_length
    most = _most(ask, context)
    told = ask.drawn * sum(map(len, prompts)) * (1 + (ask.top or 0))
    if ask.echo and ask.top is not None and told > limits.told:
        raise Refused(
            413,
            f"the prompts' probabilities would be {told} numbers, more than "
            f"{limits.told}: send fewer prompts at once, or ask for fewer logprobs",
            "prompt_too_long",
            param="logprobs",
        )
    check_tokens(served, logit_bias=ask.bias, stop_token_ids=ask.stop_ids)
    longest = max(map(len, prompts))
    if ask.least > most or longest + ask.least > context:
        why = f"max_tokens {most}" if ask.least > most else f"a context of {context}"
        raise bad(
            f"min_tokens {ask.least} cannot be with a prompt of {longest} tokens and "
            f"{why}",
            "min_tokens",
        )
    ends = [] if ask.ignore_eos else _ends(ask, served)
    ends = [*dict.fromkeys([*ends, *ask.stop_ids])]
    if len(ends) > ENDING:
        raise bad(
            f"{len(ends)} tokens that end an answer are more than {ENDING}: send "
            f"fewer stop_token_ids, at most {STOPS} do everywhere",
            "stop_token_ids",
        )
    grammar, form = _guide(ask, served), tool_form(ask, served)
    strings = [*ask.stop]
    if form and form.end.strip() and not ask.tools.several:
        strings.append(form.end.strip())  # behind one call there is no other
    seed = secrets.randbits(31) if ask.seed is None else ask.seed
    top = 0 if ask.drawn > ask.n and ask.top is None else ask.top
    numbers, requests = Counter(), []
    for prompt in (tuple(ids) for ids in prompts for _ in range(ask.drawn)):
        requests.append(
            Request(
                ids=prompt,
                settings={**served.settings(ask.settings), "max_new": most},
                seed=seed,
                number=numbers[prompt],  # equal prompts get different texts too
                stop=[*strings, *ends],
                top=top,
                score=ask.echo and ask.top is not None,
                deadline=deadline,
                least=ask.least,
                bias=ask.bias,
                grammar=grammar,
            )
        )
        numbers[prompt] += 1
    return requests


def tool_form(ask: Ask, served: Served) -> chat.ToolForm | None:
    """Returns how the calls of an answer are written; None where it has none.

    A template that writes no tools is told of none: the model then answers in text,
    unless it must call one.
    """
    if not ask.tools.described or served.template is None:
        return None
    found = chat.tool_form(served.engine.tokenizer, served.template)
    return found or (tools.PLAIN if ask.tools.must else None)


def _guide(ask: Ask, served: Served) -> Guide | None:
    """Returns what the texts must be, where that is asked for."""
    grammar, engine = ask.grammar, served.engine
    form = tool_form(ask, served)
    if form and ask.tools.strict:
        grammar = tools.grammar(ask.tools, form, engine.tokenizer.specials)
    if grammar is None:
        return None
    vocabulary = engine.model.cfg.vocab_size
    return grammars.begin(grammar, engine.tokenizer, vocabulary, _ends(ask, served))


def _most(ask: Ask, context: int) -> int:
    """Returns how many tokens to write at most; a default leaves room for a turn."""
    if ask.most is None:
        return min(ROOM, max(1, context // 2))
    if ask.most > context:
        raise bad(
            f"{MOST[ask.form]} {ask.most} is more than the context of {context}",
            MOST[ask.form],
        )
    return ask.most


def check_tokens(served: Served, **fields: Iterable[int]) -> None:
    """Refuses fields with ids that are no tokens of the model."""
    vocabulary = served.engine.model.cfg.vocab_size
    for name, ids in fields.items():
        if wrong := [i for i in ids if i >= vocabulary]:
            raise bad(
                f"token id {wrong[0]} of {name} is not in the model's vocabulary of "
                f"{vocabulary}",
                name,
            )


def _ends(ask: Ask, served: Served) -> list[int]:
    """Returns the tokens with which a text ends by itself."""
    tokenizer = served.engine.tokenizer
    if ask.messages and served.template:
        return chat.stop_ids(tokenizer, served.template)
    return list(tokenizer.ends)


def prompt_ids(ask: Ask, served: Served) -> list[list[int]]:
    """Returns the ids of every prompt; raises Refused for one that cannot be."""
    param = {"completion": "prompt", "chat": "messages", "response": "input"}[ask.form]
    if ask.messages:
        form = tool_form(ask, served)
        offered = ask.tools.described if form not in (None, tools.PLAIN) else ()
        return [conversation_ids(ask.messages, served, param=param, offered=offered)]
    return text_ids(ask.prompts, served, param=param)


def text_ids(
    prompts: Sequence[str | list[int]], served: Served, *, param: str
) -> list[list[int]]:
    """Returns the ids of texts, as `sample.prompt_ids` does; raises Refused."""
    tokenizer, cfg = served.engine.tokenizer, served.engine.model.cfg
    with _in_words(param):
        return [sample.prompt_ids(p, tokenizer, cfg) for p in prompts]


def conversation_ids(
    messages: Sequence[chat.Message],
    served: Served,
    *,
    param: str,
    offered: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Returns the ids of a conversation; raises Refused for one that cannot be."""
    ids = _rendered(messages, served, param=param, reply=True, offered=offered)
    with _in_words(param):
        return sample.prompt_ids(ids, served.engine.tokenizer, served.engine.model.cfg)


def _rendered(
    messages: Sequence[chat.Message],
    served: Served,
    *,
    param: str,
    reply: bool,
    offered: Sequence[Mapping[str, Any]] = (),
) -> list[int]:
    """Returns the ids of a conversation, however long it is."""
    with _in_words(param):
        if served.template is None:
            raise ValueError(
                "this model only continues texts: ask /v1/completions, or serve a run "
                "that was tuned on conversations"
            )
        _check_tools(messages, served, param)
        ids, _ = chat.render(
            messages,
            served.engine.tokenizer,
            served.template,
            reply=reply,
            tools=offered,
        )
        return ids


def _check_tools(messages: Sequence[chat.Message], served: Served, param: str) -> None:
    """Refuses calls of tools and what they say where the template writes none."""
    if not any(message.calls or message.role == "tool" for message in messages):
        return
    assert served.template is not None
    form = chat.tool_form(served.engine.tokenizer, served.template)
    for i, message in enumerate(messages):
        unknown = message.role == "tool" and not (form and form.answers)
        if unknown or (message.calls and not form):
            name = f"{param}[{i}].{'tool_calls' if message.calls else 'role'}"
            name = "input" if param == "input" else name  # items are not messages
            what = "calls of tools" if message.calls else "what tools say"
            raise bad(
                f"{name}: the chat template of this model does not write {what}", name
            )


@contextlib.contextmanager
def _in_words(param: str) -> Iterator[None]:
    """Makes what is wrong with a prompt the answer of a request."""
    try:
        yield
    except ValueError as error:
        long = "context" in str(error)
        code = "context_length_exceeded" if long else "invalid_request"
        raise Refused(400, str(error), code, param=param) from None


def token_ids(asked: Mapping[str, Any], served: Served) -> list[int]:
    """Returns the ids that /tokenize tells; raises Refused for what has none."""
    if asked["messages"] is not None:
        reply = asked["add_generation_prompt"]
        return _rendered(asked["messages"], served, param="messages", reply=reply)
    tokenizer = served.engine.tokenizer
    opening = tokenizer.opening if asked["add_special_tokens"] else []
    with _in_words("prompt"):
        return [*opening, *tokenizer.encode(asked["prompt"])]


def embeddings_of(
    ask: Embed, prompts: list[list[int]], deadline: float
) -> list[Request]:
    """Returns the requests for the engine whose hidden states are pooled."""
    return [
        Request(
            ids=ids,
            settings=sampling.settings(0),
            seed=0,
            number=0,
            stop=(),
            top=None,
            score=False,
            deadline=deadline,
            pool=ask.pooling,
        )
        for ids in prompts
    ]


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


class Spent(NamedTuple):
    """What the texts of a request cost: tokens written, and kept of each prompt."""

    written: int
    cached: list[int]


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
    def spent(self) -> Spent:
        """What all texts have cost so far."""
        written = sum(row.written for row in self._rows)
        return Spent(written, [row.cached for row in self._rows])

    def close(self) -> None:
        """Ends what still runs, before the next decode step."""
        for row in self._rows:
            row.cancel()
