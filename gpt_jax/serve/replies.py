"""How the texts of a request are answered: whole, or as the events of a stream."""

import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass

from gpt_jax.serve import wire
from gpt_jax.serve.engine import Piece
from gpt_jax.serve.texts import Token, speller
from gpt_jax.serve.wire import Ask


@dataclass(frozen=True)
class Reply:
    """How the texts of one request are answered."""

    ask: Ask
    name: str
    id: str
    created: int
    prompts: list[list[int]]
    echoes: list[str]  # "" unless asked for
    spell: wire.Spell

    def prompt(self, i: int) -> list[int]:
        """Returns the ids of the prompt of text `i`."""
        return self.prompts[i // self.ask.n]

    def usage(self, written: int) -> dict:
        """Returns token counts; a prompt counts once, however many texts it has."""
        return wire.usage(sum(map(len, self.prompts)), written)

    def whole(self, texts: list["Text"], written: int) -> dict:
        """Returns the body of an answer that is not streamed."""
        choices = []
        for i, text in enumerate(texts):
            choice = self._told(i, text.tokens, 0)
            choice |= {"index": i, "finish_reason": text.reason}
            if self.ask.messages:
                content = {"role": "assistant", "content": text.text, "refusal": None}
                choice["message"] = content
            else:
                choice["text"] = text.text
            choices.append(choice)
        kind = "chat.completion" if self.ask.messages else "text_completion"
        return self._body(kind, choices, usage=self.usage(written))

    def piece(self, i: int, text: str, tokens, start: int, reason: str) -> dict:
        """Returns an event of a stream; `start` is where its tokens begin."""
        choice = self._told(i, tokens, start)
        choice |= {"index": i, "finish_reason": reason or None}
        if self.ask.messages:
            delta = {"content": text} if text or not reason else {}
            choice["delta"] = delta
        else:
            choice["text"] = text
        kind = "chat.completion.chunk" if self.ask.messages else "text_completion"
        more = {"usage": None} if self.ask.usage else {}
        return self._body(kind, [choice], **more)

    def opening(self) -> list[dict]:
        """Returns the events with which a streamed chat begins."""
        if not self.ask.messages:
            return []
        events = [self.piece(i, "", [], 0, "") for i in range(self.ask.n)]
        for event in events:
            event["choices"][0]["delta"] = {"role": "assistant", "content": ""}
        return events

    def closing(self, written: int) -> list[dict]:
        """Returns the last event of a stream that asked for token counts."""
        if not self.ask.usage:
            return []
        kind = "chat.completion.chunk" if self.ask.messages else "text_completion"
        return [self._body(kind, [], usage=self.usage(written))]

    def _told(self, i: int, tokens: Sequence[Token], start: int) -> dict:
        if self.ask.top is None:
            return {"logprobs": None}
        if self.ask.messages:
            return {"logprobs": wire.told_chat(tokens, self.spell)}
        return {"logprobs": wire.told_completion(tokens, start, self.spell)}

    def _body(self, kind: str, choices: list, **more) -> dict:
        head = {"id": self.id, "object": kind, "created": self.created}
        return {**head, "model": self.name, "choices": choices, **more}


class Text:
    """A text of a request as its pieces come."""

    def __init__(self, echo: str):
        self.text, self.tokens, self.reason = echo, [], ""
        self.told = 0  # characters that tokens have added

    def add(self, piece: Piece) -> list[Token]:
        """Takes a piece; returns its tokens, the prompt's before its own."""
        tokens = [*piece.prompt, *piece.tokens]
        self.text += piece.text
        self.tokens += tokens
        self.told += sum(len(token.text) for token in tokens)
        self.reason = piece.reason
        return tokens


def reply(ask: Ask, name: str, tokenizer, prompts: list[list[int]]) -> Reply:
    """Returns how a request is answered, before there is anything to answer."""
    echoes = [
        ("" if not ask.echo else p if isinstance(p, str) else _shown(tokenizer, ids))
        for p, ids in zip(ask.prompts or [""], prompts, strict=True)
    ]
    prefix = "chatcmpl" if ask.messages else "cmpl"
    number = f"{prefix}-{secrets.token_hex(12)}"
    spell = speller(tokenizer)
    return Reply(ask, name, number, int(time.time()), prompts, echoes, spell)


def _shown(tokenizer, ids: Sequence[int]) -> str:
    """Returns the text of a prompt of ids without the token that opens texts."""
    opening = list(tokenizer.opening)
    hidden = len(opening) if list(ids[: len(opening)]) == opening else 0
    return tokenizer.decode(ids[hidden:])
