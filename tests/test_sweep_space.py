"""What a search may ask: keys that depend on others, draws that become configs."""

import json
import re

import pytest

from gpt_jax import report
from gpt_jax.sweep import plan, space
from gpt_jax.sweep import run as sweeps
from gpt_jax.sweep import study as studies
from tests.test_sweep import base, drain, make, open_study

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")


def drawn_of(study):
    return [trial.drawn for trial in study.trials.values()]


def test_a_key_may_be_drawn_under_another_alone(base, tmp_path):
    axes = {
        "optimizer.name": space.choice("adamw", "muon"),
        "hyper.matrix_lr": space.when(
            {"optimizer.name": "muon"}, space.log_uniform(2e-3, 1e-1)
        ),
    }
    study = open_study(
        make(space=axes, trials=12, sampler="tpe"), base, tmp_path / "out"
    )
    drain(study, lambda trial: trial.overrides.get("hyper.matrix_lr", 0.05))
    for trial in study.trials.values():
        muon = trial.overrides["optimizer.name"] == "muon"
        assert ("hyper.matrix_lr" in trial.overrides) == muon
    found = sweeps.results(study)
    rates = [row["overrides"]["hyper.matrix_lr"] for row in found["settings"]]
    assert None in rates and any(rates)
    assert report.write(study.out, found) == ""
    for point in space.random(axes, 30):
        assert ("hyper.matrix_lr" in point) == (point["optimizer.name"] == "muon")
    with pytest.raises(
        ValueError, match=r"hyper.lr depends on 'hyper.x' is not one of"
    ):
        make(space={"hyper.lr": space.when({"hyper.x": 1}, space.uniform(0, 1))},
             trials=1)  # fmt: skip


def heads_that_divide(drawn):
    if drawn["width"] % drawn["heads"]:
        return None
    return {
        "model.d_model": drawn["width"],
        "model.n_heads": drawn["heads"],
        "batch_size": drawn["batch"],
        "steps": 64 // drawn["batch"],
    }


HEADS = {
    "width": space.integer(16, 32, step=16),
    "heads": space.integer(1, 4),
    "batch": space.integer(2, 8, log=True),
}


@pytest.mark.parametrize("seeds", [0, 2])
def test_what_is_drawn_becomes_a_config_and_what_is_not_allowed_is_drawn_anew(
    base, tmp_path, seeds
):
    options = {"space": HEADS, "to_config": heads_that_divide, "seeds": seeds}
    chosen = make(trials=8, sampler="random", **options)
    whole = open_study(chosen, base, tmp_path / "whole")
    names = drain(whole)
    assert whole.left() == 0
    for trial in whole.trials.values():
        config = trial.config
        assert config.model.d_model % config.model.n_heads == 0
        assert config.steps == 64 // config.batch_size
        assert trial.drawn["batch"] == config.batch_size
    found = sweeps.results(whole)
    assert {"width", "batch", "model.d_model", "steps"} <= found["keys"].keys()
    assert "--config.model.d_model=" in found["command"]
    assert "width" not in found["command"]
    report.write(whole.out, found)
    parts = drain(open_study(chosen, base, tmp_path / "parts"), at_most=3)
    again = open_study(chosen, base, tmp_path / "parts")
    assert parts + drain(again) == names
    assert drawn_of(again) == drawn_of(whole)


def test_a_search_may_choose_options_of_the_config_file(tmp_path):
    from experiments import door

    axes = {"config": space.choice("train=head", "adapter=lora"),
            "hyper.lr": space.log_uniform(1e-4, 1e-2)}  # fmt: skip
    mine = make(space=axes, trials=6, config="configs/classify.py:size=tiny")
    mine, config = plan.fix(mine, door.load_config(mine.config))
    assert {c.adapter.name for _, c in plan.corners(config, mine)} == {"full", "lora"}
    study = open_study(mine, config, tmp_path / "out")
    drain(study)
    for trial in study.trials.values():
        lora = trial.overrides["config"] == "adapter=lora"
        assert trial.config.adapter.name == ("lora" if lora else "full")


def test_a_space_without_an_allowed_draw_is_told(base, tmp_path, monkeypatch):
    monkeypatch.setattr(studies, "MOST_REFUSED", 20)
    chosen = make(space=HEADS, to_config=lambda drawn: None, trials=1)
    study = open_study(chosen, base, tmp_path / "out")
    with pytest.raises(ValueError, match="allows none of 20 draws in a row, the last"):
        drain(study)


def test_a_sampler_learns_what_is_not_allowed(base, tmp_path):
    """Nobody has seen heads=3, so to TPE it is as good as what it knows is good."""
    axes = {"heads": space.choice(1, 2, 3), "rate": space.log_uniform(1e-4, 1e-1)}

    def to_config(drawn):
        if drawn["heads"] == 3:
            return None
        return {"model.n_heads": drawn["heads"], "hyper.lr": drawn["rate"]}

    chosen = make(space=axes, to_config=to_config, trials=30)
    study = open_study(chosen, base, tmp_path / "out")
    drain(study, lambda trial: trial.overrides["hyper.lr"])
    assert study.left() == 0 and len(study._draws.trials) < 90


def test_whole_numbers_on_a_log_scale_and_floats_in_steps():
    axes = {
        "log": space.integer(1, 1000, log=True),
        "steps": space.uniform(0.0, 0.3, step=0.1),
    }
    points = space.random(axes, 400)
    small = sum(point["log"] <= 31 for point in points)
    assert 140 < small < 260  # half of three decades
    assert all(1 <= point["log"] <= 1000 for point in points)
    assert {round(point["steps"], 9) for point in points} == {0.0, 0.1, 0.2, 0.3}
    with pytest.raises(ValueError, match=r"uniform.. from 0.0 to 1.0 in steps of 0.3"):
        space.uniform(0, 1, step=0.3)
    with pytest.raises(ValueError, match="log and step=2: leave one out"):
        space.integer(1, 8, step=2, log=True)


def test_what_an_old_search_recorded_of_its_space_still_reads_the_same():
    """Oracle: what 0.1.0 wrote into sweep.json."""
    assert str(space.log_uniform(1e-4, 0.1)) == (
        "Dimension(kind='log', low=0.0001, high=0.1, step=1, choices=())"
    )
    assert str(space.uniform(0.0, 0.3)) == (
        "Dimension(kind='float', low=0.0, high=0.3, step=1, choices=())"
    )
    assert str(space.integer(2, 8, step=3)) == (
        "Dimension(kind='int', low=2, high=8, step=3, choices=())"
    )
    assert str(space.choice("a", 1)) == (
        "Dimension(kind='choice', low=0, high=0, step=1, choices=('a', 1))"
    )


def test_a_search_begins_with_the_points_that_it_is_told(base, tmp_path):
    axes = {"hyper.lr": space.log_uniform(1e-4, 1e-1), "batch_size": space.choice(2, 4)}
    first = ({"hyper.lr": 0.01, "batch_size": 4}, {"hyper.lr": 0.02})
    chosen = make(space=axes, trials=4, first=first)
    whole = drain(open_study(chosen, base, tmp_path / "whole"))
    assert re.fullmatch("000-lr=0.01,batch_size=4", whole[0])
    assert re.fullmatch("001-lr=0.02,batch_size=[24]", whole[1])
    parts = drain(open_study(chosen, base, tmp_path / "parts"), at_most=1)
    assert parts + drain(open_study(chosen, base, tmp_path / "parts")) == whole
    with pytest.raises(ValueError, match=r"first has hyper.lr=5.0, which is not Dimen"):
        make(space=axes, trials=4, first=({"hyper.lr": 5.0},))
    with pytest.raises(ValueError, match=r"a key of first 'hyper.l' .* mean hyper.lr"):
        make(space=axes, trials=4, first=({"hyper.l": 0.1},))


def test_a_search_learns_from_an_earlier_one(base, tmp_path):
    """TPE that knows where the best lies draws there at once."""
    axes = {"hyper.lr": space.log_uniform(1e-5, 1e-1)}
    far = lambda trial: abs(trial.overrides["hyper.lr"] - 1e-2)  # noqa: E731
    earlier = open_study(make(space=axes, trials=30), base, tmp_path / "earlier")
    drain(earlier, far)
    report.tables(earlier.out, sweeps.results(earlier))
    chosen = make(space=axes, trials=5, start=str(earlier.out), seed=7)
    study = open_study(chosen, base, tmp_path / "out")
    drain(study, far)
    assert len(study.trials) == 5 and study.left() == 0
    rates = [trial.overrides["hyper.lr"] for trial in study.trials.values()]
    assert sum(2e-3 < rate < 5e-2 for rate in rates) >= 4
    assert drain(open_study(chosen, base, tmp_path / "out")) == []
    other = make(space=axes, trials=5, start=str(earlier.out), metric="val_bpb")
    with pytest.raises(
        ValueError, match="ranked by val_loss, minimize, best, this sweep"
    ):
        open_study(other, base, tmp_path / "other")
    narrow = {"hyper.lr": space.log_uniform(1.0, 2.0)}
    none = make(space=narrow, trials=5, start=str(earlier.out))
    with pytest.raises(ValueError, match="nothing of it lies in this space"):
        open_study(none, base, tmp_path / "none")
    (tmp_path / "x").mkdir()
    (tmp_path / "x/results.json").write_text(json.dumps({}))
    broken = make(space=axes, trials=5, start=str(tmp_path / "x"))
    with pytest.raises(ValueError, match="does not hold the results of a sweep"):
        open_study(broken, base, tmp_path / "broken")


def test_points_and_keys_are_called_what_the_file_says(base, tmp_path):
    points = [
        {"label": "wide & flat", "model.d_model": 32, "model.n_layers": 1},
        {"label": "narrow", "model.d_model": 16, "model.n_layers": 2},
    ]
    labels = {"model.d_model": "width", "val_loss": "loss (nats)"}
    chosen = make(space.product(points, space.seeds(2)), labels=labels)
    study = open_study(chosen, base, tmp_path / "out")
    assert [*study.trials][::2] == ["wide___flat,seed=1337", "narrow,seed=1337"]
    drain(study, lambda trial: float(trial.config.model.d_model))
    found = sweeps.results(study)
    assert found["best"] == "narrow" and found["title"] == "loss (nats)"
    assert found["keys"]["model.d_model"] == "width"
    assert "label" not in found["command"] and "d_model=16" in found["command"]
    assert report.write(study.out, found) == ""
    page = (study.out / "report.html").read_text()
    assert "<th class=number>width</th>" in page
    assert "best loss (nats) (mean of 2 seeds" in page
    with pytest.raises(ValueError, match=r"a key of labels 'model.d_mode' .* mean"):
        make(points, labels={"model.d_mode": "width"})
    with pytest.raises(ValueError, match=r"narrow.* is the same run as .*wide"):
        same = [{**point, "model.d_model": 16, "model.n_layers": 1} for point in points]
        sweeps.check(make(same), base)
