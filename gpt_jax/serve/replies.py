"""How the texts of completions and chats are answered: whole, or as events."""

import base64
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from gpt_jax.serve import wire
from gpt_jax.serve.engine import Piece
from gpt_jax.serve.errors import Refused
from gpt_jax.serve.flow import Served, Spent, tool_form
from gpt_jax.serve.texts import Token, speller
from gpt_jax.serve.tools import Reader, split
from gpt_jax.serve.wire import Ask


@dataclass(frozen=True)
class Reply:
    """How the texts of one request are answered."""

    ask: Ask
    name: str
    id: str
    created: int
    fingerprint: str
    prompts: list[list[int]]
    echoes: list[str]  # "" unless asked for
    spell: wire.Spell
    readers: list[Reader]  # of each text that may call tools; else none
    end: ClassVar[bytes] = b"data: [DONE]\n\n"  # stands behind the last event

    def prompt(self, i: int) -> list[int]:
        """Returns the ids of the prompt of text `i`."""
        return self.prompts[i // self.ask.drawn]

    def usage(self, spent: Spent) -> dict:
        """Returns token counts; a prompt counts once, however many texts it has."""
        cached = spent.cached[:: self.ask.drawn]
        return wire.usage(sum(map(len, self.prompts)), spent.written, sum(cached))

    def whole(self, texts: list["Text"], spent: Spent) -> dict:
        """Returns the body of an answer that is not streamed."""
        choices = []
        for i, text in enumerate(self.best(texts)):
            choice = self._told(i, text.tokens, 0)
            choice |= {"index": i, "finish_reason": text.reason}
            if self.ask.messages:
                message = {"role": "assistant", "content": text.text, "refusal": None}
                if self.readers:
                    said, calls = split(self.readers[i].push(text.text, last=True))
                    message["content"] = said or (None if calls else "")
                    if calls:
                        told = [call.told(streamed=False) for call in calls]
                        message["tool_calls"] = told
                    choice["finish_reason"] = self._reason(i, text.reason)
                choice["message"] = message
            else:
                choice["text"] = text.text
            choices.append(choice)
        kind = "chat.completion" if self.ask.messages else "text_completion"
        return self._body(kind, choices, usage=self.usage(spent))

    def best(self, texts: list["Text"]) -> list["Text"]:
        """Returns n of the texts of every prompt: the likeliest a token, these first.

        All, as they were drawn, where no more were drawn.
        """
        n, drawn = self.ask.n, self.ask.drawn
        if n == drawn:
            return texts
        found = []
        for first in range(0, len(texts), drawn):
            group = texts[first : first + drawn]
            found += sorted(group, key=lambda text: -text.likelihood)[:n]
        return found

    def pieces(self, i: int, text: str, tokens, start: int, reason: str) -> list[dict]:
        """Returns the events of a piece; `start` is where its tokens begin."""
        choice = self._told(i, tokens, start)
        choice |= {"index": i, "finish_reason": reason or None}
        if self.ask.messages:
            calls = []
            if self.readers:
                text, calls = split(self.readers[i].push(text, last=bool(reason)))
                if not (text or calls or tokens or reason):
                    return []  # what may be a call is held back until it is one
                choice["finish_reason"] = self._reason(i, reason) or None
            delta: dict = {"content": text} if text or not (reason or calls) else {}
            if calls:
                delta["tool_calls"] = [call.told(streamed=True) for call in calls]
            choice["delta"] = delta
        else:
            choice["text"] = text
        return [self._event(choice)]

    def opening(self) -> list[dict]:
        """Returns the events with which a streamed chat begins."""
        if not self.ask.messages:
            return []
        head = {"finish_reason": None, "delta": {"role": "assistant", "content": ""}}
        return [
            self._event({**self._told(i, [], 0), "index": i, **head})
            for i in range(self.ask.n)
        ]

    def closing(self, spent: Spent) -> list[dict]:
        """Returns the last event of a stream that asked for token counts."""
        if not self.ask.usage:
            return []
        kind = "chat.completion.chunk" if self.ask.messages else "text_completion"
        return [self._body(kind, [], usage=self.usage(spent))]

    def _reason(self, i: int, reason: str) -> str:
        """Returns why a text ended, as it is told of one that may call tools."""
        called = reason == "stop" and self.readers[i].calls
        return "tool_calls" if called else reason

    def encoded(self, event: dict) -> bytes:
        """Returns an event as it is sent."""
        return b"data: " + as_json(event) + b"\n\n"

    def failed(self, error: Refused) -> list[dict]:
        """Returns the event with which a stream breaks off."""
        return [error.body()]

    def _told(self, i: int, tokens: Sequence[Token], start: int) -> dict:
        if self.ask.top is None:
            return {"logprobs": None}
        if self.ask.messages:
            return {"logprobs": wire.told_chat(tokens, self.spell)}
        return {"logprobs": wire.told_completion(tokens, start, self.spell)}

    def _event(self, choice: dict) -> dict:
        kind = "chat.completion.chunk" if self.ask.messages else "text_completion"
        more = {"usage": None} if self.ask.usage else {}
        return self._body(kind, [choice], **more)

    def _body(self, kind: str, choices: list, **more) -> dict:
        head = {"id": self.id, "object": kind, "created": self.created}
        head |= {"model": self.name, "system_fingerprint": self.fingerprint}
        return {**head, "choices": choices, **more}


def as_json(body: dict) -> bytes:
    """Returns an object as the bytes of an answer."""
    return json.dumps(body, separators=(",", ":")).encode()


def embeddings(name: str, vectors: Sequence, *, encoded: bool) -> dict:
    """Returns pooled hidden states as /v1/embeddings tells them, each of length 1."""
    data = []
    for i, vector in enumerate(vectors):
        length = np.linalg.norm(vector)
        told = (vector / (length if length > 0 else 1)).astype("<f4")
        body = base64.b64encode(told.tobytes()).decode() if encoded else told.tolist()
        data.append({"object": "embedding", "index": i, "embedding": body})
    return {"object": "list", "model": name, "data": data}


def tokens(tokenizer, ids: list[int], asked, served: Served) -> dict:
    """Returns ids as /tokenize tells them."""
    context = served.engine.model.cfg.context_length
    body = {"count": len(ids), "max_model_len": context, "tokens": ids}
    if asked["return_token_strs"]:
        spell = speller(tokenizer)
        body["token_strs"] = [spell(token).text for token in ids]
    return body


class Text:
    """A text of a request as its pieces come."""

    def __init__(self, echo: str):
        self.text, self.tokens, self.reason = echo, [], ""
        self.told = 0  # characters that tokens have added
        self.own: list[float] = []  # log-probabilities of what was written

    def add(self, piece: Piece) -> list[Token]:
        """Takes a piece; returns its tokens, the prompt's before its own."""
        tokens = [*piece.prompt, *piece.tokens]
        self.text += piece.text
        self.tokens += tokens
        self.own += [token.logprob or 0.0 for token in piece.tokens]
        self.told += sum(len(token.text) for token in tokens)
        self.reason = piece.reason
        return tokens

    @property
    def likelihood(self) -> float:
        """The mean log-probability of its tokens; 0 of a text without any."""
        return sum(self.own) / max(1, len(self.own))


def reply(ask: Ask, name: str, served: Served, prompts: list[list[int]]) -> Reply:
    """Returns how a request is answered, before there is anything to answer."""
    tokenizer = served.engine.tokenizer
    echoes = [
        ("" if not ask.echo else p if isinstance(p, str) else _shown(tokenizer, ids))
        for p, ids in zip(ask.prompts or [""], prompts, strict=True)
    ]
    prefix = "chatcmpl" if ask.messages else "cmpl"
    number = f"{prefix}-{secrets.token_hex(12)}"
    head = (number, int(time.time()), served.fingerprint)
    form, names = tool_form(ask, served), ask.tools.names
    readers = [Reader(names, form) for _ in range(ask.n)] if form else []
    return Reply(ask, name, *head, prompts, echoes, speller(tokenizer), readers)


def _shown(tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of a prompt of ids without the token that opens texts."""
    opening = list(tokenizer.opening)
    hidden = len(opening) if list(ids[: len(opening)]) == opening else 0
    return tokenizer.decode(ids[hidden:])
