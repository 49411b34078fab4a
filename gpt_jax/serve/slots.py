"""The places of a server's rows on the device, and the compiled programs.

    slots.compile()                       # what the first request needs
    slots.ahead()                         # the other shapes that can occur
    end, *_ = slots.prompt(ids, 0)        # a piece of a prompt
    slot, chosen = slots.join(entry, owner)  # its row takes a place: first token
    for slot, owner in slots.taken(): ...
    chosen = slots.step()                 # the next token of every row

A program costs what its shape costs: every row is computed, and XLA reads all that a
cache can hold. So a piece of a prompt runs on the shortest cache that holds what is
done by then, rows live in the smallest of a few sizes, and their caches reach as far as
the longest of them needs; both change when that does. Where a kernel of ours reads
caches (`attention.NATIVE`), it reads what is there: prompts run on one cache then, and
rows have fewer reaches, which only bound memory.
"""

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import SingleDeviceSharding

from gpt_jax import sample
from gpt_jax.attention import natively
from gpt_jax.model import GPT, Cache, init_cache, stretch
from gpt_jax.model.cache import block, put_block
from gpt_jax.serve import batch, prefixes
from gpt_jax.serve.batch import Allowed, Chosen, Entry
from gpt_jax.serve.compiled import Draft, Programs
from gpt_jax.serve.prefixes import Prefixes
from gpt_jax.serve.texts import Request

PIECE = 256  # prompt tokens run at once: what other rows wait for at most
MORE = 4  # so many times as many where there are none: products of more rows are faster
SHORTEST = 16  # the shortest piece; the others are padded to multiples of twice that
PATIENCE = 32  # steps for which a smaller shape must have done before it is taken
REACH = 128  # no cache is made for less


def reaches(context: int) -> list[int]:
    """Returns how many tokens caches may hold, rising; the last all."""
    halves = [context]
    while halves[-1] >= 2 * REACH:
        halves.append(-(-halves[-1] // 2))
    return halves[::-1]


Share = Callable[[Any], Any]
_NONE: Mapping[int, np.ndarray] = {}  # no masks


def lengths(context: int) -> list[int]:
    """Returns the lengths that pieces of prompts are padded to, rising."""
    short = {SHORTEST, *range(2 * SHORTEST, PIECE, 2 * SHORTEST)}
    long = {PIECE * times for times in range(1, MORE + 1)}
    whole = {context} if context <= PIECE * MORE else set()
    return sorted({n for n in short | long if n < context} | whole)


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


def _length(count: int, reach: int) -> int:
    """Returns how long a piece of `count` tokens is on a cache of that reach."""
    return next(n for n in lengths(reach) if n >= count)


class Slots:
    """A batch of rows, each with an owner; grows and shrinks between fixed shapes."""

    def __init__(
        self,
        model: GPT,
        params,
        sizes: Sequence[int],
        share: Share = lambda tree: tree,
        *,
        prefix_bytes: int = 0,
        programs: Programs | None = None,
    ):
        """Lays the weights out; `compile` does the rest.

        Args:
          model: the model.
          params: its weights.
          sizes: how many rows a step may have, rising. With one alone caches always
            reach over the whole context: a row's numbers are then the same to the last
            bit, whoever is there.
          share: gives arrays that equal these and are held already; else these.
          prefix_bytes: for what prompts begin with; see prefixes.py. With one size
            alone nothing is kept: what was asked before would change the last bits.
          programs: those that others of the same shape have compiled are used here too.
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
        # With one size the last bits would tell whether somebody was there.
        self._most = PIECE * (MORE if len(sizes) > 1 else 1)
        every = reaches(self.room)
        self._exact = natively(self.model.cfg)
        self._prompt_reaches = [self.room] if self._exact else every
        self.reaches = every[::-2][::-1] if self._exact else every
        if len(sizes) == 1:
            self.reaches = [self.room]
        # Arrays that are bound to a device, as the weights of a run and all that comes
        # of them, have programs of their own: so these are bound from the start.
        (device,) = jax.tree.leaves(self._params)[0].devices()
        self._bind = partial(jax.device_put, device=device)
        self._owners: list[Any] = [None] * self.sizes[0]
        self._held: list[int] = [0] * self.sizes[0]  # tokens in each row's cache
        self._rows: dict[int, Cache] = {}  # of prompts, by reach; each made when wanted
        self._reach_of_prompt = self._prompt_reaches[0]
        self._free: dict[int, Allowed] = {}  # what rows without masks may choose
        # Steps for which a smaller size, a shorter reach would have done.
        self._spare = self._slack = 0
        fixed = {"model": self.model}
        self._prefixes = Prefixes(prefix_bytes if len(sizes) > 1 else 0)
        self._programs = Programs() if programs is None else programs
        weights = (self._params, self._params_of_one)
        shapes = tuple((x.shape, str(x.dtype)) for x in jax.tree.leaves(weights))
        kind = (self.model.cfg, jax.tree.structure(weights), shapes, device)
        self._kind = self._programs.number_of(kind)
        self._prefill = jax.jit(partial(batch.prefill, **fixed), donate_argnums=1)
        self._score = jax.jit(partial(batch.score, **fixed))
        self._grow = jax.jit(stretch, static_argnames="reach")
        self._admit = jax.jit(batch.admit, donate_argnums=0)
        self._step = jax.jit(partial(batch.step, **fixed), donate_argnums=1)
        self._take = jax.jit(partial(block, size=prefixes.BLOCK))
        self._put = jax.jit(put_block, donate_argnums=0)
        self._resize = jax.jit(batch.resize)
        self._stretch = jax.jit(batch.stretch, static_argnames="reach")

    def compile(self) -> None:
        """Makes the batch, and compiles what a short request needs."""
        first, reach = self.sizes[0], self.reaches[0]
        self._batch = self._bind(batch.empty(self.model.cfg, first, reach))
        self.prompt([0], 0)
        self.join(self._idle(), None, 1)  # nobody: the slot stays free
        self.step()

    def ahead(self) -> None:
        """Compiles every program in every shape that can occur, until `close`.

        May run in a thread beside requests; what they need meanwhile they compile.
        """
        self._programs.ahead(self._drafts())

    def close(self) -> None:
        """Lets `ahead` end after the program that it is at."""
        self._programs.close()

    def programs(self) -> int:
        """Returns how many programs there are."""
        return len(self._programs)

    def _drafts(self) -> Iterator[Draft]:
        """Yields the programs that can be wanted, the likelier ones first."""
        shaped, number = self._shaped, np.int32(0)
        params = shaped(self._params)
        row = shaped(jax.eval_shape(partial(self._empty_row, self._prompt_reaches[0])))
        tokens_1T = np.zeros((1, 1), np.int32)
        found = jax.eval_shape(self._prefill, params, row, tokens_1T, number, number)
        logits_1V, x_TD, entry = shaped(found[0]), found[2], self._idle()
        for reach in self._prompt_reaches:
            row = shaped(jax.eval_shape(partial(self._empty_row, reach)))
            for length in self._lengths_for(reach):
                tokens_1T = np.zeros((1, length), np.int32)
                given = (params, row, tokens_1T, number, number)
                yield self._draft(("prefill", length, reach), self._prefill, *given)
            if self._keeps(reach):
                kept = jax.eval_shape(self._take, row, number, number)
                given = (row, shaped(kept), number)
                yield self._draft(("put", reach), self._put, *given)
            for other in sorted({*self.reaches, *self._prompt_reaches}):
                if other > reach:
                    key, to = ("grow", reach, other), {"reach": other}
                    yield self._draft(key, self._grow, row, **to)
            for own in self.reaches:  # those of rows that have such prompts
                if own == reach or len(self._prompt_reaches) == 1:
                    yield from self._drafts_of(own, row, logits_1V, entry)
        whole = {n for r in self._prompt_reaches for n in self._lengths_for(r)}
        for length in sorted(whole):
            like = jax.ShapeDtypeStruct((length, x_TD.shape[1]), x_TD.dtype)
            given = (params, self._placed(like), np.zeros(length, np.int32))
            yield self._draft(("score", length), self._score, *given)

    def _drafts_of(self, reach: int, row, logits_1V, entry) -> Iterator[Draft]:
        """Yields the programs of rows of one reach; prompts that join are as `row`."""
        cfg, shaped, number = self.model.cfg, self._shaped, np.int32(0)
        for size, smaller in zip(self.sizes, (0, *self.sizes), strict=False):
            rows = shaped(jax.eval_shape(partial(batch.empty, cfg, size, reach)))
            given = (rows, row, logits_1V, entry, number, self._allowed(1))
            yield self._draft(("admit", size, reach), self._admit, *given)
            if self._keeps(reach):
                given = (rows.cache, number, number)
                yield self._draft(("take", size, reach), self._take, *given)
            own = self._params if size > 1 else self._params_of_one
            given = (shaped(own), rows, np.zeros(size, bool), self._allowed(size))
            yield self._draft(("step", size, reach), self._step, *given)
            if smaller:
                fewer = partial(batch.empty, cfg, smaller, reach)
                fewer = shaped(jax.eval_shape(fewer))
                up, down = np.zeros(size, np.int32), np.zeros(smaller, np.int32)
                key = ("resize", smaller, size, reach)
                yield self._draft(key, self._resize, fewer, up)
                key = ("resize", size, smaller, reach)
                yield self._draft(key, self._resize, rows, down)
            for other in self._beside(reach):
                key, to = ("stretch", size, reach, other), {"reach": other}
                yield self._draft(key, self._stretch, rows, **to)

    def _keeps(self, reach: int) -> bool:
        """Whether a cache of that reach has something to keep of prompts."""
        return bool(self._prefixes.most) and reach >= prefixes.BLOCK

    def _draft(self, key: tuple, jitted: Any, *args: Any, **static: Any) -> Draft:
        return Draft((self._kind, *key), lambda: jitted.lower(*args, **static))

    def _run(self, key: tuple, jitted: Any, *args: Any, **static: Any) -> Any:
        return self._programs.call((self._kind, *key), jitted, *args, **static)

    def _shaped(self, tree):
        """Returns the shapes of arrays, where they will lie."""
        return jax.tree.map(self._placed, tree)

    def _placed(self, x) -> jax.ShapeDtypeStruct:
        where = SingleDeviceSharding(self._bind.keywords["device"])
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=where)

    def _lengths_for(self, reach: int) -> list[int]:
        """Returns the lengths of pieces that prompts of this reach have."""
        if reach > PIECE or self._prefixes.most:
            return [n for n in lengths(reach) if n <= self._most]
        shorter = max((r for r in self._prompt_reaches if r < reach), default=0)
        return [n for n in lengths(reach) if n >= _length(shorter + 1, reach)]

    def _beside(self, reach: int) -> list[int]:
        """Returns the reaches next to one."""
        here = self.reaches.index(reach)
        return [*self.reaches[max(0, here - 1) : here], *self.reaches[here + 1 :][:1]]

    def _allowed(self, rows: int, masks: Mapping[int, np.ndarray] = _NONE) -> Allowed:
        """Returns what rows may choose; where nobody has a mask it lies there already.

        Not bound to the device: so programs are the same for either.
        """
        if masks or rows not in self._free:
            found = batch.allowed(rows, self.model.cfg.vocab_size, masks)
            if masks:
                return found
            self._free[rows] = jax.tree.map(jnp.asarray, found)
        return self._free[rows]

    def _empty_row(self, reach: int) -> Cache:
        cfg = self.model.cfg
        return init_cache(cfg, 1, reach, jnp.dtype(cfg.dtype))

    def _idle(self) -> Entry:
        """Returns what nobody brings along."""
        nobody = ([0], batch.GREEDY, 0, 0, (), 0)
        return entry(Request(*nobody, score=True, deadline=math.inf), self.room)

    def prompt(
        self,
        ids: Sequence[int],
        start: int,
        *,
        score: bool = False,
        states: bool = False,
    ) -> tuple[int, Chosen | None, Any]:
        """Runs the next piece of a prompt, whose last one leaves it ready to `join`.

        A piece is longer where no row waits for its next token.

        Returns:
          where the next piece starts; how likely each token after those of the piece
          was, if asked for (an entry more than there are when the prompt ends); the
          last hidden states [tokens, D] in float32, if asked for.
        """
        count = len(ids) - start
        if count > PIECE:
            most = min(count, PIECE if self.taken() else self._most)
            count = max(n for n in lengths(self.room) if n <= most)
        reach = self._row_for(start + count, begun=start > 0)
        length = _length(count, reach)
        tokens_T = np.zeros(length, np.int32)
        tokens_T[:count] = ids[start : start + count]
        self._logits, self._rows[reach], x_TD = self._run(
            ("prefill", length, reach),
            self._prefill,
            *(self._params, self._rows[reach], tokens_T[None]),
            *(np.int32(start), np.int32(count)),
        )
        end = start + count
        held_TD = np.asarray(x_TD)[:count].astype(np.float32) if states else None
        if not score:
            return end, None, held_TD
        next_T = np.zeros(length, np.int32)
        after = ids[start + 1 : end + 1]
        next_T[: len(after)] = after
        told = jax.device_get(
            self._run(("score", length), self._score, self._params, x_TD, next_T)
        )
        return end, jax.tree.map(lambda x: x[:count], told), held_TD

    def recall(self, ids: Sequence[int]) -> int:
        """Makes a prompt's row begin with what is kept of its beginning.

        Returns:
          how many tokens that is, after which `prompt` goes on; less than all.
        """
        if not self._prefixes.most:
            return 0
        chain = prefixes.names(ids[:-1])
        found = self._prefixes.known(chain)
        held = end = len(found) * prefixes.BLOCK
        rest = self._rest(chain[len(found) - 1] if found else b"", ids[held:-1])
        if rest and end + prefixes.BLOCK <= self.room:
            found += self._prefixes.known([rest[0]])
            held, end = held + rest[1], end + prefixes.BLOCK
        reach = self._row_for(max(end, min(len(ids), held + PIECE)), begun=False)
        for i, kept in enumerate(found):
            self._rows[reach] = self._run(
                ("put", reach),
                *(self._put, self._rows[reach], kept, np.int32(i * prefixes.BLOCK)),
            )
        return held

    def _rest(self, before: bytes, ids: Sequence[int]) -> tuple[bytes, int] | None:
        """Returns the block behind another that holds the most of these ids."""
        for count in range(min(len(ids), prefixes.BLOCK - 1), 0, -1):
            if (name := prefixes.name(before, ids[:count])) in self._prefixes:
                return name, count
        return None

    def remember(self, ids: Sequence[int], slot: int, *, rest: bool = False) -> None:
        """Keeps what a slot holds of these ids, with which its row begins.

        With `rest` also what they leave behind their whole blocks: of a conversation
        that may go on.
        """
        if not self._prefixes.most:
            return
        ids = ids[: self._held[slot]]
        whole = -(-len(ids) // prefixes.BLOCK) * prefixes.BLOCK <= self._batch.reach
        chain = prefixes.names(ids, rest=rest and whole)
        fresh = {}
        for i, name in enumerate(chain):
            if name not in self._prefixes:
                where = (np.int32(slot), np.int32(i * prefixes.BLOCK))
                fresh[name] = self._run(
                    ("take", len(self._owners), self._batch.reach),
                    *(self._take, self._batch.cache, *where),
                )
        self._prefixes.put(chain, fresh)

    def _row_for(self, tokens: int, *, begun: bool) -> int:
        """Returns the reach of the shortest cache for so many tokens of a prompt.

        It is `_rows[reach]` then; of a prompt that has begun it holds what has run.
        """
        before = self._reach_of_prompt
        reach = next(r for r in self._prompt_reaches if r >= tokens)
        if begun and reach > before:
            self._rows.pop(reach, None)
            self._rows[reach] = self._grown(self._rows[before], reach)
        elif reach not in self._rows:
            self._rows[reach] = self._bind(self._empty_row(reach))
        self._reach_of_prompt = reach
        return reach

    def _grown(self, row: Cache, reach: int) -> Cache:
        key = ("grow", row.reach, reach)
        return self._run(key, self._grow, row, reach=reach)

    def join(
        self, entry: Entry, owner, length: int, mask: np.ndarray | None = None
    ) -> tuple[int, Chosen]:
        """Gives the prompt of `length` tokens that has just run a free slot.

        Args:
          entry: what it brings.
          owner: whose the slot is then.
          length: of the prompt.
          mask: of the tokens that may come first, as `batch.allowed` takes it.

        Returns:
          the slot; the first token, Chosen of one row.
        """
        if None not in self._owners:
            self._move(self.sizes[self.sizes.index(len(self._owners)) + 1])
        slot = self._owners.index(None)
        self._owners[slot], self._held[slot] = owner, length
        if length > self._batch.reach:
            self._reach(length)
        row, reach = self._rows[self._reach_of_prompt], self._batch.reach
        if row.reach < reach:
            row = self._grown(row, reach)
        self._batch, chosen = self._run(
            ("admit", len(self._owners), reach),
            self._admit,
            *(self._batch, row, self._logits, entry, np.int32(slot)),
            self._allowed(1, _NONE if mask is None else {0: mask}),
        )
        return slot, _read(chosen, told=bool(entry.wants_1[0]))

    def leave(self, slot: int) -> None:
        """Frees a slot."""
        self._owners[slot] = None

    def taken(self) -> list[tuple[int, Any]]:
        """Returns the taken slots and their owners."""
        return [(i, o) for i, o in enumerate(self._owners) if o is not None]

    def step(
        self, *, told: bool = True, masks: Mapping[int, np.ndarray] = _NONE
    ) -> Chosen:
        """Gives every taken slot a token.

        Args:
          told: whether probabilities matter.
          masks: of the tokens that may come next in some slots; see `batch.allowed`.
        """
        self._fit_reach(self._longest() + 1)
        for slot, _ in self.taken():
            self._held[slot] += 1
        running_B = np.array([owner is not None for owner in self._owners])
        params = self._params if len(running_B) > 1 else self._params_of_one
        self._batch, chosen = self._run(
            ("step", len(running_B), self._batch.reach),
            self._step,
            *(params, self._batch, running_B),
            self._allowed(len(running_B), masks),
        )
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
        if not rows and not self._exact:
            self._reach(self.reaches[0])

    def _move(self, size: int) -> None:
        """Moves the rows, one size at a time: so few programs do.

        A reach that costs nothing but memory is given back before there are more rows.
        """
        if self._exact and size > len(self._owners):
            self._reach(self._longest())
        while len(self._owners) != size:
            here = self.sizes.index(len(self._owners))
            here += 1 if size > len(self._owners) else -1
            taken = self.taken()
            old_B = np.zeros(self.sizes[here], np.int32)
            old_B[: len(taken)] = [slot for slot, _ in taken]
            free = len(old_B) - len(taken)
            self._held = [self._held[slot] for slot, _ in taken] + [0] * free
            before = len(self._owners)
            self._owners = [owner for _, owner in taken] + [None] * free
            self._batch = self._run(
                ("resize", before, len(old_B), self._batch.reach),
                *(self._resize, self._batch, old_B),
            )
        self._spare = 0

    def _longest(self) -> int:
        """Returns how many tokens the longest row holds."""
        return max((self._held[slot] for slot, _ in self.taken()), default=0)

    def _fit_reach(self, tokens: int) -> None:
        """Lets caches hold so many tokens; see `fit`."""
        shorter = self._batch.reach > next(r for r in self.reaches if r >= tokens)
        shorter &= not self._exact or len(self._owners) > self.sizes[0]
        self._slack = self._slack + 1 if shorter else 0
        if tokens > self._batch.reach or self._slack > PATIENCE:
            self._reach(tokens)

    def _reach(self, tokens: int) -> None:
        """Changes how far caches reach, one length at a time: so few programs do."""
        wanted = next(r for r in self.reaches if r >= tokens)
        while (now := self._batch.reach) != wanted:
            step = 1 if wanted > now else -1
            reach = self.reaches[self.reaches.index(now) + step]
            self._batch = self._run(
                ("stretch", len(self._owners), now, reach),
                *(self._stretch, self._batch),
                reach=reach,
            )
        self._slack = 0


def _read(chosen: Chosen, *, told: bool) -> Chosen:
    """Fetches what was chosen from the device; without `told` only the tokens."""
    if told:
        return jax.device_get(chosen)
    return chosen._replace(token_B=jax.device_get(chosen.token_B))
