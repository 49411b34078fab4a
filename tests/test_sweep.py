"""Sweeps: what a file may say, what is refused before harm, kills that lose nothing.

The oracle of every kill is the same sweep, undisturbed.
"""

import json
import math
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from configs import common
from experiments import door
from gpt_jax import metrics, runs, train
from gpt_jax.sweep import (
    batch,
    checks,
    engine,
    plan,
    record,
    space,
    storage,
    trial,
)
from gpt_jax.sweep import run as sweeps
from gpt_jax.sweep import study as studies
from tests import tiny

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "experiments/sweeps").glob("*.py"))

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")
pytest.importorskip("distributed", reason="needs distributed: pip install distributed")


@pytest.fixture
def base(tmp_path):
    """A config of a second, which reads a text in tmp_path."""
    config = tiny.on_text(tmp_path)
    config.update(steps=8, eval_every=2, checkpoint_every=4, eval_windows=4)
    return config


def make(points=None, **settings):
    points = None if points is None else tuple(points)
    settings = {"fixed": {}, "config": "configs/quickstart.py:size=tiny", **settings}
    return plan.Plan(name="test", points=points, **settings)


def sweep_file(folder, text):
    path = folder / "mine.py"
    path.write_text(text)
    return path


# --- points ---------------------------------------------------------------------------


def test_a_grid_is_every_combination_and_together_is_side_by_side():
    axes = {"a": (1, 2), "b": (3, 4)}
    assert space.grid(axes) == [
        *({"a": 1, "b": 3}, {"a": 1, "b": 4}, {"a": 2, "b": 3}, {"a": 2, "b": 4})
    ]
    assert space.together(axes) == [{"a": 1, "b": 3}, {"a": 2, "b": 4}]
    with pytest.raises(ValueError, match="a 2, b 1"):
        space.together({"a": (1, 2), "b": (1,)})


def test_a_product_joins_points_and_refuses_a_key_given_twice():
    points = space.product(space.grid({"a": (1, 2)}), space.seeds(2, first=5))
    assert points == [{"a": a, "seed": seed} for a in (1, 2) for seed in (5, 6)]
    with pytest.raises(ValueError, match="seed twice"):
        space.product(space.seeds(2), space.seeds(2))


def test_samples_are_points_in_their_order_and_the_same_each_time():
    points = space.grid({"a": range(100)})
    chosen = space.sample(points, 10, seed=1)
    assert chosen == space.sample(points, 10, seed=1)
    assert chosen != space.sample(points, 10, seed=2)
    values = [point["a"] for point in chosen]
    assert values == sorted(set(values)) and len(values) == 10
    with pytest.raises(ValueError, match="101 of only 100"):
        space.sample(points, 101)


def test_random_points_stay_in_their_ranges():
    axes = {
        "log": space.log_uniform(1e-4, 1e-1),
        "whole": space.integer(2, 8, step=3),
        "any": space.uniform(-1, 1),
        "one": space.choice("x", "y"),
    }
    points = space.random(axes, 300)
    assert {point["whole"] for point in points} == {2, 5, 8}
    assert {point["one"] for point in points} == {"x", "y"}
    assert all(1e-4 <= point["log"] <= 1e-1 for point in points)
    # A third of a log-uniform range of three decades lies in each of them.
    low = sum(point["log"] < 1e-3 for point in points)
    assert 70 < low < 130
    assert -1 <= min(point["any"] for point in points) < -0.9


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        (lambda: space.uniform(2, 1), "from low to high, not from 2.0 to 1.0"),
        (lambda: space.log_uniform(0, 1), "starts above 0"),
        (lambda: space.integer(1, 8, step=3), "does not end at 8"),
        (lambda: space.choice(), "no values"),
        (lambda: space.asha(first=0), "at least step 1"),
        (lambda: space.asha(first=1, factor=1), "factor=1: at least 2"),
        (lambda: space.asha(first=4, last=2), "last=2: it must not be below first"),
        (lambda: space.median(first=1, trials=0), "at least 1"),
    ],
)
def test_a_range_that_cannot_be_is_refused(wrong, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        wrong()


def test_names_are_short_and_always_different():
    points = [{"hyper.lr": 1e-3, "model.d_model": 64}, {"hyper.lr": 2e-3, "seed": 1}]
    assert space.names(points) == ["lr=0.001,d_model=64", "lr=0.002,seed=1"]
    close = [{"hyper.lr": 0.00123451}, {"hyper.lr": 0.00123452}]
    assert space.names(close) == ["lr=0.00123451", "lr=0.00123452"]
    paths = [{"data.source": "a/b"}, {"data.source": "a_b"}]
    assert len(set(space.names(paths))) == 2
    assert not any("/" in name for name in space.names(paths))
    (long,) = space.names([{"data.source": "x" * 300}])
    assert len(long) <= space.LONGEST
    assert space.short_keys(["optimizer.name", "task.name", "a.lr", "b.lr"]) == {
        "optimizer.name": "optimizer",
        "task.name": "task",
        "a.lr": "a.lr",
        "b.lr": "b.lr",
    }
    with pytest.raises(ValueError, match="points 0 and 2 are the same"):
        space.names([{"seed": 1}, {"seed": 2}, {"seed": 1}])


# --- files ----------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_a_ready_sweep_fits_its_config_and_says_what_it_is(path):
    doc = runpy.run_path(str(path))["__doc__"]
    for word in ("What:", "Expected:", "Time:", f"experiments/sweeps/{path.name}"):
        assert word in doc, f"{path.name} does not say {word!r}"
    ready = plan.load(path)
    mine = re.sub(r"\brun=[^,]*", "run=", ready.config)  # the reader's run folder
    ready = replace(ready, config=mine)
    ready, config = plan.fix(ready, door.load_config(ready.config))
    if ready.space:
        configs = [corner for _, corner in plan.corners(config, ready)]
    else:
        built = plan.configs(config, ready).items()
        configs = [point for _, (_, point) in built]
        if path.stem != "book_classifier":  # whose rows differ in the reader's run
            checks.all_differ([(name, point) for name, (_, point) in built], ready)
    for config in configs:
        train.check(config)
    checks.all_read([("", config) for config in configs], ready)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("config = 'c'\ndef points(): return []", "is empty: points() gave no point"),
        ("config = 'c'\nspace = {}", "is empty: its space has no key"),
        ("def points(): return [{}]", "names no config"),
        ("config = 'c'", "must define either points() or a space"),
        (
            "config = 'c'\nprunner = 1\ndef points(): return [{}]",
            "did you mean pruner?",
        ),
        ("config = 1 / 0", "ZeroDivisionError: division by zero"),
        (
            "config = 'c'\nsampler = 'tpo'\ndef points(): return [{}]",
            "sampler 'tpo' is not one of: tpe",
        ),
        (
            "from gpt_jax.sweep.space import *\nconfig = 'c'\n"
            "space = {'hyper.lr': uniform(0, 1)}",
            "say how long, trials = 20",
        ),
        (
            "config = 'c'\nfixed = {'seed': 1}\ndef points(): return [{'seed': 2}]",
            "seed is fixed, so it cannot be swept as well",
        ),
    ],
)
def test_a_sweep_file_that_cannot_be_is_refused(tmp_path, text, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan.load(sweep_file(tmp_path, text))


def test_a_point_may_choose_options_of_the_config_file():
    points = [
        {"config": "train=head,adapter=full", "hyper.lr": 0.5},
        {"config": "adapter=lora"},
        {"hyper.lr": 0.25},
    ]
    mine = make(points, config="configs/classify.py:size=tiny", fixed={"steps": 3})
    mine, base = plan.fix(mine, door.load_config(mine.config))
    built = plan.configs(base, mine)
    names = ["train=head,adapter=full,lr=0.5", "adapter=lora", "lr=0.25"]
    assert list(built) == names
    head, lora, plain = (config for _, config in built.values())
    assert (
        head.optimizer.freeze and head.hyper.lr == 0.5 and head.adapter.name == "full"
    )
    assert lora.adapter.name == "lora" and not lora.optimizer.freeze
    assert plain.hyper.lr == 0.25 and plain.adapter.name == "full"
    assert {config.steps for config in (head, lora, plain)} == {3}
    words = plan.command(mine, points[0], "runs/x")
    assert "--config=configs/classify.py:size=tiny,train=head,adapter=full" in words
    assert not any(word.startswith("--config.config") for word in words)
    with pytest.raises(ValueError, match=r"point 0 .*is not one of: all, head"):
        plan.configs(base, make([{"config": "train=tail"}], config=mine.config))


def test_a_missing_file_and_a_word_that_is_no_setting_are_refused(tmp_path):
    with pytest.raises(ValueError, match="there is no sweep file"):
        plan.load(tmp_path / "absent.py")
    path = sweep_file(tmp_path, "config = 'c'\ndef points(): return [{'seed': 1}]")
    with pytest.raises(ValueError, match="write --set=KEY=VALUE"):
        plan.load(path, extra=["steps"])


def test_settings_of_the_command_line_take_the_types_of_the_config(base, tmp_path):
    path = sweep_file(tmp_path, "config = 'c'\ndef points(): return [{'seed': 1}]")
    extra = ["steps=20", "hyper.lr=3", "model.qk_norm=True", "data.tokenizer=char"]
    fixed, config = plan.fix(plan.load(path, extra=extra), base)
    assert fixed.fixed["steps"] == 20 and config.steps == 20
    assert config.hyper.lr == 3.0 and isinstance(config.hyper.lr, float)
    assert config.model.qk_norm is True and config.data.tokenizer == "char"
    assert base.steps == 8


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ({"hyper.lrr": 1.0}, "no config key 'hyper.lrr'; did you mean hyper.lr?"),
        ({"hyper": 1.0}, "hyper is a group of settings: give its keys one by one"),
        ({"hyper": {"lr": 0.1}}, "hyper is a group of settings: give its keys one by"),
        ({"hyper.lr.x": 1.0}, "no config key 'hyper.lr.x'"),
        ({"steps": 1.5}, "steps is 1.5: it must be of the type int"),
        ({"steps": True}, "steps is True: it must be of the type int"),
        ({"hyper.lr": "fast"}, "hyper.lr is 'fast': it must be of the type float"),
        ({"data.tokenizer": 3}, "data.tokenizer is 3: it must be of the type str"),
        ({"model.qk_norm": 1}, "model.qk_norm is 1: it must be of the type bool"),
    ],
)
def test_an_override_must_name_a_key_and_have_its_type(base, point, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        plan.override(base, point)


# --- checks before the first trial ----------------------------------------------------


def test_what_no_trial_reads_is_refused_and_what_some_read_is_not(base):
    base = plan.override(base, {"optimizer.name": "adamw"})
    rates = [{"hyper.matrix_lr": rate} for rate in (0.01, 0.03)]

    def check(mine):
        checks.all_read(
            [(k, c) for k, (_, c) in plan.configs(base, mine).items()], mine
        )

    told = "matrix_lr is set, but optimizer adamw does not read it"
    with pytest.raises(ValueError, match=told):
        check(make(rates))
    with pytest.raises(ValueError, match=told):
        check(make([{"seed": 1}], fixed={"hyper.matrix_lr": 0.03}))
    check(make([*rates, {"optimizer.name": "muon", "hyper.matrix_lr": 0.01}]))
    drawn = {"hyper.matrix_lr": space.uniform(0.01, 0.03)}
    searched = make(space=drawn, trials=2)
    with pytest.raises(ValueError, match=told):
        checks.all_read(plan.corners(base, searched), searched)
    drawn["optimizer.name"] = space.choice("adamw", "muon")
    searched = make(space=drawn, trials=2)
    checks.all_read(plan.corners(base, searched), searched)


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"model.n_heads": 3}, "is not a multiple of"),
        ({"optimizer.name": "adamv"}, "adamv"),
        ({"data.tokenizer": "bbpe"}, "bbpe"),
        ({"hyper.beta1": 1.0}, "hyper.beta1 is 1.0: it must be below 1"),
    ],
)
def test_a_mistake_in_point_17_is_found_before_point_0_runs(base, wrong, sentence):
    right = {key: _value(base, key) for key in wrong}
    points = [{"seed": i, **right} for i in range(20)]
    points[17] |= wrong
    with pytest.raises(ValueError, match=r"point 17 \(.*\): .*" + re.escape(sentence)):
        sweeps.check(make(points), base)


def _value(config, dotted):
    for key in dotted.split("."):
        config = config[key]
    return config


def test_the_ends_of_a_space_are_checked(base):
    wrong = {"hyper.beta1": space.uniform(0.5, 1.0), "hyper.lr": space.uniform(0, 1)}
    with pytest.raises(ValueError, match=r"hyper.beta1=1.0: .* must be below 1"):
        sweeps.check(make(space=wrong, trials=3), base)


def test_a_pruner_needs_evaluations_on_the_way(base):
    base.eval_every = 0
    with pytest.raises(ValueError, match="needs evaluations on the way"):
        sweeps.check(make(space.seeds(2), pruner=space.asha(first=2)), base)
    base.eval_every = 2
    with pytest.raises(ValueError, match="first judges at step 8"):
        sweeps.check(make(space.seeds(2), pruner=space.asha(first=8)), base)


@pytest.mark.parametrize("metric", ["val_accuracy", "val_los", "train_los"])
def test_a_misspelt_metric_is_refused_before_anything_runs(base, tmp_path, metric):
    chosen = make(space.seeds(2), metric=metric)
    with pytest.raises(ValueError, match=f"metric '{metric}' is not one of: .*val_bpb"):
        batched(chosen, base, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_metrics_of_a_run_are_known_before_it_trains(base, tmp_path):
    """Oracle: the record of the run."""
    task = train.make_task(train.unpack(base), tmp_path / "none")
    told = set(checks.metrics_of(base, task)) - {"mfu"}  # a CPU has no known peak
    train.train(base, tmp_path / "run")
    rows = metrics.read(tmp_path / "run")
    assert told == {name for row in rows for name in row} - {"step"}


def test_a_mean_of_evaluations_needs_as_many(base):
    """8 steps, evaluated every 2."""
    sweeps.check(make([{}], at="last 4"), base)
    with pytest.raises(ValueError, match=r"'last 5', but a run of 8 steps .* has 4 ev"):
        sweeps.check(make([{}], at="last 5"), base)


def test_two_points_that_are_one_run_are_refused(base):
    default = base.hyper.weight_decay
    points = [{"seed": 1}, {"seed": 1, "hyper.weight_decay": default}]
    with pytest.raises(ValueError, match=r"point 1 \(.*\) is the same run as point 0"):
        sweeps.check(make(points), base)
    twice = make([{"hyper.weight_decay": 0}, {"hyper.weight_decay": 0.0}])
    with pytest.raises(ValueError, match="points 0 and 1 are the same"):
        sweeps.check(twice, base)


def test_losses_per_token_do_not_rank_trials_of_different_tokenizers(base):
    points = space.grid({"data.tokenizer": ("char", "byte")})
    with pytest.raises(ValueError, match=r"another tokenizer .* metric = 'val_bpb'"):
        sweeps.check(make(points), base)
    sweeps.check(make(points, metric="val_bpb"), base)


# --- the record -----------------------------------------------------------------------


def open_study(chosen, base, out, **more):
    more = {"storage": "", "retries": 1, **more}
    return studies.Study(chosen, base, out, **more)


def result(value, status="done"):
    return {"status": status, "reason": "steps", "value": value, "step": 8, "at": 8}


def drain(study, value=lambda trial: 1.0, at_most=100):
    """Ends up to so many trials as if they had run; returns their names."""
    names = []
    while len(names) < at_most and (found := study.next(lambda name, config: None)):
        study.finish(found, result(value(found)))
        names.append(found.name)
    return names


def test_a_study_opened_again_gives_only_what_is_missing(base, tmp_path):
    chosen = make(space.seeds(5, first=0))
    first = open_study(chosen, base, tmp_path / "out")
    assert drain(first, at_most=2) == ["seed=0", "seed=1"]
    left = first.next(lambda *_: None)  # running when the sweep dies
    assert left.name == "seed=2"
    again = open_study(chosen, base, tmp_path / "out")
    assert again.left() == 3
    assert [again.trials[f"seed={i}"].status for i in (0, 1, 2)] == [
        *("done", "done", "waiting")
    ]
    reclaimed = again.next(lambda *_: None)
    assert reclaimed is not None
    assert (reclaimed.name, reclaimed.number) == (left.name, left.number)
    again.again(reclaimed)
    assert drain(again) == ["seed=2", "seed=3", "seed=4"]


def test_a_trial_that_ended_while_nobody_watched_is_not_run_again(base, tmp_path):
    chosen, out = make(space.seeds(2, first=0)), tmp_path / "out"
    first = open_study(chosen, base, out)
    trial_ = first.next(lambda *_: None)
    record.write(out / trial_.name / record.OUTCOME, result(0.5))
    again = open_study(chosen, base, out)
    assert again.trials["seed=0"].status == "done"
    assert again.best().mean.value == 0.5
    assert drain(again) == ["seed=1"]


def test_a_line_of_the_journal_cut_short_by_a_kill_is_mended(base, tmp_path):
    chosen, out = make(space.seeds(4, first=0)), tmp_path / "out"
    drain(open_study(chosen, base, out), at_most=2)
    journal = out / studies.JOURNAL
    with journal.open("ab") as file:
        file.write(b'{"op_code":4,"worker_')
    assert drain(open_study(chosen, base, out)) == ["seed=2", "seed=3"]
    assert open_study(chosen, base, out).left() == 0


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_a_search_that_was_stopped_draws_what_an_undisturbed_one_draws(
    base, tmp_path, sampler
):
    axes = {
        "hyper.lr": space.log_uniform(1e-4, 1e-1),
        "model.n_layers": space.integer(1, 4),
        "optimizer.name": space.choice("adamw", "lion"),
    }
    chosen = make(space=axes, trials=14, sampler=sampler, seed=3)

    def loss(trial):
        point = trial.overrides
        return abs(point["hyper.lr"] - 0.01) + point["model.n_layers"]

    whole = drain(open_study(chosen, base, tmp_path / "whole"), loss)
    parts = drain(open_study(chosen, base, tmp_path / "parts"), loss, at_most=5)
    parts += drain(open_study(chosen, base, tmp_path / "parts"), loss)
    assert len(set(whole)) == 14
    assert parts == whole
    form = r"\d{3}-lr=[\d.e-]+,n_layers=\d,optimizer=(adamw|lion)"
    assert all(re.fullmatch(form, name) for name in whole)


def test_a_search_does_not_train_the_same_values_twice(base, tmp_path):
    axes = {"optimizer.name": space.choice("adamw", "lion")}
    chosen = make(space=axes, trials=8, sampler="random")
    study = open_study(chosen, base, tmp_path / "out")
    assert len(drain(study)) == 2
    assert study.left() == 0
    twins = [t for t in study.trials.values() if "same_as" in t.outcome]
    assert len(twins) == 6 and all(t.status == "done" for t in twins)


def test_a_sampler_whose_package_is_absent_is_named(base, tmp_path, monkeypatch):
    axes = {"hyper.lr": space.uniform(0.1, 1)}
    monkeypatch.setitem(sys.modules, "cmaes", None)
    find = storage.importlib.util.find_spec
    monkeypatch.setattr(
        storage.importlib.util,
        "find_spec",
        lambda name: None if name == "cmaes" else find(name),
    )
    with pytest.raises(ValueError, match="pip install cmaes"):
        open_study(make(space=axes, trials=3, sampler="cmaes"), base, tmp_path / "out")


def test_points_may_be_added_but_another_sweep_is_refused(base, tmp_path):
    out = tmp_path / "out"
    drain(open_study(make(space.seeds(3, first=0)), base, out))
    before = (out / record.RECORD).read_bytes(), (out / studies.JOURNAL).read_bytes()
    base.hyper.lr = 0.5
    with pytest.raises(ValueError, match=r"another sweep:\n  hyper.lr: .* -> 0.5"):
        open_study(make(space.seeds(3, first=0)), base, out)
    base.hyper.lr = common.base().hyper.lr
    with pytest.raises(ValueError, match="1 of its trials are no points any more"):
        open_study(make(space.seeds(2, first=0)), base, out)
    assert before == (
        *((out / record.RECORD).read_bytes(), (out / studies.JOURNAL).read_bytes()),
    )
    base.grace_s = 7.0  # decides nothing that is computed
    assert drain(open_study(make(space.seeds(4, first=0)), base, out)) == ["seed=3"]


def test_a_sweep_goes_on_whose_config_lacked_newer_keys(base, tmp_path):
    chosen, out = make(space.seeds(2, first=0)), tmp_path / "out"
    drain(open_study(chosen, base, out), at_most=1)
    told = json.loads((out / record.RECORD).read_text())
    del told["base"]["max_bytes"], told["base"]["data"]["skip_bad_docs"]
    record.write(out / record.RECORD, told)
    assert drain(open_study(chosen, base, out)) == ["seed=1"]


def test_a_folder_of_something_else_is_left_alone(base, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="not empty"):
        open_study(make(space.seeds(2)), base, tmp_path / "out")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["thesis.tex"]


def test_failed_trials_run_again_when_asked(base, tmp_path):
    chosen, out = make(space.seeds(2, first=0)), tmp_path / "out"
    study = open_study(chosen, base, out)
    failed = study.next(lambda *_: None)
    assert failed is not None
    study.finish(failed, record.failure("no memory"))
    drain(study)
    assert drain(open_study(chosen, base, out)) == []
    study = open_study(chosen, base, out)
    assert study.forget_failures() == 1
    assert drain(study) == ["seed=0"]
    assert open_study(chosen, base, out).left() == 0


def test_a_storage_url_that_nobody_answers_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match="the storage nosuchdb://x/y cannot be opened"):
        open_study(
            make(space.seeds(2)), base, tmp_path / "out", storage="nosuchdb://x/y"
        )


def test_a_sweep_is_recorded_in_a_database_too(base, tmp_path):
    url = f"sqlite:///{tmp_path}/sweeps.db"
    chosen, out = make(space.seeds(3, first=0)), tmp_path / "out"
    drain(open_study(chosen, base, out, storage=url), at_most=1)
    assert drain(open_study(chosen, base, out, storage=url)) == ["seed=1", "seed=2"]
    with pytest.raises(ValueError, match="storage: "):
        open_study(chosen, base, out)


# --- one trial ------------------------------------------------------------------------


def order(config, folder, **more):
    return {
        "folder": str(folder),
        "config": json.loads(json.dumps(config.to_dict())),
        "criterion": ("val_loss", "minimize", "best"),
        "after": {"names": []},
        **more,
    }


def test_a_trial_says_how_it_ended_and_leaves_an_ordinary_run(base, tmp_path):
    folder = tmp_path / "trial"
    assert trial.run(order(base, folder)) == 0
    said = record.read_outcome(folder)
    alone = train.train(base, tmp_path / "alone")
    assert (said["status"], said["step"], said["last"]) == (
        *("done", 8, alone.numbers["val_loss"]),
    )
    assert said["value"] <= said["last"]
    run = runs.open(folder, step="latest")
    assert run.step == 8
    # A character of this text is a token and a byte.
    assert said["bytes_per_token"] == pytest.approx(1, rel=1e-5)
    count = sum(leaf.size for leaf in jax.tree.leaves(run.params))
    assert said["parameters"] == count
    assert said["flops_per_token"] > 6 * count


@pytest.mark.fault(25)
@pytest.mark.parametrize(
    ("change", "status", "reason"),
    [
        ({"hyper.lr": 1e30, "hyper.clip": 0.0, "max_skipped": 1}, "diverged", "finite"),
        ({"data.source": "no_such_text"}, "failed", "no_such_text"),
    ],
)
def test_a_trial_that_cannot_go_on_says_why(base, tmp_path, change, status, reason):
    config = plan.override(base, change)
    assert trial.run(order(config, tmp_path / "trial")) == 0
    said = record.read_outcome(tmp_path / "trial")
    assert said["status"] == status and reason in said["reason"]


def test_a_metric_that_never_appears_is_told_with_those_that_do(base, tmp_path):
    trial.run(
        order(base, tmp_path / "trial", criterion=("val_accuracy", "maximize", "best"))
    )
    said = record.read_outcome(tmp_path / "trial")
    assert said["status"] == "failed" and said["no_metric"]
    assert "'val_accuracy' never appeared" in said["reason"]
    assert "val_bpb" in said["reason"]


def reporters(study, pruner):
    """Starts every trial; returns what each would call after an evaluation."""
    found = []
    while (trial_ := study.next(lambda *_: None)) is not None:
        more = {"storage": study.storage, "study": study.record["id"], "id": trial_.id}
        given = order(trial_.config, study.out / trial_.name, pruner=pruner, **more)
        found.append(trial.reporter(given))
    return found


def test_asha_lets_the_better_half_of_those_before_go_on(base, tmp_path):
    pruner = space.asha(first=2, factor=2)
    study = open_study(make(space.seeds(4), pruner=pruner), base, tmp_path / "out")
    first, second, third, fourth = reporters(study, pruner)
    assert first(1, {"val_loss": 9.0}) == ""  # before the first rung
    assert first(2, {"val_loss": 3.0}) == ""  # alone
    assert second(2, {"val_loss": 2.0}) == ""  # the better of two
    assert third(2, {"val_loss": 2.5}) == "pruned"  # the second of three
    assert fourth(2, {"val_loss": 1.0}) == ""
    assert fourth(4, {"val_loss": 1.0}) == ""
    assert first(4, {"val_loss": 1.5}) == "pruned"
    assert second(3, {"val_loss": float("nan")}) == "diverged"
    assert second(0, {"val_loss": float("nan")}) == ""
    assert second(3, {"train_loss": 1.0}) == ""


def test_asha_may_count_tokens_where_steps_are_not_of_one_size(base, tmp_path):
    """16 tokens in a window: of 2 rows 32 in a step, of 8 rows 128."""
    pruner = space.asha(first=100, factor=2, by="tokens")
    points = space.together({"batch_size": (2, 8, 8)})
    chosen = make(points[:2], pruner=pruner)
    sweeps.check(chosen, base)
    study = open_study(chosen, base, tmp_path / "out")
    small, large = reporters(study, pruner)
    assert large(1, {"val_loss": 1.0, "tokens": 128}) == ""
    assert small(2, {"val_loss": 9.0, "tokens": 64}) == ""  # not judged yet
    assert small(4, {"val_loss": 2.0, "tokens": 128}) == "pruned"
    seen = {}
    train.train(base, tmp_path / "run", report=lambda step, numbers: seen.update(
        {step: numbers["tokens"]}) or "")  # fmt: skip
    each = base.batch_size * 16
    assert seen == {step: step * each for step in seen} and seen
    with pytest.raises(ValueError, match="judges at 256 tokens, but the run has 256 t"):
        sweeps.check(make(points[:1], pruner={**pruner, "first": 256}), base)
    with pytest.raises(ValueError, match="by 'token' is not one of"):
        space.asha(first=1, by="token")
    with pytest.raises(ValueError, match="prunes after steps, not by tokens"):
        batched(make(points[:2], pruner=pruner), base, tmp_path / "vmap")


def test_asha_judges_no_trial_after_its_last_rung(base, tmp_path):
    pruner = space.asha(first=2, factor=2, last=4)
    study = open_study(make(space.seeds(2), pruner=pruner), base, tmp_path / "out")
    first, second = reporters(study, pruner)
    for step in (2, 4, 6):
        assert first(step, {"val_loss": 1.0}) == ""
    assert second(2, {"val_loss": 1.0}) == ""  # as good as the other
    assert second(6, {"val_loss": 2.0}) == ""


def test_the_median_pruner_waits_for_its_first_trials(base, tmp_path):
    pruner = space.median(first=2, trials=2)
    study = open_study(make(space.seeds(3), pruner=pruner), base, tmp_path / "out")
    names = list(study.trials)
    first, second, third = reporters(study, pruner)
    for report, value in ((first, 1.0), (second, 2.0)):
        assert report(2, {"val_loss": value}) == ""
    for name in names[:2]:
        study.finish(study.trials[name], result(1.0))
    assert third(1, {"val_loss": 9.0}) == ""
    assert third(2, {"val_loss": 9.0}) == "pruned"


def test_a_pruned_trial_stops_there_and_can_be_resumed(base, tmp_path):
    """The other trials' evaluations are better than any that training can reach."""
    pruner = space.asha(first=2, factor=2)
    study = open_study(make(space.seeds(4), pruner=pruner), base, tmp_path / "out")
    others, last = reporters(study, pruner)[:3], list(study.trials.values())[3]
    for report in others:
        report(2, {"val_loss": 0.0})
    more = {"storage": study.storage, "study": study.record["id"], "id": last.id}
    folder = tmp_path / "out" / last.name
    trial.run(order(last.config, folder, pruner=pruner, **more))
    said = record.read_outcome(folder)
    assert (said["status"], said["step"]) == ("pruned", 2)
    assert train.train(last.config, folder).step == 8


# --- real processes, real kills -------------------------------------------------------

LONG = """
config = {config!r}
fixed = {fixed!r}
def points():
    return [{{"hyper.lr": 1e-3 * 2**i}} for i in range(3)]
"""


class Sweep:
    """A sweep in a process of its own, as people start it."""

    def __init__(self, folder, *arguments):
        self.out, self.said = folder / "out", folder / "said.txt"
        self.command = [
            *(sys.executable, "-m", "experiments.sweep", f"--out={self.out}"),
            *(f"--sweep={folder / 'mine.py'}", "--workers=2", *arguments),
        ]
        self.env = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
        self.process = None

    def start(self):
        with self.said.open("w") as said:
            self.process = subprocess.Popen(
                self.command, cwd=ROOT, env=self.env, start_new_session=True,
                stdout=said, stderr=subprocess.STDOUT,
            )  # fmt: skip
        return self

    def end(self):
        return self.process.wait(), self.said.read_text()

    def outcomes(self):
        return {path.parent.name: path for path in self.out.glob("*/outcome.json")}

    def trials(self):
        """Returns name -> process of the trials that run now, by their locks."""
        found = {}
        for path in self.out.glob("*/run.lock"):
            text = path.read_text()
            if text and _alive(json.loads(text)["pid"]):
                found[path.parent.name] = json.loads(text)["pid"]
        return found

    def rows(self):
        return json.loads((self.out / "results.json").read_text())["trials"]

    def results(self):
        return {row["name"]: (row["status"], row["last"]) for row in self.rows()}


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(") ")[1][0] != "Z"
    except FileNotFoundError:
        return False


def _parent(pid):
    return int(Path(f"/proc/{pid}/stat").read_text().split(") ")[1].split()[1])


def until(true, seconds=60):
    """Waits for another process; fails when it takes too long."""
    tick, deadline = threading.Event(), time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < deadline, "it took too long"
        tick.wait(0.02)
    return found


@pytest.fixture
def long_sweep(base, tmp_path):
    """A sweep of three trials of a few seconds each, on one device."""
    base.mesh.data = 1
    config = tmp_path / "config.py"
    config.write_text(
        f"from ml_collections import ConfigDict\n"
        f"def get_config(arg=None): return ConfigDict({base.to_dict()!r})\n"
    )
    fixed: dict = {
        "steps": 300,
        "eval_every": 20,
        "checkpoint_every": 20,
        "log_every": 20,
    }
    fixed["hyper.warmup_steps"] = 10.0
    (tmp_path / "mine.py").write_text(LONG.format(config=str(config), fixed=fixed))
    return tmp_path


def trials_of(folder):
    """Returns name -> config of the trials of the sweep in a folder."""
    chosen = plan.load(folder / "mine.py")
    chosen, config = plan.fix(chosen, door.load_config(chosen.config))
    return {name: c for name, (_, c) in plan.configs(config, chosen).items()}


@pytest.fixture
def start():
    """Starts sweeps that do not outlive the test."""
    started = []

    def begin(folder, *arguments):
        started.append(Sweep(folder, *arguments).start())
        return started[-1]

    yield begin
    for sweep in started:
        sweep.process.kill()
        sweep.process.wait()


def step_of(out, name):
    try:
        lines = (out / name / "metrics.jsonl").read_text().splitlines()
        return json.loads(lines[-1])["step"] if lines else 0
    except (FileNotFoundError, ValueError):
        return 0


@pytest.mark.fault(25)
@pytest.mark.slow
@pytest.mark.timeout(400)  # a dozen processes, half a minute on two quiet cores
@pytest.mark.skipif(not Path("/proc").exists(), reason="needs /proc")
def test_killing_a_worker_and_then_the_sweep_loses_nothing(long_sweep, start):
    cut = start(long_sweep)
    name, pid = until(lambda: next(iter(cut.trials().items()), None))
    until(lambda: step_of(cut.out, name) >= 40)
    os.kill(_parent(pid), signal.SIGKILL)
    until(lambda: not _alive(pid))  # it noticed that its worker is gone
    until(lambda: cut.outcomes() and cut.trials())
    ended = {name: path.stat().st_mtime_ns for name, path in cut.outcomes().items()}
    cut.process.kill()
    cut.process.wait()
    until(lambda: not cut.trials(), seconds=30)  # no orphans

    code, said = cut.start().end()
    assert code == 0, said
    for name, written in ended.items():  # what had ended was not run again
        assert cut.outcomes()[name].stat().st_mtime_ns == written
        assert f"done      {name}" not in said
    alone = {name: train.train(config, long_sweep / name) for name, config in
             trials_of(long_sweep).items()}  # fmt: skip
    assert len(alone) == 3
    assert cut.results() == {
        name: ("done", pytest.approx(result.numbers["val_loss"], rel=1e-5))
        for name, result in alone.items()
    }


@pytest.mark.fault(25)
@pytest.mark.slow
@pytest.mark.timeout(300)
def test_workers_of_a_scheduler_need_not_know_the_project(long_sweep, start, tmp_path):
    """Started in another folder; the sweep is killed, and its trials leave too."""
    place = long_sweep / "place"
    place.mkdir()
    port = str(free_port())
    command = [sys.executable, "-m", "distributed.cli.dask_scheduler", "--no-dashboard"]
    processes = [
        subprocess.Popen([*command, "--host=127.0.0.1", f"--port={port}"], cwd=place)
    ]
    command = [sys.executable, "-m", "distributed.cli.dask_worker", "--no-dashboard"]
    address = f"tcp://127.0.0.1:{port}"
    for _ in range(2):
        words = [*command, address, "--nthreads=1", "--memory-limit=0", "--no-nanny"]
        processes.append(subprocess.Popen(words, cwd=place))
    try:
        longer = ("--set=steps=800", "--set=checkpoint_every=200")
        sweep = start(long_sweep, f"--scheduler={address}", *longer)
        name, _ = until(lambda: next(iter(sweep.trials().items()), None))
        until(lambda: step_of(sweep.out, name) >= 40)
        sweep.process.kill()
        sweep.process.wait()
        until(lambda: not sweep.trials(), seconds=30)
        assert name not in sweep.outcomes()  # it was told to, it had not ended
        code, said = sweep.start().end()
        assert code == 0, said
        assert [end for end, _ in sweep.results().values()] == ["done"] * 3
    finally:
        for process in processes:
            process.kill()
            process.wait()


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def door_says(*arguments):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *arguments],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert "Traceback" not in done.stderr
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--sweep is missing"),
        (["--sweep=no_such.py"], "there is no sweep file no_such.py"),
        (["--workers=-1", "--sweep=mine"], "must not be negative"),
        (["--engine=ray"], "--engine=ray is not one of: "),
    ],
)
def test_the_door_refuses_with_one_sentence(arguments, sentence):
    code, said = door_says(*arguments)
    assert code == 2 and sentence in said


def test_a_typo_in_a_late_point_leaves_no_folder(long_sweep):
    text = (long_sweep / "mine.py").read_text()
    points = "[{'seed': i} for i in range(17)] + [{'hyper.lrr': 1.0}]"
    text = re.sub(r"return .*", f"return {points}", text)
    (long_sweep / "mine.py").write_text(text)
    out = long_sweep / "out"
    code, said = door_says(f"--sweep={long_sweep / 'mine.py'}", f"--out={out}")
    assert code == 2 and not out.exists()
    assert "point 17 (lrr=1): there is no config key 'hyper.lrr'" in said


def test_a_scheduler_that_is_not_there_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "CONNECT_S", 0.5)
    address = f"tcp://127.0.0.1:{free_port()}"
    with (
        pytest.raises(ValueError, match=f"no dask scheduler answers at {address}"),
        engine.remote(address),
    ):
        pass


# --- many trials in one program -------------------------------------------------------


def batched(chosen, base, out):
    done = sweeps.batched(
        *(chosen, base, out),
        members=0,
        memory=math.inf,
        storage="",
        retries=1,
        rerun_failed=False,
        changed=lambda found: None,
    )
    return {row["name"]: row for row in done.results["trials"]}


@pytest.mark.slow
def test_trials_of_one_program_end_as_they_would_alone(base, tmp_path):
    base.mesh.data = 1
    points = space.grid({"hyper.lr": (1e-3, 1e-2), "model.n_layers": (1, 2)})
    rows = batched(make(points), base, tmp_path / "out")
    assert [row["status"] for row in rows.values()] == ["done"] * 4
    name = "lr=0.01,n_layers=2"
    config = plan.override(base, rows[name]["overrides"])
    alone = train.train(config, tmp_path / "alone").numbers["val_loss"]
    assert rows[name]["last"] == pytest.approx(alone, rel=1e-5)
    assert batched(make(points), base, tmp_path / "out") == rows  # nothing runs again


@pytest.mark.slow
def test_rungs_keep_a_share_of_the_members(base, tmp_path):
    base.mesh.data = 1
    assert batch.rungs(space.asha(first=2, factor=2), 16, 9) == [(2, 5), (4, 3), (8, 2)]
    assert batch.rungs(space.asha(2, 2, last=4), 16, 9) == [(2, 5), (4, 3)]
    assert batch.rungs(None, 16, 9) == []
    points = space.grid({"hyper.lr": (1e-2, 1e-9, 2e-2)})
    after = {"letters": lambda folder: float(len(folder.name))}
    chosen = make(points, pruner=space.asha(2, 2), after=after)
    rows = batched(chosen, base, tmp_path / "out")
    for name, row in rows.items():  # only what is done is measured
        measured = len(name) if row["status"] == "done" else None
        assert row["after"] == {"letters": measured}
    assert rows["lr=1e-09"]["status"] == "pruned"
    assert rows["lr=1e-09"]["step"] < 8
    assert sum(row["status"] == "done" for row in rows.values()) == 1


def test_a_pruner_that_one_program_does_not_have_is_refused(base, tmp_path):
    chosen = make(space.seeds(2), pruner=space.median(first=2))
    with pytest.raises(ValueError, match="--engine=vmap prunes by asha and val_loss"):
        batched(chosen, base, tmp_path / "out")
