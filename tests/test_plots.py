import math

import numpy as np
import pytest

from gpt_jax import metrics, plots


def record(folder, rows, resume_step=0):
    writer = metrics.Writer(
        folder, tensorboard=False, wandb="", config=None, resume_step=resume_step
    )
    for step, numbers in rows:
        writer.write(step, **numbers)
    writer.close()


def training(steps):
    return [(s, {"train_loss": 5 / (s + 1), "tokens": s * 64}) for s in steps]


def evaluation(steps):
    return [(s, {"val_loss": 6 / (s + 1), "tokens": s * 64}) for s in steps]


@pytest.fixture
def drawn(monkeypatch):
    """The axes of the picture that a test draws."""
    seen = []
    dress = plots._dress

    def keep(axes, rows, title):
        seen.append(axes)
        dress(axes, rows, title)

    monkeypatch.setattr(plots, "_dress", keep)
    return seen


def line(axes, label):
    found = [x for x in axes.lines if str(x.get_label()).startswith(label)]
    assert len(found) == 1, [x.get_label() for x in axes.lines]
    return found[0]


def test_losses_of_other_data_are_no_best(tmp_path, drawn):
    new = [(s, {"val_loss": 9 / s, "evaluated_since": 4}) for s in (4, 6)]
    record(tmp_path, [*evaluation([0, 2]), *new])
    plots.loss(tmp_path)
    assert line(drawn[0], "best").get_label() == "best: 1.5000 at step 6"
    assert line(drawn[0], "validation").get_xdata().tolist() == [4, 6]


@pytest.mark.parametrize(
    "rows",
    [
        training([1]),
        training(range(10)),
        training(range(300)),
        evaluation([0]),
        training([10]) + evaluation([10]),
        [(1, {"train_loss": 2.0})],
        [(0, {"val_loss": 2.0, "tokens": 0})],
        [(1, {"train_loss": math.nan}), (2, {"train_loss": 1.0})],
    ],
    ids=["one", "ten", "many", "eval", "both", "untokened", "start", "nan"],
)
def test_any_record_with_a_loss_becomes_a_picture(tmp_path, rows):
    record(tmp_path, rows)
    path = tmp_path / "loss.png"
    assert plots.loss(tmp_path) == path
    assert path.read_bytes().startswith(b"\x89PNG\r\n")
    assert {p.name for p in tmp_path.iterdir()} == {"loss.png", "metrics.jsonl"}


def test_a_notebook_shows_the_picture_whose_path_is_returned(tmp_path):
    record(tmp_path, training(range(3)))
    picture = plots.loss(tmp_path)
    assert picture._repr_png_() == (tmp_path / "loss.png").read_bytes()


def test_the_share_of_known_words_stands_below_the_losses_at_the_same_steps(
    tmp_path, drawn
):
    words = [(s, {"sample_words": w}) for s, w in ((0, 0.0), (20, 0.5), (100, 0.95))]
    record(tmp_path, training(range(101)) + words)
    plots.loss(tmp_path)
    above, below = drawn[0].figure.axes[:2]
    curve = line(below, "words of the samples")
    assert curve.get_xdata().tolist() == [0, 20, 100]
    assert curve.get_ydata().tolist() == [0.0, 0.5, 0.95]
    assert below.get_xlim() == above.get_xlim()


@pytest.mark.parametrize(
    "rows", [[], [(1, {"lr": 1.0})], [(1, {"val_loss": math.nan})]]
)
def test_without_a_loss_there_is_no_picture(tmp_path, rows):
    record(tmp_path, rows)
    assert plots.loss(tmp_path) is None
    assert not (tmp_path / "loss.png").exists()


def test_curves_are_the_recorded_numbers(tmp_path, drawn):
    record(tmp_path, training([1, 2, 4]) + evaluation([2, 4]))
    plots.loss(tmp_path)
    train, val = line(drawn[0], "training"), line(drawn[0], "validation")
    np.testing.assert_allclose(train.get_xydata(), [[1, 2.5], [2, 5 / 3], [4, 1]])
    np.testing.assert_allclose(val.get_xydata(), [[2, 2], [4, 1.2]])
    assert line(drawn[0], "best").get_label() == "best: 1.2000 at step 4"


def test_tokens_stand_above_the_steps(tmp_path, drawn):
    record(tmp_path, training([10, 20]))
    plots.loss(tmp_path)
    (top,) = drawn[0].child_axes
    bottom = np.array(drawn[0].get_xlim())
    np.testing.assert_allclose(top.get_xlim(), bottom * 64)
    assert "tokens" in top.get_xlabel() and drawn[0].get_xlabel() == "step"


def test_a_smoothed_curve_keeps_the_level(tmp_path, drawn):
    rows = [(s, {"train_loss": 3.0 + (-1) ** s}) for s in range(400)]
    record(tmp_path, rows)
    plots.loss(tmp_path)
    steps, values = line(drawn[0], "training (moving average)").get_xydata().T
    assert np.all(np.abs(values - 3) < 0.1)
    np.testing.assert_array_equal(np.diff(steps), 1)
    assert steps[0] == 399 - steps[-1]  # each mean stands over its middle


def test_a_number_that_is_not_finite_is_a_gap(tmp_path, drawn):
    losses = [3.0, math.inf, 1.0]
    record(tmp_path, [(s, {"train_loss": x}) for s, x in enumerate(losses)])
    plots.loss(tmp_path)
    np.testing.assert_equal(line(drawn[0], "training").get_ydata(), [3, np.nan, 1])


def test_after_a_resume_there_is_one_curve(tmp_path, drawn):
    record(tmp_path, training([1, 2, 3, 4]))
    record(tmp_path, training([3, 4, 5]), resume_step=2)
    plots.loss(tmp_path)
    assert list(line(drawn[0], "training").get_xdata()) == [1, 2, 3, 4, 5]


def test_a_picture_is_redrawn(tmp_path):
    record(tmp_path, training([1]))
    plots.loss(tmp_path)
    before = (tmp_path / "loss.png").read_bytes()
    record(tmp_path, training([2, 3]), resume_step=1)
    plots.loss(tmp_path)
    assert (tmp_path / "loss.png").read_bytes() != before


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no training run"):
        plots.loss(tmp_path)


@pytest.mark.fault(31)
def test_a_picture_that_cannot_be_drawn_is_told_and_ends_nothing(tmp_path, caplog):
    record(tmp_path, training(range(3)))
    (tmp_path / "loss.png").mkdir()  # in the way
    plots.of_run(tmp_path)
    assert f"the picture of {tmp_path} could not be drawn: IsADirectory" in caplog.text
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "loss.png").rmdir()
    plots.of_run(tmp_path)
    assert (tmp_path / "loss.png").is_file()


def test_the_name_of_a_run_is_no_formula(tmp_path, caplog):
    folder = tmp_path / r"lr_$\frac{1}{$"
    record(folder, training(range(3)))
    plots.of_run(folder)
    assert (folder / "loss.png").is_file() and not caplog.records


def test_a_notebook_shows_the_picture_itself(tmp_path):
    record(tmp_path, training(range(3)))
    made = plots.loss(tmp_path)
    assert made == tmp_path / "loss.png"
    assert made._repr_png_().startswith(b"\x89PNG")
