"""What damaged files, other models, other devices and bad batches do to a run's state.

In one process. Run by `make test-faults`; the name keeps it out of `make test`.
"""

import json
import shutil
import signal
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import checkpoint, data, metrics, model, train
from gpt_jax.checkpoint import Checkpoints, sealing
from gpt_jax.train import feed
from tests import tiny

pytestmark = pytest.mark.timeout(900)
FLIPS = 1000


# --- 5: flipped bits ------------------------------------------------------------------


def zeros(cfg):
    """Returns weights of a model, without drawing them."""
    shapes = jax.eval_shape(lambda key: model.init(cfg, key), jax.random.key(0))
    return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)


@pytest.mark.fault(5, injections=FLIPS)
def test_every_flipped_bit_that_changes_a_value_is_caught(tmp_path, monkeypatch):
    """Oracle: what is loaded when nothing is verified."""
    rng, folder = np.random.default_rng(0), tmp_path / "checkpoints"
    weights = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), zeros(tiny.cfg())
    )
    with Checkpoints(folder, keep=1) as store:
        store.save(1, {"params": weights, "step": jnp.int32(7)}, metric=None, meta={})
    store = Checkpoints(folder, keep=None)
    wanted = checkpoint.digest(store.restore(None, step=1)[0])
    files = [path for path in sorted((folder / "1").rglob("*")) if path.is_file()]
    files = [path for path in files if path.stat().st_size]
    sizes = np.array([path.stat().st_size for path in files], float)
    sizes /= sizes.sum()
    found: Counter = Counter()
    for n in range(FLIPS):
        # Half of them fall on all files alike, half on all bytes.
        path = files[rng.choice(len(files), p=sizes) if n % 2 else n % len(files)]
        whole = path.read_bytes()
        at, bit = rng.integers(len(whole)), 1 << rng.integers(8)
        path.write_bytes(whole[:at] + bytes([whole[at] ^ bit]) + whole[at + 1 :])
        try:
            caught = is_caught(folder / "1")
            found["caught"] += caught
            if not caught or n % 10 < 2:  # a fifth shows what they would have done
                harm = unverified(store, wanted, monkeypatch)
                found[harm] += 1
                assert caught or harm == "none", f"{path}, byte {at}, bit {bit}"
        finally:
            path.write_bytes(whole)
    print(dict(found))
    assert found["caught"] == FLIPS and found["other values"] >= FLIPS // 100
    assert checkpoint.digest(store.restore(None, step=1)[0]) == wanted


def is_caught(found) -> bool:
    """Whether the check before every load, which reads each file once, finds damage."""
    try:
        sealing.verify(found, sealing.read(found), None)
    except checkpoint.Damaged:
        return True
    return False


def unverified(store, wanted, monkeypatch) -> str:
    """Returns what a reader that checks nothing would have got."""
    with monkeypatch.context() as patch:
        patch.setattr(sealing, "verify", lambda *_: None)
        manifest = store.folder / "1" / checkpoint.MANIFEST
        try:
            stated = json.loads(manifest.read_bytes())["sha256"]
            patch.setattr(sealing, "_body_hash", lambda body: stated)
            tree, _, _ = store.restore(None, step=1)
        except Exception:
            return "an error"
        return "none" if checkpoint.digest(tree) == wanted else "other values"


# --- 8: another model -----------------------------------------------------------------

PLAIN = {"n_layers": 12, "d_model": 32, "n_heads": 4}
OTHERS = {
    "deeper": {"n_layers": 16},
    "wider": {"d_model": 64},
    "another precision": {"param_dtype": "bfloat16"},
    "untied": {"tie_embeddings": False},
}


@pytest.mark.fault(8, injections=2)
@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_model_is_refused_leaf_by_leaf(tmp_path, other):
    trees = [zeros(tiny.cfg(**PLAIN)), zeros(tiny.cfg(**{**PLAIN, **OTHERS[other]}))]
    for n, (saved, wanted) in enumerate((trees, trees[::-1])):
        folder = tmp_path / str(n)
        with Checkpoints(folder, keep=1) as store:
            store.save(1, {"params": saved}, metric=None, meta={})
            store.wait()
            with pytest.raises(ValueError, match="is of another model:") as error:
                store.restore({"params": wanted}, step=None)
            with pytest.raises(ValueError, match="of another model"):
                checkpoint.check_same(wanted, saved)
        lines = str(error.value).splitlines()[1:]
        tables = [checkpoint.leaves({"params": tree}) for tree in (wanted, saved)]
        differ = checkpoint.difference(*tables)
        assert lines[:10] == [f"  {line}" for line in differ[:10]]
        assert len(lines) == min(len(differ), 11)
        assert all("params/" in line for line in lines[:10])
        assert Checkpoints(folder, keep=None).steps() == [1]


@pytest.mark.fault(8, injections=2)
def test_scanned_and_unrolled_layouts_are_the_same_weights():
    rng, cfg = np.random.default_rng(0), tiny.cfg(n_layers=5)
    weights = jax.tree.map(
        lambda x: rng.standard_normal(x.shape).astype(x.dtype), zeros(cfg)
    )
    scanned = tiny.cfg(n_layers=5, scan_layers=True)
    stacked = model.stack(weights, scanned)
    assert checkpoint.leaves(stacked) == checkpoint.leaves(zeros(scanned))
    again = model.unstack(stacked, scanned)
    assert checkpoint.digest(again) == checkpoint.digest(weights)


# --- 9, 10, 14, 15, 16: runs in this process ------------------------------------------

TEXT = "the quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def config(tmp_path):
    assert len(jax.devices()) == 8  # counted now, before a run chooses fewer
    (tmp_path / "text.txt").write_text(TEXT)
    config = common.tiny(common.base())
    config.data.update(source=str(tmp_path / "text.txt"), tokenizer="char")
    config.data.update(folder=str(tmp_path / "data"), cache=str(tmp_path / "cache"))
    config.model.context_length = 16
    config.hyper.decay_steps = 100.0
    config.update(steps=8, eval_every=4, checkpoint_every=1, compile_cache="")
    config.update(tensorboard=False, log_every=1, keep=99)
    config.mesh.data = 1
    return config


def opened(folder):
    return Checkpoints(folder / "checkpoints", keep=None)


def state_of(folder, step, *keys):
    """Returns the digest of some top-level keys of a checkpoint."""
    tree, _, _ = opened(folder).load(only=keys, step=step)
    return checkpoint.digest(tree)


def through(monkeypatch, change):
    """Lets change(n, batch) stand between the data and the run; n is the step."""
    batches = train.train_batches

    def changed(job, start):
        for n, batch in enumerate(batches(job, start), start=start):
            yield change(n, batch)

    monkeypatch.setattr("gpt_jax.train.feed.train_batches", changed)


@pytest.mark.fault(9, injections=3)
def test_one_device_four_and_one_again(config, tmp_path, monkeypatch):
    seen: dict[str, dict] = {"whole": {}, "moved": {}}
    now = "whole"

    def watch(n, batch):
        seen[now][n] = batch["tokens"]
        return batch

    through(monkeypatch, watch)
    whole = train.train(config, tmp_path / "whole")
    now = "moved"
    for steps, devices in {2: 1, 4: 4, 8: 1}.items():
        config.steps, config.mesh.data = steps, devices
        moved = train.train(config, tmp_path / "moved")
    first = [state_of(tmp_path / name, 2, "params") for name in seen]
    assert first[0] == first[1]
    assert moved.numbers["val_loss"] == pytest.approx(whole.numbers["val_loss"], 1e-6)
    assert seen["moved"].keys() == seen["whole"].keys()
    for n, tokens in seen["whole"].items():
        np.testing.assert_array_equal(seen["moved"][n], tokens)


@pytest.mark.fault(10, injections=6)
@pytest.mark.parametrize("prefetch", [1, 16])
def test_the_tokens_of_every_step_are_those_of_an_undisturbed_run(
    config, tmp_path, monkeypatch, prefetch
):
    """Oracle: the windows that each step's numbers name, without any prefetching."""
    monkeypatch.setattr(data, "PREFETCH", prefetch)
    trained: dict[int, np.ndarray] = {}
    rollouts = feed.rollouts

    def watch(job):
        roll = rollouts(job)

        def rolled(state, step, batch):
            assert step not in trained
            trained[step] = np.asarray(batch["tokens"])
            return roll(state, step, batch)

        return rolled

    monkeypatch.setattr("gpt_jax.train.feed.rollouts", watch)
    for end in (3, 3, 4, 9, 20):  # 3 twice: resumed, and nothing to do but leave
        config.steps = end
        train.train(config, tmp_path / "run")
    stop_at_once(monkeypatch)
    config.steps = 24
    assert train.train(config, tmp_path / "run").exit_code == 143
    monkeypatch.undo()
    monkeypatch.setattr(data, "PREFETCH", prefetch)
    monkeypatch.setattr("gpt_jax.train.feed.rollouts", watch)
    assert train.train(config, tmp_path / "run").step == 24
    task = train.make_task(train.unpack(config), tmp_path / "run")
    count, size = len(task.train), config.batch_size
    assert 24 * size > count  # an epoch and more
    for n in range(24):
        ids = data.members(count, size, config.seed, n)
        np.testing.assert_array_equal(trained[n][0], task.train.take(ids)["tokens"])


def stop_at_once(monkeypatch):
    """A signal that comes before the first step after a resume."""
    loop = train.loop

    def stopped(job, *args, **named):
        job.stop.signal = signal.SIGTERM
        return loop(job, *args, **named)

    monkeypatch.setattr(train, "loop", stopped)


def poison(first, last, value):
    """Returns a change that makes batches first ... last not finite."""

    def change(n, batch):
        if first <= n <= last:
            batch = {**batch, "mask": np.full_like(batch["mask"], value)}
        return batch

    return change


@pytest.mark.fault(14)
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_one_bad_batch_changes_nothing_and_the_run_goes_on(
    config, tmp_path, monkeypatch, value
):
    config.optimizer.ema = True
    through(monkeypatch, poison(3, 3, value))
    result = train.train(config, tmp_path / "run")
    assert (result.step, result.numbers["skipped"]) == (8, 1)
    for key in ("params", "opt_state", "ema"):
        states = [state_of(tmp_path / "run", step, key) for step in range(1, 9)]
        assert states[2] == states[3] and len({*states}) == 7
    rows = [row for row in metrics.read(tmp_path / "run") if "skipped" in row]
    assert [row["skipped"] for row in rows] == [0, 0, 0, 1, 1, 1, 1, 1]
    assert rows[3].get("train_loss") is None
    monkeypatch.undo()
    whole = train.train(config, tmp_path / "whole")  # the schedule followed the step
    rates = [row["lr"] for row in metrics.read(tmp_path / "whole") if "lr" in row]
    assert [row["lr"] for row in rows] == rates and whole.numbers["skipped"] == 0


@pytest.mark.fault(15)
def test_lasting_nan_ends_a_run_with_what_caused_it(config, tmp_path, monkeypatch):
    config.update(steps=40, max_skipped=3, log_every=5)
    through(monkeypatch, poison(4, 99, np.nan))
    with pytest.raises(FloatingPointError, match=r"\d updates in a row") as error:
        train.train(config, tmp_path / "run")
    # Steps 5, 6 and 7 are found out about together with those up to the next line.
    words = str(error.value)
    last = int(words.split("the last at step ")[1].split()[0])
    assert last in (7, 8, 9, 10)
    kept = np.load(tmp_path / "run" / f"skipped-{last}.npz")
    monkeypatch.undo()
    task = train.make_task(train.unpack(config), tmp_path / "run")
    for step, ids in zip(kept["steps"], kept["examples"], strict=True):
        order = data.members(len(task.train), 4, config.seed, int(step) - 1)
        assert ids.tolist() == order
    assert kept["steps"].tolist() == list(range(5, last + 1))
    wanted = task.train.take(kept["examples"][-1])["tokens"]
    np.testing.assert_array_equal(kept["tokens"][0], wanted)
    newest = opened(tmp_path / "run").latest()
    tree, _, _ = opened(tmp_path / "run").restore(None, step=newest)
    for name in ("params", "opt_state"):
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(tree[name]))
    assert state_of(tmp_path / "run", newest, "params") == state_of(
        tmp_path / "run", 4, "params"
    )


@pytest.mark.fault(16, injections=2)
def test_a_spike_after_200_steps_is_skipped_and_its_window_survives_a_resume(
    config, tmp_path, monkeypatch, capsys
):
    at, make_task = 205, train.make_task
    config.update(steps=210, spike_window=128, checkpoint_every=70, eval_every=105)

    def scaled(config, workdir):
        task = make_task(config, workdir)

        def loss(weights, frozen, batch, key, hyper):
            sums = task.loss(weights, frozen, batch, key, hyper)
            scale = batch["scale"][0] if "scale" in batch else 1.0
            return {**sums, "loss": sums["loss"] * scale}

        return task._replace(loss=loss)

    def scale(n, batch):
        scale = np.full(batch["mask"].shape[:2], 1e3 if n == at - 1 else 1.0)
        return {**batch, "scale": scale.astype(np.float32)}

    monkeypatch.setattr("gpt_jax.train.parts.make_task", scaled)
    through(monkeypatch, scale)
    whole = train.train(config, tmp_path / "whole")
    assert whole.numbers["skipped"] == 1
    assert f"step {at}: loss" in capsys.readouterr().out
    for steps in (150, 204, 210):
        config.steps = steps
        train.train(config, tmp_path / "parts")
    for key in ("params", "opt_state", "guard"):
        assert state_of(tmp_path / "parts", 210, key) == state_of(
            tmp_path / "whole", 210, key
        )
    shutil.rmtree(tmp_path / "parts")
    config.spike_window = 0
    assert train.train(config, tmp_path / "parts").numbers["skipped"] == 0
