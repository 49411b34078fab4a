"""Learning the answers of generated problems; what all tasks on them share.

Shapes: R rows, each a problem and a completion  S tokens of a row  T = S - 1 positions
that predict the next token
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax import files, sample, sampling
from gpt_jax.model import GPT, GPTConfig
from gpt_jax.options import Data
from gpt_jax.tasks import lm
from gpt_jax.tasks.problems import Problems, open_source, open_tokenizer
from gpt_jax.tasks.task import OF_THE_LOSS, OF_THE_MODEL, Kind, Task
from gpt_jax.tokenizers import Tokenizer

OF_PROBLEMS = ("data.tokenizer", "data.val_fraction")  # what these tasks read of data


@dataclass(frozen=True)
class Options:
    """The keys of `config.task`, which grpo has as well.

    Attributes:
      kind: one of problems.KINDS.
      shortest: letters, or digits of a summand.
      longest: the same, at most.
      problems: how many different training problems may be drawn.
      held_out: problems of an evaluation; a kind with few problems may have fewer.
      max_new_tokens: the longest completion; 0 = the longest answer's.
    """

    kind: str
    shortest: int
    longest: int
    problems: int
    held_out: int
    max_new_tokens: int


def complete(
    weights, batch, key_R, *, model: GPT, prompt: int, stop_id: int, temperature: float
):
    """Continues questions with the model's own decoder.

    Args:
      weights: of the model, scanned or not.
      batch: see `Problems.take`; only the question of each row is read.
      key_R: a key for each row.
      model: the model.
      prompt: the most tokens that a question has.
      stop_id: the token that ends a completion.
      temperature: 0 = the likeliest tokens.

    Returns:
      tokens_RS int32: question, completion, zeros. length_R: tokens of both, the stop
      token included. A completion that never stopped fills its row.
    """
    rows, positions = batch["tokens"].shape
    plain, params = sample.laid_out(model, weights, rows=rows)
    how = sampling.settings(positions + 1 - prompt, temperature=temperature)
    tokens_RS, length_R, _ = sample.generate(
        params,
        batch["tokens"][:, :prompt],
        jnp.maximum(batch["length"], 1),  # a row that only fills up has none
        sample.rows_of([how] * rows),
        key_R,
        model=plain,
        max_length=positions + 1,
        stop_id=stop_id,
    )
    return tokens_RS, length_R


def right(batch, tokens_RS, length_R):
    """Returns, for each row, whether it is the right answer, and its share of it.

    The share is that of positions with the right token, of the longer of both, the
    end-of-text token included.
    """
    answer_R = batch["mask"].sum(-1)
    same_RT = (tokens_RS[:, 1:] == batch["targets"]).astype(jnp.float32)
    hits_R = (batch["mask"] * same_RT).sum(-1)
    wrote_R = (length_R - batch["length"]).astype(jnp.float32)
    share_R = hits_R / jnp.maximum(jnp.maximum(answer_R, wrote_R), 1)
    return share_R == 1, share_R


def make_exact_match(model: GPT, *, prompt: int, stop_id: int):
    """Returns (weights, batch) -> Sums: "accuracy", the greedy completions right.

    "loss" counts those that are not, so its mean is 1 - accuracy; "weight" counts all.
    """

    def exact_match(weights, batch):
        rows = len(batch["length"])
        there_R = (batch["mask"].sum(-1) > 0).astype(jnp.float32)
        keys = jax.random.split(jax.random.key(0), rows)  # not used: greedy
        completed = complete(
            weights,
            batch,
            keys,
            model=model,
            prompt=prompt,
            stop_id=stop_id,
            temperature=0.0,
        )
        right_R, _ = right(batch, *completed)
        hit_R = right_R.astype(jnp.float32) * there_R
        sums = {"accuracy": hit_R.sum(), "weight": there_R.sum()}
        return {"loss": sums["weight"] - sums["accuracy"], **sums}

    return exact_match


class Parts(NamedTuple):
    """What the tasks on problems share.

    Attributes:
      prompt: the most tokens of a question.
      stop_id: the token that ends an answer.
      exact_match: see `make_exact_match`.
    """

    model: GPT
    tokenizer: Tokenizer
    prompt: int
    stop_id: int
    train: Problems
    evals: dict[str, Problems]
    exact_match: Callable[..., Any]
    fingerprint: str


def parts(options: Options, *, model: GPTConfig, text: Data) -> Parts:
    """Returns what the tasks on problems share.

    Args:
      options: which problems there are.
      model: the architecture; vocab_size 0 takes the tokenizer's.
      text: its tokenizer and val_fraction count.

    Raises:
      ValueError: a number is out of range, or the problems do not fit the tokenizer
        or the model.
    """
    kind, shortest, longest = options.kind, options.shortest, options.longest
    source = open_source(kind, shortest, longest, text.val_fraction)
    tokenizer, stop_id = open_tokenizer(text.tokenizer)
    prompt = len(tokenizer.opening) + source.kind.question(longest)
    completion = _completion(options.max_new_tokens, source.kind.answer(longest) + 1)
    gpt = lm.make_model(model, tokenizer)
    if prompt + completion > gpt.cfg.context_length:
        raise ValueError(
            f"a question and its answer have up to {prompt + completion} tokens but "
            f"model.context_length is {gpt.cfg.context_length}: lower task.longest"
        )
    kept = source.kept(options.held_out)
    sizes = {"stop_id": stop_id, "prompt": prompt, "completion": completion}
    problems, held_out = options.problems, options.held_out
    identity = [*source[1:], kind, problems, held_out, tokenizer.sha256]
    return Parts(
        model=gpt,
        tokenizer=tokenizer,
        prompt=prompt,
        stop_id=stop_id,
        train=Problems(source.training, problems, tokenizer, **sizes),
        evals={"val": Problems(kept.__getitem__, len(kept), tokenizer, **sizes)},
        exact_match=make_exact_match(gpt, prompt=prompt, stop_id=stop_id),
        fingerprint=files.digest(repr(identity)),
    )


def check(options: Options, text: Data) -> None:
    """Raises ValueError for options that cannot be; see `parts`."""
    shortest, longest = options.shortest, options.longest
    open_source(options.kind, shortest, longest, text.val_fraction)
    for key, least in {"problems": 1, "held_out": 1, "max_new_tokens": 0}.items():
        if (value := getattr(options, key)) < least:
            raise ValueError(f"task.{key} is {value}: it must be at least {least}")


def _completion(wanted: int, answer: int) -> int:
    """Returns the tokens of a completion, given those of the longest answer."""
    if wanted and wanted < answer:
        raise ValueError(
            f"task.max_new_tokens is {wanted} but an answer has up to {answer} tokens, "
            "its end included: raise it, or set it to 0"
        )
    return wanted or answer


def make(
    options: Options,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Returns the task of learning answers from examples: the start for rewards.

    Its loss is in nats per answer, of its tokens and its end; an evaluation adds
    "accuracy", the share of greedy completions that are right.

    Args:
      options: see `parts`, as for model and text.
      model: the architecture.
      text: what of config.data counts.
      dropout: see `lm.make`.
      progress: nothing here takes long.
    """
    del progress
    common = parts(options, model=model, text=text)
    next_token = lm.make_loss(
        common.model, common.tokenizer.token_bytes(), loss_chunk=0, dropout=dropout
    )

    def loss(weights, frozen, batch, key, hyper):
        sums = next_token(weights, frozen, batch, key, hyper)
        matches = {} if key is not None else common.exact_match(weights, batch)
        answers = (batch["mask"].sum(-1) > 0).sum().astype(jnp.float32)
        return {**matches, "loss": sums["loss"], "weight": answers}

    return Task(
        model=common.model,
        tokenizer=common.tokenizer,
        loss=loss,
        train=common.train,
        evals=common.evals,
        tokens=common.train.prompt + common.train.completion,
        fingerprint=common.fingerprint,
    )


KIND = Kind(
    make=make,
    options=Options,
    check=check,
    reads=lambda options: (*OF_THE_MODEL, *OF_THE_LOSS, *OF_PROBLEMS),
    config="configs/grpo.py:stage=start",
)
