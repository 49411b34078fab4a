"""The page of one run: what it draws, what it says, and that it ends nothing."""

import json
import logging
import re

import pytest

from gpt_jax import configs, model, runs
from gpt_jax.report import run as report
from tests import runs_to_evaluate
from tests.test_model import FAMILIES
from tests.tiny import cfg

TEXTS = ["a <b> & ```c```", "the </script> end"]


@pytest.fixture
def folder(tmp_path):
    """A run of 3,200 recorded steps and two samples."""
    folder = runs_to_evaluate.make(tmp_path / "run")
    lines = [
        {"step": s, "train_loss": 5 - s / 1000, "lr": 1e-3, "skipped": 0}
        for s in range(1, 3201)
    ]
    lines += [
        {"step": 3200, "tokens": 64, "seconds": 90.0, "val_loss": 2.5, "val_bpb": 1.5}
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)
    runs.add_samples(folder, 0, TEXTS[:1])
    runs.add_samples(folder, 3200, TEXTS)
    return folder


def test_a_long_curve_is_drawn_as_the_means_of_neighbours(folder):
    loss, bits, rate = report.curves(report.metrics.read(folder))
    assert [one["title"] for one in (loss, bits, rate)] == [
        *("Loss", "Bits per byte", "Learning rate")
    ]  # and not updates that were never skipped
    train, val = loss["lines"]
    assert (train["each"], len(train["x"])) == (3, 1067) and train["x"][-1] == 3200
    assert train["y"][0] == pytest.approx(5 - 2 / 1000)
    assert (val["x"], val["y"], val["each"]) == ([3200], [2.5], 1)


def test_values_that_were_not_finite_are_left_out_of_a_curve():
    rows = [{"step": 1, "train_loss": None}, {"step": 2, "train_loss": 3.0}]
    (loss,) = report.curves(rows)
    assert loss["lines"][0]["x"] == [2]


def test_samples_stand_beside_their_steps(folder):
    assert report.samples(folder) == [(0, TEXTS[:1]), (3200, TEXTS)]


@pytest.mark.parametrize("name", [*FAMILIES])
def test_the_parts_of_a_model_are_all_of_it(name):
    c = cfg(**FAMILIES[name])
    found = report.parts(c)
    assert sum(found.values()) == model.count(c) and "other" not in found


def test_a_config_is_told_as_it_differs_from_the_nearest_file():
    config = configs.load("gpt2")
    config.hyper.lr, config.log_every = 0.5, 7
    recipe, lines = report.nearest(config)
    assert recipe == "gpt2" and len(lines) == 1 and lines[0].startswith("hyper.lr: ")


def test_a_page_is_whole_and_asks_nobody_for_anything(folder):
    report.note_machine(folder)
    path = report.write(folder)
    text = path.read_text()
    assert path.name == "report.html"
    assert "://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert not re.search(r"<link|src=|@import|fetch\(|url\(", text)
    assert "a &lt;b&gt; &amp; ```c```" in text and "the &lt;/script&gt; end" in text
    assert text.count("</script>") == 2
    assert (
        "Step 3,200, val_loss 2.500" in text and "best val_loss, at step 3,200" in text
    )
    for name in ("jax", "numpy", "processor"):
        assert f"<tr><th>{name}</th>" in text
    data = re.search(r'id="curves">(.*?)</script>', text)[1]
    assert json.loads(data) == report.curves(report.metrics.read(folder))


def test_a_report_that_cannot_be_made_ends_nothing(folder, caplog):
    (folder / "metrics.jsonl").write_text("no json\nat all\n")
    with caplog.at_level(logging.WARNING):
        assert report.of_run(folder) is None
    assert "could not be written: ValueError" in caplog.text


def test_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is not a run folder"):
        report.write(tmp_path)
