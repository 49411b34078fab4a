"""Reports: tables hold every trial; pages are self-contained and show what counts."""

import csv
import itertools
import json
import math
import random
import re

import pytest
from ml_collections import ConfigDict
from scipy import stats

from configs import common
from gpt_jax import metrics, report, runs, seeds
from gpt_jax.report import figures, importance, looks, optimum, page, pictures, scales
from gpt_jax.report import results as tables
from gpt_jax.sweep import run as sweeps
from gpt_jax.sweep.study import Setting, Trial

pytest.importorskip("plotly", reason="needs plotly: pip install plotly")


def trial(name, overrides, value, status="done", step=8, seed=1, **more):
    row = {"name": name, "status": status, "value": value, "at": step, "last": value}
    row |= {"step": step, "tokens": step * 64, "seconds": 1.0, "reason": "steps"}
    row |= {"steps": 8, "seed": seed, "crashes": 0, "overrides": overrides}
    row |= {
        "after": {},
        "parameters": 1000,
        "flops": 6e3 * 64 * step,
        "bytes": 200.0 * step,
    }
    return {**row, **more}


def results(trials, keys, best="", **more):
    """Results of trials; those of one point are a setting, as `sweep.run` has it."""
    groups: dict[str, list] = {}
    for row in trials:
        groups.setdefault(seeds.text(row["overrides"]), []).append(row)
    settings = []
    for rows in groups.values():
        for row in rows:
            row["setting"] = rows[0]["name"]
        values = [row["value"] for row in rows if row["status"] == "done"]
        mean = seeds.mean(values) if values else None
        like = [Trial(row["name"], row["overrides"], ConfigDict()) for row in rows]
        named = {row["name"]: row for row in rows}
        whole = len(values) == len(rows)
        setting = Setting(rows[0]["name"], like, mean, whole)
        settings.append(sweeps._setting(setting, named))
    direction = more.get("direction", "minimize")
    settings.sort(
        key=lambda row: seeds.place(row["value"], row["status"] == "done", direction)
    )
    found = {"sweep": "mine", "config": "configs/quickstart.py:size=tiny"}
    found |= {"fixed": {"steps": 8}, "metric": "val_loss", "direction": "minimize"}
    found |= {"at": "best", "after": [], "cost": "", "evolved": {}}
    found |= {"title": "val_loss"}
    found |= {"pruner": None, "size": len(trials), "keys": keys, "space": {}}
    found |= {"drawn": False, "command": "python -m experiments.train"}
    found["best"] = best or (settings[0]["value"] and settings[0]["name"])
    return {**found, "settings": settings, "trials": trials, **more}


def record(folder, values, every=2):
    """Writes evaluations into a run folder; None is one that was not finite."""
    folder.mkdir(parents=True)
    lines = [{"step": every * i, "val_loss": x} for i, x in enumerate(values)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


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
            record(tmp_path / name, [value + 4 - s for s in (0, 1, 2, 3, 4)])
    point = {"h.lr": 1.0, "m.layers": 1}
    why = "killed by signal 9: <b>no & memory</b>"
    trials.append(trial("lr=1,layers=1", point, None, "failed", 0, reason=why))
    return tmp_path, results(trials, {"h.lr": "lr", "m.layers": "layers"})


@pytest.fixture
def seeded(tmp_path):
    """Three settings of three seeds; the luckiest seed is not of the best setting.

    Of one setting a seed diverged, and the others are the best of all.
    """
    values = {1e-3: (2.0, 2.1, 2.2), 1e-2: (1.9, 2.6, 2.7), 1e-1: (1.0, 1.1, None)}
    trials = []
    for lr, seeds_ in values.items():
        for seed, value in enumerate(seeds_):
            name, status = f"lr={lr},seed={seed}", "done" if value else "diverged"
            trials.append(trial(name, {"h.lr": lr}, value, status, seed=seed))
            end = value or 3000.0
            record(tmp_path / name, [4.0, (4 + end) / 2, end, end, value])
    return tmp_path, results(trials, {"h.lr": "lr"}, name="lr=0.001")


# --- tables ---------------------------------------------------------------------------


def read_csv(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def test_the_tables_hold_every_setting_and_every_trial_best_first(grid):
    out, found = grid
    report.tables(out, found)
    rows = read_csv(out / "results.csv")
    assert len(rows) == 7
    assert rows[0]["setting"] == "lr=0.01,layers=2"
    assert float(rows[0]["mean"]) == pytest.approx(1.8) and rows[0]["n"] == "1"
    values = [float(row["mean"]) for row in rows[:-1]]
    assert values == sorted(values)
    assert rows[-1]["status"] == "failed" and rows[-1]["mean"] == ""
    assert {row["h.lr"] for row in rows} == {"0.001", "0.01", "0.1", "1.0"}
    trials = read_csv(out / "trials.csv")
    assert [row["trial"] for row in trials] == [row["name"] for row in found["trials"]]
    assert "signal 9" in trials[-1]["reason"]
    assert json.loads((out / "results.json").read_text()) == found


def test_a_row_of_the_table_is_a_setting_and_its_mean_decides(seeded):
    """Oracle: scipy. The luckiest seeds are of other settings."""
    out, found = seeded
    report.tables(out, found)
    rows = read_csv(out / "results.csv")
    assert [row["h.lr"] for row in rows] == ["0.001", "0.01", "0.1"]
    assert [row["n"] for row in rows] == ["3", "3", "2"]
    assert [row["status"] for row in rows] == ["done", "done", "diverged"]
    low, high = stats.t.interval(0.95, 2, 2.1, stats.sem([2.0, 2.1, 2.2]))
    assert float(rows[0]["low"]) == pytest.approx(low)
    assert float(rows[0]["high"]) == pytest.approx(high)
    assert "seed" not in rows[0]
    said = report.summary(found)
    assert f"mean of 3 seeds, 95 % within [{low:.4f}, {high:.4f}]" in said
    table = " ".join(report.table(found).split())  # its columns are aligned
    assert f"| 2.1000 | {low:.4f} to {high:.4f} | 3 of 3 |" in table
    assert "| 1.0500 (diverged in part) |" in report.table(found)


def test_no_column_of_the_tables_has_the_name_of_another_or_of_a_config_key(grid):
    """`steps`, `seed` and `batch_size` may be swept."""
    out, found = grid
    report.tables(out, found)
    taken = set(runs.flat(common.base()))
    for name in ("results.csv", "trials.csv"):
        head = (out / name).read_text().splitlines()[0].split(",")
        assert len(set(head)) == len(head)
        assert {*head} & taken <= {"seed"}  # of a trial, and never a swept key


def test_every_number_of_the_tables_reads_as_a_number(seeded):
    out, found = seeded
    report.tables(out, found)
    words = {"setting", "status", "reason", "trial"}
    for name in ("results.csv", "trials.csv"):
        for row in read_csv(out / name):
            for column in row.keys() - words:
                assert row[column] == "" or math.isfinite(float(row[column]))


def test_all_curves_are_one_long_table(seeded):
    """Oracle: the records."""
    out, found = seeded
    report.write(out, found)
    rows = read_csv(out / "curves.csv")
    assert list(rows[0]) == ["trial", "setting", "seed", "step", "val_loss"]
    for told in found["trials"]:
        own = [row for row in rows if row["trial"] == told["name"]]
        assert {row["setting"] for row in own} == {told["setting"]}
        for row, line in zip(own, metrics.read(out / told["name"]), strict=True):
            value = "" if line["val_loss"] is None else str(line["val_loss"])
            assert (row["step"], row["val_loss"]) == (str(line["step"]), value)


def test_a_trial_that_did_not_end_does_not_look_like_one_that_did(seeded, grid):
    out, found = seeded
    report.tables(out, found)
    lost = [row for row in read_csv(out / "trials.csv") if row["status"] == "diverged"]
    assert [row["value"] for row in lost] == [""]
    last = report.table(grid[1]).splitlines()[-1]
    assert " ".join(last.split()) == "| lr=1,layers=1 | failed | | 1 |"


# --- importance -----------------------------------------------------------------------


def importance_of(found):
    return importance.importance(found, tables.axes(found))


def test_importance_in_a_full_grid_is_the_main_effect_of_a_key():
    """Oracle: by hand."""
    points = [{"a": a, "b": b} for a in range(4) for b in range(4)]
    # Ranks of a + 4b are a + 4b themselves: variances 1.25 and 20 of 21.25.
    both = [trial(str(p), p, float(p["a"] + 4 * p["b"])) for p in points]
    share = importance_of(results(both, {"a": "a", "b": "b"}))
    assert share == pytest.approx({"b": 20 / 21.25, "a": 1.25 / 21.25}, rel=1e-6)
    assert list(share) == ["b", "a"]


def drawn(count, keys, value, seed=0):
    source = random.Random(seed)
    points = [{key: source.random() for key in keys} for _ in range(count)]
    rows = [trial(str(i), p, value(p, source)) for i, p in enumerate(points)]
    return results(rows, dict(zip(keys, keys)), drawn=True)


def test_chance_is_no_importance():
    """Forty sweeps in which nothing matters; 1 in 20 may look as if something did."""
    found = [
        importance_of(drawn(30, "abcde", lambda p, source: source.random(), seed))
        for seed in range(40)
    ]
    assert sum(bool(share) for share in found) <= 5


def test_importances_are_shares_that_never_add_up_to_more_than_one():
    for seed in range(10):
        found = drawn(24, "abcd", lambda p, _: 3 * p["a"] + p["b"], seed)
        share = importance_of(found)
        assert next(iter(share)) == "a" and sum(share.values()) <= 1


def test_of_few_settings_no_importance_is_told():
    points = [{"a": a} for a in range(5)]
    rows = [trial(str(p), p, float(p["a"])) for p in points]
    assert importance_of(results(rows, {"a": "a"})) == {}


def test_pruned_and_diverged_trials_tell_what_is_important():
    """What decides is which trials got to their end; among those nothing does."""
    rows = []
    for a in range(4):
        for b in range(4):
            status = ("done", "done", "pruned", "diverged")[a]
            value = 2.0 + (b * 7 + a * 3) % 4 / 10
            row = trial(
                f"{a}{b}", {"a": a, "b": b}, value, status, step=8 if a < 2 else 2
            )
            rows.append({**row, "value": value if a < 2 else None})
    assert list(importance_of(results(rows, {"a": "a", "b": "b"}))) == ["a"]


# --- axes -----------------------------------------------------------------------------


def test_keys_that_move_together_are_one_axis_and_constant_ones_none():
    points = [
        {"b": b, "s": 400 // b, "lr": lr, "c": 1} for b in (4, 8) for lr in (1, 2)
    ]
    rows = [trial(str(p), p, 1.0) for p in points]
    found = tables.axes(results(rows, {k: k for k in ("b", "s", "lr", "c")}))
    assert [(axis.label, axis.tied) for axis in found] == [("b", ["s"]), ("lr", [])]
    # Drawn values are all different: that alone does not tie them.
    free = drawn(12, "ab", lambda p, _: p["a"])
    assert [axis.tied for axis in tables.axes(free)] == [[], []]
    for row in free["settings"]:
        row["overrides"]["b"] = row["overrides"]["a"] * 3
    assert [axis.tied for axis in tables.axes(free)] == [["b"]]


def test_keys_that_some_trials_lack_and_values_that_are_lists_have_their_axes(tmp_path):
    windows = ({"mixer": "attention", "window": 4}, {"mixer": "attention"})
    points = [{"r": 4, "p": None}, {"r": 8, "p": None}, {"r": None, "p": windows}]
    rows = [trial(str(i), p, 2.0 + i) for i, p in enumerate(points)]
    for row in rows:
        record(tmp_path / row["name"], [5.0, row["value"]])
    found = results(rows, {"r": "rank", "p": "pattern"})
    rank, pattern = tables.axes(found)
    assert rank.values == [4, 8, None] and not rank.numeric
    assert tables.brief(rank.values[-1]) == tables.ABSENT
    assert [type(value) for value in pattern.values] == [str, type(None)]
    assert report.write(tmp_path, found) == ""
    assert read_csv(tmp_path / "results.csv")[-1]["r"] == ""


def test_ticks_stay_apart_and_whole_numbers_look_whole():
    axis = tables.Axis("x", "x", [], [], True, True)
    close = [1e-3, 1.05e-3, 1.1e-3, 1e-2]
    assert tables.ticks(axis, close, apart=0.15) == [1e-3, 1e-2]
    many = [1e-4 * 1.3**i for i in range(30)]
    shown = tables.ticks(axis, many, apart=0.1)
    assert 2 <= len(shown) <= 8 and all(many[0] <= x <= many[-1] for x in shown)
    assert [tables.brief(x) for x in (1337, 131072.0, 0.016, None, True)] == [
        *("1337", "131072", "0.016", tables.ABSENT, "True")
    ]


def test_scales_are_logarithmic_where_values_spread_over_decades(grid):
    _, found = grid
    assert tables.logarithmic(found, "h.lr", [1e-3, 1e-2, 1e-1])
    assert not tables.logarithmic(found, "m.layers", [1, 2, 3])
    assert not tables.logarithmic(found, "x", [0.0, 0.01, 0.1])
    searched = {**found, "space": {"h.lr": "float"}}
    assert not tables.logarithmic(searched, "h.lr", [1e-3, 1e-2, 1e-1])


# --- figures --------------------------------------------------------------------------


def lines_of(figure):
    """Returns the lines of a figure, its areas and its colours' bar left out."""
    return [
        one for one in figure.data
        if one.x is not None and len(one.x) > 1 and one.fill is None
    ]  # fmt: skip


def test_the_report_is_one_file_that_needs_no_other(grid):
    out, found = grid
    assert report.write(out, found) == ""
    page = (out / "report.html").read_text()
    assert not re.search(r"<(script|link|img)[^>]+(src|href)=", page)
    for title in ("Curves", "Where the optimum lies", "Slices", "Trials"):
        assert f"<h2>{title}</h2>" in page
    assert "All keys at once" not in page  # two keys need no parallel coordinates
    assert "1.8000" in page and found["command"].split()[-1] in page
    assert "killed by signal 9: &lt;b&gt;no &amp; memory&lt;/b&gt;" in page
    assert '<a href="lr%3D0.01%2Clayers%3D2/"' in page
    for name in ("curves.png", "slices.png"):
        assert (out / name).read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_without_plotly_all_but_the_page_is_written(grid, monkeypatch):
    out, found = grid
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    assert "pip install plotly" in report.write(out, found)
    assert not (out / "report.html").exists()
    assert (out / "results.csv").exists() and (out / "curves.png").exists()


def test_a_sweep_without_a_finished_trial_still_has_a_report(tmp_path):
    rows = [trial("a", {"h.lr": 1.0}, None, "failed", 0)]
    found = results(rows, {"h.lr": "lr"}, command=None)
    report.write(tmp_path, found)
    assert "<h2>Trials</h2>" in (tmp_path / "report.html").read_text()
    assert report.summary(found) == "1 failed; no trial is done"


def test_a_curve_is_drawn_for_every_setting_and_the_best_on_top(grid):
    out, found = grid
    lines = lines_of(figures.curves(out, found, tables.axes(found)[0]))
    assert len(lines) == 6
    assert lines[-1].line.color == looks.RED
    assert list(lines[-1].x) == [0, 2, 4, 6, 8]
    assert lines[-1].y[-1] == pytest.approx(1.8)


def test_seeds_are_drawn_as_their_mean_with_a_band(seeded):
    """Oracle: scipy."""
    out, found = seeded
    figure = figures.curves(out, found, tables.axes(found)[0])
    lines = {line.name: line for line in lines_of(figure)}
    best = lines["best: lr=0.001,seed=0"]
    assert best.y[-1] == pytest.approx(2.1)
    (band,) = [one for one in figure.data if one.fill and one.fillcolor == looks.RED]
    error = stats.sem([2.0, 2.1, 2.2])
    assert max(band.y) == pytest.approx(4.0)
    assert min(band.y) == pytest.approx(2.1 - error)
    assert len(lines) == 3


def test_a_diverged_point_sets_no_colour_and_no_axis(seeded, tmp_path):
    out, found = seeded
    sound = {**found, "settings": found["settings"][:2]}
    lost = trial("far", {"h.lr": 1e30}, None, "diverged", seed=0)
    record(tmp_path / "far", [4.0, 1e9, 1e12])
    more = results([*found["trials"], lost], found["keys"])
    assert scales.interesting(more) == scales.interesting(found)
    axis = next(axis for axis in tables.axes(more) if axis.key == "h.lr")
    own = next(axis for axis in tables.axes(found) if axis.key == "h.lr")
    for row in sound["settings"]:
        assert looks.colours(more, axis)(row) == looks.colours(found, own)(row)
    (far,) = [row for row in more["settings"] if row["name"] == "far"]
    assert looks.colours(more, axis)(far) == looks.GREY
    shown = figures.slices(more, [axis]).layout.xaxis
    assert max(shown.tickvals) == pytest.approx(0.1)
    assert figures.curves(out, more, axis).layout.yaxis.range[1] < 10
    report.write(out, more)  # the pictures too


def test_words_as_colours_have_a_legend_and_none_is_the_red_of_the_best(tmp_path):
    names = ("adamw", "lion", "muon", "sgd", "adafactor", "none")
    rows = [trial(name, {"o": name}, 2.0 + i) for i, name in enumerate(names)]
    for row in rows:
        record(tmp_path / row["name"], [5.0, row["value"]])
    found = results(rows, {"o": "optimizer"})
    (axis,) = tables.axes(found)
    lines = lines_of(figures.curves(tmp_path, found, axis))
    told = {line.name: line.line.color for line in lines if line.showlegend}
    assert told.keys() == {"best: adamw", *names[1:]}
    assert len(set(told.values())) == 6
    assert [name for name, ink in told.items() if ink == looks.RED] == ["best: adamw"]


def test_forty_lines_look_different():
    assert len({looks.style(number) for number in range(40)}) == 40
    assert looks.RED not in looks.PALETTE
    dashes = {looks.style(number)[1] for number in range(40)}
    assert "dot" not in dashes  # which stands for what was stopped early
    assert dashes <= pictures.LINES.keys()


def test_drawn_points_are_never_joined_by_a_line(grid):
    _, found = grid
    axes = tables.axes(found)
    complete = {**found, "settings": found["settings"][:-1]}
    assert lines_of_mode(figures.slices(complete, tables.axes(complete)))
    assert not lines_of_mode(figures.slices({**complete, "drawn": True}, axes))
    free = drawn(8, "ab", lambda p, _: p["a"])
    assert not lines_of_mode(figures.slices(free, tables.axes(free)))
    assert figures.interaction(free, tables.axes(free)) is None
    part = {**found, "settings": found["settings"][:3]}  # of six combinations
    assert not lines_of_mode(figures.slices(part, axes))


def test_on_the_front_stands_what_nothing_is_as_good_as_for_less():
    values = {1: 3.0, 2: 2.5, 3: 2.6, 4: 2.0, 5: 2.0}
    trials = [trial(f"n={n}", {"m.n": n}, x, parameters=n) for n, x in values.items()]
    found = results(trials, {"m.n": "n"})

    def ahead():
        return [row["parameters"] for row in tables.front(found, "parameters")]

    assert ahead() == [1, 2, 4]
    figure = figures.tradeoffs(found)
    assert figure and list(figure.data[1].x) == [1, 2, 4]
    assert figure.layout.xaxis.title.text == "parameters"
    found["direction"] = "maximize"
    assert ahead() == [1]
    same = [trial(f"n={n}", {"m.n": n}, x) for n, x in values.items()]
    assert figures.tradeoffs(results(same, {"m.n": "n"})) is None


def lines_of_mode(figure):
    return [one for one in figure.data if one.mode == "lines"]


def test_the_optimum_of_each_line_is_starred(grid):
    _, found = grid
    lines = figures.interaction(found, tables.axes(found)).data
    assert [line.name for line in lines] == ["layers 1", "layers 2"]
    for line in lines:
        starred = [x for x, s in zip(line.x, line.marker.symbol) if s == "star"]
        assert starred == [1e-2]
    told = optimum.told(found, tables.axes(found))
    assert told.startswith("Best lr by layers: 1: 0.01 (") and "widen" not in told


def test_a_third_axis_has_a_panel_for_each_of_its_values():
    def loss(kind, width, lr):  # the best rate falls with the width, but for "mup"
        best = -2.0 - (width // 64 if kind == "standard" else 1)
        return 2.0 + (math.log10(lr) - best) ** 2 - width / 1000

    points = itertools.product(
        ("standard", "mup"), (64, 128, 192), (1e-5, 1e-4, 1e-3, 1e-2)
    )
    trials = [trial(str(p), dict(zip("pwl", p)), loss(*p)) for p in points]
    found = results(trials, {"p": "param", "w": "width", "l": "lr"})
    axes = tables.axes(found)
    optima = optimum.find(found, axes)
    assert optima and (optima.along.key, optima.by.key) == ("l", "w")
    assert optima.over and optima.over.key == "p"
    stars = {
        panel.of: [line.xs[line.star] for line in panel.lines]
        for panel in optima.panels
    }
    assert stars == {"standard": [1e-3, 1e-4, 1e-5], "mup": [1e-3] * 3}
    figure = figures.interaction(found, axes)
    assert figure and [note.text for note in figure.layout.annotations] == [
        f"param {panel.of}" for panel in optima.panels
    ]
    assert [one.showlegend for one in figure.data] == [True] * 3 + [False] * 3
    told = optimum.told(found, axes)
    assert "Best lr by width with param mup: 64: 0.001 (" in told
    drawn = pictures._optima(found, optima)
    assert [panel.get_title() for panel in drawn.axes] == [
        f"param {panel.of}" for panel in optima.panels
    ]


def test_a_hopeless_trial_does_not_flatten_the_picture():
    rows = [trial(str(x), {"a": x}, x) for x in (2.0, 2.1, 2.2, 2.3, 1e6)]
    low, high = scales.interesting(results(rows, {"a": "a"}))
    assert low < 2.0 and 2.3 < high < 10
