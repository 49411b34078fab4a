"""Duels: pairs that share seeds, when they end, what is refused, how ledgers replay."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax import duel, metrics, runs
from gpt_jax.criterion import Criterion
from tests import doors, tiny


@pytest.fixture
def config(tmp_path):
    config = tiny.on_text(tmp_path)
    config.update(steps=6, eval_every=6, checkpoint_every=6, early_from=0)
    return config


def against(config, **change) -> duel.Duel:
    other = config.copy_and_resolve_references()
    for key, value in change.items():
        group, _, name = key.rpartition("__")
        (other[group] if group else other)[name] = value
    return duel.Duel(
        told=("old", "new"),
        configs=(config, other),
        criterion=Criterion(at="last"),
        within=1e-4,
        alpha=0.05,
        first=0,
        seeds=8,
        at_once=8,
    )


def test_a_rate_of_nothing_loses_and_every_pair_shares_its_data(config, tmp_path):
    told = []
    found = duel.fight(
        against(config, hyper__lr=0.0), tmp_path / "duels" / "x", told.append
    )
    assert found.verdict and found.evidence
    assert (found.verdict.word, found.evidence.n) == ("worse", 8)
    assert told[-1].startswith("b is worse: b - a in val_loss +")
    out = tmp_path / "duels" / "x"
    for seed in range(8):
        first = [metrics.read(out / s / f"seed={seed}")[0] for s in duel.SIDES]
        assert first[0]["step"] == 0  # before any update: weights and data are shared
        assert first[0]["val_loss"] == first[1]["val_loss"]
        assert runs.read_config(out / "b" / f"seed={seed}").seed == seed
    (line,) = (out.parent / duel.LEDGER).read_text().splitlines()
    written = json.loads(line)
    assert written["differ"] == ["hyper.lr: 0.001 -> 0.0"]
    again = duel.fight(against(config, hyper__lr=0.0), out, told.append)
    assert again.pairs == found.pairs  # nothing was trained a second time


@pytest.mark.slow
def test_sides_that_are_the_same_end_after_one_round_as_no_difference(config, tmp_path):
    # A key that a vmapped program is not given: the sides train one after the other.
    same = against(config, log_every=3)._replace(at_once=2)
    assert not duel.together(same.configs)
    found = duel.fight(same, tmp_path / "x", print)
    assert found.verdict and found.verdict.word == "no difference"
    assert [a - b for _, a, b in found.pairs] == [0.0, 0.0]


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"steps": 12}, "differ in their budget: steps x batch_size 24 and 48"),
        ({"max_seconds": 5.0}, "budget: max_seconds 0 and 5"),
        ({"data__val_fraction": 0.2}, r"data or in what.*data\.val_fraction: 0\.1"),
        ({"eval_windows": 4}, "do not compare: eval_windows: 8 -> 4"),
        ({"seed": 3}, r"differ in their seed \(seed: 1337 -> 3\)"),
        ({"hyper__beta1": 1.0}, r"hyper\.beta1 is 1\.0: it must be below 1"),
    ],
)
def test_sides_that_do_not_compare_are_refused(config, tmp_path, change, sentence):
    with pytest.raises(ValueError, match=sentence):
        duel.fight(against(config, **change), tmp_path / "out" / "x", print)
    assert not (tmp_path / "out").exists()


def test_twice_the_batch_for_half_the_steps_is_the_same_budget(config):
    duel.check(against(config, batch_size=8, steps=3, eval_every=6))


def test_a_wrong_rule_is_refused(config):
    wanted = against(config)
    for change, sentence in (
        ({"seeds": 1}, "seeds is 1: it must be at least 2"),
        ({"alpha": 0.0}, r"alpha is 0\.0"),
        ({"within": -1.0}, r"within -1\.0"),
        ({"criterion": Criterion(at="first")}, "at is 'first'"),
    ):
        with pytest.raises(ValueError, match=sentence):
            duel.check(wanted._replace(**change))


@pytest.fixture
def ledger(config, tmp_path):
    """Returns a ledger of three looks at made-up pairs, none of which was trained."""
    path, wanted = tmp_path / duel.LEDGER, against(config, hyper__lr=0.5)
    losses = [2.0, 2.1, 1.9, 2.05, 1.95, 2.02]
    pairs = [(s, loss, loss - 0.3 + 0.01 * s) for s, loss in enumerate(losses)]
    for count in (1, 3, 6):
        verdict, found = duel.judged(wanted, pairs[:count])
        duel.note(path, wanted, duel.Outcome(pairs[:count], verdict, found))
    return path


def test_a_ledger_replays_and_a_changed_number_shows(ledger):
    found = duel.replay(ledger)
    assert [one.verdict.word for one in found] == ["not yet", "not yet", "better"]
    assert all(one.same for one in found)
    lines = ledger.read_text().splitlines()
    forged = json.loads(lines[2])
    forged["pairs"][0][2] += 3.0
    ledger.write_text("\n".join([*lines[:2], json.dumps(forged)]) + "\n")
    assert [one.same for one in duel.replay(ledger)] == [True, True, False]
    ledger.write_text("{}\n")
    with pytest.raises(ValueError, match=r"duels\.jsonl line 1 is not of a ledger"):
        duel.replay(ledger)


def test_the_door_replays_a_ledger(ledger):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.duel", f"--replay={ledger}"],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=Path(__file__).parents[1],
    )
    assert done.returncode == 0 and "better" in done.stdout and "NO" not in done.stdout


@pytest.mark.parametrize(
    ("words", "config", "change", "sentence"),
    [
        ([], "", [], "give two config files"),
        (["configs/quickstart.py"], "", [], "give two config files; --change"),
        (["a.py", "b.py"], "quickstart", [], "give two config files, A.py B.py, or"),
        ([], "quickstart", [], "--change is missing"),
        ([], "quickstart", ["hyper.lrr=1"], "did you mean hyper.lr?"),
        ([], "quickstart", ["lr"], "write --change=KEY=VALUE"),
        ([], "quickstart", ["steps=3"], "steps is in --set and in --change"),
    ],
)
def test_the_door_refuses_sides_that_are_not_two(
    monkeypatch, words, config, change, sentence
):
    door = doors.load("duel")
    monkeypatch.setattr(door, "CONFIG", Flag(config))
    monkeypatch.setattr(door, "SET", Flag(["steps=4"]))
    monkeypatch.setattr(door, "CHANGE", Flag(change))
    with pytest.raises(ValueError, match=re.escape(sentence)):
        door.sides(words)


def test_the_door_builds_both_sides(monkeypatch):
    door = doors.load("duel")
    monkeypatch.setattr(door, "CONFIG", Flag("configs/quickstart.py:size=tiny"))
    monkeypatch.setattr(door, "SET", Flag(["steps=4"]))
    monkeypatch.setattr(door, "CHANGE", Flag(["hyper.lr=1", "optimizer.name=adamw"]))
    told, (a, b) = door.sides([])
    assert told[1] == "hyper.lr=1 optimizer.name=adamw"
    assert runs.difference(a, b) == [
        "hyper.lr: 0.005 -> 1.0",
        "optimizer.name: 'muon' -> 'adamw'",
    ]
    assert a.steps == b.steps == 4


class Flag:
    def __init__(self, value):
        self.value = value
