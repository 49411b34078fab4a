"""The places of a server's rows on the device, and the compiled programs.

    slots.compile()                       # every shape that can occur, once
    end, told = slots.prompt(ids, 0)      # a piece of a prompt
    slot, chosen = slots.join(entry, owner)  # its row takes a place: first token
    for slot, owner in slots.taken(): ...
    chosen = slots.step()                 # the next token of every row

A decode step costs what its shape costs: every row is computed, and all that a cache
holds is read. So rows live in the smallest of a few sizes, and their caches reach as
far as the longest of them needs; both change when that does.
"""

import math
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import sample
from gpt_jax.model import GPT, init_cache
from gpt_jax.serve import batch
from gpt_jax.serve.batch import Chosen, Entry
from gpt_jax.serve.texts import Request

PIECE = 256  # prompt tokens run at once: what other rows wait for at most
SHORTEST = 16  # pieces are padded to powers of two from here on
PATIENCE = 32  # steps for which a smaller shape must have done before it is taken
REACH, REACHES = 128, 4  # the shortest reach of caches, and how many there are at most


def reaches(context: int) -> list[int]:
    """Returns how many tokens the caches of a batch may hold, rising; the last all."""
    halves = [context]
    while len(halves) < REACHES and halves[-1] >= 2 * REACH:
        halves.append(-(-halves[-1] // 2))
    return halves[::-1]


Share = Callable[[Any], Any]


def lengths(context: int) -> list[int]:
    """Returns the lengths that pieces of prompts are padded to, rising."""
    most = min(PIECE, context)
    powers = [1 << n for n in range(SHORTEST.bit_length() - 1, PIECE.bit_length())]
    return [*(length for length in powers if length < most), most]


def entry(request: Request, room: int) -> Entry:
    """Returns what a request's row brings along; the key is that of `sample.texts`."""
    ids = request.ids
    tokens_S = np.zeros(room, np.int32)
    tokens_S[: len(ids)] = ids
    key_1 = sample.row_keys(
        np.uint32(request.seed % 2**32),
        np.array([zlib.crc32(np.asarray(ids, "<i4").tobytes())], np.uint32),
        np.array([request.number], np.uint32),
    )
    ends = [token for token in request.stop if not isinstance(token, str)]
    ruling = batch.rules(
        1, begin=len(ids), bias=request.bias, ends=ends, least=request.least
    )
    wants_1 = np.array([request.top is not None])
    return Entry(tokens_S, sample.rows_of([request.settings]), ruling, key_1, wants_1)


class Slots:
    """A batch of rows, each with an owner; grows and shrinks between fixed shapes."""

    def __init__(
        self, model: GPT, params, sizes: Sequence[int], share: Share = lambda tree: tree
    ):
        """Lays the weights out; `compile` does the rest.

        Args:
          model: the model.
          params: its weights.
          sizes: how many rows a step may have, rising. With one alone caches always
            reach over the whole context: a row's numbers are then the same to the last
            bit, whoever is there.
          share: gives arrays that equal these and are held already; else these.
        """
        if not sizes or min(sizes) < 1 or list(sizes) != sorted(set(sizes)):
            raise ValueError(
                f"batch sizes {list(sizes)} must be whole numbers above 0 that rise"
            )
        self.model, many = sample.laid_out(model, params, rows=sizes[-1])
        # One row reads its weights in an order of its own where that is faster.
        _, one = sample.laid_out(self.model, many, rows=sizes[0])
        self._params = share(many)
        self._params_of_one = self._params if one is many else share(one)
        self.room, self.sizes = model.cfg.context_length, tuple(sizes)
        self._lengths = lengths(self.room)
        self.reaches = reaches(self.room) if len(sizes) > 1 else [self.room]
        self._owners: list[Any] = [None] * self.sizes[0]
        self._held: list[int] = [0] * self.sizes[0]  # tokens in each row's cache
        # Steps for which a smaller size, a shorter reach would have done.
        self._spare = self._slack = 0
        fixed = {"model": self.model}
        self._prefill = jax.jit(partial(batch.prefill, **fixed), donate_argnums=1)
        self._score = jax.jit(partial(batch.score, **fixed))
        self._admit = jax.jit(batch.admit, donate_argnums=0)
        self._step = jax.jit(partial(batch.step, **fixed), donate_argnums=1)
        self._resize = jax.jit(batch.resize)
        self._stretch = jax.jit(batch.stretch, static_argnames="reach")

    def compile(self) -> None:
        """Runs every program once in every shape; nothing is compiled later."""
        cfg = self.model.cfg
        # Arrays that are bound to a device, as the weights of a run and all that comes
        # of them, have programs of their own: so these are bound from the start.
        (device,) = jax.tree.leaves(self._params)[0].devices()
        bind = partial(jax.device_put, device=device)
        self._row = bind(init_cache(cfg, 1, self.room, jnp.dtype(cfg.dtype)))
        for length in self._lengths:
            self.prompt([0] * length, 0, score=True)
        nobody = Request(
            *([0], batch.GREEDY, 0, 0, (), 0),
            score=True,
            deadline=math.inf,
        )
        idle = entry(nobody, self.room)
        for smaller, size in zip((None, *self.sizes), self.sizes, strict=False):
            for reach in self.reaches:
                self._batch = bind(batch.empty(cfg, size, reach))
                self._owners, self._held = [None] * size, [0] * size
                self.join(idle, None, 1)  # nobody: the slot stays free
                self.step()
                if smaller:
                    self._move(smaller)
                    self._move(size)
            for reach in (*self.reaches[::-1], *self.reaches):
                self._reach(reach)
        first = self.sizes[0]
        self._batch = bind(batch.empty(cfg, first, self.reaches[0]))
        self._owners, self._held = [None] * first, [0] * first

    def programs(self) -> int:
        """Returns how many programs there are."""
        jitted: list[Any] = [self._prefill, self._score, self._admit]
        jitted += [self._step, self._resize, self._stretch]
        return sum(one._cache_size() for one in jitted)

    def prompt(
        self,
        ids: Sequence[int],
        start: int,
        *,
        score: bool = False,
        states: bool = False,
    ) -> tuple[int, Chosen | None, Any]:
        """Runs the next piece of a prompt, whose last one leaves it ready to `join`.

        Returns:
          where the next piece starts; how likely each token after those of the piece
          was, if asked for (an entry more than there are when the prompt ends); the
          last hidden states [tokens, D] in float32, if asked for.
        """
        count = min(PIECE, len(ids) - start)
        length = next(n for n in self._lengths if n >= count)
        tokens_T = np.zeros(length, np.int32)
        tokens_T[:count] = ids[start : start + count]
        self._logits, self._row, x_TD = self._prefill(
            self._params, self._row, tokens_T[None], np.int32(start), np.int32(count)
        )
        end = start + count
        held_TD = np.asarray(x_TD)[:count].astype(np.float32) if states else None
        if not score:
            return end, None, held_TD
        next_T = np.zeros(length, np.int32)
        after = ids[start + 1 : end + 1]
        next_T[: len(after)] = after
        told = jax.device_get(self._score(self._params, x_TD, next_T))
        return end, jax.tree.map(lambda x: x[:count], told), held_TD

    def join(self, entry: Entry, owner, length: int) -> tuple[int, Chosen]:
        """Gives the prompt of `length` tokens that has just run a free slot.

        Returns:
          the slot; the first token, Chosen of one row.
        """
        if None not in self._owners:
            self._move(self.sizes[self.sizes.index(len(self._owners)) + 1])
        slot = self._owners.index(None)
        self._owners[slot], self._held[slot] = owner, length
        if length > self._batch.reach:
            self._reach(length)
        self._batch, chosen = self._admit(
            self._batch, self._row, self._logits, entry, np.int32(slot)
        )
        return slot, _read(chosen, told=bool(entry.wants_1[0]))

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        self._owners[slot] = None

    def taken(self) -> list[tuple[int, Any]]:
        """Returns the taken slots and their owners."""
        return [(i, o) for i, o in enumerate(self._owners) if o is not None]

    def step(self, *, told: bool = True) -> Chosen:
        """Gives every taken slot a token; `told` says whether probabilities matter."""
        taken = [slot for slot, _ in self.taken()]
        self._fit_reach(max((self._held[slot] for slot in taken), default=0) + 1)
        for slot in taken:
            self._held[slot] += 1
        running_B = np.array([owner is not None for owner in self._owners])
        params = self._params if len(running_B) > 1 else self._params_of_one
        self._batch, chosen = self._step(params, self._batch, running_B)
        return _read(chosen, told=told)

    def fit(self, rows: int) -> None:
        """Takes the smallest size that holds so many rows.

        A larger one at once; a smaller one after some steps, since moving rows costs
        more than a step, or when there are none to move.
        """
        size = next((s for s in self.sizes if s >= rows), self.sizes[-1])
        self._spare = self._spare + 1 if size < len(self._owners) else 0
        if size > len(self._owners) or self._spare > PATIENCE or not rows:
            self._move(size)
        if not rows:
            self._reach(self.reaches[0])

    def _move(self, size: int) -> None:
        """Moves the rows, one size at a time: so few programs do."""
        while len(self._owners) != size:
            here = self.sizes.index(len(self._owners))
            here += 1 if size > len(self._owners) else -1
            taken = self.taken()
            old_B = np.zeros(self.sizes[here], np.int32)
            old_B[: len(taken)] = [slot for slot, _ in taken]
            free = len(old_B) - len(taken)
            self._held = [self._held[slot] for slot, _ in taken] + [0] * free
            self._owners = [owner for _, owner in taken] + [None] * free
            self._batch = self._resize(self._batch, old_B)
        self._spare = 0

    def _fit_reach(self, tokens: int) -> None:
        """Lets caches hold so many tokens; see `fit`."""
        shorter = self._batch.reach > next(r for r in self.reaches if r >= tokens)
        self._slack = self._slack + 1 if shorter else 0
        if tokens > self._batch.reach or self._slack > PATIENCE:
            self._reach(tokens)

    def _reach(self, tokens: int) -> None:
        """Changes how far caches reach, one length at a time: so few programs do."""
        wanted = next(r for r in self.reaches if r >= tokens)
        while (now := self._batch.reach) != wanted:
            step = 1 if wanted > now else -1
            reach = self.reaches[self.reaches.index(now) + step]
            self._batch = self._stretch(self._batch, reach=reach)
        self._slack = 0


def _read(chosen: Chosen, *, told: bool) -> Chosen:
    """Fetches what was chosen from the device; without `told` only the tokens."""
    if told:
        return jax.device_get(chosen)
    return chosen._replace(token_B=jax.device_get(chosen.token_B))
