"""Group-relative policy optimisation with rewards that a program checks.

Before a step the model answers every question several times (`rollout`); an answer
better than its group's mean is made likelier, one that is worse less likely (Shao et
al. 2024, DeepSeekMath, section 4). There is no value network and no reward model.

Shapes: A micro-batches  B questions of one  G answers to a question  R = A * B * G
S tokens of a question and its answer  T = S - 1 positions  V vocabulary
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from gpt_jax import adapters, losses, names
from gpt_jax.model import GPTConfig, hidden, logits
from gpt_jax.options import Data
from gpt_jax.tasks import answers
from gpt_jax.tasks.answers import Parts
from gpt_jax.tasks.task import Kind, Task, with_own

SPREAD_FLOOR = 1e-4  # added to a group's standard deviation, as by most libraries


@dataclass(frozen=True)
class Options(answers.Options):
    """The keys of `config.task`: those of problems, and GRPO's own.

    Attributes:
      group: G, answers to each question.
      reward: one of REWARDS.
      normalize: whether advantages are divided by the group's standard deviation.
      average: one of AVERAGES.
      clip: see `losses.policy`.
      kl: see `losses.policy`; the reference is the start.
      temperature: that answers are drawn with, and that the policy has.
      updates: steps that use the answers of one rollout.
    """

    group: int
    reward: str
    normalize: bool
    average: str
    clip: float
    kl: float
    temperature: float
    updates: int


REWARDS: dict[str, Callable] = {
    "exact": lambda right_R, share_R: right_R.astype(jnp.float32),
    "partial": lambda right_R, share_R: share_R,
}

# What a token of a completion counts, from the lengths [groups, G] and the longest.
AVERAGES: dict[str, Callable] = {
    # Each answer the same (Shao et al. 2024, equation 3).
    "sequence": lambda length_NG, most: 1 / length_NG,
    # Each token of a group the same (DAPO: Yu et al. 2025, equation 8).
    "token": lambda length_NG, most: (
        length_NG.shape[1] / length_NG.sum(1, keepdims=True) + 0 * length_NG
    ),
    # Each token of all the same (Dr. GRPO: Liu et al. 2025, section 3.2).
    "constant": lambda length_NG, most: 1 / most + 0 * length_NG,
}


def make(
    options: Options,
    *,
    model: GPTConfig,
    text: Data,
    dropout: Collection[str],
    progress: bool,
) -> Task:
    """Returns the task of finding right answers by trying.

    An evaluation answers the held-out questions greedily: its "accuracy" is the share
    that is right, and its loss is 1 - accuracy. Training reports, besides the loss:
    "reward", "accuracy" and "length" (means over answers), "reward_std" (mean over
    groups), "no_signal" (the share of groups with equal rewards, which teach nothing),
    and what `losses.policy` adds.

    Args:
      options: see `Options`.
      model: the architecture; vocab_size 0 takes the tokenizer's.
      text: see `answers.parts`.
      dropout: must be empty: answers are drawn without it.
      progress: nothing here takes long.

    Raises:
      ValueError: an option is out of range, or the problems do not fit the model.
    """
    del progress
    if dropout:
        raise ValueError(
            f"hyper.{sorted(dropout)[0]} is above 0, but answers are drawn without "
            "dropout and their probabilities must be those: set it to 0"
        )
    common = answers.parts(options, model=model, text=text)
    size = common.train.prompt + common.train.completion
    return Task(
        model=common.model,
        tokenizer=common.tokenizer,
        loss=make_loss(common, options),
        train=common.train,
        evals=common.evals,
        tokens=options.group * size,
        fingerprint=common.fingerprint,
        reference=options.kl > 0,
        rollout=make_rollout(common, options),
        updates=options.updates,
    )


def check(options: Options, text: Data) -> None:
    """Raises ValueError for options that cannot be; see `make`."""
    names.choose("task.reward", options.reward, REWARDS)
    names.choose("task.average", options.average, AVERAGES)
    rules = (
        (options.group >= 2, "group", "at least 2: answers are compared"),
        (options.updates >= 1, "updates", "at least 1"),
        (0 <= options.clip < 1, "clip", "at least 0 (off) and below 1"),
        (0 <= options.kl < math.inf, "kl", "a number, at least 0 (off)"),
        (0 < options.temperature < math.inf, "temperature", "above 0"),
    )
    for fits, name, wanted in rules:
        if not fits:
            raise ValueError(
                f"task.{name} is {getattr(options, name)}: it must be {wanted}"
            )
    answers.check(options, text)


def make_rollout(common: Parts, options: Options):
    """Returns (weights, batch [A, B, ...], key) -> batch [A, B * G, ...].

    The answers of a question stand together; each is drawn with the key of its
    question's number and its place in the group, and so depends on no other row. What
    comes back, all [A, B * G, ...]:

      tokens, targets: question and answer, and the same one further.
      weight: what each target counts, 0 outside answers.
      advantage: of the answer.
      old: log-probabilities of the targets; only where updates > 1.
      reward, reward_std, no_signal, accuracy, length: to be reported.
    """
    G = options.group

    def rollout(weights, batch, key):
        A, B = batch["length"].shape
        rows = jax.tree.map(
            lambda x: jnp.repeat(x.reshape(A * B, *x.shape[2:]), G, axis=0), batch
        )
        key_R = jax.vmap(
            lambda i, g: jax.random.fold_in(jax.random.fold_in(key, i), g)
        )(rows["number"], jnp.tile(jnp.arange(G), A * B))
        tokens_RS, length_R = answers.complete(
            weights,
            rows,
            key_R,
            model=common.model,
            prompt=common.prompt,
            stop_id=common.stop_id,
            temperature=options.temperature,
        )
        new_R = length_R - rows["length"]
        place_1T = jnp.arange(1, tokens_RS.shape[1])[None]
        begin_R1, end_R1 = rows["length"][:, None], length_R[:, None]
        inside_RT = (place_1T >= begin_R1) & (place_1T < end_R1)
        scale_NG = AVERAGES[options.average](
            new_R.reshape(A * B, G).astype(jnp.float32), common.train.completion
        )
        answered = {
            "tokens": tokens_RS[:, :-1],
            "targets": tokens_RS[:, 1:],
            "weight": inside_RT.astype(jnp.float32) * scale_NG.reshape(-1, 1),
            "length": new_R.astype(jnp.float32),
            **judge(
                *answers.right(rows, tokens_RS, length_R),
                group=G,
                reward=options.reward,
                normalize=options.normalize,
            ),
        }
        if options.updates > 1:
            answered["old"], _ = logp(common, options, weights, answered)
        return jax.tree.map(lambda x: x.reshape(A, B * G, *x.shape[1:]), answered)

    return rollout


def judge(right_R, share_R, *, group: int, reward: str, normalize: bool):
    """Returns [R] arrays: reward, advantage, and what is reported about them.

    The advantage is the reward less its group's mean, divided by the group's standard
    deviation where `normalize` says so (equation 3; Liu et al. 2025 advise against).
    """
    reward_NG = REWARDS[reward](right_R, share_R).reshape(-1, group)
    advantage_NG = reward_NG - reward_NG.mean(1, keepdims=True)
    equal_N1 = reward_NG.max(1, keepdims=True) == reward_NG.min(1, keepdims=True)
    advantage_NG = jnp.where(equal_N1, 0, advantage_NG)  # also no rounding errors
    std_N1 = jnp.sqrt(jnp.square(advantage_NG).mean(1, keepdims=True))
    if normalize:
        advantage_NG = advantage_NG / (std_N1 + SPREAD_FLOOR)
    blank_NG = jnp.zeros_like(reward_NG)
    found = {
        "reward": reward_NG,
        "advantage": advantage_NG,
        "reward_std": blank_NG + std_N1,
        "no_signal": blank_NG + equal_N1.astype(jnp.float32),
        "accuracy": right_R.astype(jnp.float32),
    }
    return {name: x.reshape(-1) for name, x in found.items()}


REPORTED = ("reward", "reward_std", "no_signal", "accuracy", "length")


def make_loss(common: Parts, options: Options):
    """Returns the policy loss as `(weights, frozen, batch, key, hyper) -> Sums`.

    With key=None it is the exact match of greedy answers instead.
    """

    def loss(weights, frozen, batch, key, hyper):
        del hyper
        if key is None:
            return common.exact_match(weights, batch)
        logp_RT, own = logp(common, options, weights, batch)
        reference_RT = None
        if options.kl:
            start = jax.lax.stop_gradient(adapters.reference(frozen))
            reference_RT, _ = logp(common, options, start, batch)
        sums = losses.policy(
            logp_RT,
            batch.get("old", logp_RT),
            reference_RT,
            batch["advantage"],
            batch["weight"],
            clip=options.clip,
            kl=options.kl,
        )
        sums = {**sums, **{name: batch[name].sum() for name in REPORTED}}
        return with_own(sums, own)

    return loss


def logp(common: Parts, options: Options, weights, batch):
    """Returns [R, T] log-probabilities of the answers' tokens, 0 elsewhere.

    And the model's own losses.
    """
    found = hidden(common.model, weights, batch["tokens"])
    logits_RTV = logits(common.model, weights, found.x_BTD) / options.temperature
    each = losses.scores(logits_RTV, batch["targets"], batch["weight"])
    logp_RT = losses.token_logp(each, batch["weight"])
    return logp_RT, found.sums


KIND = Kind(
    make=make,
    options=Options,
    check=check,
    reads=lambda options: answers.OF_PROBLEMS,
    config="configs/grpo.py",
    tuned=True,
    # With one step to a rollout the ratio that is clipped is 1.
    idle=lambda options: () if options.updates > 1 else ("clip",),
)
