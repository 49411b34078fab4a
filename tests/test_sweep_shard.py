"""Parts of a sweep beside each other, what a sitting may take, what others see."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest

from gpt_jax import files, runs
from gpt_jax.sweep import record, shard, space
from gpt_jax.sweep import run as sweeps
from gpt_jax.sweep import study as studies
from gpt_jax.sweep.shard import Shard
from gpt_jax.sweep.study import Budget
from tests import doors
from tests.test_sweep import ROOT, base, drain, make, open_study, result

door = doors.load("sweep")

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")


@pytest.mark.parametrize("count, of", [(7, 3), (3, 5), (1, 1), (12, 4)])
def test_shards_take_every_point_once(count, of):
    taken = [
        i for part in range(of) for i in range(count) if Shard(part + 1, of).owns(i)
    ]
    assert sorted(taken) == list(range(count))


@pytest.mark.parametrize("text", ["3", "0/4", "5/4", "1/0", "a/b", "1/2/3", "-1/4"])
def test_a_shard_that_is_none_is_refused(text):
    with pytest.raises(ValueError, match=rf"--shard={text}: give the part"):
        shard.parse(text)
    assert shard.parse("3/16") == Shard(3, 16)
    assert shard.parse("").whole


def test_shards_train_their_points_into_one_record(base, tmp_path):
    """Oracle: the names of the points. A third opens while two have trials running."""
    chosen, out = make(space.seeds(7, first=0)), tmp_path / "out"
    one, two = (open_study(chosen, base, out, shard=Shard(i, 3)) for i in (1, 2))
    assert (one.size, two.size) == (3, 2)
    first, second = one.next(lambda *_: None), two.next(lambda *_: None)
    assert first and second
    three = open_study(chosen, base, out, shard=Shard(3, 3), alone=False)
    assert three.left() == 2 and drain(three) == ["seed=2", "seed=5"]
    for study, trial in ((one, first), (two, second)):
        study.finish(trial, result(0.5 if study is two else 1.0))
    assert drain(one) == ["seed=3", "seed=6"] and drain(two) == ["seed=4"]
    assert one.left() == two.left() == three.left() == 0
    whole = open_study(chosen, base, out)
    assert whole.left() == 0 and len(whole._study.trials) == 7
    assert whole.best().mean.n == 7


def test_a_shard_goes_on_with_what_it_was_running_and_leaves_that_of_others(
    base, tmp_path
):
    chosen, out = make(space.seeds(4, first=0)), tmp_path / "out"
    one, two = (open_study(chosen, base, out, shard=Shard(i, 2)) for i in (1, 2))
    mine, theirs = one.next(lambda *_: None), two.next(lambda *_: None)
    again = open_study(chosen, base, out, shard=Shard(1, 2), alone=False)
    reclaimed = again.next(lambda *_: None)
    assert mine and theirs and reclaimed
    assert (reclaimed.name, reclaimed.number) == (mine.name, mine.number)
    assert again.trials[theirs.name].number == -1
    two.finish(theirs, result(1.0))  # the record still calls it running


def test_who_trains_what_is_held_by_locks(base, tmp_path):
    out, script = tmp_path / "out", tmp_path / "hold.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\nfrom gpt_jax.sweep import shard\n"
        "with shard.hold(Path(sys.argv[1]), shard.parse(sys.argv[2])) as (_, opened):\n"
        "    opened()\n    print('held', flush=True)\n    sys.stdin.read()\n"
    )
    pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    command = [sys.executable, str(script), str(out), "2/3"]
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen(command, env=env, text=True, **pipes) as other:
        assert other.stdout.readline() == "held\n"
        with shard.hold(out, Shard(1, 3)) as (alone, opened):
            assert not alone
            with pytest.raises(ValueError, match=f"in use by process {os.getpid()}"):
                shard.hold(out, Shard()).__enter__()
            opened()
        told = rf"--shard=2/3 of .*out is in use by process {other.pid}"
        for wanted in (Shard(), Shard(2, 3), Shard(1, 2)):
            with pytest.raises(ValueError, match=told):
                shard.hold(out, wanted).__enter__()
        other.stdin.close()
    with shard.hold(out, Shard()) as (alone, _):
        assert alone
        with pytest.raises(ValueError, match="out is in use by process"):
            runs.lock(out).__enter__()


def test_a_search_has_no_shards(base, tmp_path):
    chosen = make(space={"hyper.lr": space.uniform(0.1, 1)}, trials=4)
    with pytest.raises(ValueError, match="--shard divides points: what a search draws"):
        open_study(chosen, base, tmp_path / "out", shard=Shard(1, 2))


def test_a_sweep_folder_of_shards_is_no_other_folder(base, tmp_path):
    chosen, out = make(space.seeds(2, first=0)), tmp_path / "out"
    options = {"storage": "", "retries": 0, "rerun_failed": False}
    told = []
    for part in (1, 2):
        opened = sweeps._opened(
            chosen, base, out, shard=Shard(part, 2), changed=told.append, **options
        )
        with opened as (study, _, _, changed, _):
            assert len(drain(study)) == 1
            changed()
            with pytest.raises(files.Held):
                files.lock(out / shard.FOLDER / f"{part}-of-2.lock").__enter__()
    assert told == []  # a shard knows of its own part only
    with sweeps._opened(chosen, base, out, changed=told.append, **options) as parts:
        assert parts[0].left() == 0
        parts[3]()
    assert len(told[0]["trials"]) == 2


# --- what a sitting may take ----------------------------------------------------------


def test_a_sitting_begins_no_more_trials_than_it_may(base, tmp_path):
    chosen, out = make(space.seeds(5, first=0)), tmp_path / "out"
    first = open_study(chosen, base, out, budget=Budget(trials=2))
    assert drain(first) == ["seed=0", "seed=1"] and first.left() == 3
    assert not first.late()
    second = open_study(chosen, base, out, budget=Budget(trials=2))
    assert drain(second) == ["seed=2", "seed=3"]
    none = open_study(chosen, base, out, budget=Budget(seconds=1e-9))
    assert none.late() and drain(none) == [] and none.left() == 1
    enough = open_study(chosen, base, out, budget=Budget(seconds=1e9))
    assert drain(enough) == ["seed=4"]


@pytest.mark.slow
def test_a_budget_bounds_the_trials_of_a_program(base, tmp_path):
    """The real thing: two of three points train, the third is left."""
    chosen, out = make(space.seeds(3, first=0)), tmp_path / "out"
    options = {"storage": "", "retries": 0, "rerun_failed": False}
    options |= {"members": 0, "memory": float("inf"), "changed": lambda results: None}
    done = sweeps.batched(chosen, base, out, budget=Budget(trials=2), **options)
    assert (done.left, done.exit_code) == (1, 0)
    assert sorted(path.parent.name for path in out.glob("*/outcome.json")) == [
        *("seed=0", "seed=1"),
    ]


DEVICES = """
import json, sys, jax
from gpt_jax import runs
from gpt_jax.sweep import plan, run
from gpt_jax.sweep.study import Budget
base = runs.as_config(json.loads(sys.argv[1]))
chosen = plan.Plan("p", "c", {}, points=({"seed": 1}, {"seed": 2}))
run.batched(chosen, base, run.Path(sys.argv[2]), members=0, memory=1e9, storage="",
    retries=0, rerun_failed=False, changed=print, budget=Budget(seconds=1e-9))
print(jax.device_count())
"""


def test_a_program_of_many_trials_has_a_device_for_each_core(base, tmp_path):
    """Whatever the checks before it have JAX do."""
    env = {key: x for key, x in os.environ.items() if key not in ("XLA_FLAGS", "NPROC")}
    words = [sys.executable, "-c", DEVICES, base.to_json(), str(tmp_path / "out")]
    env |= {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run(words, env=env, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.splitlines()[-1:] == [str(min(files.cores(), 8))], done.stderr


# --- what others see ------------------------------------------------------------------


def test_a_dashboard_sees_the_values_of_points(base, tmp_path):
    """Oracle: the points. A key that becomes a word later is not shown any more."""
    points = [
        {"hyper.lr": 1e-3, "model.n_layers": 1, "optimizer.name": "adamw"},
        {"hyper.lr": 1e-2, "model.n_layers": 2, "optimizer.name": "lion"},
    ]
    out = tmp_path / "out"
    study = open_study(make(points), base, out)
    drain(study)
    assert [trial.params for trial in study._study.trials] == points
    kinds = study._study.trials[0].distributions
    assert {key: type(kind).__name__ for key, kind in kinds.items()} == {
        "hyper.lr": "FloatDistribution",
        "model.n_layers": "IntDistribution",
        "optimizer.name": "CategoricalDistribution",
    }
    more = [*points, {"hyper.lr": 1e-1, "model.n_layers": 4, "optimizer.name": "muon"}]
    added = open_study(make(more), base, out)
    drain(added)
    assert added._study.trials[2].params == {"hyper.lr": 1e-1, "model.n_layers": 4}


def test_runs_of_a_sweep_are_a_group_of_wandb(base, tmp_path):
    """The environment of a trial's process, from the process itself."""
    pytest.importorskip("distributed")
    code = "import os; print(os.environ['WANDB_RUN_GROUP'], os.environ['NPROC'])"
    options = {"storage": "", "retries": 0, "rerun_failed": False, "workers": 1}
    options |= {"trial_timeout": 0, "scheduler": "", "accelerators": []}
    with pytest.raises(ValueError, match="all 1 trials failed"):  # it prints alone
        sweeps.processes(
            make([{"seed": 0}]), base, tmp_path / "out", command=["-c", code],
            environment={"WANDB_RUN_GROUP": "mine"}, changed=lambda results: None,
            **options,
        )  # fmt: skip
    said = (tmp_path / "out" / "seed=0" / "trial.log").read_text()
    assert said == f"mine {files.cores()}\n"


@pytest.mark.parametrize(
    ("gpus", "each", "places"),
    [
        ("0,1,2,3", 2, ["0,1", "2,3"]),
        ("0,1,2", 2, ["0,1"]),
        ("5", 1, ["5"]),
    ],
)
def test_a_trial_may_have_several_gpus(monkeypatch, gpus, each, places):
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", gpus)
    monkeypatch.setattr(door, "GPUS_PER_TRIAL", SimpleNamespace(value=each))
    assert door._places() == [{"CUDA_VISIBLE_DEVICES": place} for place in places]
    monkeypatch.setattr(door, "GPUS_PER_TRIAL", SimpleNamespace(value=5))
    with pytest.raises(ValueError, match=f"=5: there are {len(gpus.split(','))} GPUs"):
        door._places()


def test_the_record_of_a_sweep_is_of_all_shards(base, tmp_path):
    chosen, out = make(space.seeds(3, first=0)), tmp_path / "out"
    open_study(chosen, base, out, shard=Shard(2, 3))
    told = json.loads((out / record.RECORD).read_text())
    assert told["trials"] == [*open_study(chosen, base, out).trials]
    assert studies.JOURNAL in {path.name for path in out.iterdir()}
