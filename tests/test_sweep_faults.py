"""Faults of sweeps: seeds that were ranked, trials of unlike keys, retries, databases.

Nothing trains here: trials end as they are told to.
"""

import json
import math
import os
import re
import sqlite3

import pytest

from gpt_jax import report
from gpt_jax.criterion import Criterion
from gpt_jax.report import compare
from gpt_jax.sweep import plan, record, space, storage
from gpt_jax.sweep import run as sweeps
from tests import doors
from tests.test_sweep import base, drain, make, open_study, result

door = doors.load("sweep")

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")


def nothing(*_):
    """A check that finds no fault."""


def begin(study):
    """Returns the next trial, which then runs."""
    trial = study.next(nothing)
    assert trial is not None
    return trial


def end(study, values, base):
    """Ends all trials as runs whose evaluations are these.

    Args:
      study: all of whose trials wait.
      values: trial -> its evaluations; None in them: not finite, the trial diverged; an
        empty list: it failed before it was a run.
      base: config of the runs.
    """
    while trial := study.next(nothing):
        folder, found = study.out / trial.name, values(trial)
        if not found:
            study.finish(trial, record.failure("no memory", final=True))
            continue
        lines = [{"step": 4 * i, "val_loss": x, "tokens": 64 * i, "seconds": 1.0 * i}
                 for i, x in enumerate(found)]  # fmt: skip
        folder.mkdir(parents=True)
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (folder / "metrics.jsonl").write_text(text)
        (folder / "config.json").write_text(json.dumps(trial.config.to_dict()))
        status = "done"
        if found[-1] is None:
            status = "diverged"
        elif len(found) < 3:
            status = "pruned"
        told = record.measure(folder, Criterion())
        told = {"status": status, "reason": status, **told}
        record.write(folder / record.OUTCOME, told)
        study.finish(trial, told)


# --- seeds ----------------------------------------------------------------------------

LUCK = {  # learning rate -> the last losses of its seeds
    1e-3: (2.0, 2.1, 2.2),
    1e-2: (1.5, 2.6, 2.7),  # the luckiest seed that came to an end
    1e-1: (1.0, 1.1, None),  # the best mean, if a diverged seed did not count
    3e-1: (0.9, 1.0, "pruned"),
    1e0: (0.5, 0.6, "failed"),
}


@pytest.fixture
def lucky(base, tmp_path):
    """A sweep over five rates of three seeds, all of which have ended."""
    points = space.product(space.grid({"hyper.lr": LUCK}), space.seeds(3, first=0))
    study = open_study(make(points), base, tmp_path / "out")

    def values(trial):
        value = LUCK[trial.overrides["hyper.lr"]][trial.overrides["seed"]]
        early = {"pruned": [4.0, 3.0], "failed": []}
        return early[value] if isinstance(value, str) else [4.0, 3.0, value]

    end(study, values, base)
    return study


def test_the_best_is_the_best_mean_and_its_command_names_no_seed(lucky):
    """Oracle: by hand."""
    best = lucky.best()
    assert best.name == "lr=0.001" and best.mean.value == pytest.approx(2.1)
    found = sweeps.results(lucky)
    assert found["best"] == "lr=0.001" and "seed" not in found["command"]
    assert found["keys"] == {"hyper.lr": "lr"}
    assert [row["name"] for row in found["settings"]][:2] == ["lr=0.001", "lr=0.01"]
    whole = {row["name"]: (row["n"], row["seeds"]) for row in found["settings"]}
    assert whole["lr=0.1"] == whole["lr=0.3"] == whole["lr=1"] == (2, 3)
    assert found["settings"][0]["value"] == pytest.approx(2.1)


def test_the_best_of_the_report_is_the_best_of_compare(lucky):
    found = compare.compare(sorted(lucky.out.glob("lr=*")))
    results = sweeps.results(lucky)
    assert found.settings[0].name == results["best"]
    theirs = {s.name: s.mean.value for s in found.settings}
    ours = {row["name"]: row["value"] for row in results["settings"]}
    assert theirs == pytest.approx(ours)
    assert [s.name for s in found.settings] == [r["name"] for r in results["settings"]]
    marked = {s.name: compare.mark(s) for s in found.settings}
    assert marked["lr=0.1"] == "1 diverged" and marked["lr=0.3"] == "1 pruned"
    assert marked["lr=1"] == "1 failed" and not marked["lr=0.001"]


def test_the_best_is_known_at_each_moment(base, tmp_path):
    """Oracle: the best of all settings, looked for anew."""
    points = space.product(space.grid({"hyper.lr": range(1, 6)}), space.seeds(2))
    study = open_study(make(points), base, tmp_path / "out")
    while trial := study.next(nothing):
        lr, seed = trial.overrides["hyper.lr"], trial.overrides["seed"]
        study.finish(trial, result(math.sin(7 * lr + seed)))
        assert study.best() == study.settings()[0]


def test_a_sweep_of_seeds_alone_is_one_setting(base, tmp_path):
    study = open_study(make(space.seeds(4)), base, tmp_path / "out")
    drain(study, lambda trial: float(trial.overrides["seed"] - 1337))
    found = sweeps.results(study)
    (row,) = found["settings"]
    assert (row["value"], row["n"]) == (1.5, 4) and not found["keys"]
    assert report.write(study.out, found) == ""


# --- keys that not all trials have, values that are no scalars ------------------------


def test_trials_of_which_some_lack_a_key_have_their_report(base, tmp_path):
    points = [
        *({"config": "adapter=lora", "adapter.rank": rank} for rank in (4, 8)),
        {"config": "adapter=full"},
    ]
    mine = make(points, config="configs/classify.py:size=tiny")
    from experiments import door as doors

    mine, config = plan.fix(mine, doors.load_config(mine.config))
    study = open_study(mine, config, tmp_path / "out")
    drain(study, lambda trial: 2.0 + trial.overrides.get("adapter.rank", 0))
    found = sweeps.results(study)
    ranks = [row["overrides"]["adapter.rank"] for row in found["settings"]]
    assert ranks == [None, 4, 8]
    assert report.write(study.out, found) == ""


def test_a_sweep_over_lists_of_layers_has_its_report(base, tmp_path):
    kinds = (({"window": 4}, {}), ({"window": 8}, {}), ())
    study = open_study(
        make(space.grid({"model.pattern": kinds})), base, tmp_path / "out"
    )
    drain(study, lambda trial: 2.0 + len(trial.overrides["model.pattern"]))
    assert report.write(study.out, sweeps.results(study)) == ""
    lines = (study.out / "results.csv").read_text().splitlines()
    assert len(lines) == 4 and '""window"" 8' in lines[2] + lines[3]


def test_a_search_over_lists_goes_on_where_it_was(base, tmp_path):
    kinds = space.choice(({"window": 4}, {}), ({"window": 8}, {}), ())
    axes = {"model.pattern": kinds, "hyper.lr": space.log_uniform(1e-4, 1e-1)}
    chosen = make(space=axes, trials=8, sampler="tpe")
    whole = drain(open_study(chosen, base, tmp_path / "whole"))
    parts = drain(open_study(chosen, base, tmp_path / "parts"), at_most=3)
    again = open_study(chosen, base, tmp_path / "parts")
    for trial in again.trials.values():
        assert trial.config.model.pattern == trial.overrides["model.pattern"]
    assert parts + drain(again) == whole
    assert report.write(again.out, sweeps.results(again)) == ""


# --- what a sweep costs ---------------------------------------------------------------


def test_what_a_plan_is_asked_for_each_trial_is_worked_out_once():
    chosen = make(space.grid({"hyper.lr": (0.1, 0.2)}))
    assert chosen.keys is chosen.keys and chosen.short is chosen.short


def test_an_ended_trial_is_not_looked_at_again(base, tmp_path, monkeypatch):
    study = open_study(make(space.seeds(20)), base, tmp_path / "out")
    looked = []
    row = sweeps._row
    monkeypatch.setattr(
        sweeps, "_row", lambda trial, *rest: looked.append(trial) or row(trial, *rest)
    )
    rows: dict = {}
    while trial := study.next(nothing):
        study.finish(trial, result(1.0))
        found = sweeps.results(study, rows)
    assert len(found["trials"]) == 20
    ended = [trial for trial in looked if trial.status == "done"]
    assert len(looked) <= 20 * 21 / 2 + 20 and len(ended) >= 20
    looked.clear()
    sweeps.results(study, rows)
    assert not looked


def test_tables_take_a_small_share_of_the_time(monkeypatch):
    now, spent = [0.0], [0.0]
    monkeypatch.setattr(sweeps.time, "monotonic", lambda: now[0])

    def write():
        now[0] += 0.5
        spent[0] += 0.5

    maybe = sweeps._seldom(write)
    while now[0] < 1000:
        maybe()
        now[0] += 0.01
    assert 0 < spent[0] < 0.03 * now[0]


# --- retries --------------------------------------------------------------------------


def saved(folder, step):
    """Makes what a finished checkpoint of a step looks like from outside."""
    place = folder / "checkpoints" / str(step)
    place.mkdir(parents=True)
    (place / "manifest.json").write_text("{}")


def test_being_stopped_uses_up_no_retry(base, tmp_path):
    """Ctrl-C, a preemption, and a sweep that is killed while a trial runs."""
    out = tmp_path / "out"
    study = open_study(make(space.seeds(1)), base, out, retries=0)
    for _ in range(3):
        study.again(begin(study))
    begin(study)
    again = open_study(make(space.seeds(1)), base, out, retries=0)
    trial = begin(again)
    assert trial is not None and trial.crashes == 0


def test_a_trial_that_crashes_without_getting_further_fails(base, tmp_path):
    out = tmp_path / "out"
    study = open_study(make(space.seeds(1, first=0)), base, out, retries=1)
    told = record.failure("killed by signal 9")
    assert study.crashed(begin(study), told)
    again = open_study(make(space.seeds(1, first=0)), base, out, retries=1)
    assert not again.crashed(begin(again), told)
    assert again.trials["seed=0"].status == "failed"


def test_a_trial_that_got_further_begins_to_count_anew(base, tmp_path):
    out = tmp_path / "out"
    study = open_study(make(space.seeds(1, first=0)), base, out, retries=1)
    for step in (100, 200, 300):  # a job that is preempted again and again
        trial = begin(study)
        saved(out / trial.name, step)
        assert study.crashed(trial, record.failure("its worker was lost"))
        assert trial.crashes == 1


def test_an_end_that_is_not_final_is_tried_again_at_the_next_start(base, tmp_path):
    """The database was away when the trial wanted to report."""
    out = tmp_path / "out"
    study = open_study(make(space.seeds(1, first=0)), base, out)
    folder = out / begin(study).name
    record.write(folder / record.OUTCOME, record.failure("no connection"))
    again = open_study(make(space.seeds(1, first=0)), base, out)
    assert again.trials["seed=0"].status == "waiting"
    assert not (folder / record.OUTCOME).exists()
    final = record.failure("batch_size is 0", final=True)
    record.write(folder / record.OUTCOME, final)
    begin(again)
    assert open_study(make(space.seeds(1, first=0)), base, out).left() == 0


def test_failures_are_told_by_the_exit_code(base, tmp_path):
    study = open_study(make(space.seeds(2)), base, tmp_path / "out")
    study.finish(begin(study), record.failure("no memory"))
    drain(study)
    calm = sweeps.signals.Stop()
    assert sweeps._done(study, calm).exit_code == 1
    calm.signal = 15
    assert sweeps._done(study, calm).exit_code == 143
    study.forget_failures()
    drain(study)
    assert sweeps._done(study, sweeps.signals.Stop()).exit_code == 0


# --- another metric -------------------------------------------------------------------


def test_a_finished_sweep_can_be_reported_by_another_metric(base, tmp_path):
    """Those that were chosen by the metric, by search or pruner, keep it."""
    out = tmp_path / "out"
    study = open_study(make(space.seeds(2, first=0)), base, out)
    end(study, lambda trial: [3.0, 2.0, 1.0 + trial.overrides["seed"]], base)
    tokens = Criterion("tokens", "maximize")
    again = open_study(make(space.seeds(2, first=0)), base, out, criterion=tokens)
    found = sweeps.results(again)
    assert (found["metric"], found["direction"]) == ("tokens", "maximize")
    assert [row["value"] for row in found["trials"]] == [128, 128]
    other = make(space.seeds(2, first=0), metric="seconds")
    rows = sweeps.results(open_study(other, base, out))["trials"]
    assert [row["value"] for row in rows] == [0.0, 0.0]
    for at, value in {"last": 3.5, "last 2": 2.5, "best": 1.0}.items():
        counts = make([{"steps": 8}], at=at)
        study = open_study(counts, base, tmp_path / "counts")
        end(study, lambda trial: [4.0, 1.0, 1.5, 3.5], base)
        found = sweeps.results(study)
        assert found["settings"][0]["value"] == value
        report.write(study.out, found)
        (setting,) = compare.compare([study.out / "steps=8"]).settings
        assert setting.mean and setting.mean.value == value
    pruned = make(space.seeds(2, first=0), pruner=space.asha(first=2))
    open_study(pruned, base, tmp_path / "pruned")
    told = make(pruned.points, pruner=pruned.pruner, metric="val_bpb")
    with pytest.raises(
        ValueError, match="--metric, --direction and --at change what is rep"
    ):
        open_study(told, base, tmp_path / "pruned")


# --- databases ------------------------------------------------------------------------


def test_a_database_that_is_away_for_a_while_loses_nothing(base, tmp_path, monkeypatch):
    """A real one, held by another connection for longer than its own patience."""
    monkeypatch.setattr(storage, "RETRY_S", 0.05)
    url = f"sqlite:///{tmp_path}/sweeps.db?timeout=0.05"
    study = open_study(make(space.seeds(2)), base, tmp_path / "out", storage=url)
    trial = begin(study)
    other = sqlite3.connect(tmp_path / "sweeps.db", check_same_thread=False)
    other.execute("BEGIN EXCLUSIVE")
    tries, sleep = [], storage.time.sleep

    def wait(seconds):
        tries.append(seconds)
        if len(tries) == 3:
            other.rollback()
        sleep(seconds)

    monkeypatch.setattr(storage.time, "sleep", wait)
    study.finish(trial, result(0.5))
    assert len(tries) >= 3
    again = open_study(make(space.seeds(2)), base, tmp_path / "out", storage=url)
    assert again.trials[trial.name].outcome["value"] == 0.5


def test_a_database_that_stays_away_is_told_in_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "RETRY_S", 0.01)
    monkeypatch.setattr(storage, "PATIENCE_S", 0.05)
    opened = storage.open_storage(f"sqlite:///{tmp_path}/sweeps.db?timeout=0.01")
    other = sqlite3.connect(tmp_path / "sweeps.db")
    other.execute("BEGIN EXCLUSIVE")
    with pytest.raises(
        OSError, match=r"sweeps.db.* has not answered for 0.05 s; the s"
    ):
        opened.get_all_trials(0)


# --- accelerators ---------------------------------------------------------------------


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with two NVIDIA GPUs, as its tool lists them."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\nprintf 'GPU 0: A (UUID: x)\\nGPU 1: A (UUID: y)\\n'")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for name in ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "JAX_PLATFORMS"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("told", "found"),
    [
        (None, ["0", "1"]),
        ("", []),
        ("-1", []),
        ("1", ["1"]),
        ("0,-1,1", ["0"]),
        ("GPU-8f, MIG-2", ["GPU-8f", "MIG-2"]),
    ],
)
def test_hidden_gpus_stay_hidden(machine, told, found):
    if told is not None:
        machine.setenv("CUDA_VISIBLE_DEVICES", told)
    assert door._accelerators() == [{"CUDA_VISIBLE_DEVICES": name} for name in found]


def test_a_sweep_on_the_cpu_takes_no_gpu(machine):
    machine.setenv("JAX_PLATFORMS", "cpu")
    assert door._accelerators() == []


def test_a_job_of_slurm_has_the_memory_that_it_was_given(machine):
    for name in door.SLURM:
        machine.delenv(f"SLURM_{name}", raising=False)
    assert door._memory() == math.inf
    machine.setenv("SLURM_MEM_PER_CPU", "1500")
    machine.setenv("SLURM_CPUS_ON_NODE", "4")
    assert door._memory() == 6000 * 2**20
    machine.setenv("SLURM_MEM_PER_NODE", "3000")
    assert door._memory() == 3000 * 2**20


# --- seeds inside a search ------------------------------------------------------------


def test_each_draw_of_a_search_is_trained_with_its_seeds_and_judged_by_their_mean(
    base, tmp_path
):
    axes = {"hyper.lr": space.log_uniform(1e-4, 1e-1)}
    chosen = make(space=axes, trials=5, seeds=3)

    def loss(trial):
        rate, seed = trial.overrides["hyper.lr"], trial.overrides["seed"]
        return abs(math.log10(rate) + 2) + math.sin(1e4 * rate + seed)

    study = open_study(chosen, base, tmp_path / "whole")
    whole = drain(study, loss)
    assert len(whole) == 15 and study.left() == 0
    assert all(re.fullmatch(r"00\d-lr=[\d.e-]+,seed=13\d\d", name) for name in whole)
    found = sweeps.results(study)
    assert [row["n"] for row in found["settings"]] == [3] * 5
    assert found["keys"] == {"hyper.lr": "lr"} and "seed" not in found["command"]
    told = sorted(one.value for one in study._draws.get_trials())
    assert told == pytest.approx(sorted(row["value"] for row in found["settings"]))
    # Stopped in the middle of a draw, it goes on as if it had not been.
    parts = drain(open_study(chosen, base, tmp_path / "parts"), loss, at_most=4)
    parts += drain(open_study(chosen, base, tmp_path / "parts"), loss)
    assert parts == whole


def test_each_point_may_be_given_seeds_as_well(base, tmp_path):
    chosen = make(space.grid({"hyper.lr": (0.1, 0.2)}), seeds=2)
    study = open_study(chosen, base, tmp_path / "out")
    assert drain(study) == [
        *("lr=0.1,seed=1337", "lr=0.1,seed=1338"),
        *("lr=0.2,seed=1337", "lr=0.2,seed=1338"),
    ]
    assert len(study.settings()) == 2
    with pytest.raises(ValueError, match="seeds is 2, so seed cannot be set as well"):
        make(space.seeds(2), seeds=2)


def test_a_draw_with_a_seed_that_diverged_is_no_good_one_for_the_sampler(
    base, tmp_path
):
    axes = {"hyper.lr": space.log_uniform(1e-4, 1e-1)}
    study = open_study(make(space=axes, trials=1, seeds=2), base, tmp_path / "out")
    study.finish(begin(study), result(0.1))
    study.finish(begin(study), {**result(0.2), "status": "diverged"})
    (told,) = study._draws.get_trials()
    assert told.state.name == "PRUNED" and told.value is None
    assert sweeps.results(study)["settings"][0]["status"] == "diverged"


def test_values_that_a_search_draws_again_count_once(base, tmp_path):
    axes = {"optimizer.name": space.choice("adamw", "lion")}
    chosen = make(space=axes, trials=6, sampler="random")
    study = open_study(chosen, base, tmp_path / "out")
    drain(study)
    found = sweeps.results(study)
    assert [(row["n"], row["seeds"]) for row in found["settings"]] == [(1, 1)] * 2
    assert report.write(study.out, found) == ""
