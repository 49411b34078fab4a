"""Inside a run: what its layers do with a text, at every checkpoint that it keeps.

    found = microscope.look("runs/a", ["def __init__(self"])
    microscope.write("runs/a/look.html", found)

taps.py watches a forward pass, attribution.py takes a logit apart, page.py makes one
HTML file of it. Everything is computed in float32, also for a model of bfloat16, whose
parts would add up to three digits only.

Shapes: T time  S key time  L layers  H heads  C tokens whose logits are taken apart
N tokens that are told of each place  V vocabulary  R rows, each with a patch of its own
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import files, programs, runs, sample, screen
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.microscope import page, taps
from gpt_jax.microscope.attribution import Attribution, attribute
from gpt_jax.microscope.taps import Patch, Row, Seen
from gpt_jax.model import GPT, count

__all__ = ["Frame", "Lens", "Look", "Swap", "look", "write"]

TOLD = 5  # the likeliest tokens of a place that the page names
TAKEN_APART = 4  # logits of a place: of the token that follows, and the likeliest
REPEATED = 24  # random tokens, twice: what heads are asked whether they look up


class Lens(NamedTuple):
    """What a layer would say of the next token, were it the last one.

    Attributes:
      likeliest_TN: int32 ids, likeliest first.
      chance_TN: their probabilities.
      rank_T: int32; how many tokens are likelier than the one that follows.
      chance_T: the probability of that one.
    """

    likeliest_TN: Any
    chance_TN: Any
    rank_T: Any
    chance_T: Any


class Frame(NamedTuple):
    """What was seen of one checkpoint.

    Attributes:
      step: of the checkpoint.
      weight_LHTS: attention weights.
      lens: of the stream before the first layer and after each, L + 1 of them.
      norm_LT: of the residual stream, L + 1 of them; attn_norm_LT and mlp_norm_LT of
        what attention and MLP added.
      taken_TC: int32: the tokens whose logits were taken apart.
      parts: of those logits, [C, T, ...].
      induction_LH: how much of its attention a head gives to what followed the same
        token before, in random tokens that come twice.
      repeat_losses: mean loss of those tokens, the first and the second time, in nats.
    """

    step: int
    weight_LHTS: np.ndarray
    lens: list[Lens]
    norm_LT: np.ndarray
    attn_norm_LT: np.ndarray
    mlp_norm_LT: np.ndarray
    taken_TC: np.ndarray
    parts: Attribution
    induction_LH: np.ndarray
    repeat_losses: tuple[float, float]


class Swap(NamedTuple):
    """Two prompts patched against each other.

    The residual stream of one is replaced, at one layer and place, by that of the
    other.

    Attributes:
      other_T: the tokens of the other.
      here, there: the likeliest next token of each; two that differ.
      before, whole: logit(there) - logit(here) of the prompt, and of the other.
      effect_LT: how far a patch moves that; L + 1 layers.
    """

    other_T: np.ndarray
    here: int
    there: int
    before: float
    whole: float
    effect_LT: np.ndarray


class Look(NamedTuple):
    """What `look` found.

    Attributes:
      name: of the run.
      facts: of its model, as (name, value).
      row: the tokens.
      texts: of every token that is named somewhere.
      windows: of each layer; 0 = it sees everything before.
      frames: of the checkpoints, by their steps.
      opened: which of them was asked for.
      swap: None without another prompt.
    """

    name: str
    facts: list[tuple[str, str]]
    row: Row
    texts: dict[int, str]
    windows: list[int]
    frames: list[Frame]
    opened: int
    swap: Swap | None


def look(
    folder: str | Path,
    prompts: Sequence[str],
    *,
    against: str = "",
    step: int | str | None = None,
    weights: str = "",
    history: bool = True,
    progress: bool = False,
    at_most: int | None = None,
) -> Look:
    """Looks into a run while it reads a text.

    Args:
      folder: the run folder.
      prompts: the text; several are documents of one row, which do not see each other.
      against: another text of as many tokens, to be patched into the first.
      step: the checkpoint, and `weights` which of its weights: see `runs.open`.
      weights: see there.
      history: whether all other checkpoints that the run keeps are looked at as well.
      progress: show how far it is.
      at_most: tokens; None = as many as the model reads.

    Raises:
      ValueError: the run is none or writes no text, a text does not fit the model, or
        the two texts are not of one length.
    """
    run = runs.open(folder, step=step, weights=weights)
    programs.use_cache(run.config.compile_cache)
    cfg = replace(run.model.cfg, dtype="float32", attention="plain", remat="none")
    gpt = GPT(cfg)
    documents = [sample.prompt_ids(text, run.tokenizer, cfg) for text in prompts]
    row = taps.row(documents)
    if len(row.tokens_T) > cfg.context_length:
        raise ValueError(
            f"the prompts have {len(row.tokens_T)} tokens together but the model's "
            f"context is {cfg.context_length}; shorten them"
        )
    if at_most is not None and len(row.tokens_T) > at_most:
        raise ValueError(
            f"the prompt has {len(row.tokens_T)} tokens; here at most {at_most} are "
            "looked at: shorten it"
        )
    swap = None
    if against:
        if row.packed:
            raise ValueError("--against goes with one --prompt: it is patched into it")
        other = taps.row([sample.prompt_ids(against, run.tokenizer, cfg)])
        swap = swapped(gpt, run.params, row, other)
    watch = _Watch(gpt, row)
    kept = Checkpoints(run.folder / "checkpoints", keep=None).steps()
    others = [number for number in kept if number != run.step] if history else []
    frames = [watch.frame(run.params, run.step)]
    with screen.counted("checkpoints", len(others), wanted=progress) as more:
        for number in others:
            found = runs.open(run.folder, step=number, weights=weights)
            frames.append(watch.frame(found.params, number))
            more(1)
    return Look(
        name=str(folder),
        facts=_facts(run),
        row=row,
        texts=_texts(run.tokenizer, row, frames, swap),
        windows=[cfg.kind(layer).window for layer in range(cfg.n_layers)],
        frames=sorted(frames, key=lambda frame: frame.step),
        opened=run.step,
        swap=swap,
    )


def write(path: str | Path, found: Look) -> list[int]:
    """Writes the page; returns the steps that it has, of all that were looked at.

    Raises:
      ValueError: not even the checkpoint that was asked for fits into the file.
    """
    text, steps = page.make(found)
    files.write(path, text)
    return steps


def swapped(gpt: GPT, params, row: Row, other: Row) -> Swap:
    """Patches the stream of another row into a row, at each layer and place.

    Raises:
      ValueError: they are not of one length.
    """
    T, L = len(row.tokens_T), gpt.cfg.n_layers
    if len(other.tokens_T) != T:
        raise ValueError(
            f"--prompt has {T} tokens and --against {len(other.tokens_T)}: patching "
            "needs texts of as many tokens, so that each place has its like"
        )
    changed_T = np.flatnonzero(row.tokens_T != other.tokens_T)
    first = int(changed_T[0]) if len(changed_T) else T - 1  # before it both are alike
    swapped_RT = jnp.eye(T, dtype=bool)[first:]

    @jax.jit
    def last_RV(params, stream_LTD, layer):
        return taps.patched(gpt, params, row, Patch(layer, swapped_RT, stream_LTD))

    @jax.jit
    def seen(params, tokens_T):
        found = taps.see(gpt, params, row._replace(tokens_T=tokens_T))
        return found.stream_LTD, found.logits_TV[-1]

    own_LTD, here_V = seen(params, row.tokens_T)
    stream_LTD, there_V = seen(params, other.tokens_T)
    here_V, there_V = np.asarray(here_V), np.asarray(there_V)
    here = int(here_V.argmax())
    there = next(int(i) for i in np.argsort(-there_V) if i != here)
    # What is patched is a difference that the same program makes of the same numbers.
    before = last_RV(params, own_LTD, jnp.int32(-1))
    rows = [last_RV(params, stream_LTD, jnp.int32(layer)) for layer in range(L + 1)]

    def apart(logits_RV):
        return np.asarray(logits_RV[:, there] - logits_RV[:, here])

    effect_LT = np.zeros((L + 1, T), np.float32)
    effect_LT[:, first:] = [apart(x_RV) - apart(before) for x_RV in rows]
    whole = float(there_V[there] - there_V[here])
    return Swap(other.tokens_T, here, there, float(apart(before)[0]), whole, effect_LT)


class _Watch:
    """The programs that look at checkpoints, compiled once for all of them."""

    def __init__(self, gpt: GPT, row: Row):
        self.gpt, self.row = gpt, row
        self.see = jax.jit(lambda params: taps.see(gpt, params, row))
        self.lens = jax.jit(self._lens)
        self.attribute = jax.jit(self._attribute)
        self.repeat = jax.jit(self._repeat)

    def frame(self, params, step: int) -> Frame:
        """Returns what is seen of the weights of a step."""
        seen = self.see(params)
        found = [self.lens(params, x_TD) for x_TD in seen.stream_LTD]
        lens = [Lens(*map(np.asarray, one)) for one in found]
        taken_TC = self._taken(lens[-1])
        parts = self.attribute(params, seen, taken_TC)
        induction_LH, losses = self.repeat(params)
        norm_LT, attn_LT, mlp_LT = (
            np.linalg.norm(x_LTD, axis=-1)
            for x_LTD in (seen.stream_LTD, seen.attn_LTD, seen.mlp_LTD)
        )
        return Frame(
            step,
            np.asarray(seen.weight_LHTS),
            lens,
            norm_LT,
            attn_LT,
            mlp_LT,
            taken_TC,
            jax.tree.map(np.asarray, parts),
            np.asarray(induction_LH),
            (float(losses[0]), float(losses[1])),
        )

    def _lens(self, params, x_TD) -> Lens:
        logits_TV = taps.lens(self.gpt, params, x_TD)
        logp_TV = jax.nn.log_softmax(logits_TV)
        told = min(TOLD, logits_TV.shape[-1])
        value_TN, likeliest_TN = jax.lax.top_k(logp_TV, told)
        next_T = np.roll(self.row.tokens_T, -1)
        right_T1 = jnp.take_along_axis(logp_TV, next_T[:, None], 1)
        rank_T = (logp_TV > right_T1).sum(1)
        return Lens(likeliest_TN, jnp.exp(value_TN), rank_T, jnp.exp(right_T1[:, 0]))

    def _taken(self, last: Lens) -> np.ndarray:
        """Returns the tokens [T, C] whose logits are taken apart."""
        follows_T = np.roll(self.row.tokens_T, -1)
        taken = []
        for place, likeliest_N in enumerate(last.likeliest_TN):
            known = place + 1 < len(follows_T)
            wanted = [int(follows_T[place])] if known else []
            wanted += [int(i) for i in likeliest_N if int(i) not in wanted]
            wanted += wanted[-1:] * TAKEN_APART  # a vocabulary of fewer
            taken.append(wanted[:TAKEN_APART])
        return np.array(taken, np.int32)

    def _attribute(self, params, seen: Seen, taken_TC) -> Attribution:
        each = jax.vmap(lambda wanted_T: attribute(self.gpt, params, seen, wanted_T))
        return each(taken_TC.T)

    def _repeat(self, params) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """Returns [L, H] scores and the losses of random tokens that come twice."""
        cfg = self.gpt.cfg
        n = min(REPEATED, cfg.context_length // 2)
        rng = np.random.default_rng(0)
        once = rng.integers(0, cfg.vocab_size, n).tolist()
        row = taps.row([once + once])
        seen = taps.see(self.gpt, params, row)
        query_N = np.arange(n, 2 * n - 1)  # what followed it is known
        score_LH = seen.weight_LHTS[:, :, query_N, query_N - n + 1].mean(-1)
        logp_TV = jax.nn.log_softmax(seen.logits_TV[:-1])
        loss_T = -logp_TV[np.arange(2 * n - 1), row.tokens_T[1:]]
        return score_LH, (loss_T[: n - 1].mean(), loss_T[n:].mean())


def _facts(run: runs.Run) -> list[tuple[str, str]]:
    cfg = run.model.cfg
    heads = f"{cfg.n_heads} heads"
    if cfg.n_kv_heads != cfg.n_heads:
        heads += f", {cfg.n_kv_heads} of keys and values"
    return [
        ("parameters", f"{count(cfg):,}"),
        ("layers", f"{cfg.n_layers} of width {cfg.d_model}, {heads}"),
        ("context", f"{cfg.context_length:,} tokens"),
        ("vocabulary", f"{run.tokenizer.kind}, {cfg.vocab_size:,} tokens"),
    ]


def _texts(tokenizer, row: Row, frames: list[Frame], swap: Swap | None):
    """Returns id -> text of all tokens that the page names."""
    ids = {*row.tokens_T.tolist()}
    for frame in frames:
        ids.update(frame.taken_TC.ravel().tolist())
        for lens in frame.lens:
            ids.update(lens.likeliest_TN.ravel().tolist())
    if swap:
        ids.update((*swap.other_T.tolist(), swap.here, swap.there))
    return {i: _text(tokenizer, i) for i in sorted(ids)}


def _text(tokenizer, token: int) -> str:
    """Returns the text of a token; of one that is no whole character, its number."""
    try:
        text = tokenizer.decode([token])
    except ValueError:  # the model's table is larger than the vocabulary
        text = ""
    return f"<{token}>" if "\N{REPLACEMENT CHARACTER}" in text or not text else text
