"""Which engine a sweep is given, and why."""

import os
import sys

import pytest

from gpt_jax import commands
from gpt_jax.sweep import choose, plan, space
from gpt_jax.sweep.choose import Measured
from tests.test_sweep import base, make

__all__ = ["base"]  # a fixture

pytest.importorskip("optuna", reason="needs optuna: pip install optuna")


def engine(chosen, base, monkeypatch=None, found=None, **more):
    if found:
        monkeypatch.setattr(choose, "measure", lambda *_: found)
    options = {"command": [], "environment": {}, "accelerators": 2, "workers": 0}
    options |= {"needs_processes": False}
    return choose.engine(chosen, base, **{**options, **more})


def rates(count):
    return space.grid({"hyper.lr": [1e-3 * 1.1**i for i in range(count)]})


@pytest.mark.parametrize(
    ("settings", "change", "told"),
    [
        ({"pruner": space.median(first=2)}, {}, "only it prunes by median"),
        ({}, {"mesh.tensor": 2}, "the mesh splits the weights of each trial"),
        (
            {"points": space.grid({"model.n_layers": (1, 2, 3)})},
            {},
            "no two trials could share a program",
        ),
    ],
)
def test_what_only_processes_can_do_is_told_without_measuring(
    base, settings, change, told
):
    settings = {"points": rates(3), **settings}
    chosen = make(settings.pop("points"), **settings)
    assert engine(chosen, plan.override(base, change))[0] == "process"
    assert told in engine(chosen, plan.override(base, change))[1]
    assert engine(make(rates(3)), base, needs_processes=True)[0] == "process"


def test_the_faster_one_is_chosen_by_what_was_measured(base, monkeypatch):
    """By hand: 12 trials of 8 steps on 2 places.

    Processes: 6 rounds of 10 + 8 x 0.1 s, 64.8 s. A program: 10 + 8 x 0.1 x 6, 14.8 s.
    """
    found = Measured(start=10.0, compile=4.0, step=0.1, mfu=1.0)
    chosen, why = engine(make(rates(12)), base, monkeypatch, found)
    assert chosen == "vmap"
    assert why == (
        "about 0:00:14 in 1 program, 0:01:04 in 12 processes (measured: start 10.0 s, "
        "of which compiling 4.0 s, step 100.0 ms)"
    )
    # Twenty shapes of two members each: their programs are compiled one by one.
    shapes = space.grid({"batch_size": range(1, 21), "hyper.lr": (1e-3, 2e-3)})
    slow = Measured(start=10.0, compile=60.0, step=0.01, mfu=1.0)
    assert engine(make(shapes), base, monkeypatch, slow)[0] == "process"
    # What leaves a device idle fills it with more members.
    idle = Measured(start=0.0, compile=0.0, step=1.0, mfu=0.04)
    assert choose.of_programs(idle, [20], 1, 5) == pytest.approx(10)
    assert choose.of_programs(idle, [2], 1, 5) == pytest.approx(5)


def test_the_programs_of_a_search_are_counted_by_drawing(base, monkeypatch):
    axes = {"hyper.lr": space.log_uniform(1e-4, 1e-1),
            "model.n_layers": space.choice(1, 2)}  # fmt: skip
    found = Measured(start=10.0, compile=1.0, step=0.01, mfu=1.0)
    chosen, why = engine(make(space=axes, trials=16), base, monkeypatch, found)
    assert chosen == "vmap" and "in 2 programs, " in why and "16 processes" in why


@pytest.mark.slow
def test_a_run_is_measured_as_a_process_of_its_own(base):
    command = [sys.executable, *commands.argv("trial")[1:]]
    found = choose.measure(base, command, {**os.environ})
    assert found.step > 0 and found.start > 0 and found.compile >= 0
    assert found.start > found.step
    assert base.steps == 8 and base.mesh.cpu_devices == 0
    broken = plan.override(base, {"data.source": "no_such_text"})
    with pytest.raises(ValueError, match=r"to be measured, did not train: .*no_such"):
        choose.measure(broken, command, {**os.environ})
