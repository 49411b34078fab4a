"""What is measured of a trial after its training."""

import math

import pytest

from gpt_jax import files, metrics, report, runs, train
from gpt_jax.report import compare
from gpt_jax.sweep import after, plan, record, trial
from gpt_jax.sweep import run as sweeps
from tests.test_sweep import base, make, open_study, order, sweep_file

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")

FILE = """
config = "configs/quickstart.py:size=tiny"

def _letters(folder):
    return len(folder.name)

def _broken(folder):
    raise KeyError("no such thing")

after = {"letters": _letters, "broken": _broken}

def points():
    return [{}]
"""


def test_what_is_measured_of_a_done_trial_is_in_its_record(base, tmp_path):
    told = {"file": str(sweep_file(tmp_path, FILE)), "names": ["letters"]}
    folder = tmp_path / "seven77"
    trial.run(
        order(base, folder, after=told, criterion=("letters", "maximize", "best"))
    )
    said = record.read_outcome(folder)
    assert (said["status"], said["value"], said["at"]) == ("done", 7.0, 8)
    assert said["after"] == {"letters": 7.0}
    rows = metrics.read(folder)
    alone = train.train(base, tmp_path / "alone")
    assert rows[-1]["letters"] == 7.0 and rows[-1]["step"] == 8
    names = [row["step"] for row in rows[:-1]]
    assert names == [row["step"] for row in metrics.read(tmp_path / "alone")]
    assert rows[-2]["val_loss"] == alone.numbers["val_loss"]


def test_a_trial_that_cannot_be_measured_has_failed_and_says_why(base, tmp_path):
    told = {"file": str(sweep_file(tmp_path, FILE)), "names": ["letters", "broken"]}
    trial.run(order(base, tmp_path / "trial", after=told))
    said = record.read_outcome(tmp_path / "trial")
    assert said["status"] == "failed" and said["final"]
    assert said["reason"] == (
        "it is trained, but broken was not measured: 'no such thing'"
    )


def test_trials_may_be_ranked_by_what_is_measured_afterwards(base, tmp_path):
    sizes = {"letters": lambda folder: float(len(folder.name))}
    points = [{"label": "a"}, {"label": "long", "model.n_layers": 2}]
    chosen = make(points, after=sizes, metric="letters", direction="maximize")
    sweeps.check(chosen, base)
    study = open_study(chosen, base, tmp_path / "out")
    while one := study.next(lambda name, config: None):
        folder = study.out / one.name
        folder.mkdir()
        (folder / metrics.FILE).write_text('{"step": 8, "val_loss": 2.0}\n')
        files.write(folder / "config.json", runs.as_text(one.config))
        told = trial.measured(folder, sizes)
        found = trial.outcome(
            folder, chosen.criterion, status="done", reason="steps", **told
        )
        study.finish(one, found)
    found = sweeps.results(study)
    assert found["best"] == "long" and found["settings"][0]["after"] == {"letters": 4.0}
    assert report.write(study.out, found) == ""
    head = (study.out / "results.csv").read_text().splitlines()[0]
    assert head.endswith(",reason,letters")
    assert "<th class=number>letters</th>" in (study.out / "report.html").read_text()
    assert compare.compare([study.out / "a", study.out / "long"]).metric == "letters"


def test_what_is_measured_afterwards_must_have_a_name_of_its_own(base, tmp_path):
    one = {"val_loss": lambda folder: 0.0}
    with pytest.raises(ValueError, match="after has val_loss, which a run records"):
        sweeps.check(make([{}], after=one), base)
    with pytest.raises(ValueError, match="after has 'x': 3; give names"):
        make([{}], after={"x": 3})
    late = {"x": lambda folder: 0.0}
    with pytest.raises(ValueError, match="x is measured after training, so the pruner"):
        make([{}], after=late, metric="x", pruner={"name": "asha"})
    with pytest.raises(ValueError, match=r"metric 'y' is not one of.*, x"):
        sweeps.check(make([{}], after=late, metric="y"), base)
    with pytest.raises(ValueError, match=r"'last 2', but"):
        sweeps.check(make([{}], after=late, metric="x", at="last 2"), base)


def test_bits_per_byte_are_those_of_the_best_checkpoint(base, tmp_path):
    """Oracle: the validation of the run, on the same text, by windows of its own."""
    config = plan.override(base, {"eval_windows": 0, "data.val_fraction": 0.5})
    train.train(config, tmp_path / "run")
    best = min(row["val_bpb"] for row in metrics.read(tmp_path / "run")
               if "val_bpb" in row)  # fmt: skip
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "late.txt").write_text(text[len(text) // 2 :])
    measure = after.bits_per_byte(str(tmp_path / "late.txt"))
    assert math.isclose(measure(tmp_path / "run"), best, rel_tol=1e-2)
    with pytest.raises(ValueError, match="is a language model: it has no classes"):
        after.test_accuracy(tmp_path / "run")
