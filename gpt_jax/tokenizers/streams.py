"""Text from ids that come one by one, without half a character."""

import codecs
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpt_jax.tokenizers.tokenizer import Tokenizer

HELD = 8  # tokens: whoever waits for the rest of a character gives up after so many


class PieceStream:
    """Decodes ids one by one where each id stands for fixed bytes."""

    def __init__(self, tokenizer: "Tokenizer"):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.started = tokenizer.kind != "word"

    def push(self, id: int) -> str:
        """Returns the text that this id completes, often all of it."""
        (id,) = self.tokenizer._checked([id])
        pieces = self.tokenizer._pieces
        assert pieces is not None
        text = self.decoder.decode(pieces[id])
        if not self.started:
            text, self.started = text.removeprefix(" "), True
        return text

    def flush(self) -> str:
        """Returns what is left of an unfinished character, as U+FFFD."""
        return self.decoder.decode(b"", final=True)


class WindowStream:
    """Decodes ids one by one where a token's text depends on its neighbours."""

    def __init__(self, tokenizer: "Tokenizer"):
        self.tokenizer = tokenizer
        self.context: list[int] = []  # printed already; what follows is read after it
        self.fresh: list[int] = []

    def push(self, id: int) -> str:
        """Returns the text that this id completes."""
        self.fresh += self.tokenizer._checked([id])
        return self._emit(final=False)

    def flush(self) -> str:
        """Returns the text that was held back."""
        return self._emit(final=True)

    def _emit(self, *, final: bool) -> str:
        before = self.tokenizer.decode(self.context)
        after = self.tokenizer.decode(self.context + self.fresh)
        more = after.endswith("\ufffd") and len(self.fresh) < HELD and not final
        if not self.fresh or more:
            return ""
        self.context, self.fresh = self.fresh, []
        return after[len(before) :]
