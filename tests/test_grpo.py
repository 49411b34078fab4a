"""Rewards that a program checks: problems, the policy loss, rollouts, whole runs."""

import signal
from functools import partial
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from configs import grpo as recipe
from gpt_jax import (
    losses,
    metrics,
    model,
    population,
    runs,
    sample,
    sampling,
    sharding,
    signals,
    tasks,
    train,
)
from gpt_jax.options import Data
from gpt_jax.tasks import answers, grpo, problems
from tests import test_step, tiny

B, T, V = 3, 5, 7


# --- the policy loss ------------------------------------------------------------------


def logp_by_hand(logits, target):
    """Log-probabilities of the targets, one by one in float64."""
    out = np.zeros(target.shape)
    for place in np.ndindex(target.shape):
        scores = np.exp(np.asarray(logits[place], np.float64))
        out[place] = np.log(scores[target[place]] / scores.sum())
    return out


def policy_by_hand(logp, old, reference, advantage, weight, *, clip, kl):
    """Equations 3 and 4 of Shao et al. 2024, token by token."""
    sums = dict.fromkeys(("loss", "weight", "entropy", "clipped", "kl"), 0.0)
    for b in range(len(logp)):
        inside = [t for t in range(logp.shape[1]) if weight[b, t] > 0]
        for t in inside:
            ratio = np.exp(logp[b, t] - old[b, t])
            near = min(max(ratio, 1 - clip), 1 + clip)
            gain = min(ratio * advantage[b], near * advantage[b])
            away = np.exp(reference[b, t]) / np.exp(logp[b, t])
            apart = away - np.log(away) - 1
            sums["loss"] -= weight[b, t] * (gain - kl * apart)
            sums["entropy"] -= logp[b, t] / len(inside)
            sums["clipped"] += (gain < ratio * advantage[b]) / len(inside)
            sums["kl"] += apart / len(inside)
        sums["weight"] += bool(inside)
    return sums


@pytest.fixture(scope="module")
def case():
    """Log-probabilities of three rows, the last of them without an answer."""
    rng = np.random.default_rng(0)
    logp, old, reference = -rng.uniform(0.1, 3, (3, B, T)).astype(np.float32)
    advantage = np.array([1.5, -0.7, 2.0], np.float32)
    weight = np.array(
        [[0, 0, 0.5, 0.5, 0], [0, 0.2, 0.2, 0.2, 0.2], [0] * 5], np.float32
    )
    return logp, old, reference, advantage, weight


def test_the_policy_loss_is_that_of_the_paper(case):
    got = losses.policy(*case, clip=0.2, kl=0.3)
    want = policy_by_hand(*case, clip=0.2, kl=0.3)
    assert set(got) == set(want)
    for name in want:
        np.testing.assert_allclose(got[name], want[name], rtol=1e-5, err_msg=name)
    assert 0 < want["clipped"] < want["weight"] == 2  # else nothing was clipped


def test_on_policy_the_gradient_is_advantage_times_that_of_the_log_probability(case):
    logp, _, _, advantage, weight = case

    def loss(logp):
        return losses.policy(logp, logp, None, advantage, weight, clip=0.2, kl=0)[
            "loss"
        ]

    want = -advantage[:, None] * weight
    np.testing.assert_allclose(jax.grad(loss)(logp), want, rtol=1e-6)


def test_a_token_that_has_moved_far_enough_adds_no_gradient(case):
    logp, old, _, advantage, weight = case

    def loss(logp, clip):
        return losses.policy(logp, old, None, advantage, weight, clip=clip, kl=0)[
            "loss"
        ]

    ratio = np.exp(logp - old)
    far = np.where(advantage[:, None] > 0, ratio > 1.2, ratio < 0.8)
    want = np.where(far, 0, -advantage[:, None] * weight * ratio)
    np.testing.assert_allclose(jax.grad(loss)(logp, 0.2), want, rtol=1e-5)
    free = -advantage[:, None] * weight * ratio
    np.testing.assert_allclose(jax.grad(loss)(logp, 0.0), free, rtol=1e-5)
    assert (far & (weight > 0)).any() and not far[weight > 0].all()


def test_the_divergence_is_zero_at_the_reference_and_pulls_towards_it(case):
    logp, _, reference, _, weight = case

    def kl(logp):
        still = jnp.zeros(B)
        sums = losses.policy(logp, logp, reference, still, weight, clip=0.2, kl=1.0)
        return sums["loss"], sums["kl"]

    slope = jax.grad(kl, has_aux=True)(logp)[0]
    inside = weight > 0
    assert (np.sign(slope) == np.sign(logp - reference))[inside].all()
    assert kl(reference)[1] == 0 and kl(logp)[1] > 0


@pytest.mark.parametrize("poison", [np.nan, np.inf])
def test_log_probabilities_are_right_and_zero_where_masked(poison):
    rng = np.random.default_rng(1)
    logits = rng.normal(size=(B, T, V)).astype(np.float32) * 3
    target = jnp.asarray(rng.integers(0, V, (B, T)))
    mask = jnp.asarray(rng.integers(0, 2, (B, T)), jnp.float32)
    want = np.where(mask > 0, logp_by_hand(logits, np.asarray(target)), 0)
    bad = jnp.where(mask[..., None] > 0, logits, poison)

    def logp(logits):
        return losses.token_logp(losses.scores(logits, target, mask), mask)

    np.testing.assert_allclose(logp(bad), want, rtol=1e-5, atol=1e-6)
    grad = jax.grad(lambda x: logp(x).sum())(bad)
    assert np.isfinite(grad).all() and not grad[mask == 0].any()


# --- groups ---------------------------------------------------------------------------

PROBLEMS = {"kind": "reverse", "shortest": 1, "longest": 2, "problems": 50}
PROBLEMS |= {"held_out": 4, "max_new_tokens": 0}


@pytest.mark.parametrize("normalize", [True, False])
def test_an_advantage_is_a_reward_against_its_own_group(normalize):
    right = np.array([1, 0, 0, 0, 1, 1, 1, 1, 0, 1, 1, 0], bool)
    how = {"group": 4, "reward": "exact", "normalize": normalize}
    found = grpo.judge(right, right * 1.0, **how)
    groups = right.reshape(3, 4).astype(np.float64)
    want = groups - groups.mean(1, keepdims=True)
    if normalize:
        want /= groups.std(1, keepdims=True) + 1e-4
    np.testing.assert_allclose(found["advantage"], want.reshape(-1), rtol=1e-5)
    np.testing.assert_allclose(
        found["reward_std"], np.repeat(groups.std(1), 4), rtol=1e-6
    )
    np.testing.assert_array_equal(found["no_signal"], np.repeat([0, 1, 0], 4))


def test_equal_rewards_teach_nothing_whatever_their_mean_rounds_to():
    share = np.full(12, 1 / 3, np.float32)
    how = {"group": 12, "reward": "partial", "normalize": True}
    found = grpo.judge(share == 1, share, **how)
    assert not np.asarray(found["advantage"]).any()
    assert np.asarray(found["no_signal"]).all()


def test_what_a_token_counts():
    lengths = np.array([[1, 3], [4, 2]], np.float32)
    counts = {name: rule(lengths, 5) for name, rule in grpo.AVERAGES.items()}
    np.testing.assert_allclose(counts["sequence"] * lengths, np.ones((2, 2)))
    # Of a group of two, all tokens together count two, and each the same.
    np.testing.assert_allclose(counts["token"], [[1 / 2, 1 / 2], [1 / 3, 1 / 3]])
    np.testing.assert_allclose(counts["constant"], np.full((2, 2), 0.2))


# --- problems -------------------------------------------------------------------------


def source(kind, shortest=2, longest=4, val_fraction=0.2):
    return problems.Source(problems.KINDS[kind], shortest, longest, val_fraction)


WORKED = {
    "reverse": lambda q: "".join(reversed(q.removesuffix("<"))),
    "sort": lambda q: "".join(sorted(q.removesuffix("^"))),
    "copy": lambda q: q.removesuffix("="),
    "upper": lambda q: q.removesuffix(">").upper(),
    "add": lambda q: str(sum(map(int, q.removesuffix("=").split("+")))),
}


@pytest.mark.parametrize("kind", problems.KINDS)
def test_answers_are_right_and_fit_their_widths(kind):
    made = [source(kind).training(i) for i in range(200)]
    for question, answer in made:
        assert answer == WORKED[kind](question)
        assert len(question) <= problems.KINDS[kind].question(4)
        assert len(answer) <= problems.KINDS[kind].answer(4)
        assert set(question + answer) <= set(problems.CHARACTERS)
    assert made == [source(kind).training(i) for i in range(200)]
    lengths = {len(question) for question, _ in made}
    assert len(lengths) >= 3  # every length from the shortest on is asked


def test_no_question_of_an_evaluation_is_trained_on():
    pairs = source("reverse", 2, 2)
    kept = pairs.kept(100)
    assert len({question for question, _ in kept}) == 100
    trained = {pairs.training(i).question for i in range(3_000)}
    assert not trained & {question for question, _ in kept}
    assert len(trained) > 450  # of 676 pairs of letters, a fifth is kept


def make_parts(**changes):
    """Returns the parts of a small run on problems of two letters."""
    cfg = tiny.cfg(vocab_size=0, position="rope", init="torch_default")
    text = {**common.base().data, "tokenizer": "char", **changes.pop("text", {})}
    text, cfg = Data(**text), changes.pop("model", cfg)
    return answers.parts(answers.Options(**PROBLEMS | changes), model=cfg, text=text)


def test_a_problem_is_spelled_as_question_answer_and_end():
    parts = make_parts()
    batch = parts.train.take([3, 8, 8])
    for row, i in enumerate([3, 8, 8]):
        question, answer = source("reverse", 1, 2, 0.1).training(i)
        size = len(question)
        assert batch["length"][row] == size
        text = [*batch["tokens"][row], batch["targets"][row, -1]]
        assert parts.tokenizer.decode(text[:size]) == question
        wanted = batch["targets"][row][batch["mask"][row] > 0]
        assert parts.tokenizer.decode(wanted[:-1]) == answer
        assert wanted[-1] == parts.tokenizer.eos_id
    np.testing.assert_array_equal(batch["number"], [3, 8, 8])


def test_only_the_whole_answer_and_its_end_is_right():
    """The answer is 5 6 and its end 9, after a question of two tokens."""
    completions = {
        (5, 6, 9): (True, 1),
        (5, 6, 4): (False, 2 / 3),  # never ended
        (5, 7, 9): (False, 2 / 3),
        (5, 9): (False, 1 / 3),
        (5, 6, 6, 9): (False, 2 / 4),
        (9,): (False, 0),
    }
    rows = np.zeros((len(completions), 6), np.int32)
    rows[:, :2] = 1, 2
    for row, tokens in zip(rows, completions, strict=True):
        row[2 : 2 + len(tokens)] = tokens
    batch = {
        "targets": np.tile([2, 5, 6, 9, 0], (len(rows), 1)),
        "mask": np.tile([0.0, 1, 1, 1, 0], (len(rows), 1)),
        "length": np.full(len(rows), 2),
    }
    length = np.array([2 + len(tokens) for tokens in completions])
    right, share = answers.right(batch, rows, length)
    assert [(bool(r), float(s)) for r, s in zip(right, share, strict=True)] == [
        (r, pytest.approx(s)) for r, s in completions.values()
    ]


# --- rollouts -------------------------------------------------------------------------

DRAWN = grpo.Options(
    **PROBLEMS,
    group=4,
    reward="exact",
    normalize=True,
    average="token",
    clip=0.2,
    kl=0.0,
    temperature=0.7,
    updates=2,
)


@pytest.fixture(scope="module")
def parts():
    return make_parts()


@pytest.fixture(scope="module")
def weights(parts):
    """Random ones, halved: else one token would have all the probability."""
    drawn = tiny.jit(partial(model.init, parts.model.cfg))(jax.random.key(0))
    return jax.tree.map(lambda x: x / 2, drawn)


def roll(parts, weights, numbers, devices):
    """Returns the rollout [2, len(numbers) / 2 * 4, ...] of these problems."""
    task = grpo_task(parts)
    strategy = sharding.make(
        len(numbers) // 2,
        model.declared(parts.model.cfg),
        **{"strategy": "mesh", "data": devices, "fsdp": 1, "tensor": 1},
        cpu_devices=0,
    )
    run = train.compile_rollout(task, lambda params, _: params, strategy)
    assert run is not None
    batch = parts.train.take(numbers)
    batch = jax.tree.map(lambda x: x.reshape(2, -1, *x.shape[1:]), batch)
    placed = strategy.place(weights)
    got = run(placed, {}, strategy.put(batch), jax.random.key(3), np.uint32(5))
    return jax.device_get(got)


def grpo_task(parts):
    return tasks.Task(
        model=parts.model,
        tokenizer=parts.tokenizer,
        loss=grpo.make_loss(parts, DRAWN),
        train=parts.train,
        evals=parts.evals,
        tokens=0,
        fingerprint="",
        rollout=grpo.make_rollout(parts, DRAWN),
    )


@pytest.fixture(scope="module")
def drawn(parts, weights):
    return roll(parts, weights, [1, 4, 6, 9], devices=2)


def test_a_rollout_is_its_question_and_then_an_answer(parts, drawn):
    assert drawn["tokens"].shape[:2] == (2, 8)
    eos = parts.tokenizer.eos_id
    for place in np.ndindex(2, 8):
        row = {name: x[place] for name, x in drawn.items()}
        number = [1, 4, 6, 9][2 * place[0] + place[1] // 4]
        question, answer = source("reverse", 1, 2, 0.1).training(number)
        ids = [*row["tokens"], row["targets"][-1]]
        assert parts.tokenizer.decode(ids[: len(question)]) == question
        inside = np.flatnonzero(row["weight"])
        said = row["targets"][inside].tolist()
        np.testing.assert_array_equal(inside, len(question) - 1 + np.arange(len(said)))
        assert len(said) == row["length"]
        assert eos not in said[:-1]
        assert said[-1] == eos or len(said) == 3  # two letters and the end
        right = said == [*parts.tokenizer.encode(answer), eos]
        assert row["reward"] == row["accuracy"] == right


def test_answers_to_one_question_differ_and_depend_on_no_other_row(
    parts, weights, drawn
):
    """On one device, and in a batch of other questions."""
    alone = roll(parts, weights, [9, 1], devices=1)
    for name in ("tokens", "weight", "reward", "old"):
        got, want = alone[name], drawn[name]
        same = partial(np.testing.assert_allclose, rtol=2e-4, atol=2e-5)
        same(got[0], want[1, 4:])
        same(got[1], want[0, :4])
    answers = {tuple(row) for row in drawn["tokens"][0, :4].tolist()}
    assert len(answers) > 1


def test_answers_are_drawn_with_the_probabilities_that_the_loss_gives_them(
    parts, weights
):
    """Of one letter and its end: how often each is drawn, against its probability."""
    count = 4096
    batch = parts.train.take([0])
    rows = jax.tree.map(lambda x: jnp.repeat(x, count, axis=0), batch)
    tokens, _ = tiny.jit(
        partial(
            answers.complete,
            model=parts.model,
            prompt=parts.prompt,
            stop_id=parts.stop_id,
            temperature=DRAWN.temperature,
        )
    )(weights, rows, jax.random.split(jax.random.key(7), count))
    first = int(batch["length"][0])
    found = np.bincount(np.asarray(tokens)[:, first], minlength=68) / count
    logits, _ = tiny.jit(parts.model.apply)({"params": weights}, tokens[:1, :first])
    scores = np.asarray(logits)[0, -1].astype(np.float64) / DRAWN.temperature
    wanted = np.exp(scores - scores.max())
    wanted /= wanted.sum()
    assert abs(found - wanted).sum() < 0.15  # 68 shares of 4,096 draws
    assert abs(found - 1 / 68).sum() > 0.3  # else everything would pass
    alike = {"tokens": tokens[:, :-1], "targets": tokens[:, 1:]}
    alike["weight"] = np.float32(np.arange(1, tokens.shape[1])[None] == first)
    logp, _ = tiny.jit(partial(grpo.logp, parts, DRAWN))(weights, alike)
    got = np.exp(np.asarray(logp)[:, first - 1])
    np.testing.assert_allclose(got, wanted[np.asarray(tokens)[:, first]], rtol=1e-3)


def test_what_a_rollout_remembers_is_what_its_first_step_computes(
    parts, weights, drawn
):
    """So the ratio is 1 and nothing is clipped, until the weights have moved."""
    loss = tiny.jit(grpo.make_loss(parts, DRAWN))
    batch = jax.tree.map(lambda x: x[0], drawn)
    key, hyper = jax.random.key(0), test_step.make_hyper()
    batch["advantage"] = np.tile([1.0, -0.5], 4).astype(np.float32)
    sums = loss(weights, {}, batch, key, hyper)
    assert float(sums["clipped"]) == 0
    assert float(sums["weight"]) == 8
    wanted = -(batch["advantage"][:, None] * batch["weight"]).sum()
    assert float(sums["loss"]) == pytest.approx(wanted, rel=1e-4)
    moved = jax.tree.map(lambda x: 1.2 * x, weights)
    assert float(loss(moved, {}, batch, key, hyper)["clipped"]) > 0


def test_an_evaluation_counts_greedy_answers(parts, weights):
    """Oracle: the text that the sampler writes for each question."""
    kept = source("reverse", 1, 2, 0.1).kept(4)
    said = sample.texts(
        model=parts.model,
        params=weights,
        tokenizer=parts.tokenizer,
        prompts=[question for question, _ in kept],
        count=1,
        seed=0,
        stop=(),
        **sampling.settings(3, temperature=0.0),
    )
    batch = parts.evals["val"].take([0, 1, 2, 3])
    for number, text in enumerate(said):  # makes every answer but one right
        if number == 2:
            continue
        ids = [*text.ids, parts.stop_id][:3]
        first = int(batch["length"][number])
        batch["mask"][number] = 0
        batch["mask"][number, first - 1 : first - 1 + len(ids)] = 1
        batch["targets"][number, first - 1 : first - 1 + len(ids)] = ids
    empty = {name: np.zeros_like(x[:1]) for name, x in batch.items()}
    batch = {name: np.concatenate([x, empty[name]]) for name, x in batch.items()}
    sums = tiny.jit(grpo.make_loss(parts, DRAWN))(weights, {}, batch, None, None)
    assert {name: float(x) for name, x in sums.items()} == {
        "accuracy": 3,
        "loss": 1,
        "weight": 4,
    }


# --- runs -----------------------------------------------------------------------------


def config_of(**task):
    config = recipe.get_config("stage=rl,size=tiny")
    config.update(batch_size=4, steps=8, eval_every=4, checkpoint_every=4)
    config.update(log_every=1, tensorboard=False, compile_cache="")
    config.optimizer.schedule = "constant"  # a decay would depend on `steps`
    config.task.update(shortest=1, longest=2, held_out=6, **task)
    config.mesh.cpu_devices = 2
    return config


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of two steps a rollout, from start to end."""
    folder = tmp_path_factory.mktemp("grpo") / "whole"
    config = config_of(updates=2, reward="partial")
    return config, folder, train.train(config, folder)


def test_a_run_reports_rewards_and_draws_them(whole):
    _, folder, result = whole
    assert result.numbers["val_loss"] == pytest.approx(
        1 - result.numbers["val_accuracy"]
    )
    rows = [row for row in metrics.read(folder) if "train_reward" in row]
    assert [row["step"] for row in rows] == list(range(1, 9))
    for row in rows:
        assert 0 <= row["train_reward"] <= 1
        assert 0 <= row["train_no_signal"] <= 1
        assert 1 <= row["train_length"] <= 3
        assert row["train_entropy"] > 0
    # Two steps share the answers of one rollout, and no more than two.
    rewards = [row["train_reward"] for row in rows]
    assert rewards[0::2] == rewards[1::2]
    assert len(set(rewards)) > 2
    assert (folder / "reward.png").read_bytes()[:4] == b"\x89PNG"


def test_a_resumed_run_is_the_uninterrupted_one(whole, tmp_path):
    config, folder, _ = whole
    config = config.copy_and_resolve_references()
    config.steps = 4
    train.train(config, tmp_path / "run")
    config.steps = 8
    train.train(config, tmp_path / "run")
    skip = ("seconds", "tokens_per_second")

    def record(folder):
        return [
            {k: v for k, v in row.items() if k not in skip}
            for row in metrics.read(folder)
        ]

    assert record(tmp_path / "run") == record(folder)
    got, want = (runs.open(x, step=8).params for x in (tmp_path / "run", folder))
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_a_signal_waits_for_the_last_step_of_a_rollout(whole):
    config, _, _ = whole
    stop = signals.Stop()
    stop.signal = signal.SIGTERM
    job: Any = SimpleNamespace(
        config=config, stop=stop, task=SimpleNamespace(updates=2)
    )
    assert [train.ended(job, train.Totals(), step) for step in (4, 5, 6)] == [
        "signal",
        "",
        "signal",
    ]


@pytest.mark.slow
def test_answers_can_be_learnt_before_rewards_are(tmp_path):
    """The start: supervised, its loss in nats per answer, with the same exact match."""
    config = recipe.get_config("stage=start,size=tiny")
    config.update(tensorboard=False, compile_cache="", steps=2, eval_every=2)
    config.mesh.cpu_devices = 1
    config.task.update(shortest=1, longest=1, held_out=2)
    result = train.train(config, tmp_path / "run")
    # A letter and its end, of 68 tokens each.
    assert 1 < result.numbers["val_loss"] < 3 * np.log(68)
    assert result.numbers["val_accuracy"] in (0, 0.5, 1)


# --- bad input ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "spell"}, "task.kind 'spell' is not one of: reverse, sort"),
        ({"shortest": 4, "longest": 3}, "task.shortest is 4 and task.longest 3"),
        ({"max_new_tokens": 2}, "task.max_new_tokens is 2 but an answer has up to 3"),
        ({"longest": 20}, "tokens but model.context_length is 16"),
        ({"text": {"tokenizer": "word", "val_fraction": 0.1}}, "cannot spell"),
        ({"text": {"tokenizer": "char", "val_fraction": 1.0}}, "val_fraction is 1.0"),
        (
            {"longest": 1, "text": {"tokenizer": "char", "val_fraction": 0.001}},
            "none is left to evaluate on",
        ),
    ],
)
def test_problems_that_do_not_fit_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        make_parts(**change)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"group": 1}, "task.group is 1: it must be at least 2"),
        ({"reward": "vibes"}, "task.reward 'vibes' is not one of: exact, partial"),
        ({"average": "x"}, "task.average 'x' is not one of: sequence, token, constant"),
        ({"clip": 1.0}, "task.clip is 1.0: it must be at least 0"),
        ({"kl": -0.1}, "task.kl is -0.1: it must be a number"),
        ({"temperature": 0.0}, "task.temperature is 0.0: it must be above 0"),
        ({"updates": 0}, "task.updates is 0: it must be at least 1"),
        ({"held_out": 0}, "task.held_out is 0: it must be at least 1"),
        ({"problems": 0}, "task.problems is 0: it must be at least 1"),
        ({"max_new_tokens": -1}, "task.max_new_tokens is -1: it must be at least 0"),
        ({"updates": 3}, "is not a multiple of task.updates 3"),
        ({"hyper.dropout_attn": 0.1}, "dropout_attn is 0.1, but task grpo does not"),
        ({"mesh.strategy": "pmap"}, "mesh.strategy is pmap: task grpo needs mesh"),
    ],
)
def test_options_that_make_no_sense_are_refused(change, message, tmp_path):
    config = config_of()
    for key, value in change.items():
        place, _, name = key.rpartition(".")
        config[place or "task"][name] = value
    with pytest.raises(ValueError, match=message):
        train.check(config)
        train.make_task(train.unpack(config), tmp_path)


def test_a_population_refuses_to_roll_out(tmp_path):
    configs = [config_of(), config_of()]
    folders = [tmp_path / "a", tmp_path / "b"]
    with pytest.raises(ValueError, match="task grpo makes its batches"):
        population.train(configs, folders, members=0, rungs=(), report=lambda *_: None)
