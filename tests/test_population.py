"""Populations: each member is the run that it would have been alone."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import checkpoint, metrics, population, runs, sharding, train
from gpt_jax.population import Rung, program
from tests import tiny


@pytest.fixture
def config(tmp_path):
    config = tiny.on_text(tmp_path)
    config.model.d_model = 16
    config.update(steps=8, eval_every=4, checkpoint_every=3)
    config.mesh.data = 2
    return config


def variants(config, **changes):
    """Returns one config for each value of the dotted keys, zipped."""
    found = []
    for values in zip(*changes.values(), strict=True):
        each = config.copy_and_resolve_references()
        for key, value in zip(changes, values, strict=True):
            each.update_from_flattened_dict({key.replace("__", "."): value})
        found.append(each)
    return found


def rates(config, *lrs):
    return variants(config, hyper__lr=lrs)


def fit(configs, folder, **options):
    workdirs = [folder / str(i) for i in range(len(configs))]
    given = {"members": 0, "rungs": (), "report": lambda *_: None, **options}
    return population.train(configs, workdirs, **given)


def params_digest(folder):
    return checkpoint.digest(runs.open(folder, step="latest").params)


def digests(folder, count):
    return [params_digest(folder / str(i)) for i in range(count)]


def lines(folder):
    """Returns the record without what a clock says."""
    clock = ("seconds", "tokens_per_second")
    rows = metrics.read(folder)
    return [{k: v for k, v in row.items() if k not in clock} for row in rows]


@pytest.mark.slow
@pytest.mark.parametrize(
    "recipe, vmap",
    [("adamw", False), ("muon", True)],
)
def test_a_member_trains_as_it_would_alone(config, tmp_path, recipe, vmap, monkeypatch):
    """Oracle: `train.train`. Numbers, seeds and dropout differ between the members."""
    if vmap:  # as on an accelerator
        monkeypatch.setattr(program, "over_members", jax.vmap)
    if recipe == "muon":
        config = common.tiny(common.modern(config))
        config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
        config.model.update(context_length=16, d_model=16, n_layers=1)
    rates = {"hyper__matrix_lr": (0.02, 0.01, 0.02)} if recipe == "muon" else {}
    config.update(steps=50, eval_every=20, checkpoint_every=25, log_every=7)
    configs = variants(
        config,
        seed=(1, 1, 2),
        hyper__lr=(1e-3, 3e-3, 1e-3),
        **rates,
        hyper__clip=(0.0, 1.0, 0.5),
        hyper__dropout_residual=(0.0, 0.1, 0.2),
        hyper__label_smoothing=(0.0, 0.0, 0.1),
    )
    results = fit(configs, tmp_path / "together")
    assert [(r.reason, r.step) for r in results] == [("steps", 50)] * 3
    for i, each in enumerate(configs):
        train.train(each, tmp_path / "alone" / str(i))
        mine, alone = (lines(tmp_path / n / str(i)) for n in ("together", "alone"))
        assert [sorted(row) for row in mine] == [sorted(row) for row in alone]
        for a, b in zip(mine, alone, strict=True):
            for key in ("step", "tokens"):
                assert a[key] == b[key]
            for key in ("train_loss", "val_loss", "lr"):
                assert a.get(key) == pytest.approx(b.get(key), abs=1e-5)
    assert len({params_digest(tmp_path / "together" / str(i)) for i in range(3)}) == 3


def test_the_folders_are_those_of_runs_alone(config, tmp_path):
    """Oracle: the folder that `train.train` leaves, and that it can go on in."""
    config.update(tensorboard=True, sample_every=4, early_from=2)
    config.sample.max_new_tokens = 4
    fit(rates(config, 1e-3, 2e-3), tmp_path / "together")
    train.train(config, tmp_path / "alone")
    names = {path.name for path in (tmp_path / "alone").iterdir()}
    for i in (0, 1):
        folder = tmp_path / "together" / str(i)
        assert {path.name for path in folder.iterdir()} == names
        assert runs.read_config(folder).hyper.lr == (i + 1) * 1e-3
        assert "Step 8" in (folder / "samples.md").read_text()
        steps = [row["step"] for row in metrics.read(folder) if "val_loss" in row]
        assert steps == [0, 2, 4, 8]
        longer = runs.read_config(folder)
        longer.steps = 10
        assert train.train(longer, folder).step == 10
    assert lines(tmp_path / "together" / "0")[-1]["step"] == 10


@pytest.mark.slow
def test_losers_of_a_rung_stop_and_the_others_train_as_before(config, tmp_path):
    """Oracle: the same trials without rungs."""
    configs = rates(config, 0.0, 3e-3, 1e-2, 1e-4, 1e-3)
    fit(configs, tmp_path / "whole")
    seen = []
    results = fit(
        configs,
        tmp_path / "halved",
        rungs=[Rung(3, 3), Rung(6, 1)],
        report=lambda member, step, numbers: seen.append((step, member)),
    )
    order = {}
    for step in (3, 6):
        order[step] = {member for at, member in seen if at == step}
    assert (len(order[3]), len(order[6])) == (5, 3)
    assert {i for i, r in enumerate(results) if r.step > 3} == order[6]
    assert sorted(r.reason for r in results) == ["pruned"] * 4 + ["steps"]
    for step, keep in ((3, 3), (6, 1)):
        losses = {
            i: population.loss_at(tmp_path / "halved" / str(i), step) or np.nan
            for i in order[step]
        }
        best = sorted(losses, key=lambda i: losses[i])[:keep]
        assert {i for i in order[step] if results[i].step > step} == set(best)
    winner = next(i for i, r in enumerate(results) if r.reason == "steps")
    whole, halved = (tmp_path / n / str(winner) for n in ("whole", "halved"))
    assert params_digest(whole) == params_digest(halved)
    loser = next(i for i, r in enumerate(results) if r.step == 3)
    folder = tmp_path / "halved" / str(loser)
    assert max(row["step"] for row in metrics.read(folder)) == 3
    assert fit(configs, tmp_path / "halved", rungs=[Rung(3, 3)])[loser].step == 3
    assert train.train(configs[loser], folder).step == 8
    assert params_digest(folder) == params_digest(tmp_path / "whole" / str(loser))
    again = fit(configs, tmp_path / "halved")[loser]
    assert (again.reason, again.step) == ("steps", 8)


@pytest.mark.slow
@pytest.mark.fault(15)
def test_a_diverging_member_leaves_the_others_bit_for_bit(config, tmp_path):
    config.optimizer.name = "sgd"
    config.hyper.update(clip=0.0, warmup_steps=0.0)
    config.update(max_skipped=2, log_every=1)
    fit(rates(config, 1e-3, 1e-3, 2e-3), tmp_path / "sound")
    results = fit(rates(config, 1e-3, 1e30, 2e-3), tmp_path / "one")
    assert [r.reason for r in results] == ["steps", "diverged", "steps"]
    for i in ("0", "2"):
        sound, one = tmp_path / "sound" / i, tmp_path / "one" / i
        assert params_digest(one) == params_digest(sound)
        assert lines(one) == lines(sound)
    assert runs.ended(tmp_path / "one" / "1") == ("diverged", results[1].step)
    again = fit(rates(config, 1e-3, 1e30, 2e-3), tmp_path / "one")
    assert [r[:2] for r in again] == [r[:2] for r in results]


@pytest.mark.slow
def test_waves_give_what_one_wave_gives(config, tmp_path):
    configs = variants(
        config, seed=(1, 2, 3, 1, 2), hyper__lr=(1e-3,) * 3 + (2e-3,) * 2
    )
    rungs = [Rung(5, 3)]
    together = fit(configs, tmp_path / "one", rungs=rungs)
    waves = fit(configs, tmp_path / "two", members=2, rungs=rungs)
    assert [r[:2] for r in waves] == [r[:2] for r in together]
    assert digests(tmp_path / "one", 5) == digests(tmp_path / "two", 5)


@pytest.mark.slow
def test_as_many_members_train_at_once_as_memory_holds(config, tmp_path, monkeypatch):
    configs = rates(config, *[1e-3] * 8)
    workdirs = [tmp_path / "runs" / str(i) for i in range(8)]
    stop, ignore = train.signals.Stop(), lambda *_: None
    shared = population.build(configs, workdirs, stop, ignore, math.inf)
    few, many = (
        program.needed_bytes(shared.program(slots, 1), shared.mesh.size)
        for slots in (2, 8)
    )
    state = jax.eval_shape(shared.parts.first, jax.random.key(0))
    assert many - few >= 6 * sum(leaf.size * 4 for leaf in jax.tree.leaves(state))
    assert program.free_bytes(jax.devices()[0], math.inf) > many

    opened = waves(monkeypatch)
    free = (few + many) / 2 / program.MEMORY_SHARE  # five of them, on two devices
    fit(configs, tmp_path / "runs", memory=free)
    assert opened == [4, 4]


def waves(monkeypatch):
    """Returns the list that the sizes of all waves will be in."""
    opened = []
    open_wave = population.open_wave

    def watch(shared, trials, stack):
        opened.append(len(trials))
        return open_wave(shared, trials, stack)

    monkeypatch.setattr(population, "open_wave", watch)
    return opened


@pytest.mark.slow
def test_a_wave_that_was_killed_before_it_saved_comes_again_in_halves(
    config, tmp_path, monkeypatch, caplog
):
    """The note of a process that the system killed, for want of memory, is there."""
    configs = rates(config, 1e-3, 2e-3, 3e-3, 4e-3)
    note = tmp_path / "0" / population.NOTE
    note.parent.mkdir()
    note.write_text('{"members": 4}')
    opened, seen = waves(monkeypatch), {}

    def report(member, step, numbers):
        if member == 0:
            seen[step] = json.loads(note.read_text()) if note.exists() else None

    results = fit(configs, tmp_path, report=report)
    assert opened == [2, 2] and [r.step for r in results] == [8] * 4
    assert "4 members at once were killed before they saved" in caplog.text
    # The note is there until the first checkpoint is, and never after.
    assert seen[0] == {"members": 2} and seen[8] is None
    assert not list(tmp_path.rglob(population.NOTE))


@pytest.mark.slow
def test_a_wave_that_the_devices_have_no_memory_for_is_halved(
    config, tmp_path, monkeypatch, caplog
):
    configs = rates(config, 1e-3, 2e-3, 3e-3)
    advance, tried = population.advance, []

    def full(shared, wave, until):
        tried.append(len(wave.members))
        if len(wave.members) > 2:
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory")
        return advance(shared, wave, until)

    monkeypatch.setattr(population, "advance", full)
    assert [r.reason for r in fit(configs, tmp_path)] == ["steps"] * 3
    assert tried == [3, 2, 1]
    assert "no memory for 3 members at once" in caplog.text

    def broken(shared, wave, until):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")

    monkeypatch.setattr(population, "advance", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        fit(configs, tmp_path / "other")


def test_patience_ends_a_member_alone(config, tmp_path, capsys):
    config.update(patience=2, eval_every=1)
    config.hyper.update(weight_decay=0.0)
    results = fit(rates(config, 0.0, 1e-3), tmp_path)
    assert [(r.reason, r.step) for r in results] == [("patience", 2), ("steps", 8)]
    last = capsys.readouterr().out.splitlines()[-1]
    rows = [row for row in metrics.read(tmp_path / "1") if row["step"] < 8]
    best = min(row.get("val_loss", np.inf) for row in rows)
    assert last.startswith(f"step 8/8  1 members  best {best:.4f}")


def test_a_finished_population_is_not_trained_again(config, tmp_path):
    configs = rates(config, 1e-3, 2e-3)
    first = fit(configs, tmp_path / "runs")
    record = tmp_path / "runs" / "0" / "metrics.jsonl"
    before = record.stat().st_mtime_ns
    assert fit(configs, tmp_path / "runs") == first
    assert record.stat().st_mtime_ns == before
    for each in configs:
        each.steps = 10
    assert [r.step for r in fit(configs, tmp_path / "runs")] == [10, 10]
    configs[1].hyper.lr = 0.5
    with pytest.raises(ValueError, match=r"hyper\.lr"):
        fit(configs, tmp_path / "runs")


@pytest.mark.slow
@pytest.mark.parametrize("damage", ["missing", "changed"])
def test_all_go_back_to_the_newest_checkpoint_that_all_have(
    config, tmp_path, damage, capsys
):
    """As after a kill between the members' saves, or with a damaged file."""
    config.hyper.decay_steps = 8.0
    configs = rates(config, 1e-3, 2e-3)
    fit(configs, tmp_path / "whole")
    for each in configs:
        each.steps = 6
    fit(configs, tmp_path / "cut")
    newest = tmp_path / "cut" / "1" / "checkpoints" / "6"
    if damage == "missing":
        shutil.rmtree(newest)
    else:
        file = max(newest.rglob("*"), key=lambda p: p.stat().st_size * p.is_file())
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    for each in configs:
        each.steps = 8
    assert [r.step for r in fit(configs, tmp_path / "cut")] == [8, 8]
    assert "resuming after step 4" in capsys.readouterr().out
    assert digests(tmp_path / "cut", 2) == digests(tmp_path / "whole", 2)
    assert lines(tmp_path / "cut" / "0") == lines(tmp_path / "whole" / "0")


def test_every_device_is_given_all_of_a_batch_however_few_its_examples_are():
    """Of more devices than examples, too: members are what is divided."""
    mesh = sharding.make_mesh(0, data=8, fsdp=1, tensor=1, cpu_devices=0)
    assert program.strategy(mesh).rows(4) == [0, 1, 2, 3]


def test_only_what_is_the_same_beside_seed_and_hyper_shares_a_program(config):
    configs = rates(config, 1e-3, 2e-3, 3e-3, 4e-3)
    configs[1].seed = 5
    configs[2].model.d_model = 64
    configs[3].steps = 9
    assert population.group(configs) == [[0, 1], [2], [3]]
    assert population.varies("hyper.lr") and population.varies("seed")
    assert not population.varies("steps") and not population.varies("model.d_model")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"model.d_model": 64}, "model.d_model: 16 -> 64"),
        ({"hyper.lr": float("nan")}, "hyper.lr is nan"),
        ({"hyper.matrix_lr": 0.03}, "matrix_lr differs between the members, but"),
        ({"folder": "0"}, "the same run folder"),
        ({"members": -1}, "members is -1"),
        ({"task.buckets": (8,)}, "task.buckets is"),
        ({"rungs": [Rung(0, 1)]}, "at least 1"),
    ],
)
def test_what_cannot_train_together_is_refused(config, tmp_path, change, message):
    configs = rates(config, 1e-3, 2e-3)
    options = {"members": 0, "rungs": [], "report": lambda *_: None}
    folders = [tmp_path / "0", tmp_path / change.pop("folder", "1")]
    options |= {key: change.pop(key) for key in ("members", "rungs") if key in change}
    if "task.buckets" in change:
        for each in configs:
            each.task = common.task_classify()
            each.task.buckets = change["task.buckets"]
    configs[1].update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        population.train(configs, folders, **options)
    assert not (tmp_path / "0").exists()


# ---- ends that nobody asked for ----

CHILD = """
import json, sys
from pathlib import Path
from gpt_jax import population, runs
folders = [Path(name) for name in sys.argv[1:]]
configs = [runs.read_config(f"{folder}.config") for folder in folders]
results = population.train(configs, folders, members=0, rungs=[population.Rung(30, 2)],
                           report=lambda *numbers: None)
sys.exit(max(result.exit_code for result in results))
"""


def spawn(configs, folder):
    """Starts a population in a process of its own, one device per member."""
    folders = [folder / str(i) for i in range(len(configs))]
    for config, each in zip(configs, folders, strict=True):
        target = Path(f"{each}.config")
        target.mkdir(parents=True, exist_ok=True)
        (target / "config.json").write_text(config.to_json())
    return subprocess.Popen(
        [sys.executable, "-c", CHILD, *map(str, folders)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "kill",
    [
        pytest.param(signal.SIGTERM, marks=pytest.mark.fault(3)),
        pytest.param(signal.SIGKILL, marks=pytest.mark.fault(2)),
    ],
)
def test_a_killed_population_ends_as_an_undisturbed_one(config, tmp_path, kill):
    config.update(steps=60, eval_every=30, log_every=5)
    config.checkpoint_every = 5 if kill == signal.SIGKILL else 60
    configs = rates(config, 1e-3, 2e-3, 3e-3)
    whole = fit(configs, tmp_path / "whole", rungs=[Rung(30, 2)])
    process = spawn(configs, tmp_path / "killed")
    record = tmp_path / "killed" / "0" / "metrics.jsonl"
    assert process.stdout
    for _ in process.stdout:  # a line of progress: it trains
        if record.exists() and any(r["step"] for r in metrics.read(record.parent)):
            break
    threading.Thread(target=process.stdout.read, daemon=True).start()
    process.send_signal(kill)
    code = process.wait(timeout=60)
    assert code == (143 if kill == signal.SIGTERM else -signal.SIGKILL)
    if kill == signal.SIGTERM:  # what was trained was saved
        trained = max(row["step"] for row in metrics.read(record.parent))
        assert runs.open(record.parent, step="latest").step >= trained
    results = fit(configs, tmp_path / "killed", rungs=[Rung(30, 2)])
    assert [r[:2] for r in results] == [r[:2] for r in whole]
    assert digests(tmp_path / "killed", 3) == digests(tmp_path / "whole", 3)
    for i in range(3):
        mine, other = (lines(tmp_path / n / str(i)) for n in ("killed", "whole"))
        assert [row["step"] for row in mine] == [row["step"] for row in other]
        last = [next(r["val_loss"] for r in reversed(rows) if "val_loss" in r)
                for rows in (mine, other)]  # fmt: skip
        np.testing.assert_allclose(*last, rtol=1e-6)
