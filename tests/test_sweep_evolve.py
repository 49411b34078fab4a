"""Sweeps whose points evolve: what is refused, and what the report says."""

import pytest

from gpt_jax import report, runs
from gpt_jax.population import evolve
from gpt_jax.report import scales
from gpt_jax.sweep import choose, plan, space
from gpt_jax.sweep import run as sweeps
from gpt_jax.sweep.study import Budget
from tests.test_sweep import base, make, open_study, sweep_file

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")
pytest.importorskip("plotly", reason="needs plotly: pip install plotly")

PBT = space.pbt(every=4, keys=("hyper.lr",), share=0.5)
POINTS = [{"hyper.lr": rate, "seed": 1} for rate in (1e-2, 1e-4)]
GOOD, BAD = "lr=0.01,seed=1", "lr=0.0001,seed=1"


def batched(chosen, base, out, **more):
    options = {"storage": "", "retries": 0, "rerun_failed": False, "members": 0}
    options |= {"memory": float("inf"), "changed": lambda results: None}
    return sweeps.batched(chosen, base, out, **{**options, **more})


@pytest.mark.slow
def test_a_sweep_evolves_and_its_report_says_how(base, tmp_path):
    """Oracle: the folders."""
    out = tmp_path / "out"
    done = batched(make(POINTS, evolve=PBT), base, out)
    (move,) = evolve.lineage(out / BAD)
    assert (move["step"], move["from"]) == (4, GOOD)
    rate = move["hyper"]["hyper.lr"]
    assert runs.read_config(out / BAD).hyper.lr == rate
    assert rate in (1e-2 * 0.8, 1e-2 * 1.25)
    assert done.results["evolved"][BAD] == [
        (0, {"hyper.lr": 1e-2}),
        (4, {"hyper.lr": rate}),
    ]
    assert done.results["command"] is None  # no command trains that again
    assert next(iter(done.results["evolved"])).startswith(done.results["best"])
    changes = {BAD: done.results["evolved"][BAD]}
    told = {**done.results, "evolved": changes}
    assert f"from step 4: lr {rate:.4g}" in report.summary(told)
    assert scales.stairs(told, BAD, "hyper.lr") == (
        [0, 4, 8],
        [1e-2, rate, rate],
    )
    assert report.write(out, done.results) == ""
    assert "What evolved" in (out / "report.html").read_text()
    assert (out / "schedules.png").stat().st_size > 1000
    again = batched(make(POINTS, evolve=PBT), base, out)
    assert again.results["evolved"] == done.results["evolved"]
    with pytest.raises(ValueError, match=r"another sweep:\n  evolve: "):
        batched(make(POINTS, evolve={**PBT, "every": 2}), base, out)


def test_a_sweep_file_says_how_its_points_evolve(tmp_path):
    text = (
        "from gpt_jax.sweep.space import grid, pbt\nconfig = 'c'\n"
        "evolve = pbt(every=50, keys=('hyper.lr',))\n"
        "def points(): return grid({'hyper.lr': (0.1, 0.2)})"
    )
    assert plan.load(sweep_file(tmp_path, text)).evolve["every"] == 50


def test_what_cannot_evolve_is_refused_before_anything_trains(base, tmp_path):
    told = "evolve trains a list of points together: leave space, pruner and seeds"
    for more in ({"pruner": space.asha(first=2)}, {"seeds": 2}):
        with pytest.raises(ValueError, match=told):
            make(POINTS, evolve=PBT, **more)
    with pytest.raises(ValueError, match="judges members by val_loss"):
        make(POINTS, evolve=PBT, metric="val_bpb")
    with pytest.raises(ValueError, match="every is 8 of 8 steps: nothing would"):
        sweeps.check(make(POINTS, evolve={**PBT, "every": 8}), base)
    shapes = [{"model.n_layers": 1}, {"model.n_layers": 2}]
    with pytest.raises(ValueError, match="points that evolve train together: they may"):
        batched(make(shapes, evolve=PBT), base, tmp_path / "shapes")
    with pytest.raises(ValueError, match="--shard and --max_trials would part them"):
        batched(make(POINTS, evolve=PBT), base, tmp_path / "few", budget=Budget(1))
    with pytest.raises(ValueError, match="use --engine=vmap"):
        sweeps.processes(
            make(POINTS, evolve=PBT), base, tmp_path / "apart", command=[],
            trial_timeout=0, scheduler="", workers=1, accelerators=[],
        )  # fmt: skip
    open_study(make(POINTS, evolve=PBT), base, tmp_path / "any")
    chosen, why = choose.engine(
        make(POINTS, evolve=PBT), base, command=[], environment={}, accelerators=0,
        workers=0, needs_processes=False,
    )  # fmt: skip
    assert (chosen, why) == ("vmap", "points that evolve train together")
