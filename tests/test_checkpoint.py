"""Facts about checkpoints: whole, or not used."""

import json
import logging
import os
import random
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec, SingleDeviceSharding

from gpt_jax import checkpoint
from gpt_jax.checkpoint import Checkpoints, digest

ROOT = Path(__file__).resolve().parents[1]


def state(value=0.0, width=4):
    params = {
        "block_0": {
            "kernel": jnp.full((3, width), value, jnp.float32),
            "bias": jnp.arange(2.0),
        },
        "head": jnp.full((width,), value, jnp.bfloat16),
    }
    return {
        "params": params,
        "opt_state": optax.adamw(1e-3).init(params),
        "step": jnp.int32(value),
        "guard": (jnp.zeros(3).at[0].set(jnp.inf), jnp.uint32(7)),
    }


def test_metrics_from_before_what_is_measured_changed_take_no_part(folder):
    with Checkpoints(folder, keep=9) as store:
        put(store, 1, 2, metrics={1: 1.0, 2: 2.0})
        assert store.best() == 1
        store.save(3, state(3), metric=None, meta={}, since=3)
        store.wait()
        assert store.best() is None
        store.save(4, state(4), metric=9.0, meta={}, since=3)
        store.save(5, state(5), metric=8.0, meta={}, since=3)
        store.wait()
        assert store.best() == 5


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding or x.sharding
        ),
        tree,
    )


def put(store, *steps, metrics=None):
    for step in steps:
        metric = (metrics or {}).get(step)
        assert store.save(step, state(step), metric=metric, meta={"at": step})
    store.wait()


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run" / "checkpoints"


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """A folder with the sound checkpoints 1 and 2, to be copied."""
    folder = tmp_path_factory.mktemp("pair") / "checkpoints"
    with Checkpoints(folder, keep=2) as store:
        put(store, 1, 2)
    return folder


def test_what_is_saved_comes_back_bit_equal_in_the_given_containers(folder):
    tree = state(3.0)
    with Checkpoints(folder, keep=1) as store:
        store.save(3, tree, metric=0.5, meta={"epoch": 1})
        found, meta, step = store.restore(abstract(tree), step=None)
    assert (meta, step) == ({"epoch": 1}, 3)
    assert jax.tree.structure(found) == jax.tree.structure(tree)
    assert digest(found) == digest(tree)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(found))


class State(NamedTuple):
    step: jax.Array
    params: dict
    frozen: dict
    ema: dict | None


def test_a_named_tuple_comes_back_as_one_with_what_holds_no_arrays(folder):
    tree = State(jnp.int32(1), {"w": jnp.ones(2)}, {}, None)
    with Checkpoints(folder, keep=1) as store:
        store.save(1, tree, metric=None, meta={})
        found, _, _ = store.restore(abstract(tree))
        assert isinstance(found, State) and digest(found) == digest(tree)
        assert jax.tree.structure(found) == jax.tree.structure(tree)
        with pytest.raises(
            ValueError, match=r"ema/w: wanted \(2,\) float32, but absent"
        ):
            store.restore(abstract(tree._replace(ema=tree.params)))


def test_weights_are_compared_by_path_shape_and_dtype():
    tree = {"a": jnp.zeros(2), "b": jnp.zeros(3)}
    checkpoint.check_same(abstract(tree), tree)
    with pytest.raises(ValueError, match="these weights are of another model"):
        checkpoint.check_same(abstract(tree), {**tree, "b": jnp.zeros(4)})


def test_without_an_abstract_tree_the_bytes_are_the_same(pair):
    tree, _, step = Checkpoints(pair, keep=None).restore(None, step=None)
    assert step == 2
    assert digest(tree["params"]) == digest(state(2.0)["params"])
    assert tree["opt_state"][0]["mu"]["head"].dtype == jnp.bfloat16


def test_donating_right_after_save_does_not_change_what_is_saved(folder):
    advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    tree = advance({"params": {"w": jnp.zeros(2_000_000)}, "step": jnp.int32(0)})
    with Checkpoints(folder, keep=1) as store:
        for step in range(1, 4):
            store.save(step, tree, metric=None, meta={})
            for _ in range(3):
                tree = jax.block_until_ready(advance(tree))
            found, _, _ = store.restore(None, step=step)
            want = 3 * (step - 1) + 1
            assert np.unique(found["params"]["w"]).tolist() == [want]
            assert int(found["step"]) == want


def test_a_restored_state_may_be_donated(pair):
    advance = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
    tree, _, _ = Checkpoints(pair, keep=None).restore(abstract(state()), step=2)
    want = jax.tree.map(lambda x: np.array(x) + 1, tree)
    assert digest(advance(tree)) == digest(want)


@pytest.mark.fault(9, injections=2)
def test_saved_on_two_devices_opens_on_one_and_back(folder):
    mesh = jax.make_mesh(
        (2,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:2]
    )
    split = NamedSharding(mesh, PartitionSpec("data"))
    one = SingleDeviceSharding(jax.devices()[0])
    tree = {"params": {"w": jax.device_put(jnp.arange(8.0), split)}}
    with Checkpoints(folder, keep=2) as store:
        store.save(1, tree, metric=None, meta={})
        found, _, _ = store.restore(abstract(tree, one), step=1)
        assert found["params"]["w"].sharding == one
        plain, _, _ = store.restore(None, step=1)
        assert plain["params"]["w"].devices() == {jax.devices()[0]}
        store.save(2, found, metric=None, meta={})
        back, _, _ = store.restore(abstract(tree), step=2)
    assert back["params"]["w"].sharding == split
    assert digest(found) == digest(plain) == digest(back) == digest(tree)


@pytest.mark.fault(9)
def test_the_sharding_file_is_not_needed_to_open_elsewhere(folder):
    script = f"""
import os; os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=1"
import jax; from gpt_jax import checkpoint
assert jax.device_count() == 1
tree, _, step = checkpoint.Checkpoints({str(folder)!r}, keep=None).load(
    only=["params"], step=None)
print(step, tree["params"]["w"].sum())
"""
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
    split = NamedSharding(mesh, PartitionSpec("data"))
    with Checkpoints(folder, keep=1) as store:
        tree = {"params": {"w": jax.device_put(jnp.arange(8.0), split)}}
        store.save(5, tree, metric=None, meta={})
    run = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT
    )
    assert run.stdout.split() == ["5", "28.0"], run.stderr


def damage_flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def damage_cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.fault(5)
@pytest.mark.parametrize("damage", [damage_flip, damage_cut, Path.unlink])
def test_damage_to_any_file_costs_one_checkpoint(
    pair, tmp_path, caplog, damage, record_property
):
    names = sorted(p.relative_to(pair / "2") for p in (pair / "2").rglob("*"))
    names = [n for n in names if (pair / "2" / n).is_file()]
    assert len(names) > 15
    for number, name in enumerate(names):
        if damage is not Path.unlink and not (pair / "2" / name).stat().st_size:
            continue
        if damage is Path.unlink and name.name == checkpoint.MANIFEST:
            continue
        folder = tmp_path / str(number)
        shutil.copytree(pair, folder)
        damage(folder / "2" / name)
        store = Checkpoints(folder, keep=2)
        with pytest.raises(checkpoint.Damaged, match=str(name)):
            store.restore(abstract(state()), step=2)
        caplog.clear()
        tree, meta, step = store.restore(abstract(state()), step=None)
        assert (step, meta) == (1, {"at": 1})
        assert digest(tree) == digest(state(1.0))
        assert str(name) in caplog.text and len(caplog.records) == 1
        assert (folder / "damaged-2").is_dir() and not (folder / "2").exists()
        assert store.steps() == [1]
    record_property("injections", len(list(tmp_path.iterdir())))


@pytest.mark.fault(5)
def test_a_reader_passes_damage_over_without_touching_it(pair, tmp_path):
    folder = shutil.copytree(pair, tmp_path / "c")
    damage_flip(folder / "2" / "manifest.json")
    (folder / "3").mkdir()
    before = sorted(folder.rglob("*"))
    store = Checkpoints(folder, keep=None)
    assert store.restore(None, step=None)[2] == 1
    assert sorted(folder.rglob("*")) == before


@pytest.mark.fault(5, injections=2)
def test_when_no_checkpoint_is_sound_restoring_fails(pair, tmp_path):
    folder = shutil.copytree(pair, tmp_path / "c")
    for step in "12":
        damage_flip(folder / step / "manifest.json")
    store = Checkpoints(folder, keep=1)
    with pytest.raises(ValueError, match=r"no checkpoint .* is sound"):
        store.restore(None, step=None)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        store.restore(None, step=None)


@pytest.mark.fault(7, injections=2)
def test_a_step_without_a_manifest_is_unfinished(pair, tmp_path, caplog):
    folder = shutil.copytree(pair, tmp_path / "c")
    (folder / "2" / "manifest.json").unlink()
    (folder / "8.orbax-checkpoint-tmp-1").mkdir()
    (folder / "notes").mkdir()
    reader = Checkpoints(folder, keep=None)
    assert reader.steps() == [1] and (folder / "2").exists()
    with pytest.raises(FileNotFoundError, match="2 is unfinished"):
        reader.restore(None, step=2)
    store = Checkpoints(folder, keep=2)
    assert sorted(p.name for p in folder.iterdir()) == ["1", "notes"]
    assert len(caplog.records) == 2 and "unfinished" in caplog.text
    put(store, 2)
    assert store.steps() == [1, 2]


def test_several_steps_without_any_manifest_are_lost_not_unfinished(pair, tmp_path):
    """As in a folder that was copied without its last files."""
    copy = Path(shutil.copytree(pair, tmp_path / "checkpoints"))
    for path in copy.glob("*/manifest.json"):
        path.unlink()
    with Checkpoints(copy, keep=2) as store:
        assert store.steps() == []
        assert [path.name for path in store.damaged()] == ["1", "2"]


def test_the_newest_and_the_best_are_kept(folder):
    metrics = {1: 3.0, 2: 1.0, 3: 1.0, 4: float("nan"), 5: 9.0, 6: None}
    with Checkpoints(folder, keep=2) as store:
        put(store, 1, 2, 3, 4, 5, 6, metrics=metrics)
        assert store.steps() == [2, 5, 6]
        assert (store.best(), store.latest()) == (2, 6)
    assert sorted(p.name for p in folder.iterdir()) == ["2", "5", "6"]


def test_nothing_older_goes_before_the_newer_manifest_exists(folder, monkeypatch):
    with Checkpoints(folder, keep=1) as store:
        put(store, 1)
        seal = checkpoint.sealing.seal

        def watched(target, note):
            assert store.steps() == [1]
            seal(target, note)
            assert store.steps() == [1, 2]

        monkeypatch.setattr(checkpoint.sealing, "seal", watched)
        put(store, 2)
        assert store.steps() == [2]


@pytest.mark.fault(7)
def test_a_removal_that_stops_half_way_leaves_no_half_checkpoint(folder, monkeypatch):
    with Checkpoints(folder, keep=1) as store:
        put(store, 1)
        with monkeypatch.context() as patch:

            def stop(path, **_):
                if path.exists():
                    raise OSError("stopped")

            patch.setattr(checkpoint.shutil, "rmtree", stop)
            put(store, 2)
        assert store.steps() == [2] and (folder / "1").exists()
    assert Checkpoints(folder, keep=1).latest() == 2
    assert not (folder / "1").exists()


@pytest.mark.fault(7)
def test_rewind_sets_newer_steps_aside_so_that_saves_really_happen(folder):
    with Checkpoints(folder, keep=9) as store:
        put(store, 2, 4, 6, 8)
        with pytest.raises(ValueError, match=r"rewind\(5\)"):
            store.save(5, state(), metric=None, meta={})
        assert store.rewind(4) == [6, 8] and store.rewind(4) == []
        put(store, 6)
        assert store.steps() == [2, 4, 6] and store.rewind(4) == [6]
        assert not store.save(4, state(), metric=None, meta={})
    aside = [sorted(p.name for p in f.iterdir()) for f in folder.glob("aside-*")]
    assert sorted(aside) == [["6"], ["6", "8"]]


@pytest.mark.fault(8)
def test_another_model_is_refused_leaf_by_leaf(pair):
    store = Checkpoints(pair, keep=None)
    other = abstract(state(width=5))
    other["params"]["head"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    del other["params"]["block_0"]["bias"]
    other["params"]["norm"] = jax.ShapeDtypeStruct((4,), jnp.float32)
    with pytest.raises(ValueError, match="another model") as error:
        store.restore(other, step=None)
    text = str(error.value)
    assert "params/block_0/kernel: wanted (3, 5) float32, found (3, 4) float32" in text
    assert "params/head: wanted (4,) float32, found (4,) bfloat16" in text
    assert "params/block_0/bias: not wanted, found (2,) float32" in text
    assert "params/norm: wanted (4,) float32, but absent" in text
    assert (pair / "2").exists()


@pytest.mark.fault(8)
def test_a_difference_shows_ten_leaves_and_counts_the_rest(pair):
    other = {**abstract(state()), "more": [jnp.zeros(1)] * 13}
    with pytest.raises(ValueError, match="and 3 more") as error:
        Checkpoints(pair, keep=None).restore(other, step=None)
    assert str(error.value).count("\n") == 11


def test_only_the_asked_keys_are_read(pair, tmp_path):
    folder = shutil.copytree(pair, tmp_path / "c")
    shutil.rmtree(folder / "2" / "state")  # proves that it is not needed
    store = Checkpoints(folder, keep=None)
    tree, meta, step = store.load(only=["params"], step=2)
    assert (list(tree), meta, step) == (["params"], {"at": 2}, 2)
    assert digest(tree["params"]) == digest(state(2.0)["params"])
    tree, _, _ = store.load(only=["params", "step"], step=1)
    assert sorted(tree) == ["params", "step"] and int(tree["step"]) == 1
    with pytest.raises(ValueError, match="holds guard, opt_state, params, step, but"):
        store.load(only=["ema"], step=1)


def test_weights_alone_and_empty_containers_come_back(folder):
    tree = {"params": {"w": jnp.ones(3)}, "none": None, "empty": (optax.EmptyState(),)}
    with Checkpoints(folder, keep=1) as store:
        store.save(0, tree, metric=None, meta={})
        found, _, _ = store.restore(abstract(tree), step=0)
    assert jax.tree.structure(found) == jax.tree.structure(tree)


@pytest.mark.fault(15)
def test_a_checkpoint_with_nan_is_refused_by_name(folder):
    tree = state(1.0)
    tree["params"]["head"] = tree["params"]["head"].at[2].set(jnp.nan)
    with Checkpoints(folder, keep=1) as store:
        store.save(1, tree, metric=None, meta={})
        with pytest.raises(FloatingPointError, match="params/head"):
            store.wait()
        assert list(folder.iterdir()) == []
        put(store, 2)
        assert store.steps() == [2]


@pytest.mark.parametrize(
    ("leaf", "sentence"),
    [(3, "rate is 3, not an array"), (jax.random.key(0), "key_data")],
)
def test_what_cannot_be_saved_is_named_at_once(folder, leaf, sentence):
    with (
        Checkpoints(folder, keep=1) as store,
        pytest.raises(ValueError, match=sentence),
    ):
        store.save(1, {"params": {}, "rate": leaf}, metric=None, meta={})


@pytest.mark.fault(4)
def test_a_failed_save_names_path_and_free_bytes_and_leaves_nothing(
    folder, monkeypatch
):
    with Checkpoints(folder, keep=3) as store:
        put(store, 1)
        with monkeypatch.context() as patch:

            def full(*_):
                raise OSError(28, "No space left on device")

            patch.setattr(checkpoint.sealing, "seal", full)
            store.save(2, state(2), metric=None, meta={})
            with pytest.raises(OSError, match="No space left") as error:
                store.save(3, state(3), metric=None, meta={})
        assert str(folder / "2") in str(error.value)
        assert "bytes are free" in str(error.value)
        assert sorted(p.name for p in folder.iterdir()) == ["1"]
        put(store, 3)
        assert store.steps() == [1, 3]


@pytest.mark.fault(4)
def test_a_full_disk_neither_hangs_nor_damages_and_the_next_save_works(folder):
    script = """
import resource, sys, time, jax.numpy as jnp
from gpt_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=3) as store:
    big = {"params": {"w": jnp.ones(500_000)}}
    store.save(1, big, metric=None, meta={})
    store.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, -1))
    store.save(2, big, metric=None, meta={})
    try:
        store.wait()
    except OSError as error:
        print(error)
    resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
    store.save(3, big, metric=None, meta={})
"""
    run = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        cwd=ROOT,
        timeout=60,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert f"checkpoint {folder / '2'} was not saved" in run.stdout
    assert sorted(p.name for p in folder.iterdir()) == ["1", "3"]
    assert Checkpoints(folder, keep=None).restore(None, step=3)[2] == 3


@pytest.mark.fault(6)
def test_check_surfaces_an_error_without_another_save(folder, monkeypatch):
    store = Checkpoints(folder, keep=3)
    shutil.rmtree(folder)
    folder.write_text("a file where the folder should be")
    store.save(1, state(), metric=None, meta={})
    store._thread.join()
    with pytest.raises(OSError, match="was not saved"):
        store.check()
    store.check()


@pytest.mark.fault(6, injections=2)
def test_an_error_in_the_block_is_not_hidden_by_a_failed_save(folder, monkeypatch):
    monkeypatch.setattr(checkpoint.sealing, "seal", lambda *_: 1 / 0)
    with pytest.raises(KeyError), Checkpoints(folder, keep=1) as store:
        store.save(1, state(), metric=None, meta={})
        raise KeyError("first")
    with pytest.raises(OSError), Checkpoints(folder, keep=1) as store:
        store.save(1, state(), metric=None, meta={})


def test_frozen_weights_are_stored_once_by_their_digest(folder):
    tree = {"base": state(5.0)["params"], "reference": {"w": jnp.ones(2, jnp.bfloat16)}}
    with Checkpoints(folder, keep=1) as store:
        name = store.save_frozen(tree)
        where = folder.parent / "frozen"
        before = (where / name / "manifest.json").stat().st_mtime_ns
        assert store.save_frozen(tree) == name
        assert (where / name / "manifest.json").stat().st_mtime_ns == before
        assert [p.name for p in where.iterdir()] == [name]
        assert digest(store.load_frozen(name, None)) == name
        assert digest(store.load_frozen(name, abstract(tree))) == name
        damage_flip(where / name / "state" / "_METADATA")
        with pytest.raises(ValueError, match=r"frozen weights .* cannot be used"):
            store.load_frozen(name, None)
        assert store.save_frozen(tree) == name
        assert digest(store.load_frozen(name, None)) == name


def test_frozen_weights_with_nan_are_refused_by_name(folder):
    bad = {"base": {"w": np.array([1, np.nan], np.float32)}}
    store = Checkpoints(folder, keep=2)
    with pytest.raises(FloatingPointError, match="base/w holds NaN"):
        store.save_frozen(bad)
    assert not list((folder.parent / "frozen").glob("*/manifest.json"))


def test_the_digest_sees_paths_dtypes_shapes_and_bytes():
    base = {"a": jnp.zeros((2, 3)), "b": jnp.int32(0)}
    others = [
        {"a": jnp.zeros((2, 3)), "c": jnp.int32(0)},
        {"a": jnp.zeros((3, 2)), "b": jnp.int32(0)},
        {"a": jnp.zeros((2, 3)), "b": jnp.uint32(0)},
        {"a": -jnp.zeros((2, 3)), "b": jnp.int32(0)},
        {"a": jnp.zeros((2, 3)), "b": jnp.zeros(1, jnp.int32)},
    ]
    assert len({digest(t) for t in [base, *others]}) == 6
    assert digest({"b": np.int32(0), "a": np.zeros((2, 3), np.float32)}) == digest(base)


SAVER = """
import sys, jax.numpy as jnp
from gpt_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as store:
    first = (store.latest() or 0) + 1
    for step in range(first, first + 400):
        tree = {"params": {"w": jnp.full((200_000,), step, jnp.float32)}}
        store.save(step, tree, metric=None, meta={"at": step})
        print(step, flush=True)
"""


@pytest.mark.fault(1, injections=2)
def test_a_kill_in_mid_save_leaves_only_sound_checkpoints(folder):
    rng = random.Random(0)
    seen = 0
    for _ in range(2):
        run = subprocess.Popen(
            [sys.executable, "-c", SAVER, str(folder)],
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        started = 0
        for _ in range(rng.randint(3, 9)):
            started = int(run.stdout.readline())
        # The next save is under way: let a different share of it happen.
        for _ in range(rng.randint(0, 1_500_000)):
            pass
        os.kill(run.pid, signal.SIGKILL)
        rest = run.communicate(timeout=60)[0].split()
        started = int(rest[-1]) if rest else started
        reader = Checkpoints(folder, keep=None)
        assert reader.steps()
        for step in reader.steps():
            tree, meta, _ = reader.restore(None, step=step)
            assert np.unique(tree["params"]["w"]).tolist() == [step]
            assert meta == {"at": step}
        assert started - 2 <= reader.latest() <= started + 1 and started > seen
        seen = started
    Checkpoints(folder, keep=2)
    assert all((p / "manifest.json").is_file() for p in folder.iterdir())


@pytest.mark.fault(6)
def test_the_last_save_is_on_the_disk_when_the_block_ends_by_sys_exit(folder):
    script = """
import sys, jax.numpy as jnp
from gpt_jax.checkpoint import Checkpoints
with Checkpoints(sys.argv[1], keep=2) as store:
    tree = {"params": {"w": jnp.ones(3_000_000)}}
    store.save(7, tree, metric=None, meta={})
    sys.exit(3)
"""
    run = subprocess.run([sys.executable, "-c", script, str(folder)], cwd=ROOT)
    assert run.returncode == 3
    assert Checkpoints(folder, keep=None).steps() == [7]


def test_the_manifest_is_readable_by_people(pair):
    manifest = json.loads((pair / "2" / "manifest.json").read_text())
    assert manifest["step"] == 2 and manifest["meta"] == {"at": 2}
    assert manifest["leaves"]["params/head"] == [[4], "bfloat16"]
    assert logging.getLogger("gpt_jax.checkpoint") is checkpoint.log
