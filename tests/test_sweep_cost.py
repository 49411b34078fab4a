"""Sweeps of two objectives: the result and what it costs."""

import pytest

from gpt_jax import report
from gpt_jax.report import results as tables
from gpt_jax.report import scales
from gpt_jax.sweep import plan, space
from gpt_jax.sweep import run as sweeps
from tests.test_sweep import base, make, open_study

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")


def end_all(study):
    """Ends trials that are the better the wider, and the dearer."""
    while one := study.next(lambda name, config: None):
        width = one.config.model.d_model
        found = {"status": "done", "reason": "steps", "step": 8, "at": 8, "last": 1.0}
        found |= {"tokens": 100, "seconds": 1.0, "parameters": width**2}
        found |= {"value": 64 / width, "flops_per_token": 6 * width**2}
        found |= {"after": {"size": float(width)}} if study.plan.after else {}
        study.finish(one, found)
    return study


WIDTHS = {"model.d_model": space.integer(16, 64, step=16)}


@pytest.mark.parametrize("seeds", [0, 2])
@pytest.mark.parametrize("cost", ["flops", "size"])
def test_a_search_with_a_cost_looks_for_the_front(base, tmp_path, cost, seeds):
    """Every width stands on the front here, so none is better than another to TPE."""
    after = {"size": lambda folder: 0.0} if cost == "size" else {}
    chosen = make(space=WIDTHS, trials=8, cost=cost, after=after, seeds=seeds)
    sweeps.check(chosen, base)
    study = end_all(open_study(chosen, base, tmp_path / "out"))
    told = study._draws
    assert [d.name for d in told.directions] == ["MINIMIZE", "MINIMIZE"]
    amount = {"flops": lambda w: 600.0 * w**2, "size": float}[cost]
    for one in told.trials:
        width = one.params["model.d_model"]
        assert one.values == [64 / width, amount(width)]
    found = sweeps.results(study)
    widths = sorted({one.config.model.d_model for one in study.trials.values()})
    assert [row["overrides"]["model.d_model"] for row in tables.front(found, cost)] == (
        widths
    )
    assert next(iter(scales.spent(found))) == cost
    said = report.summary(found)
    assert f"nothing is as good for less (val_loss, {cost}):\n" in said
    assert f"  {64 / widths[0]:.4f}  {amount(widths[0]):.4g}  " in said
    assert report.write(study.out, found) == ""
    assert (study.out / "front.png").stat().st_size > 1000
    again = open_study(chosen, base, tmp_path / "out")
    assert again.left() == 0


def test_a_search_with_a_cost_begins_with_what_an_earlier_one_paid(base, tmp_path):
    first = end_all(open_study(make(space=WIDTHS, trials=6), base, tmp_path / "first"))
    report.tables(first.out, sweeps.results(first))
    chosen = make(space=WIDTHS, trials=2, cost="flops", start=str(first.out))
    study = open_study(chosen, base, tmp_path / "out")
    known = study._draws.trials
    assert known and all(
        one.values == [64 / w, 600.0 * w**2]
        for one in known
        for w in one.params.values()
    )


def test_a_grid_with_a_cost_reports_its_front_and_may_change_it(base, tmp_path):
    points = [{"model.d_model": width} for width in (16, 32)]
    for cost in ("", "flops", "parameters"):
        study = open_study(make(points, cost=cost), base, tmp_path / "out")
        end_all(study)
    assert len(study._study.directions) == 1
    assert "(val_loss, parameters)" in report.summary(sweeps.results(study))


def test_a_cost_that_cannot_be_is_refused(base, tmp_path):
    with pytest.raises(ValueError, match=r"cost 'flop' is not one of.*mean flops"):
        make([{}], cost="flop")
    with pytest.raises(ValueError, match=r"the pruner asha judges by val_loss alone"):
        make([{}], cost="flops", pruner=space.asha(first=2))
    with pytest.raises(ValueError, match="'cmaes' knows one objective"):
        make(space=WIDTHS, trials=2, cost="flops", sampler="cmaes")
    out = tmp_path / "out"
    end_all(open_study(make(space=WIDTHS, trials=2, cost="flops"), base, out))
    with pytest.raises(ValueError, match=r"another sweep:\n  cost: 'flops' -> 'toke"):
        open_study(make(space=WIDTHS, trials=2, cost="tokens"), base, out)
    rows = plan.override(base, {"steps": 4})
    sweeps.check(make([{}], cost="bytes"), rows)  # a language model records them
