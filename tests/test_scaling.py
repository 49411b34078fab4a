"""Scaling laws: the fit, its intervals, the best compute, and a whole small ladder."""

import json

import numpy as np
import pytest
from scipy import optimize

from configs import common
from gpt_jax import runs, scaling
from gpt_jax.report import law as pages
from gpt_jax.scaling import Ladder, Law, Point

TRUE = Law(E=1.7, A=60.0, B=300.0, alpha=0.32, beta=0.36)
SIZES = (2e5, 4e5, 8e5, 1.6e6, 3.2e6)
LENGTHS = (2e6, 4e6, 6e6, 8e6)


def made(noise, seed):
    rng = np.random.default_rng(seed)
    return [
        Point(n, d, float(TRUE(n, d) * np.exp(noise * rng.normal())))
        for n in SIZES
        for d in LENGTHS
    ]


def test_a_law_is_found_again_from_points_of_it():
    found = scaling.fit(made(0.0, 0))
    for n in SIZES:
        for d in LENGTHS:
            assert found(n, d) == pytest.approx(TRUE(n, d), rel=1e-4)
    assert found(6.4e6, 1.6e7) == pytest.approx(TRUE(6.4e6, 1.6e7), rel=1e-2)


@pytest.mark.slow
def test_a_run_one_size_larger_falls_into_the_interval_that_was_predicted():
    inside, widths = 0, []
    for seed in range(10):
        points = made(0.003, seed)
        law = scaling.fit(points)
        laws, residuals = scaling.bootstrap(points, law, seed=seed, tries=40)
        low, high = scaling.predict(laws, residuals, 6.4e6, 8e6)
        rng = np.random.default_rng(1000 + seed)
        truth = TRUE(6.4e6, 8e6) * np.exp(0.003 * rng.normal())
        inside += low <= truth <= high
        widths.append((high - low) / 2 / truth)
    assert inside >= 8
    assert np.median(widths) < 0.02


@pytest.mark.parametrize("flops", [1e12, 1e15, 1e18])
def test_the_best_split_of_a_compute_is_the_least_loss_on_its_line(flops):
    n, d = scaling.optimal(TRUE, flops)
    assert 6 * n * d == pytest.approx(flops)
    least = optimize.minimize_scalar(
        lambda x: TRUE(np.exp(x), flops / 6 / np.exp(x)),
        bounds=(np.log(n) - 5, np.log(n) + 5),
        method="bounded",
    )
    assert np.exp(least.x) == pytest.approx(n, rel=1e-2)


def test_too_few_runs_make_no_law():
    with pytest.raises(ValueError, match="5 runs of 1 sizes and 5 lengths"):
        scaling.fit([Point(1e5, d, 3.0) for d in (1e6, 2e6, 3e6, 4e6, 5e6)])


@pytest.fixture
def config(tmp_path):
    (tmp_path / "text.txt").write_text("the quick brown fox jumps. " * 400)
    config = common.tiny(common.modern(common.base()))
    config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
    config.data.update(folder=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    config.model.update(context_length=16, n_layers=1)
    config.optimizer.name = "adamw"
    config.update(compile_cache="", tensorboard=False, log_every=100)
    return config


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"widths": [16, 32, 48]}, "give at least 4, rising"),
        ({"widths": [16, 32, 64, 48]}, "give at least 4, rising"),
        ({"widths": [16, 32, 40, 64]}, "width 40 is not a multiple of the 16 features"),
        ({"steps": 32}, "a multiple of 20"),
        ({"horizons": 2}, "give at least 3"),
    ],
)
def test_a_ladder_that_cannot_be_is_refused(config, tmp_path, change, sentence):
    ladder = Ladder(config, [16, 32, 48, 64], 40, 4)._replace(**change)
    with pytest.raises(ValueError, match=sentence):
        scaling.climb(ladder, tmp_path / "out", print)
    config.optimizer.schedule = "cosine"
    with pytest.raises(ValueError, match="which needs wsd"):
        scaling.check(Ladder(config, [16, 32, 48, 64], 40, 4))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_ladder_is_climbed_and_its_last_run_predicted_before_it_is_trained(
    config, tmp_path
):
    out, told = tmp_path / "out", []

    def tell(line):
        told.append(line)
        if line.startswith("predicted"):
            noted = json.loads((out / scaling.FILE).read_text())
            assert "loss" not in noted["held_out"] and not (out / "held_out").exists()

    ladder = Ladder(config, [16, 32, 48, 64], 40, 4)
    found = scaling.climb(ladder, out, tell)
    assert isinstance(found, dict) and len(found["points"]) == 12
    assert found["held_out"]["loss"] > 0 and told[-1].startswith("and it is")
    branch = runs.read_config(out / "width=32" / "steps=20")
    assert branch.fork.endswith("trunk:step=16") and branch.steps == 20
    assert found["points"][4][1] == 10 * 4 * 16  # tokens of the second size's first
    assert pages.write(out, found) == ""
    page = (out / "scaling.html").read_text()
    assert "predicted for the run held out" in page and "alpha" in page
