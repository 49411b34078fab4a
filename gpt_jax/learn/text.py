"""Holes on text: counts, byte-pair encoding, windows; and the first steps in JAX.

Shapes: N tokens  V vocabulary  T window
"""

import itertools
import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gpt_jax import tokenizers
from gpt_jax.learn.hole import hole, normal

# ---------------------------------------------------------------- JAX in an hour


@hole(0, lambda: [(normal(0, 5, 3), normal(1, 4, 3))], grads=(0, 1))
def pairwise(x_ND, y_MD):
    """Returns the squared distance of every row of x to every row of y, [N, M].

    No loop: either broadcast, or two times `jax.vmap`.

    Args:
      x_ND: N points of D numbers.
      y_MD: M points.
    """

    def apart(x_D, y_D):
        return jnp.square(x_D - y_D).sum()

    return jax.vmap(jax.vmap(apart, (None, 0)), (0, None))(x_ND, y_MD)


@pairwise.mistake("rows are x's and columns y's: yours is turned, [M, N]")
def _(x_ND, y_MD):
    return jnp.square(x_ND[None] - y_MD[:, None]).sum(-1)


@pairwise.mistake("squared distances are wanted: you took the square root")
def _(x_ND, y_MD):
    return jnp.sqrt(jnp.square(x_ND[:, None] - y_MD[None]).sum(-1))


def _trees():
    one = {"a": normal(0, 3), "b": {"c": normal(1, 2, 2)}}
    return [(one,), ({"x": normal(2, 7)},)]


@hole(0, _trees, grads=(0,))
def tree_norm(tree):
    """Returns the length of all numbers of a pytree together, as if one vector.

    `jax.tree.leaves` or `jax.tree.map` walk a tree of any form.

    Args:
      tree: any pytree of float arrays.
    """
    return optax.tree.norm(tree)


@tree_norm.mistake(
    "the norm of the whole is not the sum of the norms of its parts: add up squares"
)
def _(tree):
    return sum(jnp.linalg.norm(x.ravel()) for x in jax.tree.leaves(tree))


@tree_norm.mistake("the square root is missing")
def _(tree):
    return sum(jnp.square(x).sum() for x in jax.tree.leaves(tree))


@hole(0, lambda: [(normal(0, 6, 8), 0.25, jax.random.key(3))], grads=(0,))
def dropout(x, rate, key):
    """Returns x with a share `rate` of its numbers zero, the rest scaled up.

    A number stays where `jax.random.uniform(key, x.shape)` is below 1 - rate; what
    stays is divided by 1 - rate, so that the mean is kept.

    Args:
      x: any array.
      rate: how much is dropped, below 1.
      key: a PRNG key: the same key drops the same.
    """
    kept = jax.random.uniform(key, x.shape) < 1 - rate
    return jnp.where(kept, x / (1 - rate), 0)


@dropout.mistake("what stays is not scaled by 1 / (1 - rate): the mean shrinks")
def _(x, rate, key):
    return jnp.where(jax.random.uniform(key, x.shape) < 1 - rate, x, 0)


@dropout.mistake("rate is what is dropped, not what is kept")
def _(x, rate, key):
    return jnp.where(jax.random.uniform(key, x.shape) < rate, x / rate, 0)


# ---------------------------------------------------------------- counts


def _names():
    rng = np.random.default_rng(0)
    return [(jnp.asarray(rng.integers(0, 5, 40), jnp.int32), 6)]


@hole(0, _names)
def bigram(tokens_N, vocab_size):
    """Returns the chance of each next token after each token, [V, V], by counting.

    One is added to every count, so that nothing is impossible.

    Args:
      tokens_N: int ids.
      vocab_size: V.
    """
    count_VV = jnp.ones((vocab_size, vocab_size))
    count_VV = count_VV.at[tokens_N[:-1], tokens_N[1:]].add(1)
    return count_VV / count_VV.sum(1, keepdims=True)


@bigram.mistake("each row must add up to 1: you divided by the sums of the columns")
def _(tokens_N, vocab_size):
    count_VV = jnp.ones((vocab_size,) * 2).at[tokens_N[:-1], tokens_N[1:]].add(1)
    return count_VV / count_VV.sum(0, keepdims=True)


@bigram.mistake("nothing was added to the counts: what was not seen has chance 0")
def _(tokens_N, vocab_size):
    count_VV = jnp.zeros((vocab_size,) * 2).at[tokens_N[:-1], tokens_N[1:]].add(1)
    return count_VV / count_VV.sum(1, keepdims=True)


@bigram.mistake("a pair that comes often counted once: add with .at[...].add(1)")
def _(tokens_N, vocab_size):
    count_VV = jnp.ones((vocab_size,) * 2).at[tokens_N[:-1], tokens_N[1:]].set(2)
    return count_VV / count_VV.sum(1, keepdims=True)


# ---------------------------------------------------------------- byte pairs

TEXTS = [list(b"aaabdaaabac"), list(b"abababcaba"), [7], [1, 1, 1, 1, 2]]


@hole(2, lambda: [(TEXTS[0],), (TEXTS[1],), ([0, 1, 2, 1, 2],)], traced=False)
def bpe_pair(ids):
    """Returns the pair of neighbours (a, b) that occurs most often.

    Of pairs that occur equally often, the one that comes first.

    Args:
      ids: a list of at least two ids.
    """
    counts = Counter(itertools.pairwise(ids))
    return max(counts, key=lambda pair: counts[pair])


@bpe_pair.mistake("pairs overlap: every place but the last begins one, not every other")
def _(ids):
    counts = Counter(zip(ids[::2], ids[1::2], strict=False))
    return max(counts, key=lambda pair: counts[pair])


def _merges():
    return [(ids, pair, 256) for ids in TEXTS for pair in [(97, 97), (97, 98), (1, 1)]]


@hole(2, _merges, traced=False)
def bpe_merge(ids, pair, new):
    """Returns the list with every occurrence of a pair replaced by one new id.

    From left to right; what is replaced is used up: three a's are (aa) a.

    Args:
      ids: a list of ids.
      pair: two ids.
      new: the id that takes their place.
    """
    made, at = [], 0
    while at < len(ids):
        if tuple(ids[at : at + 2]) == tuple(pair):
            made.append(new)
            at += 2
        else:
            made.append(ids[at])
            at += 1
    return made


@bpe_merge.mistake("the last token is lost when it is not the end of a pair")
def _(ids, pair, new):
    made, at = [], 0
    while at < len(ids) - 1:
        same = tuple(ids[at : at + 2]) == tuple(pair)
        made.append(new if same else ids[at])
        at += 1 + same
    return made


@bpe_merge.mistake("only the first occurrence was merged")
def _(ids, pair, new):
    for at in range(len(ids) - 1):
        if tuple(ids[at : at + 2]) == tuple(pair):
            return [*ids[:at], new, *ids[at + 2 :]]
    return list(ids)


@bpe_merge.mistake("the second half of a pair was kept: skip two tokens, not one")
def _(ids, pair, new):
    pairs = list(zip(ids, [*ids[1:], None], strict=True))
    return [new if two == tuple(pair) else two[0] for two in pairs]


def _encodings():
    text = "the cat sat on the mat, the rat sat"
    found = tokenizers.train("bpe:270", [text * 3]).backend
    merges = _merges_of(found)
    return [(list(word.encode()), merges) for word in ("thethe", "at the", "xyz")]


def _merges_of(backend) -> list[tuple[tuple[int, int], int]]:
    """Returns (pair, new id) of a trained BPE, over bytes and 256, 257, ..."""
    model = json.loads(backend.to_str())["model"]
    byte_of = tokenizers.byte_values()
    ids = dict(byte_of)
    made = []
    for number, (a, b) in enumerate(model["merges"]):
        made.append(((ids[a], ids[b]), 256 + number))
        ids[a + b] = 256 + number
    return made


@hole(2, _encodings, traced=False)
def bpe_encode(ids, merges):
    """Returns bytes as tokens: merges are done in the order in which they were learnt.

    Args:
      ids: a list of bytes.
      merges: a list of (pair, new id), the first learnt first.
    """
    for pair, new in merges:
        ids = bpe_merge.real(ids, pair, new)
    return ids


@bpe_encode.mistake("merges are done in the order learnt, not the last one first")
def _(ids, merges):
    for pair, new in reversed(merges):
        ids = bpe_merge.real(ids, pair, new)
    return ids


@bpe_encode.mistake("every merge is to be tried, not the first that fits only")
def _(ids, merges):
    for pair, new in merges:
        made = bpe_merge.real(ids, pair, new)
        if made != ids:
            return made
    return ids


# ---------------------------------------------------------------- windows


@hole(
    2,
    lambda: [(np.arange(10, 30), 6, 4), (np.arange(9), 3, 3), (np.arange(8), 4, 1)],
    traced=False,
)
def windows(tokens_N, seq_len, stride):
    """Returns inputs and targets [W, T] of all whole windows.

    Window w begins at token w * stride; targets are the inputs one token further on.
    Only windows whose last target exists count.

    Args:
      tokens_N: a NumPy array of ids.
      seq_len: T.
      stride: how far apart windows begin.
    """
    count = (len(tokens_N) - seq_len - 1) // stride + 1
    return _windows(tokens_N, seq_len, [w * stride for w in range(count)])


def _windows(tokens_N, seq_len, starts, shift=1):
    inputs = np.stack([tokens_N[s : s + seq_len] for s in starts])
    return inputs, np.stack([tokens_N[s + shift :][:seq_len] for s in starts])


@windows.mistake("targets must be the inputs one token further on: yours are the same")
def _(tokens_N, seq_len, stride):
    count = (len(tokens_N) - seq_len - 1) // stride + 1
    return _windows(tokens_N, seq_len, [w * stride for w in range(count)], shift=0)


@windows.mistake("a last window is missing: one more fits exactly")
def _(tokens_N, seq_len, stride):
    starts = range(0, len(tokens_N) - seq_len - 1, stride)
    return _windows(tokens_N, seq_len, starts)


@windows.mistake("windows begin a stride apart, not a window")
def _(tokens_N, seq_len, stride):
    starts = range(0, len(tokens_N) - seq_len, seq_len)
    return _windows(tokens_N, seq_len, starts)
