"""Runs that are given wall time: the arithmetic, a kill, what is refused."""

from types import SimpleNamespace

import pytest

from configs import common
from gpt_jax import checkpoint, pace, population, runs, sharding, train
from gpt_jax.pace import Pace, Plan

TEXT = "the quick brown fox jumps over the lazy dog. " * 300


def rows(*points):
    return [{"step": s, "seconds": t, "grad_norm": 1.0} for s, t in points]


def test_a_step_is_measured_past_the_compiler_and_the_rest_is_what_is_left():
    # 20 s to compile, 0.5 s a step, 4 s for the evaluation at the end.
    found = pace.measure(
        rows((1, 20.5), (10, 25.0), (20, 30.0), (40, 40.0)), 0, 40, wall=44.0
    )
    assert found == Pace(step=0.5, pause=0.0, rest=24.0)
    assert pace.measure(rows((1, 20.0)), 0, 40, wall=30.0) is None
    # A later sitting is measured from where it began.
    found = pace.measure(
        rows((40, 40.0), (50, 62.0), (60, 72.0), (100, 112.0)), 40, 100, wall=70.0
    )
    assert found == Pace(step=1.0, pause=0.0, rest=10.0)


def test_evaluations_are_measured_apart_from_steps():
    # 1 s a step; the first evaluation compiles and takes 9 s, the others take 3.
    lines = rows((10, 20.0), (20, 30.0), (30, 49.0), (40, 59.0), (50, 72.0))
    lines += [{"step": at, "val_loss": 1.0} for at in (20, 40, 50)]
    found = pace.measure(lines, 0, 50, wall=100.0)
    assert found == Pace(step=1.0, pause=3.0, rest=100.0 - 50 - 3 * 3)
    # Beside the rest's 20 s, 60 steps and 6 evaluations take 78; a step more ends with
    # one more evaluation, and takes 82.
    assert pace.steps(Pace(1.0, 3.0, 20.0), 50, 100.0, 1, every=10) == 110
    # Where there are none on the way there is one at the end.
    assert pace.steps(Pace(1.0, 3.0, 20.0), 50, 100.0, 1, every=0) == 50 + 77


@pytest.mark.parametrize(
    ("left", "rounds", "last"), [(60.0, 1, 140), (60.0, 8, 136), (3.0, 8, 48)]
)
def test_the_steps_are_those_that_the_time_has_room_for(left, rounds, last):
    assert pace.steps(Pace(0.5, 0.0, 10.0), 40, left, rounds, every=0) == last


def test_the_steps_are_counted_once_more_before_the_decay_and_then_no_more():
    first = pace.then(Plan(40, 0), 1000, decay=0.5, done=40, round_to=1)
    assert first == Plan(450, 1000)
    assert pace.then(first, 980, decay=0.5, done=450, round_to=1) == Plan(980, 980)
    assert pace.then(Plan(40, 0), 60, decay=0.5, done=40, round_to=1) == Plan(60, 60)


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    config = common.tiny(common.base())
    config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
    config.data.update(folder=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    config.model.update(context_length=16, n_layers=1)
    config.optimizer.schedule = "wsd"
    config.update(eval_every=50, checkpoint_every=50, log_every=5, early_from=0)
    config.update(compile_cache="", tensorboard=False)
    return config


def test_a_run_fits_its_time_and_is_that_of_its_number_of_steps(
    config, tmp_path, monkeypatch
):
    """With a clock that only counts steps: so many fit, whatever this machine does."""
    monkeypatch.setattr(pace, "TRIAL", 10)
    config.fit_seconds = 40.0
    clock = FakeClock(monkeypatch, each=0.5)
    result = train.train(config, tmp_path / "run")
    assert result.reason == "steps" and 60 <= result.step <= 80
    assert clock.now == pytest.approx(40.0, abs=4.0)
    alone = config.copy_and_resolve_references()
    alone.update(fit_seconds=0.0, steps=result.step)
    monkeypatch.undo()
    train.train(alone, tmp_path / "alone")
    digests = [
        checkpoint.digest(runs.open(tmp_path / name, step="latest").params)
        for name in ("run", "alone")
    ]
    assert digests[0] == digests[1]
    again = train.train(config, tmp_path / "run")  # the end that was settled stays
    assert (again.step, again.trained) == (result.step, False)


class FakeClock:
    """A clock that a step moves on, and nothing else."""

    def __init__(self, monkeypatch, each):
        self.now, wait = 0.0, sharding.wait_on_cpu

        def tick(tree):
            self.now += each
            wait(tree)

        monkeypatch.setattr(train.sharding, "wait_on_cpu", tick)
        clock = SimpleNamespace(monotonic=lambda: self.now)
        monkeypatch.setattr(train, "time", clock)


def test_what_has_no_time_of_its_own_is_refused(config, tmp_path):
    config.fit_seconds = 5.0
    quiet = {"members": 0, "rungs": [], "report": lambda *told: None}
    with pytest.raises(
        ValueError, match=r"fit_seconds is 5\.0: members train together"
    ):
        population.train([config], [tmp_path / "x"], **quiet)
    config.optimizer.schedule = "cosine"
    with pytest.raises(ValueError, match="'cosine' is not one of: wsd, constant"):
        train.train(config, tmp_path / "x")
    assert not (tmp_path / "x").exists()
