"""The dial: what a budget buys, how it is told, what is too little."""

import subprocess
import sys
from pathlib import Path

import pytest

from configs import budget
from gpt_jax import calibration, configs, metrics, model


@pytest.fixture
def machine(monkeypatch):
    """A machine whose speed is known: 100 GFLOP/s."""
    speed = calibration.Speed(1e11, 0.2, 2_000_000, "2 x cpu")
    monkeypatch.setattr(calibration, "known", lambda cache: speed)


def test_minutes_buy_what_their_flops_buy_and_the_run_fits_the_time(machine):
    timed, spent = (budget.get_config(x) for x in ("minutes=10", "flops=5.4e13"))
    assert timed.fit_seconds == 600 and spent.fit_seconds == 0
    timed.fit_seconds = 0.0
    assert timed == spent
    (what, chosen, rule), *_ = budget.explain("minutes=10")
    assert (what, chosen) == ("flops", "5.4e+13") and "100 GFLOP/s" in rule


@pytest.mark.parametrize("flops", [1e14, 1e16, 1e18, 1e20])
def test_the_flops_are_spent_at_about_ten_tokens_a_parameter(flops):
    config = budget.get_config(f"flops={flops}")
    fields = {**config.model, "vocab_size": budget.VOCABULARY}
    cfg = model.GPTConfig(**fields)
    # Counted from the model itself: all but the table, which is looked up.
    parameters = model.count(cfg) - budget.VOCABULARY * cfg.d_model
    tokens = config.steps * config.batch_size * cfg.context_length
    assert 7 < tokens / parameters < 14
    each = metrics.flops_per_token(
        parameters,
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        head_dim=cfg.head_dim,
        seq_len=cfg.context_length,
    )
    assert tokens * each == pytest.approx(flops, rel=0.05)
    assert 32 <= cfg.d_model / cfg.n_layers <= 128


def test_larger_budgets_buy_more_of_everything_and_lower_rates():
    small, large = (budget.get_config(f"tokens={n}") for n in ("1e7", "1e9"))
    for key in ("batch_size", "steps"):
        assert large[key] > small[key]
    assert large.model.d_model > small.model.d_model
    assert large.hyper.lr < small.hyper.lr
    tokens = large.steps * large.batch_size * large.model.context_length
    assert tokens == pytest.approx(1e9, rel=0.01)


def test_every_choice_is_told_with_its_rule_and_is_that_of_the_config():
    told = {what: (chosen, rule) for what, chosen, rule in budget.explain("tokens=1e8")}
    config = budget.get_config("tokens=1e8")
    shape = f"{config.model.n_layers} x {config.model.d_model}"
    assert told["layers x width"][0].startswith(shape)
    assert told["hyper.lr"][0] == f"{config.hyper.lr:g}"
    assert told["batch_size"][0].startswith(f"{config.batch_size} windows")
    assert told["steps"][0] == f"{config.steps:,}"
    assert all(rule for _, rule in told.values())


@pytest.mark.parametrize(
    ("arg", "sentence"),
    [
        ("", "0 of them are given"),
        ("minutes=3,tokens=1e6", "2 of them are given"),
        ("minutes=0.5", r"minutes=0\.5: compiling and one evaluation"),
        ("tokens=many", "tokens=many: it must be a number above 0"),
        ("flops=-1", "flops=-1: it must be"),
        ("flops=inf", "flops=inf: it must be"),
        ("hours=1", "is not one of"),
    ],
)
def test_what_is_no_budget_is_refused(machine, arg, sentence):
    with pytest.raises(ValueError, match=sentence):
        budget.get_config(arg)


def test_a_config_without_rules_explains_nothing():
    with pytest.raises(ValueError, match="chooses nothing by rules"):
        configs.explain("quickstart")
    assert configs.explain("budget:tokens=1e8") == budget.explain("tokens=1e8")


def test_the_door_prints_the_rules_and_trains_nothing(tmp_path):
    words = ["--config=configs/budget.py:tokens=1e8", "--explain"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.train", *words],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0, done.stderr
    assert "DeepSeek-AI 2024" in done.stdout and "hyper.lr" in done.stdout
