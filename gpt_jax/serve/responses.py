"""How /v1/responses answers: one object, or the events of its making.

The form is that of OpenAI's Responses: items in the order in which the model wrote
them, each a message with one text or the call of a tool. Nothing is stored here, so an
answer cannot be gone on from by its id; send the conversation again.
"""

import secrets
import time
from collections.abc import Sequence

from gpt_jax.serve import wire
from gpt_jax.serve.engine import Piece
from gpt_jax.serve.errors import Refused
from gpt_jax.serve.flow import Served, Spent, tool_form
from gpt_jax.serve.replies import Text, as_json
from gpt_jax.serve.texts import Token, speller
from gpt_jax.serve.tools import Called, Reader
from gpt_jax.serve.wire import Ask


class Response:
    """How one request is answered; used for one answer, since it counts its events."""

    end = b""  # nothing stands behind the last event

    def __init__(self, ask: Ask, name: str, served: Served, prompts: list[list[int]]):
        self.ask, self.prompts, self.echoes = ask, prompts, [""]
        self._name, self._spell = name, speller(served.engine.tokenizer)
        self._fingerprint = served.fingerprint
        self._settings = served.settings(ask.settings)
        form = tool_form(ask, served)
        self._reader = Reader(ask.tools.names, form) if form else None
        self._id, self._created = f"resp_{secrets.token_hex(12)}", int(time.time())
        self._count = 0
        self._items: list[dict] = []  # those that are done
        self._text: Text | None = None  # of the message that is being written
        self._message_id = ""
        self._status = "in_progress"

    def whole(self, texts: list[Text], spent: Spent) -> dict:
        """Returns the body of an answer that is not streamed."""
        (text,) = texts
        self.pieces(0, text.text, text.tokens, 0, text.reason)
        return self._body(spent)

    def opening(self) -> list[dict]:
        """Returns the events with which a stream begins."""
        return [
            self._event("created", response=self._body()),
            self._event("in_progress", response=self._body()),
        ]

    def pieces(self, i: int, text: str, tokens, start: int, reason: str) -> list[dict]:
        """Returns the events of a piece; at the last one what is done is told whole."""
        found: list[str | Called] = [text] if text or tokens else []
        if self._reader:
            found = self._reader.push(text, last=bool(reason))
        events = []
        for part in found:
            if isinstance(part, Called):
                events += [*self._said("completed"), *self._called(part)]
            else:
                events += self._saying(part, tokens)
        if reason:
            self._status = "completed" if reason == "stop" else "incomplete"
            if not (found or self._items or self._text):  # an answer without a text
                events += self._saying("", [])
            events += self._said(self._status)
        return events

    def closing(self, spent: Spent) -> list[dict]:
        """Returns the last event of a stream."""
        return [self._event(self._status, response=self._body(spent))]

    def encoded(self, event: dict) -> bytes:
        """Returns an event as it is sent."""
        name = event["type"].encode()
        return b"event: " + name + b"\ndata: " + as_json(event) + b"\n\n"

    def failed(self, error: Refused) -> list[dict]:
        """Returns the event with which a stream breaks off."""
        told = {"code": error.code, "message": str(error), "param": error.param}
        return [{"type": "error", **told, "sequence_number": self._next()}]

    # ------------------------------------------------------------ items

    def _saying(self, text: str, tokens: list[Token]) -> list[dict]:
        """Returns the events of more text of a message, which it may begin."""
        events = []
        if self._text is None:
            self._text, self._message_id = Text(""), f"msg_{secrets.token_hex(12)}"
            item = self._message("in_progress", [])
            events.append(self._of_item("output_item.added", item=item))
            part = self._part("", [])
            events.append(self._of_text("content_part.added", part=part))
        self._text.add(Piece(text, tokens, [], ""))
        if text or tokens:
            told = {"delta": text, "logprobs": self._told(tokens)}
            events.append(self._of_text("output_text.delta", **told))
        return events

    def _said(self, status: str) -> list[dict]:
        """Returns the events that end the message, if one is being written."""
        if self._text is None:
            return []
        part = self._part(self._text.text, self._text.tokens)
        done = {"text": part["text"], "logprobs": part["logprobs"]}
        item = self._message(status, [part])
        events = [
            self._of_text("output_text.done", **done),
            self._of_text("content_part.done", part=part),
            self._of_item("output_item.done", item=item),
        ]
        self._items.append(item)
        self._text = None
        return events

    def _called(self, call: Called) -> list[dict]:
        """Returns the events of a call, which is found when it is whole."""
        number = f"fc_{secrets.token_hex(12)}"
        head = {"id": number, "type": "function_call", "call_id": call.id}
        head |= {"name": call.name}
        begun = {**head, "arguments": "", "status": "in_progress"}
        item = {**head, "arguments": call.arguments, "status": "completed"}
        name, done = "function_call_arguments", {"arguments": call.arguments}
        events = [
            self._of_item("output_item.added", item=begun),
            self._of_item(f"{name}.delta", item_id=number, delta=call.arguments),
            self._of_item(f"{name}.done", item_id=number, name=call.name, **done),
            self._of_item("output_item.done", item=item),
        ]
        self._items.append(item)
        return events

    def _message(self, status: str, content: list[dict]) -> dict:
        head = {"id": self._message_id, "type": "message", "role": "assistant"}
        return {**head, "status": status, "content": content}

    def _part(self, text: str, tokens: Sequence[Token]) -> dict:
        told = {"annotations": [], "logprobs": self._told(tokens)}
        return {"type": "output_text", "text": text, **told}

    def _told(self, tokens: Sequence[Token]) -> list[dict]:
        if self.ask.top is None:
            return []
        return wire.told_chat(tokens, self._spell)["content"]

    # ------------------------------------------------------------ events

    def _of_text(self, name: str, /, **more) -> dict:
        """Returns an event of the text of the message that is being written."""
        return self._of_item(name, item_id=self._message_id, content_index=0, **more)

    def _of_item(self, name: str, /, **more) -> dict:
        """Returns an event of the item behind those that are done."""
        return self._event(name, output_index=len(self._items), **more)

    def _event(self, name: str, /, **more) -> dict:
        return {
            "type": f"response.{name}",
            "sequence_number": self._next(),
            **more,
        }

    def _next(self) -> int:
        self._count += 1
        return self._count - 1

    def _body(self, spent: Spent | None = None) -> dict:
        given, usage = self.ask.given, None
        if spent is not None:
            prompt, cached = sum(map(len, self.prompts)), sum(spent.cached)
            usage = wire.usage_of_response(prompt, spent.written, cached)
        cut = {"reason": "max_output_tokens"} if self._status == "incomplete" else None
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": self._status,
            "error": None,
            "incomplete_details": cut,
            "instructions": given["instructions"],
            "max_output_tokens": given["max_output_tokens"],
            "metadata": given["metadata"] or {},
            "model": self._name,
            "output": [*self._items],
            "parallel_tool_calls": given["parallel_tool_calls"],
            "previous_response_id": None,
            "store": False,
            "system_fingerprint": self._fingerprint,
            "temperature": self._settings["temperature"],
            "text": {"format": given["text"].get("format") or {"type": "text"}},
            "tool_choice": given["tool_choice"],
            "tools": [{**UNSAID, **tool} for tool in given["tools"] or []],
            "top_logprobs": given["top_logprobs"] or 0,
            "top_p": self._settings["top_p"],
            "truncation": "disabled",
            "usage": usage,
            "user": given["user"],
        }


UNSAID = {"description": None, "parameters": None, "strict": None}  # of a tool
