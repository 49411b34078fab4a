"""Reports: tables hold every trial; pages are self-contained and show what counts."""

import csv
import json
import math
import re
import subprocess
import sys

import pytest
from scipy import stats

from configs import common
from gpt_jax import report
from gpt_jax.report import compare, figures
from gpt_jax.report import results as tables

pytest.importorskip("plotly", reason="needs plotly: pip install plotly")


def trial(name, overrides, value, status="done", step=8, **more):
    row = {
        "name": name,
        "status": status,
        "reason": "steps",
        "value": value,
        "at": step,
    }
    row |= {"last": value, "step": step, "tokens": step * 64, "seconds": 1.0}
    return {**row, "steps": 8, "attempts": 1, "overrides": overrides, **more}


def results(trials, keys, best, **more):
    found = {"sweep": "mine", "config": "configs/quickstart.py:size=tiny"}
    found |= {"fixed": {"steps": 8}, "metric": "val_loss", "direction": "minimize"}
    found |= {"pruner": None, "size": len(trials), "keys": keys, "space": {}}
    found |= {
        "importance": None,
        "best": best,
        "command": "python -m experiments.train",
    }
    return {**found, "trials": trials, **more}


@pytest.fixture
def grid(tmp_path):
    """Two keys: lr decides nearly all, layers a little; one trial failed."""
    trials = []
    for lr in (1e-3, 1e-2, 1e-1):
        for layers in (1, 2):
            name, value = f"lr={lr},layers={layers}", 2 + abs(math.log10(lr) + 2)
            value += 0.3 * (lr > 0.01)
            value -= 0.1 * layers
            trials.append(trial(name, {"h.lr": lr, "m.layers": layers}, value))
            lines = [{"step": s, "val_loss": value + 4 - s / 2} for s in (0, 2, 4, 8)]
            (tmp_path / name).mkdir()
            text = "".join(json.dumps(line) + "\n" for line in lines)
            (tmp_path / name / "metrics.jsonl").write_text(text)
    point = {"h.lr": 1.0, "m.layers": 1}
    why = "killed by signal 9: <b>no & memory</b>"
    trials.append(trial("lr=1,layers=1", point, None, "failed", 0, reason=why))
    keys = {"h.lr": "lr", "m.layers": "layers"}
    return tmp_path, results(trials, keys, "lr=0.01,layers=2")


def test_the_tables_hold_every_trial_best_first(grid):
    out, found = grid
    report.tables(out, found)
    rows = list(csv.DictReader((out / "results.csv").read_text().splitlines()))
    assert len(rows) == 7
    assert rows[0]["trial"] == "lr=0.01,layers=2"
    assert float(rows[0]["value"]) == pytest.approx(1.8)
    values = [float(row["value"]) for row in rows[:-1]]
    assert values == sorted(values)
    assert rows[-1]["status"] == "failed" and "signal 9" in rows[-1]["reason"]
    assert {row["h.lr"] for row in rows} == {"0.001", "0.01", "0.1", "1.0"}
    assert json.loads((out / "results.json").read_text()) == found


def test_maximizing_turns_the_order_around(grid):
    _, found = grid
    down = [row["name"] for row in tables.ranked(found)]
    up = [row["name"] for row in tables.ranked({**found, "direction": "maximize"})]
    assert up[:-1] == down[:-1][::-1] and up[-1] == down[-1]


def test_importance_is_the_variance_between_the_values_of_a_key():
    """Oracle: by hand."""
    keys = {"a": "a", "b": "b"}
    points = [{"a": a, "b": b} for a in range(4) for b in range(4)]
    # Ranks of a + 4b are a + 4b themselves: variances 1.25 and 20 of 21.25.
    both = [trial(str(p), p, float(p["a"] + 4 * p["b"])) for p in points]
    share = tables.importance(results(both, keys, None))
    assert share["b"] == pytest.approx(20 / 21.25) and list(share) == ["b", "a"]
    assert share["a"] == pytest.approx(1.25 / 21.25)


def test_a_failed_trial_does_not_decide_what_is_important(grid):
    _, found = grid
    before = tables.importance(found)
    for row in found["trials"]:
        if row["overrides"] == {"h.lr": 0.1, "m.layers": 1}:
            row["value"] = 1e9  # it was the worst already
    assert tables.importance(found) == before


def test_a_continuous_key_is_put_into_bins():
    points = [{"a": i / 40, "b": (i * 17 % 40) / 40} for i in range(40)]
    rows = [trial(str(i), p, p["a"]) for i, p in enumerate(points)]
    share = tables.importance(results(rows, {"a": "a", "b": "b"}, None))
    assert share["a"] > 0.9 and share["b"] < 0.3


def test_the_report_is_one_file_that_needs_no_other(grid):
    out, found = grid
    report.write(out, found)
    page = (out / "report.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    for title in ("Curves", "Where the optimum lies", "Slices", "Importance", "Trials"):
        assert f"<h2>{title}</h2>" in page
    assert "All keys at once" not in page  # two keys need no parallel coordinates
    assert "1.8000" in page and found["command"].split()[-1] in page
    assert "killed by signal 9: &lt;b&gt;no &amp; memory&lt;/b&gt;" in page
    for name in ("curves.png", "slices.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_a_sweep_without_a_finished_trial_still_has_a_report(tmp_path):
    rows = [trial("a", {"h.lr": 1.0}, None, "failed", 0)]
    found = results(rows, {"h.lr": "lr"}, None, command=None)
    report.write(tmp_path, found)
    assert "<h2>Trials</h2>" in (tmp_path / "report.html").read_text()
    assert report.summary(found) == "1 failed; no trial is done"
    cells = report.table(found).splitlines()[-1].split("|")
    assert [cell.strip() for cell in cells] == ["", "a", "failed", "0", "1", ""]


def test_a_curve_is_drawn_for_every_trial_and_the_best_on_top(grid):
    out, found = grid
    lines = [
        t for t in figures.curves(out, found).data if t.x is not None and len(t.x) > 1
    ]
    assert len(lines) == 6
    assert lines[-1].line.color == figures.RED
    assert list(lines[-1].x) == [0, 2, 4, 8]
    assert lines[-1].y[-1] == pytest.approx(1.8)


def test_the_optimum_of_each_line_is_starred(grid):
    _, found = grid
    lines = figures.interaction(found).data
    assert [line.name for line in lines] == ["layers 1", "layers 2"]
    for line in lines:
        starred = [x for x, s in zip(line.x, line.marker.symbol) if s == "star"]
        assert starred == [1e-2]


def test_scales_are_logarithmic_where_values_spread_over_decades(grid):
    _, found = grid
    assert tables.logarithmic(found, "h.lr", [1e-3, 1e-2, 1e-1])
    assert not tables.logarithmic(found, "m.layers", [1, 2, 3])
    assert not tables.logarithmic(found, "x", [0.0, 0.01, 0.1])
    searched = {**found, "space": {"h.lr": "float"}}
    assert not tables.logarithmic(searched, "h.lr", [1e-3, 1e-2, 1e-1])


def test_a_hopeless_trial_does_not_flatten_the_picture(grid):
    _, found = grid
    low, high = figures.interesting(found, [2.0, 2.1, 2.2, 2.3, 1e6])
    assert low < 2.0 and 2.3 < high < 10


# --- comparing runs -------------------------------------------------------------------


def run(folder, value, **overrides):
    """Writes a run folder that compare can read; its last evaluation is the best."""
    config = common.base()
    for key, changed in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): changed})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    rows = [{"step": step, "val_loss": value + 8 - step} for step in (0, 4, 8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def compared(folders, **more):
    options = {"direction": "minimize", "at": "best", **more}
    return compare.compare(folders, options.pop("metric", "val_loss"), **options)


@pytest.fixture
def seeds(tmp_path):
    """Two settings over five seeds: the difference is small beside the seeds'."""
    a = [2.0, 2.2, 2.4, 2.6, 2.8]
    b = [2.11, 2.29, 2.50, 2.71, 2.89]
    folders = []
    for i in range(5):
        folders.append(run(tmp_path / f"a{i}", a[i], seed=i, hyper__lr=1e-3))
        folders.append(run(tmp_path / f"b{i}", b[i], seed=i, hyper__lr=2e-3))
    return folders


def test_seeds_become_mean_and_standard_error(seeds):
    """Oracle: scipy."""
    found = compared(seeds)
    assert [setting.name for setting in found.settings] == ["lr=0.001", "lr=0.002"]
    values = [2.0, 2.2, 2.4, 2.6, 2.8]
    assert list(found.settings[0].values.values()) == pytest.approx(values)
    assert found.settings[0].mean == pytest.approx(2.4)
    assert found.settings[0].error == pytest.approx(stats.sem(values))


def test_pairs_of_one_seed_show_what_the_seeds_hide(seeds):
    """Oracle: scipy's paired t-test, whose 5 % is the interval's edge."""
    (pair,) = compared(seeds).pairs
    a, b = [2.0, 2.2, 2.4, 2.6, 2.8], [2.11, 2.29, 2.50, 2.71, 2.89]
    interval = stats.ttest_rel(b, a).confidence_interval(0.95)
    assert (pair.a, pair.b, pair.seeds) == ("lr=0.001", "lr=0.002", 5)
    assert (pair.low, pair.high) == pytest.approx(tuple(interval))
    assert pair.low > 0  # sure, although the settings' values overlap widely
    assert "more than chance" in compare.lines(compared(seeds))[-1]


def test_settings_without_shared_seeds_are_not_paired(tmp_path):
    folders = [run(tmp_path / f"a{i}", 2.0 + i, seed=i) for i in range(2)]
    folders += [run(tmp_path / f"b{i}", 2.5, seed=i + 7, steps=9) for i in range(2)]
    found = compared(folders)
    assert len(found.settings) == 2 and found.pairs == []


def test_keys_that_decide_nothing_do_not_tell_runs_apart(tmp_path):
    folders = [run(tmp_path / "a", 2.0, seed=1), run(tmp_path / "b", 2.1, seed=2)]
    folders.append(run(tmp_path / "c", 2.2, seed=3, grace_s=5.0, mesh__cpu_devices=1))
    (setting,) = compared(folders).settings
    assert len(setting.runs) == 3


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = run(tmp_path / "a", 2.0), run(tmp_path / "b", 2.1)
    with pytest.raises(ValueError, match="same config and seed"):
        compared([a, b])
    with pytest.raises(ValueError, match="not a run folder"):
        compared([a, tmp_path / "absent"])
    with pytest.raises(ValueError, match="has no 'val_acc'"):
        compared([a], metric="val_acc")


def test_the_last_evaluation_may_count_instead_of_the_best(tmp_path):
    folder = run(tmp_path / "a", 2.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "val_loss": 3.0}\n')
    assert compared([folder]).settings[0].mean == 2.0
    assert compared([folder], at="last").settings[0].mean == 3.0
    assert compared([folder], direction="maximize").settings[0].mean == 10.0


def test_the_door_writes_table_page_and_picture(seeds, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.compare"),
            *(f"--runs={tmp_path}/a*,{seeds[1]}", f"--out={tmp_path}/out"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "2.4000 +- 0.1414" in done.stdout
    page = (tmp_path / "out/compare.html").read_text()
    assert "lr=0.001" in page and "<h2>Curves</h2>" in page
    rows = list(csv.DictReader((tmp_path / "out/compare.csv").read_text().splitlines()))
    assert len(rows) == 6
    assert (tmp_path / "out/compare.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ([], "--runs is missing"),
        (["--runs=no_such_folder/*"], "no run folder matches no_such_folder/*"),
        (["--runs=no_such_folder"], "no_such_folder is not a run folder"),
    ],
)
def test_the_door_refuses_with_one_sentence(arguments, sentence):
    command = [sys.executable, "-m", "experiments.compare", *arguments]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert sentence in done.stderr and "Traceback" not in done.stderr
