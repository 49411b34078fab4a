"""Training runs: what they leave behind, how they stop, how they go on."""

import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import (
    checkpoint,
    generation,
    metrics,
    model,
    runs,
    tasks,
    tokenizers,
    train,
)
from gpt_jax.checkpoint import arrays
from gpt_jax.report import compare
from tests import tiny
from tests.cases import few

TEXT = "the quick brown fox jumps over the lazy dog. " * 300


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = common.tiny(common.base())
    config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
    config.data.update(folder=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    config.model.context_length = 16
    config.hyper.decay_steps = 8.0  # so that a run cut short has the same schedule
    config.update(steps=8, eval_every=4, checkpoint_every=3, compile_cache="")
    config.tensorboard = False
    return config


def params_digest(folder):
    return checkpoint.digest(runs.open(folder, step="latest").params)


def test_a_run_leaves_everything_that_a_reader_expects(config, tmp_path):
    config.sample_every = 4
    config.tensorboard = True
    result = train.train(config, tmp_path / "run")
    assert (result.reason, result.step, result.exit_code) == ("steps", 8, 0)
    names = {path.name for path in (tmp_path / "run").iterdir()}
    wanted = {
        "config.json",
        "tokenizer.json",
        "metrics.jsonl",
        "loss.png",
        "samples.md",
    }
    assert wanted | {"checkpoints"} <= names
    rows = metrics.read(tmp_path / "run")
    last = {key: value for row in rows for key, value in row.items()}
    for key in ("step", "tokens", "seconds", "train_loss", "val_loss", "val_bpb", "lr"):
        assert key in last, f"metrics.jsonl has no {key}"
    assert last["tokens"] == 8 * 4 * 16
    first_val = next(row["val_loss"] for row in rows if "val_loss" in row)
    assert first_val == pytest.approx(np.log(28), abs=0.3)  # 28 characters, untrained
    assert last["val_loss"] < first_val
    # One byte a character: bits per byte is the loss in bits.
    assert last["val_bpb"] == pytest.approx(last["val_loss"] / np.log(2), rel=1e-5)
    assert "Step 8" in (tmp_path / "run" / "samples.md").read_text()


def evaluated(folder, name="val_loss"):
    return [row["step"] for row in metrics.read(folder) if name in row]


@pytest.mark.parametrize(
    "every, first, updates, steps",
    [
        (250, 20, 1, [20, 50, 100, 200]),
        (500, 20, 1, [20, 50, 100, 200]),
        (1000, 10, 1, [10, 20, 50, 100, 200, 500]),
        (20, 20, 1, []),
        (30, 1, 1, [1, 2, 5, 10, 20]),
        (250, 0, 1, []),
        (0, 20, 1, []),
        (300, 20, 3, []),
        (300, 10, 4, [20, 100, 200]),
    ],
)
def test_the_early_steps_are_1_2_5_times_powers_of_ten(every, first, updates, steps):
    config = common.base()
    config.update(eval_every=every, sample_every=0, early_from=first)
    task: Any = type("Task", (), {"updates": updates})
    early = train.early_steps(train.unpack(config), task)
    found = [n for n in range(1100) if train.due(n, every, early)]
    regular = range(0, 1100, every) if every else ()
    assert found == sorted({*steps, *regular})


@pytest.mark.slow
def test_early_evaluations_and_samples_survive_a_resume(config, tmp_path):
    config.update(steps=12, eval_every=9, sample_every=12, early_from=1)
    config.model.update(context_length=48, n_layers=1, d_model=16)
    config.sample.update(max_new_tokens=40, words=True)
    train.train(config, tmp_path / "whole")
    assert evaluated(tmp_path / "whole") == [0, 1, 2, 5, 9, 12]
    assert evaluated(tmp_path / "whole", "sample_words") == [0, 1, 2, 5, 10, 12]
    for config.steps in (7, 12):
        train.train(config, tmp_path / "parts")
    for name in ("val_loss", "sample_words"):
        rows = [metrics.read(tmp_path / run) for run in ("whole", "parts")]
        whole, parts = ({r["step"]: r[name] for r in run if name in r} for run in rows)
        assert whole.items() <= parts.items()  # each sitting ends with one more
    assert params_digest(tmp_path / "parts") == params_digest(tmp_path / "whole")


def test_words_of_samples_are_refused_where_there_is_no_running_text(config, tmp_path):
    config.task = common.task_answers()
    config.update(sample_every=2, data=common.base().data)
    config.data.tokenizer = "char"
    config.sample.words = True
    with pytest.raises(ValueError, match=r"sample\.words is True, but task answers"):
        train.train(config, tmp_path / "run")


@pytest.mark.slow
def test_the_collector_leaves_alone_what_a_run_was_built_of(config, tmp_path):
    frozen, evaluate_now = [], train.evaluate_now

    def look(*args):
        frozen.append(gc.get_freeze_count())
        return evaluate_now(*args)

    train.evaluate_now = look
    try:
        train.train(config, tmp_path / "run")
    finally:
        train.evaluate_now = evaluate_now
    assert frozen and min(frozen) > 50_000
    assert gc.get_freeze_count() == 0


@pytest.mark.slow
def test_no_thread_is_left_behind(config, tmp_path):
    before = set(threading.enumerate())
    train.train(config, tmp_path / "run")
    gc.collect()  # the iterator over batches ends its thread
    left = set(threading.enumerate()) - before
    assert not [thread.name for thread in left if "gpt_jax" in thread.name]
    assert not [thread.name for thread in left if "compile" in thread.name]


@pytest.mark.fault(10)
@pytest.mark.parametrize("strategy", few(["mesh", "pmap"], "mesh"))
def test_a_resumed_run_ends_bit_equal_to_an_uninterrupted_one(
    config, tmp_path, strategy
):
    config.mesh.update(strategy=strategy, data=2)
    config.hyper.dropout_residual = 0.1
    config.accumulate = 2
    config.optimizer.ema = True
    train.train(config, tmp_path / "whole")
    config.steps = 5
    train.train(config, tmp_path / "parts")
    config.steps = 8
    result = train.train(config, tmp_path / "parts")
    assert result.step == 8
    assert params_digest(tmp_path / "parts") == params_digest(tmp_path / "whole")

    def losses(name):
        rows = metrics.read(tmp_path / name)
        return {row["step"]: row["train_loss"] for row in rows if "train_loss" in row}

    whole, parts = losses("whole"), losses("parts")
    assert whole[2] == parts[2] and whole[4] == parts[4] and whole[8] == parts[8]


@pytest.mark.slow
@pytest.mark.fault(9)
def test_a_run_from_two_devices_opens_and_resumes_on_one(config, tmp_path):
    config.mesh.data = 2
    config.steps = 4
    train.train(config, tmp_path / "run")
    config.steps = 8
    config.mesh.data = 1
    result = train.train(config, tmp_path / "run")
    config.mesh.data = 2
    whole = train.train(config, tmp_path / "whole")
    assert result.numbers["val_loss"] == pytest.approx(
        whole.numbers["val_loss"], rel=1e-4
    )


@pytest.mark.slow
@pytest.mark.fault(9, injections=3)
def test_a_run_over_split_weights_goes_on_over_another_mesh(config, tmp_path):
    config.sample_every = 4
    config.mesh.data = 1
    whole = train.train(config, tmp_path / "whole")
    for steps, axes in {4: (1, 2, 1), 6: (1, 1, 2), 8: (2, 1, 1)}.items():
        config.mesh.data, config.mesh.fsdp, config.mesh.tensor = axes
        config.steps = steps
        moved = train.train(config, tmp_path / "run")
    assert moved.step == 8
    assert moved.numbers["val_loss"] == pytest.approx(whole.numbers["val_loss"], 1e-5)


@pytest.mark.slow
@pytest.mark.fault(3)
def test_an_evaluation_that_a_signal_cut_short_is_made_up_for(config, tmp_path):
    """Oracle: a run that nobody interrupted."""
    config.patience = 9
    whole = train.train(config, tmp_path / "whole")

    evaluate_now = train.evaluate_now

    def interrupt(job, state, totals, step):
        if step == 4:
            job.stop.signal = signal.SIGTERM
        return evaluate_now(job, state, totals, step)

    train.evaluate_now = interrupt
    try:
        cut = train.train(config, tmp_path / "cut")
    finally:
        train.evaluate_now = evaluate_now
    assert (cut.reason, cut.step, cut.exit_code) == ("signal", 4, 143)
    rest = train.train(config, tmp_path / "cut")
    assert rest.numbers["val_loss"] == whole.numbers["val_loss"]

    def evaluations(name):
        rows = metrics.read(tmp_path / name)
        return {row["step"]: row["val_loss"] for row in rows if "val_loss" in row}

    assert evaluations("cut") == evaluations("whole")


@pytest.mark.slow
def test_a_run_goes_on_when_the_run_that_it_started_from_is_gone(config, tmp_path):
    train.train(config, tmp_path / "first")
    config.init_from = str(tmp_path / "first")
    train.train(config, tmp_path / "second")
    shutil.rmtree(tmp_path / "first")
    config.steps = 10
    assert train.train(config, tmp_path / "second").step == 10


@pytest.mark.slow
def test_a_profile_is_written_however_few_steps_are_left(config, tmp_path):
    config.steps = 2
    train.train(config, tmp_path / "run", profile=5)
    assert list((tmp_path / "run" / "profile").rglob("*.pb"))


def test_a_changed_config_is_refused_and_nothing_is_overwritten(config, tmp_path):
    train.train(config, tmp_path / "run")
    before = (tmp_path / "run" / "config.json").read_text()
    config.hyper.lr = 0.5
    with pytest.raises(ValueError, match=r"hyper\.lr"):
        train.train(config, tmp_path / "run")
    assert (tmp_path / "run" / "config.json").read_text() == before


@pytest.mark.fault(32)
def test_the_best_begins_anew_where_evaluations_are_of_something_else(
    config, tmp_path, capsys
):
    """The old best was lower; nothing of it takes part: best, patience, the record."""
    config.update(steps=4, eval_every=2, checkpoint_every=2, patience=2)
    config.hyper.update(lr=1e-2, warmup_steps=0.0)
    train.train(config, tmp_path / "run")
    old = metrics.read(tmp_path / "run")[-1]["val_loss"]
    assert runs.open(tmp_path / "run").step == 4
    config.hyper.decay_steps, config.steps = 4.0, 12  # from now on nothing is learnt
    config.hyper.final_lr_ratio = 0.0
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    config.allow_data_change = True
    saved = runs.read_config(tmp_path / "run")
    saved.hyper.update(decay_steps=4.0, final_lr_ratio=0.0)
    (tmp_path / "run" / "config.json").write_text(saved.to_json())
    capsys.readouterr()
    result = train.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert said.count(f"the best loss, {old:.4f} until here, begins anew") == 1
    # The evaluation after step 6 is the first of its kind, so a best one.
    rows = {r["step"]: r for r in metrics.read(tmp_path / "run") if "val_loss" in r}
    assert rows[6]["val_loss"] > old and rows[6]["evaluated_since"] == 5
    assert "evaluated_since" not in rows[4]
    assert (result.reason, result.step) == ("patience", 10)
    assert runs.open(tmp_path / "run").step == 6
    train.train(config, tmp_path / "run")
    assert "begins anew" not in capsys.readouterr().out


@pytest.mark.fault(22)
def test_a_run_that_does_not_say_what_it_measured_goes_on_where_nothing_changed(
    config, tmp_path, capsys
):
    train.train(config, tmp_path / "run")
    parts, old = tmp_path / "run", train.Totals(best=0.5, stale=2)
    task = train.make_task(train.unpack(config), parts)
    shared: Any = type("Parts", (), {"task": task, "measured": "now"})
    totals, told = train.resumed(config, parts, shared, old, 8)
    assert (totals, told) == (old._replace(measured="now"), [])
    config.eval_windows = 3
    totals, told = train.resumed(config, parts, shared, old, 8)
    assert totals.best == float("inf") and totals.since == 9 and len(told) == 1


def test_a_command_with_fewer_steps_leaves_the_run_as_it_is(config, tmp_path):
    train.train(config, tmp_path / "run")
    kept = {p: p.read_bytes() for p in (tmp_path / "run").rglob("*") if p.is_file()}
    for steps in (4, 8, 0):
        config.steps, config.log_every = steps, 1
        result = train.train(config, tmp_path / "run")
        assert (result.reason, result.step, result.trained) == ("steps", 8, False)
    assert kept == {p: p.read_bytes() for p in kept}
    config.steps = 9
    assert train.train(config, tmp_path / "run").trained
    assert runs.read_config(tmp_path / "run").steps == 9


@pytest.mark.slow
def test_a_run_without_a_step_can_be_sampled_and_gone_on_with(config, tmp_path):
    config.steps = 0
    assert train.train(config, tmp_path / "run").trained
    assert runs.open(tmp_path / "run").step == 0
    config.steps = 8
    train.train(config, tmp_path / "whole")
    assert train.train(config, tmp_path / "run").step == 8
    assert params_digest(tmp_path / "run") == params_digest(tmp_path / "whole")


def test_a_rate_that_moves_when_a_run_is_extended_is_told(config, tmp_path):
    config.hyper.update(decay_steps=0.0, final_lr_ratio=0.0)
    old = config.copy_and_resolve_references()
    config.steps = 16
    task = train.make_task(train.unpack(config), tmp_path / "run")
    (told,) = train.rate_moves(train.unpack(old), train.unpack(config), task, 8)
    # Half of a cosine over 16 steps, 2 of them warm-up, is left at step 8.
    rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * 6 / 14))
    assert f"at step 8 the learning rate goes from 0 to {rate:.2g}" in told
    assert "--config.hyper.decay_steps=8 keeps it" in told
    config.hyper.decay_steps = 8.0
    assert train.rate_moves(train.unpack(old), train.unpack(config), task, 8) == []


@pytest.mark.fault(14)
def test_updates_that_are_skipped_are_told_and_a_run_of_none_has_failed(
    config, tmp_path, capsys
):
    config.update(steps=3, eval_every=0, max_skipped=10, log_every=3)
    config.hyper.update(lr=3e38, weight_decay=3e38, warmup_steps=3.0)
    config.hyper.initial_lr_ratio = 1.0
    with pytest.raises(FloatingPointError, match="3 updates in a row were not finite"):
        train.train(config, tmp_path / "run")
    said = capsys.readouterr().out
    assert "the warm-up of 3 steps is as long as the run of 3, or longer" in said
    for step in (1, 2, 3):
        assert f"step {step}: not finite; update skipped" in said


@pytest.mark.fault(11)
def test_changed_data_under_a_run_is_refused(config, tmp_path):
    train.train(config, tmp_path / "run")
    (tmp_path / "text.txt").write_text(TEXT[::-1])
    config.steps = 10
    with pytest.raises(ValueError, match="data"):
        train.train(config, tmp_path / "run")


@pytest.mark.slow
def test_max_bytes_ends_runs_of_any_tokenizer_after_the_same_text(config, tmp_path):
    """Oracle: the ids of the text themselves, decoded."""
    text = "naïve façade, 5 € a piece. " * 200
    (tmp_path / "text.txt").write_text(text)
    config.data.update(source=str(tmp_path / "text.txt"), folder=str(tmp_path / "data"))
    config.update(max_bytes=2000, steps=10_000, eval_every=40)
    spent = {}
    for kind in ("char", "byte"):
        config.data.tokenizer = kind
        result = train.train(config, tmp_path / kind)
        assert result.reason == "max_bytes"
        each = config.batch_size * config.model.context_length
        length = 1 if kind == "byte" else len(text.encode()) / len(text)
        assert result.step == math.ceil(2000 / (each * length))
        spent[kind] = metrics.read(tmp_path / kind)[-1]["bytes"]
        assert spent[kind] == pytest.approx(result.step * each * length, rel=2e-3)
        assert train.train(config, tmp_path / kind).trained is False
    assert spent["char"] == pytest.approx(spent["byte"], rel=0.05)
    assert compare.compare([tmp_path / "char"]).settings[0].state == "done"
    config.task = common.task_sft()
    assert "max_bytes" in train.unread(config)


def test_max_tokens_patience_and_max_seconds_end_a_run(config, tmp_path):
    config.max_tokens = 3 * 4 * 16 - 1
    assert train.train(config, tmp_path / "tokens").step == 3
    config.max_tokens = 0
    config.max_seconds = 1e-9
    result = train.train(config, tmp_path / "seconds")
    assert (result.reason, result.step) == ("max_seconds", 1)
    config.max_seconds = 0.0
    config.update(patience=2, eval_every=1, steps=50)
    config.hyper.update(lr=0.0, matrix_lr=0.0)  # never gets better than at step 0
    result = train.train(config, tmp_path / "patience")
    assert (result.reason, result.step) == ("patience", 2)


def test_a_new_run_starts_from_the_weights_of_another(config, tmp_path):
    config.hyper.warmup_steps = 0.0
    train.train(config, tmp_path / "first")
    config.init_from = str(tmp_path / "first")
    config.hyper.update(lr=0.0, weight_decay=0.0)
    config.data.tokenizer = "byte"  # the first run's tokenizer is what counts
    train.train(config, tmp_path / "second")
    assert params_digest(tmp_path / "first") == params_digest(tmp_path / "second")
    config.model.d_model = 64
    with pytest.raises(ValueError, match="of another model"):
        train.train(config, tmp_path / "third")
    config.model.update(d_model=32, context_length=32)
    with pytest.raises(ValueError, match="learnt vectors for 16 positions: take 16"):
        train.train(config, tmp_path / "third")
    assert not (tmp_path / "third" / "config.json").exists()


def test_weights_of_another_task_lose_and_gain_only_what_the_task_names():
    key = jax.random.key(0)
    old, new = tiny.cfg(tie_embeddings=False), tiny.cfg(n_classes=3)
    weights = model.init(old, jax.random.key(1))
    nothing: Any = None
    task = tasks.Task(
        *(model.GPT(new), nothing, nothing, nothing, nothing, 8, ""),
        draws=("^classifier/",),
        drops=("^head/",),
    )
    got = train.adopt(weights, task, key)
    checkpoint.check_same(model.init(new, key), got)
    kept, first = got["block_1"], weights["block_1"]
    jax.tree.map(np.testing.assert_array_equal, kept, first)
    assert np.abs(got["classifier"]["kernel"]).max() > 0
    again = train.adopt(got, task, jax.random.key(2))  # a classifier is kept whole
    np.testing.assert_array_equal(
        again["classifier"]["kernel"], got["classifier"]["kernel"]
    )
    plain = task._replace(draws=(), drops=())
    assert train.adopt(weights, plain, key).keys() == weights.keys()


@pytest.mark.fault(15)
def test_a_run_of_nothing_but_nan_stops_and_saves_none_of_it(config, tmp_path):
    config.hyper.update(lr=1e30, clip=0.0, warmup_steps=0.0)
    config.update(max_skipped=2, steps=40, log_every=1)
    config.optimizer.name = "sgd"
    with pytest.raises(FloatingPointError, match=r"updates in a row .* step \d+"):
        train.train(config, tmp_path / "run")
    saved = checkpoint.Checkpoints(tmp_path / "run" / "checkpoints", keep=9)
    for step in saved.steps():
        tree, *_ = saved.load(only=("params",), step=step)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree))


@pytest.mark.fault(21)
@pytest.mark.fault(6)
def test_the_last_checkpoint_is_not_passed_over(config, tmp_path, monkeypatch):
    """Nor where the folder itself refuses it, before anything is written."""
    config.on_save_error, made = "continue", arrays.writer

    def refuse(target, items):
        if target.name == str(config.steps):
            raise OSError(13, "Permission denied")
        return made(target, items)

    monkeypatch.setattr(arrays, "writer", refuse)
    with pytest.raises(OSError, match=f"step {config.steps}, the last one, is not in"):
        train.train(config, tmp_path / "run")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"accumulate": 3}, "batch_size 4 is not a multiple of accumulate 3"),
        ({"steps": -1}, "steps is -1"),
        ({"hyper.lr": float("nan")}, "hyper.lr is nan"),
        ({"hyper.lr": 1e39}, "hyper.lr is 1e"),
        ({"seed": -1}, "seed is -1"),
        ({"optimizer.freeze": ("(",)}, "not a regular expression"),
        ({"model.pattern": ({"window": 1},)}, "rope_base"),
        ({"sample_every": 1, "sample.top_p": 2.0}, "top_p"),
        ({"hyper.dropout_attn": 1.0}, "hyper.dropout_attn is 1.0"),
        ({"hyper.beta2": 1.0}, "hyper.beta2 is 1.0"),
        ({"optimizer.freeze": ("nothing",)}, "nothing"),
        ({"model.n_heads": 5}, "d_model 32 is not a multiple of n_heads 5"),
        ({"task.name": "nothing"}, "task.name 'nothing' is not one of: lm"),
        ({"data.seq_len": 99}, "data.seq_len 99 is more than model.context_length 16"),
        ({"model.vocab_size": 3}, "model.vocab_size 3 is less than the tokenizer's 28"),
        ({"model.context_length": 99_999}, "window"),
        ({"init_from": "no/such/run"}, "no/such/run"),
    ],
)
def test_a_wrong_config_is_refused_before_a_run_folder_exists(
    config, tmp_path, change, message
):
    for path, value in change.items():
        *parents, key = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        node[key] = value
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()


def spawn(config, tmp_path, name):
    """Trains in a process of its own; returns it, with its output to read."""
    path = tmp_path / f"{name}.json"
    path.write_text(config.to_json())
    code = (
        "import json, sys; from ml_collections import ConfigDict; "
        "from gpt_jax import train; "
        f"config = ConfigDict(json.load(open({str(path)!r}))); "
        f"sys.exit(train.train(config, {str(tmp_path / name)!r}).exit_code)"
    )
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def read_until(process, word):
    """Reads the process's output up to a line with `word`; drains the rest aside."""
    for line in process.stdout:
        if word in line:
            break
    else:
        pytest.fail(f"the run ended without printing {word!r}")
    threading.Thread(target=process.stdout.read, daemon=True).start()


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(signal.SIGTERM, marks=[pytest.mark.fault(3), pytest.mark.slow]),
        pytest.param(signal.SIGKILL, marks=pytest.mark.fault(2)),
    ],
)
def test_a_killed_run_goes_on_to_the_parameters_of_an_undisturbed_one(
    config, tmp_path, kill
):
    config.update(steps=60, eval_every=10, checkpoint_every=5, log_every=5)
    config.mesh.data = 1  # this process has eight devices, the others choose
    train.train(config, tmp_path / "whole")
    process = spawn(config, tmp_path, "killed")
    read_until(process, "step 10:")
    process.send_signal(kill)
    code = process.wait(timeout=60)
    assert code == (143 if kill == signal.SIGTERM else -signal.SIGKILL)
    reached = max(row["step"] for row in metrics.read(tmp_path / "killed"))
    if kill == signal.SIGTERM and reached < 60:
        assert runs.open(tmp_path / "killed", step="latest").step >= reached
    again = spawn(config, tmp_path, "killed")
    out, _ = again.communicate(timeout=100)
    assert again.returncode == 0, out
    assert params_digest(tmp_path / "killed") == params_digest(tmp_path / "whole")
    steps = [row["step"] for row in metrics.read(tmp_path / "killed") if "lr" in row]
    assert steps == sorted(set(steps)) == [1, *range(5, 61, 5)]


@pytest.fixture
def published(tmp_path) -> Path:
    """The golden GPT-2 with a tokenizer: a Hugging Face folder."""
    golden = Path(__file__).parent / "golden" / "gpt2"
    folder = Path(shutil.copytree(golden, tmp_path / "gpt2"))
    tokenizers.train("char", [TEXT]).add_special(["<|endoftext|>"]).save(
        folder / "tokenizer.json"
    )
    return folder


@pytest.mark.slow
def test_a_new_run_starts_from_published_weights(config, published, tmp_path):
    (published / "generation_config.json").write_text('{"temperature": 0.25}')
    config.init_from = f"hf:{published}"
    config.model.update(vocab_size=128, context_length=64, n_layers=2, d_model=32)
    config.model.update(n_heads=4, vocab_multiple=50, scan_layers=True)
    config.hyper.update(lr=0.0, weight_decay=0.0)
    config.data.folder = str(tmp_path / "data")
    config.steps = 2
    train.train(config, tmp_path / "run")
    shutil.rmtree(published)  # resuming needs it no more
    config.steps = 3
    train.train(config, tmp_path / "run")
    run = runs.open(tmp_path / "run")
    assert run.tokenizer.eos_id == run.tokenizer.vocab_size - 1
    assert generation.of(tmp_path / "run").settings["temperature"] == 0.25
    answers = np.load(Path(__file__).parent / "golden/gpt2/answers.npz")
    found, _ = run.model.apply({"params": run.params}, answers["ids"])
    assert np.abs(found - answers["logits"]).max() < 1e-4


def test_published_weights_of_another_shape_are_refused(config, published, tmp_path):
    config.init_from = f"hf:{published}"
    with pytest.raises(ValueError, match="vocab_size 128 instead of"):
        train.train(config, tmp_path / "run")
    config.init_from = f"hf:{tmp_path / 'absent'}"
    with pytest.raises(ValueError, match="absent"):
        train.train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "config.json").exists()
