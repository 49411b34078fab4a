"""Comparing runs: settings by their mean, told from chance; what is not comparable.

The oracles are scipy and, of Holm's correction, its definition by hand.
"""

import csv
import json
import subprocess
import sys

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.image import imread
from scipy import stats

from configs import common
from gpt_jax.report import compare, compared, page

A, B = [2.0, 2.2, 2.4, 2.6, 2.8], [2.11, 2.29, 2.50, 2.71, 2.89]


def run(folder, value, *, tokenizer="one", rows=None, **overrides):
    """Writes a run folder of 8 steps; its last evaluation is the best."""
    config = common.base()
    config.steps = 8
    for key, changed in overrides.items():
        config.update_from_flattened_dict({key.replace("__", "."): changed})
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config.to_dict()))
    (folder / "tokenizer.json").write_text(tokenizer)
    rows = rows or [{"step": s, "val_loss": value + 8 - s} for s in (0, 4, 8)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(lines)
    return folder


def per_token(loss, bits):
    """Rows of a language model: nats per token and bits per byte."""
    told = {"val_loss": loss, "val_perplexity": 2.0, "val_bpb": bits}
    return [{"step": step, **told} for step in (0, 8)]


@pytest.fixture
def two(tmp_path):
    """Two settings over five seeds: the difference is small beside the seeds'."""
    folders = []
    for i in range(5):
        folders.append(run(tmp_path / f"a,seed={i}", A[i], seed=i, hyper__lr=1e-3))
        folders.append(run(tmp_path / f"b,seed={i}", B[i], seed=i, hyper__lr=2e-3))
    return folders


def test_seeds_become_a_mean_and_its_interval(two):
    """Oracle: scipy."""
    found = compare.compare(two)
    assert [setting.name for setting in found.settings] == ["a", "b"]
    assert [setting.told for setting in found.settings] == ["lr=0.001", "lr=0.002"]
    assert list(found.settings[0].values.values()) == pytest.approx(A)
    mean = found.settings[0].mean
    assert mean.value == pytest.approx(2.4)
    interval = stats.t.interval(0.95, 4, 2.4, stats.sem(A))
    assert (mean.low, mean.high) == pytest.approx(interval)


def test_pairs_of_one_seed_show_what_the_seeds_hide(two):
    """Oracle: scipy's paired t-test, whose 5 % is the interval's edge."""
    (pair,) = compare.compare(two).pairs
    oracle = stats.ttest_rel(B, A)
    interval = oracle.confidence_interval(0.95)
    mean = pair.difference.mean
    assert (pair.a, pair.b, mean.n) == ("a", "b", 5)
    assert (mean.low, mean.high) == pytest.approx(tuple(interval))
    assert pair.p == pytest.approx(oracle.pvalue)
    assert mean.low > 0  # sure, although the settings' values overlap widely
    said = compare.lines(compare.compare(two))
    assert said[-1] == "Told from a by more than chance: b."
    assert f"+0.1000 [{mean.low:+.4f}, {mean.high:+.4f}] p {pair.p:.2g}" in said[2]


def test_what_is_more_than_chance_is_corrected_for_the_number_of_comparisons(tmp_path):
    """Four settings: six pairs, of which the best was chosen; three against one."""
    for name, offset in (("a", 0.0), ("b", 0.04), ("c", 0.5), ("d", 0.9)):
        for i, noise in enumerate((0.00, 0.03, -0.02)):
            value = A[i] + offset + noise * (name != "a")
            run(tmp_path / f"{name},seed={i}", value, seed=i, hyper__lr=offset + 1e-3)
    folders = sorted(tmp_path.iterdir())
    best = compare.compare(folders)
    alone = {pair.b: pair.difference.p for pair in best.pairs}
    order = sorted(alone, key=lambda name: alone[name])
    worst = 0.0
    for times, name in zip((6, 5, 4), order):  # Holm, by hand
        worst = max(worst, min(1.0, times * alone[name]))
        assert {p.b: p.p for p in best.pairs}[name] == pytest.approx(worst)
    assert best.tests == 6
    against = compare.compare(folders, against=str(tmp_path / "b,seed=1"))
    assert {pair.a for pair in against.pairs} == {"b"} and against.tests == 3
    assert compare.compare(folders, against="b").pairs == against.pairs
    assert "for 6 comparisons, all that were possible" in compare.lines(best)[-3]
    with pytest.raises(ValueError, match="--against 'e' is not one of: a, b"):
        compare.compare(folders, against="e")


def test_settings_without_shared_seeds_are_not_paired(tmp_path):
    folders = [run(tmp_path / f"a{i}", 2.0 + i, seed=i) for i in range(2)]
    folders += [run(tmp_path / f"b{i}", 2.5, seed=i + 7, batch_size=9) for i in (0, 1)]
    found = compare.compare(folders)
    assert len(found.settings) == 2 and found.pairs == []
    assert "cannot be told" in compare.lines(found)[-1]


def test_rows_are_named_by_their_folder_and_at_most_three_keys(tmp_path):
    for i in range(6):
        many: dict = {
            f"hyper__{key}": 0.1 + 0.1 * (i % 2) for key in ("beta1", "beta2")
        }
        run(tmp_path / f"run{i}", 2.0 + i, hyper__lr=0.1 * (i // 2 + 1), **many,
            model__n_layers=1 + i % 2, hyper__weight_decay=0.1 * (i % 2))  # fmt: skip
    found = compare.compare(sorted(tmp_path.iterdir()))
    assert [setting.name for setting in found.settings] == [f"run{i}" for i in range(6)]
    # Five keys differ; these two tell all six apart.
    assert found.settings[3].told == "lr=0.2, n_layers=2"
    assert len(found.differ) == 5
    for setting in found.settings:
        assert setting.told.count("=") <= compare.MOST_KEYS


def test_folders_of_one_name_are_told_by_their_path(tmp_path):
    folders = [run(tmp_path / one / "gpt", 2.0, batch_size=b) for one, b in
               (("x", 4), ("y", 8))]  # fmt: skip
    named = {setting.name for setting in compare.compare(folders).settings}
    assert named == {"x/gpt", "y/gpt"}


def test_keys_that_decide_nothing_do_not_tell_runs_apart(tmp_path):
    folders = [run(tmp_path / "a", 2.0, seed=1), run(tmp_path / "b", 2.1, seed=2)]
    folders.append(run(tmp_path / "c", 2.2, seed=3, grace_s=5.0, mesh__cpu_devices=1))
    (setting,) = compare.compare(folders).settings
    assert len(setting.runs) == 3


# --- runs that are not comparable as they are -----------------------------------------


def test_a_run_that_diverged_or_did_not_end_stands_last_and_is_marked(tmp_path):
    run(tmp_path / "whole", 2.0)
    rows = [{"step": 0, "val_loss": 4.0}, {"step": 4, "val_loss": 1.0}]
    run(tmp_path / "short", 0, rows=rows, batch_size=2)
    lost = [*rows, {"step": 8, "val_loss": None}]
    run(tmp_path / "lost", 0, rows=lost, batch_size=3)
    found = compare.compare(sorted(tmp_path.iterdir()))
    told = {s.name: (compare.mark(s), compare.said(s)) for s in found.settings}
    assert [s.name for s in found.settings] == ["whole", "short", "lost"]
    assert told["short"] == ("unfinished", "1.0000")
    assert told["lost"] == ("diverged", "-") and told["whole"] == ("", "2.0000")
    ends = compared._range(found)
    assert ends is not None and ends[1] < 11  # what diverged sets no scale


def test_runs_that_ended_early_by_their_own_rules_are_done(tmp_path):
    rows = [{"step": s, "val_loss": 3.0, "tokens": 100 * s} for s in (0, 4)]
    folder = run(tmp_path / "a", 0, rows=rows, max_tokens=400)
    assert compare.compare([folder]).settings[0].state == "done"


def test_a_trial_that_failed_before_it_was_a_run_keeps_its_setting_from_the_top(
    tmp_path,
):
    config = {
        "config": json.loads((run(tmp_path / "x", 0) / "config.json").read_text())
    }
    for name, lr, value in (("a", 0.1, 2.0), ("b", 0.2, 1.0)):
        run(tmp_path / f"{name},seed=0", value, seed=0, hyper__lr=lr)
    config["config"].update(seed=1, hyper={**config["config"]["hyper"], "lr": 0.2})
    lost = tmp_path / "b,seed=1"
    lost.mkdir()
    told = {"status": "failed", "step": 0, "reason": "no memory", **config}
    (lost / "outcome.json").write_text(json.dumps(told))
    found = compare.compare([tmp_path / "a,seed=0", tmp_path / "b,seed=0", lost])
    assert [s.name for s in found.settings] == ["a,seed=0", "b"]
    assert compare.mark(found.settings[1]) == "1 failed"


def test_different_tokenizers_are_ranked_by_bits_per_byte(tmp_path):
    folders = [
        run(tmp_path / name, 0, rows=rows, tokenizer=name, data__tokenizer=name)
        for name, rows in (("char", per_token(1.5, 2.2)), ("bpe", per_token(4.0, 1.9)))
    ]
    found = compare.compare(folders)
    assert found.metric == "val_bpb"
    assert [setting.name for setting in found.settings] == ["bpe", "char"]
    assert "tokenizers differ" in found.notes[0]
    with pytest.raises(ValueError, match="different tokenizers, and val_loss is per t"):
        compare.compare(folders, metric="val_loss")
    older = run(tmp_path / "old", 2.0, tokenizer="other")  # without bits per byte
    with pytest.raises(ValueError, match="use --metric=val_bpb"):
        compare.compare([*folders, older])


def test_runs_of_different_texts_are_told(tmp_path):
    folders = [run(tmp_path / f"r{n}", 2.0, eval_windows=n) for n in (4, 8)]
    (note,) = compare.compare(folders).notes
    assert "same text (eval_windows)" in note
    assert note in compare.lines(compare.compare(folders))


def test_trials_of_a_sweep_are_compared_by_its_metric(tmp_path):
    rows = [{"step": 8, "val_loss": 2.0, "val_accuracy": x} for x in (0.5, 0.9)]
    folders = [run(tmp_path / f"r{i}", 0, rows=[row], batch_size=i + 1) for i, row in
               enumerate(rows)]  # fmt: skip
    told = {"metric": "val_accuracy", "direction": "maximize"}
    (tmp_path / "results.json").write_text(json.dumps(told))
    found = compare.compare(folders)
    assert (found.metric, found.direction) == ("val_accuracy", "maximize")
    assert [setting.name for setting in found.settings] == ["r1", "r0"]


def test_what_cannot_be_compared_is_refused(tmp_path):
    a, b = run(tmp_path / "a", 2.0), run(tmp_path / "b", 2.1)
    with pytest.raises(ValueError, match="same config and seed"):
        compare.compare([a, b])
    with pytest.raises(ValueError, match="not a run folder"):
        compare.compare([a, tmp_path / "absent"])
    with pytest.raises(ValueError, match=r"has no 'val_los' .* did you mean val_loss"):
        compare.compare([a], metric="val_los")


def test_the_last_evaluation_may_count_instead_of_the_best(tmp_path):
    folder = run(tmp_path / "a", 2.0)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 9, "val_loss": 3.0}\n')
    value = lambda **more: compare.compare([folder], **more).settings[0].mean.value  # noqa: E731
    assert value() == 2.0
    assert value(at="last") == 3.0
    assert value(at="last 2") == 2.5
    with pytest.raises(ValueError, match=r"has \d evaluations of val_loss, not the 40"):
        value(at="last 40")
    assert value(direction="maximize") == 10.0


# --- pictures and files ---------------------------------------------------------------


def test_lines_beyond_the_sixth_have_looks_of_their_own(tmp_path):
    folders = [
        run(tmp_path / f"r{i:02d}", 2.0 + i, batch_size=i + 1) for i in range(24)
    ]
    figure = compared._figure(compare.compare(folders))
    looks = {(line.line.color, line.line.dash) for line in figure.data}
    assert len(looks) == 24


def test_the_legend_stands_beside_the_picture(tmp_path):
    """Where the legend is, no curve is drawn."""
    name = "a_folder_with_a_name_of_many_letters"
    folders = [
        run(tmp_path / f"{name}_{i}", 2.0 + i, batch_size=i + 1) for i in range(9)
    ]
    figure = compared._picture(compare.compare(folders))
    FigureCanvasAgg(figure).draw()
    (legend,) = figure.legends
    (panel,) = figure.axes
    assert legend.get_window_extent().x0 >= panel.get_window_extent().x1
    assert panel.get_window_extent().width > 0.5 * figure.get_window_extent().width


def test_without_plotly_all_but_the_page_is_written(two, tmp_path, monkeypatch):
    monkeypatch.setattr(page.importlib.util, "find_spec", lambda name: None)
    out = tmp_path / "out"
    assert "pip install plotly" in compared.write(out, compare.compare(two))
    assert sorted(path.name for path in out.iterdir()) == [
        *("compare.csv", "compare.json", "compare.png")
    ]


def test_the_door_writes_table_page_and_picture(two, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.compare"),
            *(f"--runs={tmp_path}/a*,{two[1]}", f"--out={tmp_path}/out"),
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "a         2.4000 [2.0074, 2.7926]  5      lr=0.001" in done.stdout
    text = (tmp_path / "out/compare.html").read_text()
    assert "lr=0.001" in text and "<h2>Curves</h2>" in text
    assert 'href="../a%2Cseed%3D0/"' in text
    rows = list(csv.DictReader((tmp_path / "out/compare.csv").read_text().splitlines()))
    assert len(rows) == 6 and {row["hyper.lr"] for row in rows} == {"0.001", "0.002"}
    assert imread(tmp_path / "out/compare.png").shape[1] > 1000


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
