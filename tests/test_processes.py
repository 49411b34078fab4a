"""Processes that wait for each other and agree; here two, connected over loopback."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments.launch import free_port
from gpt_jax import processes, signals

ROOT = Path(__file__).parents[1]

# Two processes run this. What they print is what the test below looks at.
TWO = """
import json, sys
import jax
import numpy as np
from experiments.launch import free_port
from gpt_jax import processes, sharding, signals

jax.config.update("jax_num_cpu_devices", 1)
port, me = sys.argv[1], int(sys.argv[2])
processes.join(
    coordinator=f"127.0.0.1:{port}", count=2, index=me, heartbeat_timeout_seconds=30
)
def tell(name, value):
    print(json.dumps([name, value]), flush=True)

class Odd(Exception):
    pass

def fails(kind, at):
    if me == at:
        raise kind(f"only in {at}")
    return "fine"

def caught(function, *args):
    try:
        return function(*args)
    except Exception as error:
        return f"{type(error).__name__}: {error}"

tell("place", [processes.index(), processes.count(), jax.process_count()])
tell("first", processes.first(lambda: {"from": me}))
tell("first fails", caught(processes.first, lambda: fails(FileNotFoundError, 0)))
tell("odd", caught(processes.first, lambda: fails(Odd, 0), Odd))
tell("not built in", caught(processes.first, lambda: fails(Odd, 0)))
order = []
processes.in_turn(lambda: print(f"turn of {me}", flush=True))
tell("in turn", processes.in_turn(lambda: f"made by {me}"))
tell("the second fails", caught(processes.in_turn, lambda: fails(ValueError, 1)))
tell("the first fails", caught(processes.in_turn, lambda: fails(ValueError, 0)))
tell("same", caught(processes.check_same, "the text", "abc"))
tell("not same", caught(processes.check_same, "the text", "abc"[me:]))
processes.wait()

own = signals.Stop()
stop = processes.together(own)
seen = []
for step in range(5):
    if (me, step) == (1, 2):
        own.signal = 15
    seen.append([stop.look(late=(me, step) == (0, 0)), stop.late])
tell("stop", [seen, stop.exit_code, bool(own)])

mesh = sharding.make_mesh(4, data=2, fsdp=1, tensor=1, cpu_devices=0)
mine = sharding.rows(mesh, 4)
whole = np.arange(8.0).reshape(1, 4, 2)
joined = sharding.join_rows({"x": whole[:, mine]}, mesh=mesh)["x"]
split = sharding.split_rows({"x": whole}, mesh=mesh)["x"]
tell("rows", mine)
tell("alike", bool((joined == split).all()))
tell("gathered", np.asarray(sharding.local(joined)).tolist() == whole.tolist())
few = caught(lambda: sharding.make_mesh(1, data=-1, fsdp=1, tensor=1, cpu_devices=0))
tell("few", few)
tell("pmap", caught(lambda: sharding.make(
    4, {}, strategy="pmap", data=2, fsdp=1, tensor=1, cpu_devices=0)))
processes.leave(0)
"""


@pytest.fixture(scope="module")
def said():
    """What each of two processes printed: (name -> value, the whole text)."""
    port = str(free_port())
    env = {**os.environ, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    pair = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, port, str(me)],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for me in range(2)
    ]
    try:
        texts = [process.communicate(timeout=100)[0] for process in pair]
    finally:
        for process in pair:
            process.kill()
    assert [process.returncode for process in pair] == [0, 0], texts
    rows = [[json.loads(x) for x in re.findall(r'^\[".*', t, re.M)] for t in texts]
    return [dict(found) for found in rows]


def both(said, name):
    return [found[name] for found in said]


def test_each_process_knows_its_place(said):
    assert both(said, "place") == [[0, 2, 2], [1, 2, 2]]


def test_what_the_first_process_returns_is_returned_in_all(said):
    assert both(said, "first") == [{"from": 0}] * 2


def test_an_error_of_the_first_process_is_raised_in_all(said):
    assert both(said, "first fails") == ["FileNotFoundError: only in 0"] * 2
    assert both(said, "odd") == ["Odd: only in 0"] * 2
    # A class that the others do not know is the built-in one that it stands on.
    assert both(said, "not built in") == ["Odd: only in 0", "Exception: only in 0"]


def test_in_turn_every_process_has_its_own_result_and_all_have_an_error(said):
    assert both(said, "in turn") == ["made by 0", "made by 1"]
    first, second = both(said, "the second fails")
    assert first == "ValueError: process 1: only in 1"
    assert second == "ValueError: only in 1"
    assert both(said, "the first fails") == ["ValueError: only in 0"] * 2


def test_processes_that_begin_with_different_things_are_refused_in_all(said):
    assert both(said, "same") == [None, None]
    first, second = both(said, "not same")
    assert first == second
    assert first.startswith(
        "ValueError: the text of process 1 is not that of process 0"
    )


def test_a_signal_of_one_process_stops_all_at_the_same_step(said):
    (seen, code, own), other = both(said, "stop")
    # Wished for in step 2, known in step 3; the time that was up in step 0 stays up.
    wanted = [[False, 0], [False, 1], [False, 1], [True, 1], [True, 1]]
    assert seen == wanted == other[0]
    assert (code, own) == (143, False)
    assert other[1:] == [143, True]


def test_each_process_gives_its_rows_of_a_batch(said):
    assert both(said, "rows") == [[0, 1], [2, 3]]
    assert both(said, "alike") == both(said, "gathered") == [True, True]


def test_a_mesh_that_leaves_a_process_out_is_refused(said):
    (found, _) = both(said, "few")
    assert "takes 1 of 2 devices" in found
    assert all("pmap is for one process" in found for found in both(said, "pmap"))


def test_one_process_does_its_work_at_once():
    assert (processes.count(), processes.index()) == (1, 0)
    assert processes.first(lambda: {1, 2}) == {1, 2}
    assert processes.in_turn(lambda: {1, 2}) == {1, 2}
    processes.check_same("a thing", "a")
    processes.wait()
    own = signals.Stop()
    assert processes.together(own) is own
    assert not own.look(late=True) and own.late
    own.signal = 2
    assert own.look() and not own.late
    processes.leave(3)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"index": None}, "give all three"),
        ({"coordinator": ""}, "give all three"),
        ({"index": 2}, "--process=2 of --processes=2"),
        ({"coordinator": "somewhere"}, "not HOST:PORT"),
    ],
)
def test_a_place_that_cannot_be_is_refused(changes, words):
    place = {"coordinator": "127.0.0.1:1", "count": 2, "index": 0} | changes
    with pytest.raises(ValueError, match=words):
        processes.join(**place, heartbeat_timeout_seconds=1)


def test_an_error_of_our_own_is_not_told_as_a_lost_process(monkeypatch):
    lost = jax.errors.JaxRuntimeError("Gloo all-reduce failed: Connection closed")
    assert not processes.lost(lost)  # there is no other
    monkeypatch.setattr(processes, "count", lambda: 2)
    assert "lost another process of this run (Gloo" in processes.lost(lost)
    assert not processes.lost(jax.errors.JaxRuntimeError("out of memory"))
    assert not processes.lost(OSError("the connection to the disk is gone"))
