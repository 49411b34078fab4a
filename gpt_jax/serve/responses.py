"""How /v1/responses answers: one object, or the events of its making.

The form is that of OpenAI's Responses: one message with one text. Nothing is stored
here, so an answer cannot be gone on from by its id; send the conversation again.
"""

import secrets
import time
from collections.abc import Sequence
from typing import Any

from gpt_jax.serve import wire
from gpt_jax.serve.engine import Piece
from gpt_jax.serve.errors import Refused
from gpt_jax.serve.flow import Served, Spent
from gpt_jax.serve.replies import Text, as_json
from gpt_jax.serve.texts import Token, speller
from gpt_jax.serve.wire import Ask


class Response:
    """How one request is answered; used for one answer, since it counts its events."""

    end = b""  # nothing stands behind the last event

    def __init__(self, ask: Ask, name: str, served: Served, prompts: list[list[int]]):
        self.ask, self.prompts, self.echoes = ask, prompts, [""]
        self._name, self._spell = name, speller(served.engine.tokenizer)
        self._fingerprint = served.fingerprint
        self._settings = served.settings(ask.settings)
        self._id, self._item = f"resp_{secrets.token_hex(12)}", secrets.token_hex(12)
        self._created, self._count, self._text = int(time.time()), 0, Text("")

    def whole(self, texts: list[Text], spent: Spent) -> dict:
        """Returns the body of an answer that is not streamed."""
        (text,) = texts
        item = self._message(text.text, text.tokens, _status(text.reason))
        return self._body(_status(text.reason), [item], spent)

    def opening(self) -> list[dict]:
        """Returns the events with which a stream begins."""
        return [
            self._event("created", response=self._body("in_progress", [])),
            self._event("in_progress", response=self._body("in_progress", [])),
            self._event("output_item.added", 0, item=self._message(None, [], "")),
            self._event("content_part.added", 0, 0, part=self._part("", [])),
        ]

    def pieces(self, i: int, text: str, tokens, start: int, reason: str) -> list[dict]:
        """Returns the events of a piece; at the last one what is done is told whole."""
        self._text.add(Piece(text, tokens, [], reason))
        events = []
        if text or tokens:
            told = {"logprobs": self._told(tokens)}
            events.append(self._event("output_text.delta", 0, 0, delta=text, **told))
        if reason:
            whole = self._text
            part = self._part(whole.text, whole.tokens)
            done = {"text": whole.text, "logprobs": part["logprobs"]}
            item = self._message(whole.text, whole.tokens, _status(reason))
            events.append(self._event("output_text.done", 0, 0, **done))
            events.append(self._event("content_part.done", 0, 0, part=part))
            events.append(self._event("output_item.done", 0, item=item))
        return events

    def closing(self, spent: Spent) -> list[dict]:
        """Returns the last event of a stream."""
        text, status = self._text, _status(self._text.reason)
        body = self._body(
            status, [self._message(text.text, text.tokens, status)], spent
        )
        return [self._event(status, response=body)]

    def encoded(self, event: dict) -> bytes:
        """Returns an event as it is sent."""
        name = event["type"].encode()
        return b"event: " + name + b"\ndata: " + as_json(event) + b"\n\n"

    def failed(self, error: Refused) -> list[dict]:
        """Returns the event with which a stream breaks off."""
        told = {"code": error.code, "message": str(error), "param": error.param}
        return [{"type": "error", **told, "sequence_number": self._next()}]

    def _event(self, name: str, output: int | None = None, place=None, **more) -> dict:
        head: dict[str, Any] = {"type": f"response.{name}"}
        head["sequence_number"] = self._next()
        if output is not None:
            head["output_index"] = output
        if output is not None and "item" not in more:
            head["item_id"] = f"msg_{self._item}"
        if place is not None:
            head["content_index"] = place
        return {**head, **more}

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    def _message(self, text: str | None, tokens: Sequence[Token], status: str) -> dict:
        """Returns what is written as an item; `text` None: it has not begun."""
        head = {"id": f"msg_{self._item}", "type": "message", "role": "assistant"}
        content = [] if text is None else [self._part(text, tokens)]
        return {**head, "status": status or "in_progress", "content": content}

    def _part(self, text: str, tokens: Sequence[Token]) -> dict:
        told = {"annotations": [], "logprobs": self._told(tokens)}
        return {"type": "output_text", "text": text, **told}

    def _told(self, tokens: Sequence[Token]) -> list[dict]:
        if self.ask.top is None:
            return []
        return wire.told_chat(tokens, self._spell)["content"]

    def _body(self, status: str, output: list, spent: Spent | None = None) -> dict:
        given, usage = self.ask.given, None
        if spent is not None:
            prompt, cached = sum(map(len, self.prompts)), sum(spent.cached)
            usage = wire.usage_of_response(prompt, spent.written, cached)
        cut = {"reason": "max_output_tokens"} if status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": cut,
            "instructions": given["instructions"],
            "max_output_tokens": given["max_output_tokens"],
            "metadata": given["metadata"] or {},
            "model": self._name,
            "output": output,
            "parallel_tool_calls": False,
            "previous_response_id": None,
            "store": False,
            "system_fingerprint": self._fingerprint,
            "temperature": self._settings["temperature"],
            "text": {"format": given["text"].get("format") or {"type": "text"}},
            "tool_choice": "none",
            "tools": [],
            "top_logprobs": given["top_logprobs"] or 0,
            "top_p": self._settings["top_p"],
            "truncation": "disabled",
            "usage": usage,
            "user": given["user"],
        }


def _status(reason: str) -> str:
    return "completed" if reason == "stop" else "incomplete"
