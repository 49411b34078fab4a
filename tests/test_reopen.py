"""Steps executed again: the same bits, what instruments see, what is refused."""

import json
import math
import re
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common, dpo, grpo, sft
from gpt_jax import data, metrics, model, reopen, runs, train
from gpt_jax.reopen import instruments
from gpt_jax.reopen.instruments import Example, Frame, Line
from gpt_jax.report import reopened

LINE = "the quick brown fox jumps over the lazy dog. "
NOISE = "zqxjkvwzqxjkvwzqxjkvwzqxjkvwzqxjkvw"  # letters that the lines hold, one by one
EVERYTHING = list(reopen.INSTRUMENTS)


@pytest.fixture(scope="module")
def spiked(tmp_path_factory):
    """Returns a run in whose text one place is noise, and its config."""
    folder = tmp_path_factory.mktemp("reopen")
    (folder / "text.txt").write_text(LINE * 30 + NOISE + LINE * 50)
    config = common.tiny(common.base())
    config.data.update(source=str(folder / "text.txt"), tokenizer="char")
    config.data.update(folder=str(folder / "data"), cache=str(folder / "cache"))
    config.model.update(context_length=32, n_layers=2, attention="plain")
    config.hyper.update(lr=1e-2, weight_decay=0.0)
    config.update(steps=50, eval_every=25, checkpoint_every=20, keep=9)
    config.update(log_every=1, early_from=0, compile_cache="", tensorboard=False)
    train.train(config, folder / "run")
    return folder / "run", config


def test_a_planted_spike_is_met_to_the_bit_and_explained(spiked, tmp_path):
    folder, _ = spiked
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("*")}
    rows = {r["step"]: r for r in metrics.read(folder) if "grad_norm" in r}
    late = [step for step in rows if step > 25]
    spike = max(late, key=lambda step: rows[step]["train_loss"])
    first, last = max(spike - 6, 21), min(spike + 6, 50)
    found = reopen.reopen(folder, first, last, EVERYTHING)
    assert found.off == 0.0 and set(range(first, last + 1)) <= {*found.met}
    assert found.began in (20, 25, 40) and found.began < first
    for frame in found.frames:
        assert frame.loss == rows[frame.step]["train_loss"]
    at = reopened.peak(found.frames)
    assert at.step == spike
    worst = at.examples[0]
    assert "zqx" in "".join(worst.tokens)
    told = reopened.findings(found.frames)
    blame = next(line for line in told if line.startswith("It is the data: "))
    assert f"first number {worst.number:,} " in blame
    page = reopened.write(found, tmp_path / "page.html").read_text()
    assert f"<li>{blame.split('(')[0]}" in page
    drawn = json.loads(re.search(r'id="curves">(.*?)</script>', page, re.S)[1])
    assert [one["title"] for one in drawn][:2] == ["Loss", "Gradient norm"]
    assert "http" not in re.sub(r"http://www\.w3\.org/\S+", "", page)  # self-contained
    assert {p: p.stat().st_mtime_ns for p in folder.rglob("*")} == before


def test_what_instruments_say_agrees_with_the_step_and_with_plain_jax(spiked):
    folder, config = spiked
    (frame,) = reopen.reopen(folder, 22, 22, EVERYTHING).frames
    norms = frame.tables["grad_norms"]
    whole = math.sqrt(sum(x * x for x in norms.values()))
    assert whole == pytest.approx(frame.grad_norm, rel=1e-5)
    # Of single examples: their mean is the step's loss, and their text is in order.
    assert np.mean([e.loss for e in frame.examples]) == pytest.approx(frame.loss, 1e-5)
    assert [e.loss for e in frame.examples] == sorted(
        (e.loss for e in frame.examples), reverse=True
    )
    one = frame.examples[0]
    assert np.mean(one.losses) == pytest.approx(one.loss, rel=1e-5)
    assert len(one.losses) == len(one.tokens) == 32
    ids = data.members(len_of(config), 4, config.seed, 21)
    assert sorted(e.number for e in frame.examples) == sorted(ids)
    # The update of a weight, from the checkpoints of the steps before and after.
    again = reopen.reopen(folder, 21, 21, ["update_ratio"]).frames[0]
    assert 0 < again.tables["update_ratio"]["block_0/mlp/up/kernel"] < 1
    entropy = frame.tables["attention"]
    assert len(entropy) == 2 * 2
    assert all(0 <= x <= math.log(32) for x in entropy.values())


def len_of(config) -> int:
    count = len(LINE * 80 + NOISE)
    kept = count - round(count * config.data.val_fraction)
    return (kept - 33) // 32 + 1


def test_the_noise_scale_is_that_of_its_definition():
    rng = np.random.default_rng(0)
    n, size, deviation = 4000, 50, 0.3
    true = rng.normal(size=size)
    grads = true + deviation * rng.normal(size=(n, size))
    weight = np.full(n, 7.0)  # targets of an example: losses are sums over them
    square = ((7 * grads) ** 2).sum(1)
    each = {
        "weight": weight,
        "square": square,
        "whole": ((7 * grads).sum(0) ** 2).sum(),
    }
    found, norms = instruments.noise_of(each)
    assert found["noise"] == pytest.approx(size * deviation**2, rel=0.05)
    assert found["signal"] == pytest.approx((true**2).sum(), rel=0.05)
    assert found["scale"] == found["noise"] / found["signal"]
    single = np.linalg.norm(grads, axis=1) / np.linalg.norm(grads.mean(0))
    np.testing.assert_allclose(norms, single, rtol=1e-6)


def test_attention_that_sees_everything_alike_has_the_entropy_of_its_length(spiked):
    folder, _ = spiked
    run = runs.open(folder)
    cfg = replace(run.model.cfg, n_layers=1)
    zero = jax.tree.map(jnp.zeros_like, model.init(cfg, jax.random.key(0)))

    class Job:
        join = staticmethod(lambda params, frozen: params)
        task = type("Task", (), {"model": model.GPT(cfg)})

    batch = {"tokens": np.zeros((1, 1, 8), np.int32)}
    entropy = jax.jit(partial(instruments._entropy, Job))  # type: ignore[arg-type]
    entropy_LH = entropy(zero, {}, batch, 0)
    wanted = np.log(np.arange(1, 9)).mean()
    np.testing.assert_allclose(entropy_LH, wanted, rtol=1e-5)


def tuned(make, arg, folder):
    config = make.get_config(arg)
    config.data.update(folder=str(folder / "data"), cache=str(folder / "cache"))
    config.update(compile_cache="", tensorboard=False, sample_every=0, keep=9)
    return config


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "arg", "last"),
    [
        pytest.param(sft, "size=tiny,run=none", 6, id="sft"),
        pytest.param(dpo, "size=tiny,run=none", 6, id="dpo"),
        pytest.param(grpo, "stage=rl,size=tiny,run=none", 6, id="grpo"),
    ],
)
def test_steps_of_tuned_runs_are_met_to_the_bit(make, arg, last, tmp_path):
    config = tuned(make, arg, tmp_path)
    last = min(last, config.steps)
    train.train(config, tmp_path / "run")
    fits = [n for n, of in reopen.INSTRUMENTS.items() if not of or make is sft]
    found = reopen.reopen(tmp_path / "run", last - 1, last, fits)
    assert found.off == 0.0 and last in found.met
    assert found.frames[-1].tables.keys() == {*fits}
    assert len(found.frames[-1].examples) >= config.batch_size
    if make is not sft:
        with pytest.raises(ValueError, match=r"attention is for rows of tokens"):
            reopen.reopen(tmp_path / "run", 1, 2, ["attention"])


def test_a_run_is_reopened_from_its_start_where_no_checkpoint_is_old_enough(spiked):
    found = reopen.reopen(spiked[0], 2, 3, [])
    assert (found.began, found.met, found.off) == (0, [1, 2, 3], 0.0)


def test_a_record_that_is_not_met_is_told_and_a_tolerance_lets_it_be(spiked, tmp_path):
    folder, _ = spiked
    text = (folder / "metrics.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    row = next(r for r in rows if r["step"] == 23 and "train_loss" in r)
    true = row["train_loss"]
    row["train_loss"] = true * (1 + 1e-4)
    (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    try:
        with pytest.raises(reopen.Unmet, match=r"step 23 .* train_loss .* again gives"):
            reopen.reopen(folder, 22, 24, [])
        found = reopen.reopen(folder, 22, 24, [], tolerance=1e-3)
        assert found.off == pytest.approx(1e-4, rel=0.01)
    finally:
        (folder / "metrics.jsonl").write_text(text)


def test_a_line_that_a_resume_cut_short_is_met_by_the_steps_after_it(tmp_path):
    def line(loss):
        sums = {"loss": 2 * loss, "weight": 2.0}
        return Line(sums, {"lr": 0.5, "grad_norm": loss, "skipped": 0})

    lines = {step: line(float(step)) for step in (5, 6, 7, 8)}
    row = {"step": 8, "lr": 0.5, "grad_norm": 8.0, "skipped": 0, "train_loss": 7.5}
    assert reopen.compare(tmp_path, row, lines, since=4, tolerance=0.0) == 0.0
    row["train_loss"] = 7.25
    with pytest.raises(reopen.Unmet, match=r"says train_loss 7\.25"):
        reopen.compare(tmp_path, row, lines, since=4, tolerance=0.0)
    # Of a line whose first steps are before the checkpoint the last step is met alone.
    assert reopen.compare(tmp_path, row, lines, since=2, tolerance=0.0) == 0.0
    row["lr"] = 0.25
    with pytest.raises(reopen.Unmet, match="says lr"):
        reopen.compare(tmp_path, row, lines, since=2, tolerance=0.0)


def test_other_data_other_steps_and_other_instruments_are_refused(spiked, tmp_path):
    folder, _ = spiked
    for args, sentence in (
        ((1, 60, []), "came to step 50"),
        ((0, 3, []), "from 1 on"),
        ((9, 3, []), "from 1 on"),
        ((1, 2, ["grad_norm"]), "did you mean grad_norms?"),
    ):
        with pytest.raises(ValueError, match=re.escape(sentence)):
            reopen.reopen(folder, *args)
    with pytest.raises(ValueError, match="is not a run folder"):
        reopen.reopen(tmp_path, 1, 2, [])
    text = folder.parent / "text.txt"
    kept = text.read_text()
    text.write_text(kept.replace("lazy", "busy"))
    try:
        with pytest.raises(ValueError, match="learnt from other data"):
            reopen.reopen(folder, 22, 23, [])
    finally:
        text.write_text(kept)


def frame(step, losses, **tables) -> Frame:
    examples = [Example(i, "", x, math.nan, (), ()) for i, x in enumerate(losses)]
    examples.sort(key=lambda example: -example.loss)
    mean = float(np.mean(losses))
    return Frame(step, mean, 1e-3, 1.0, False, tables, examples)


def test_a_step_whose_examples_are_all_worse_blames_the_weights():
    rng = np.random.default_rng(0)
    frames = [
        frame(step, 3 + 0.1 * rng.normal(size=8), grad_norms={"a": 1.0, "b": 1.0})
        for step in range(20)
    ]
    (_, told) = reopened.findings(frames)
    assert told == "No loss stands out from the others."
    frames[9] = frame(9, [9.0] * 8, grad_norms={"a": 5.0, "b": 1.1})
    told = reopened.findings(frames)
    assert "at step 9;" in told[0]
    assert told[1].startswith("It is the weights, not the data")
    assert "a 5.0 times" in told[2]
    frames[9] = frame(9, [3.0] * 7 + [30.0])
    told = reopened.findings(frames)
    assert told[1].startswith("It is the data: 1 of 8 examples stand out, first num")
