"""Populations that evolve: exact copies, new numbers, and kills that change nothing."""

import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gpt_jax import metrics, population, runs, train
from gpt_jax.population import Evolve, evolve
from tests.test_population import config, digests, fit, lines, params_digest, rates

__all__ = ["config"]  # a fixture

EVOLVE = Evolve(every=4, keys=("hyper.lr",), share=0.5, factors=(0.5, 2.0), seed=1)


@pytest.fixture
def four(config):
    config.update(steps=12, eval_every=6, checkpoint_every=3, keep=1)
    return rates(config, 1e-2, 0.0001, 3e-3, 0.0002)


def told(folder, count=4):
    return [evolve.lineage(folder / str(i)) for i in range(count)]


def test_the_worst_go_on_as_the_best_with_other_numbers(config, four, tmp_path):
    """Oracle: runs alone, of which one is given the checkpoint of another by hand."""
    results = fit(four, tmp_path / "together", evolve=EVOLVE)
    assert [(r.reason, r.step) for r in results] == [("steps", 12)] * 4
    moved = told(tmp_path / "together")
    first = [[move for move in own if move["step"] == 4] for own in moved]
    assert [len(own) for own in first] == [0, 1, 0, 1]  # the two that learn nothing
    rates_of = {"0": 1e-2, "2": 3e-3}
    for (move,) in (first[1], first[3]):
        source = rates_of[move["from"]]
        assert move["hyper"]["hyper.lr"] in (source * 0.5, source * 2.0)
    (move,), alone = first[1], tmp_path / "alone"
    half = four[int(move["from"])].copy_and_resolve_references()
    half.update(steps=4)
    half.hyper.decay_steps = 12.0
    train.train(half, alone)
    mine = half.copy_and_resolve_references()
    mine.update(steps=12, seed=four[1].seed)
    mine.hyper.lr = move["hyper"]["hyper.lr"]
    (alone / "config.json").write_text(json.dumps(mine.to_dict()))
    mine.steps = next((m["step"] for m in moved[1] if m["step"] > 4), 12)
    train.train(mine, alone)
    ours, theirs = by_step(tmp_path / "together" / "1"), by_step(alone)
    step = mine.steps if mine.steps == 12 else 6
    assert ours[step]["val_loss"] == pytest.approx(theirs[step]["val_loss"], abs=1e-5)
    assert ours[step]["lr"] == pytest.approx(theirs[step]["lr"])
    last = runs.read_config(tmp_path / "together" / "1")
    assert last.hyper.lr == pytest.approx(moved[1][-1]["hyper"]["hyper.lr"])
    assert [row["step"] for row in lines(tmp_path / "together" / "1")
            if "val_loss" in row] == [0, 4, 6, 8, 12]  # fmt: skip
    again = fit(four, tmp_path / "together", evolve=EVOLVE)
    assert [r[:2] for r in again] == [r[:2] for r in results]


def by_step(folder):
    found = {}
    for row in lines(folder):
        found.setdefault(row["step"], {}).update(row)
    return found


class Killed(BaseException):
    pass


def killed_at(step):
    def report(member, at, numbers):
        if at == step and member == 2:
            raise Killed

    return report


@pytest.mark.slow
def test_a_population_that_was_killed_evolves_as_if_it_had_not_been(
    four, tmp_path, monkeypatch
):
    """Oracle: the same population, undisturbed; to the bit."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    fit(four, whole, evolve=EVOLVE)
    copytree, replace = shutil.copytree, os.replace
    deaths: Iterator[bool] = iter([])

    def copy(source, target, *more, **options):
        if str(target).endswith(evolve.NEW) and not next(deaths, True):
            Path(target).mkdir()
            raise Killed
        return copytree(source, target, *more, **options)

    def swap(source, target):  # a kill while checkpoints are put into their place
        if str(target).endswith("/checkpoints") and not next(deaths, True):
            raise Killed
        return replace(source, target)

    monkeypatch.setattr(evolve.shutil, "copytree", copy)
    monkeypatch.setattr(evolve.os, "replace", swap)
    deaths = iter([True, True, False])  # the second copy of the first milestone
    with pytest.raises(Killed):
        fit(four, parts, evolve=EVOLVE)
    assert sum(map(len, told(parts))) == 1  # the other had moved
    with pytest.raises(Killed):
        fit(four, parts, evolve=EVOLVE, report=killed_at(6))
    assert sum(map(len, told(parts))) == 2
    deaths = iter([True, False])  # at the second one, while a copy takes its place
    with pytest.raises(Killed):
        fit(four, parts, evolve=EVOLVE)
    assert any(not (parts / str(i) / "checkpoints").is_dir() for i in range(4))
    results = fit(four, parts, evolve=EVOLVE, members=2)
    assert [(r.reason, r.step) for r in results] == [("steps", 12)] * 4
    assert told(parts) == told(whole)
    assert digests(parts, 4) == digests(whole, 4)
    assert [lines(parts / str(i)) for i in range(4)] == [
        lines(whole / str(i)) for i in range(4)
    ]


def test_a_schedule_is_that_of_the_weights_not_of_the_folder(tmp_path):
    """b copied a at 4; a copied c at 8; b copied a at 12."""
    moves = {
        "a": [(8, "c", 3.0)],
        "b": [(4, "a", 2.0), (12, "a", 4.0)],
        "c": [],
    }
    for name, own in moves.items():
        (tmp_path / name).mkdir()
        text = "".join(
            json.dumps({"step": s, "from": f, "hyper": {"hyper.lr": x}}) + "\n"
            for s, f, x in own
        )
        (tmp_path / name / evolve.FILE).write_text(text)
    folders = {name: tmp_path / name for name in moves}
    starts = {name: {"hyper.lr": x} for name, x in zip("abc", (1.0, 1.5, 1.7))}
    found = evolve.schedule(folders, starts, "b")
    assert [(step, numbers["hyper.lr"]) for step, numbers in found] == [
        *((0, 1.7), (8, 3.0), (12, 4.0)),
    ]
    assert evolve.schedule(folders, starts, "c") == [(0, {"hyper.lr": 1.7})]


def test_numbers_that_no_run_can_have_are_not_taken(config):
    class Always:
        def integers(self, n):
            return n - 1

    draw: Any = Always()
    config.hyper.beta1 = 0.9
    wide = Evolve(every=1, keys=("hyper.beta1",), factors=(0.5, 2.0))
    assert evolve.explored(config, wide, draw) == {"hyper.beta1": 0.9}
    config.hyper.beta1 = 0.3
    assert evolve.explored(config, wide, draw) == {"hyper.beta1": 0.6}


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"every": 0}, "every is 0: give a number of steps"),
        ({"every": 8}, "every is 8 of 8 steps: nothing would evolve before the end"),
        ({"keys": ()}, r"keys is \(\): only numbers of hyper can change"),
        ({"keys": ("model.d_model",)}, "only numbers of hyper can change"),
        ({"keys": ("hyper.lrr",)}, "there is no config key 'hyper.lrr'"),
        ({"keys": ("hyper.z_loss",)}, "hyper.z_loss is 0: no factor changes it"),
        ({"share": 0.6}, r"share is 0.6: it must be above 0, at most 0.5"),
        ({"factors": (0.0, 2.0)}, "give numbers above 0"),
    ],
)
def test_what_cannot_evolve_is_refused(config, tmp_path, change, sentence):
    configs = rates(config, 1e-3, 2e-3)
    with pytest.raises(ValueError, match=sentence):
        fit(configs, tmp_path, evolve=EVOLVE._replace(**change))
    assert not (tmp_path / "0").exists()


@pytest.mark.slow
def test_members_cannot_go_back_to_before_they_became_copies(four, tmp_path):
    fit(four, tmp_path, evolve=EVOLVE)
    moved = next(i for i in range(4) if evolve.lineage(tmp_path / str(i)))
    for path in (tmp_path / str(moved) / "checkpoints").iterdir():
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="became a copy of another run after step"):
        fit(four, tmp_path, evolve=EVOLVE)


def test_a_population_that_evolves_is_not_halved_as_well(config, tmp_path):
    with pytest.raises(ValueError, match="rungs end members and evolve replaces them"):
        fit(rates(config, 1e-3, 2e-3), tmp_path, evolve=EVOLVE,
            rungs=[population.Rung(2, 1)])  # fmt: skip
    assert math.isfinite(EVOLVE.share) and not list(tmp_path.glob("*/metrics.jsonl"))


@pytest.mark.slow
def test_the_record_of_a_copy_stays_that_of_its_folder(four, tmp_path):
    fit(four, tmp_path, evolve=EVOLVE)
    moved = next(i for i in range(4) if evolve.lineage(tmp_path / str(i)))
    steps = [row["step"] for row in metrics.read(tmp_path / str(moved))]
    assert steps == sorted(steps) and steps[0] == 0 and steps[-1] == 12
    assert params_digest(tmp_path / str(moved))
