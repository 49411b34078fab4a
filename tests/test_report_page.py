"""A sweep's report in a browser: another metric, another axis, smoothing, a filter.

Needs playwright and a Chromium (make test-browser); see browser.py.
"""

import json
import math

import pytest

from gpt_jax import report
from tests.browser import chromium, problems, shoot
from tests.test_report import results, trial

pytest.importorskip("plotly", reason="needs plotly: pip install plotly")


def recorded(folder, value, seed):
    """A run of 8 steps of 64 tokens and half a second, its loss falls to `value`."""
    folder.mkdir()
    lines = [
        {"step": s, "tokens": 64 * s, "seconds": s / 2, "val_bpb": 0.6 * loss,
         "val_loss": loss}
        for s in range(9) for loss in [value + 2 * math.exp(-s) + 0.01 * seed]
    ]  # fmt: skip
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The page of a sweep over two keys, three seeds each."""
    out, trials = tmp_path_factory.mktemp("sweep"), []
    for lr in (1e-3, 1e-2):
        for rule in ("adamw", "muon"):
            for seed in range(3):
                name = f"lr={lr},optimizer={rule},seed={seed}"
                value = 2 + abs(math.log10(lr) + 2) + 0.3 * (rule == "adamw")
                point = {"h.lr": lr, "o": rule}
                trials.append(trial(name, point, value + 0.01 * seed, seed=seed))
                recorded(out / name, value, seed)
    report.write(out, results(trials, {"h.lr": "lr", "o": "optimizer"}))
    with chromium() as browser:
        page = browser.new_page(viewport={"width": 1200, "height": 2400})
        found = problems(page)
        page.goto(f"file://{out}/report.html")
        page.wait_for_selector("#curves .xtitle")
        yield page
        shoot(page, "report", full_page=True)
        assert found == []


def lines(page):
    """Returns name -> (x, y) of the lines that are drawn, without bands."""
    return page.evaluate(
        """() => Object.fromEntries(document.getElementById("curves").data
          .filter(t => t.line && t.line.width && t.x.length > 1)
          .map(t => [t.hovertemplate.match(/<b>(.*?)<.b>/)[1],
                     [[...t.x], [...t.y]]]))"""
    )


def title(page, axis):
    return page.text_content(f"#curves .{axis}title")


def test_curves_are_drawn_over_what_is_chosen_and_of_the_metric_that_is(shown):
    """Oracle: the records."""
    assert title(shown, "x") == "step" and title(shown, "y") == "val_loss"
    before = lines(shown)
    shown.select_option("#along", "tokens")
    shown.select_option("#metric", "val_bpb")
    assert title(shown, "x") == "tokens" and title(shown, "y") == "val_bpb"
    after = lines(shown)
    assert after.keys() == before.keys() and len(after) == 4
    for name, (xs, ys) in after.items():
        steps, losses = before[name]
        assert xs == [64 * step for step in steps]
        assert ys == pytest.approx([0.6 * loss for loss in losses], rel=1e-4)
    shown.select_option("#along", "flops")
    assert title(shown, "x") == "FLOPs"
    (xs, _), *_ = lines(shown).values()
    assert xs[-1] == pytest.approx(6e3 * 64 * 8)
    shown.select_option("#along", "step")
    shown.select_option("#metric", "val_loss")
    assert lines(shown).keys() == before.keys()


def test_smoothing_is_a_mean_whose_weights_fall(shown):
    """Oracle: the weights written out."""
    (name, (_, raw)), *_ = lines(shown).items()
    shown.fill("#smooth", "0.5")
    _, smooth = lines(shown)[name]
    shown.fill("#smooth", "0")
    for end in range(len(raw)):
        weights = [0.5 ** (end - i) for i in range(end + 1)]
        mean = sum(w * y for w, y in zip(weights, raw)) / sum(weights)
        assert smooth[end] == pytest.approx(mean, rel=1e-4)


def test_a_filter_leaves_the_settings_of_its_words_in_picture_and_table(shown):
    shown.fill("#only", "muon 0.001")
    assert [name.split(",seed")[0] for name in lines(shown)] == [
        "lr=0.001,optimizer=muon"
    ]
    assert shown.locator("tr[data-text]:visible").count() == 1
    shown.fill("#only", "")
    assert len(lines(shown)) == 4
    assert shown.locator("tr[data-text]:visible").count() == 4


def test_colours_stand_for_the_key_that_is_chosen(shown):
    def colours():
        return shown.evaluate(
            """() => [...new Set(document.getElementById("curves").data
              .filter(t => t.line && t.line.width && t.x.length > 1)
              .map(t => t.line.color))].length"""
        )

    bar = shown.locator("#curves .colorbar")
    assert bar.count() == 1 and "lr" in (bar.text_content() or "")
    shown.select_option("#by", "o")
    assert bar.count() == 0
    legend = shown.text_content("#curves .legend")
    assert "adamw" in legend and "best: muon" in legend and colours() == 3
    shown.select_option("#by", "")
    assert colours() == 2  # the best, and the others
    shown.select_option("#by", "h.lr")
    assert bar.count() == 1


def test_axes_may_be_logarithmic(shown):
    shown.check("#logy")
    kind = 'document.getElementById("curves").layout.yaxis.type'
    assert shown.evaluate(kind) == "log"
    shown.uncheck("#logy")
    assert shown.evaluate(kind) == "linear"
