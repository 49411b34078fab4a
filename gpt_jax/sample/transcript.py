"""The text of a row as its tokens arrive, up to where a stop string begins."""

from collections.abc import Sequence

TAIL = 8  # tokens of a prompt that may decide how the next one is spelled


class Transcript:
    """One row's text as its tokens arrive; knows its stop strings and stop tokens.

    Text that may be the beginning of a stop string is held back until it is not.
    """

    def __init__(
        self,
        tokenizer,
        prompt: Sequence[int],
        stop: Sequence[str | int],
        least: int = 0,
    ):
        """Begins behind a prompt; in the first `least` tokens no stop string counts."""
        self.ids: list[int] = []
        self._least = least
        self.text = ""
        self.stopped_by: str | int | None = None
        self._strings = [s for s in stop if isinstance(s, str)]
        self._tokens = {s for s in stop if not isinstance(s, str)}
        self._stream = tokenizer.decode_stream()
        self._held = ""
        for token in prompt[-TAIL:]:  # so that the first word is spaced as after it
            self._decode(token)

    def push(self, token: int) -> str:
        """Takes a token; returns the text that is now certain."""
        if token in self._tokens:
            self.stopped_by = token
            return ""
        self.ids.append(token)
        return self._release(self._decode(token), last=False)

    def flush(self) -> str:
        """Returns the text still held back; nothing may be pushed afterwards."""
        if isinstance(self.stopped_by, str):
            return ""
        return self._release(self._stream.flush(), last=True)

    def _decode(self, token: int) -> str:
        try:
            return self._stream.push(token)
        except ValueError:  # published models have more ids than their tokenizers
            return ""

    def _release(self, fresh: str, *, last: bool) -> str:
        """Returns what of the held text and the fresh may be shown."""
        text = self._held + fresh
        if len(self.ids) < self._least:
            self.text += text
            return text
        found = [(text.index(s), s) for s in self._strings if s in text]
        if found:
            end, self.stopped_by = min(found)
        else:
            end = len(text) - (0 if last else self._unsure(text))
        self._held = text[end:]
        self.text += text[:end]
        return text[:end]

    def _unsure(self, text: str) -> int:
        """Returns how many last characters may begin a stop string."""
        longest = max(map(len, self._strings), default=1)
        for size in range(min(longest - 1, len(text)), 0, -1):
            if any(s.startswith(text[-size:]) for s in self._strings):
                return size
        return 0
