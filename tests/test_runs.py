"""Facts about run folders: what they hold, who may write, how they open."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import psutil
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from configs import common
from gpt_jax import files, model, runs, tokenizers
from gpt_jax.checkpoint import Checkpoints, digest

ROOT = Path(__file__).resolve().parents[1]
TEXT = "to be, or not to be: that is the question"
IDS = jnp.arange(12, dtype=jnp.int32).reshape(1, 12)


def draw(cfg, seed):
    """Random weights of the model's shapes, without compiling its own init."""
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda key: model.init(cfg, key), jax.random.key(0))
    return jax.tree.map(
        lambda x: jnp.asarray(rng.normal(0, 0.02, x.shape), x.dtype), shapes
    )


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train("char", iter([TEXT]))


@pytest.fixture
def config():
    return common.tiny(common.base())


def save(folder, config, tokenizer, *, steps, metrics=None, extra=None, place=None):
    """Makes a run whose params at step n come from seed n; returns them by step."""
    runs.create_or_check(folder, config, tokenizer, "text")
    cfg = runs.model_config(config, tokenizer)
    made = {}
    with Checkpoints(folder / "checkpoints", keep=9) as store:
        for step in steps:
            params = draw(cfg, step)
            made[step] = params = jax.device_put(params, place) if place else params
            tree = {"params": params, "opt_state": params, **(extra or {})}
            metric = (metrics or {}).get(step)
            store.save(step, tree, metric=metric, meta={})
    return made


def test_a_config_comes_back_equal_with_its_tuples(config, tokenizer, tmp_path):
    config.model.pattern = (
        {"window": 8, "rope_base": 1e4, "rope_scaling": None},
        {
            "window": 0,
            "rope_base": 1e6,
            "rope_scaling": {"kind": "linear", "factor": 2},
        },
    )
    runs.create(tmp_path / "run", config, tokenizer)
    found = runs.read_config(tmp_path / "run")
    assert found.to_dict() == config.to_dict()
    assert isinstance(found.optimizer.decay, tuple)
    assert runs.difference(config, found) == []
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["hyper"]["lr"] == config.hyper.lr
    again = tokenizers.load(tmp_path / "run" / "tokenizer.json")
    assert again.sha256 == tokenizer.sha256
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_an_opened_run_gives_the_logits_of_the_saved_weights(
    config, tokenizer, tmp_path
):
    made = save(tmp_path, config, tokenizer, steps=[3])
    run = runs.open(tmp_path)
    assert (run.folder, run.step) == (tmp_path, 3)
    assert run.config.to_dict() == config.to_dict()
    assert run.tokenizer.sha256 == tokenizer.sha256
    assert run.model.cfg.vocab_size == tokenizer.vocab_size
    gpt = model.GPT(runs.model_config(config, tokenizer))
    want, _ = jax.jit(gpt.apply)({"params": made[3]}, IDS)
    got, _ = jax.jit(run.model.apply)({"params": run.params}, IDS)
    np.testing.assert_array_equal(got, want)


def test_the_default_step_is_the_best_and_else_the_newest(config, tokenizer, tmp_path):
    made = save(
        tmp_path / "a", config, tokenizer, steps=[1, 2, 3], metrics={1: 2.0, 2: 1.0}
    )
    chosen = {None: 2, "best": 2, "latest": 3, 1: 1, "1": 1}
    for step, want in chosen.items():
        run = runs.open(tmp_path / "a", step=step)
        assert run.step == want
        assert digest(run.params) == digest(made[want])
    save(tmp_path / "b", config, tokenizer, steps=[4, 5])
    assert runs.open(tmp_path / "b").step == 5
    with pytest.raises(ValueError, match="has a validation loss; use latest"):
        runs.open(tmp_path / "b", step="best")
    with pytest.raises(FileNotFoundError, match="finished steps: 4, 5"):
        runs.open(tmp_path / "b", step=7)
    with pytest.raises(ValueError, match="'newest' is not a number, best or latest"):
        runs.open(tmp_path / "b", step="newest")


@pytest.mark.fault(5)
def test_a_damaged_best_is_passed_over_unless_asked_for(
    config, tokenizer, tmp_path, caplog
):
    save(tmp_path, config, tokenizer, steps=[1, 2], metrics={1: 1.0, 2: 2.0})
    (tmp_path / "checkpoints" / "1" / "params" / "_METADATA").write_text("{}")
    assert runs.open(tmp_path).step == 2
    assert "the best checkpoint is damaged" in caplog.text
    for step in (1, "best"):
        with pytest.raises(ValueError, match="does not match its sha256"):
            runs.open(tmp_path, step=step)
    assert (tmp_path / "checkpoints" / "1").is_dir()  # a reader moves nothing


@pytest.mark.slow
def test_a_run_of_four_devices_and_scanned_layers_opens_on_one(
    config, tokenizer, tmp_path
):
    config.model.scan_layers = True
    mesh = jax.make_mesh(
        (4,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:4]
    )
    cfg = runs.model_config(config, tokenizer)
    everywhere = NamedSharding(mesh, PartitionSpec())
    made = save(tmp_path, config, tokenizer, steps=[1], place=everywhere)
    script = f"""
import jax
from gpt_jax import checkpoint, runs
assert jax.device_count() == 1
run = runs.open({str(tmp_path)!r})
print(checkpoint.digest(run.params), run.model.cfg.scan_layers)
"""
    env = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    run = subprocess.run(
        [sys.executable, "-c", script],
        cwd=ROOT,
        env=env,
        capture_output=True,
        text=True,
    )
    flat = model.unstack(made[1], cfg)
    assert "block_0" in flat
    assert run.stdout.split() == [digest(flat), "False"], run.stderr


def test_the_moving_average_opens_when_asked_for(config, tokenizer, tmp_path):
    cfg = runs.model_config(config, tokenizer)
    ema = draw(cfg, 99)
    made = save(tmp_path / "a", config, tokenizer, steps=[1], extra={"ema": ema})
    assert digest(runs.open(tmp_path / "a", weights="ema").params) == digest(ema)
    assert digest(runs.open(tmp_path / "a").params) == digest(made[1])
    save(tmp_path / "b", config, tokenizer, steps=[1], extra={"ema": None})
    with pytest.raises(ValueError, match="but not ema"):
        runs.open(tmp_path / "b", weights="ema")


@pytest.mark.parametrize("make", [Path.mkdir, Path.touch, lambda path: None])
def test_what_is_not_a_run_is_said_with_the_command_that_makes_one(tmp_path, make):
    folder = tmp_path / "somewhere"
    make(folder)
    sentence = r"is not a run folder.*(config.json|exist|is a file).*--config="
    with pytest.raises(ValueError, match=sentence):
        runs.open(folder)
    for text in ("[1, 2", "[]", "{}", '{"model": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json is not a config"):
            runs.open(tmp_path)


def test_a_run_without_a_checkpoint_says_so(config, tokenizer, tmp_path):
    runs.create(tmp_path, config, tokenizer)
    with pytest.raises(FileNotFoundError, match="no finished checkpoint"):
        runs.open(tmp_path)


def test_the_example_command_names_a_config_that_exists(tmp_path):
    with pytest.raises(ValueError) as error:
        runs.read_config(tmp_path)
    named = str(error.value).split("--config=")[1].split()[0]
    assert (ROOT / named).is_file()


def test_differences_are_named_key_by_key():
    old, new = common.base(), common.base()
    new.hyper.lr = 0.5
    new.data.source = "austen"
    new.adapter.rank = 4
    new.optimizer.freeze = ("embed",)
    del new.patience
    assert runs.difference(old, new) == [
        "adapter.rank: (absent) -> 4",
        "data.source: 'builtin' -> 'austen'",
        "hyper.lr: 0.001 -> 0.5",
        "optimizer.freeze: [] -> ['embed']",
        "patience: 0 -> (absent)",
    ]
    assert runs.difference(old, common.base()) == []


def begin(folder, config, tokenizer):
    """Makes a run that has been trained, as far as its folder shows."""
    assert not runs.create_or_check(folder, config, tokenizer, "text")
    (folder / "checkpoints" / "1").mkdir(parents=True)


KEPT = "steps sample.top_k mesh.data data.workers eval_windows grace_s keep wandb "
KEPT += "hyper.decay_steps"
FIXED = "seed init_from batch_size accumulate hyper.lr data.source data.seq_len"


@pytest.mark.parametrize("key", KEPT.split())
def test_a_run_goes_on_with_another(config, tokenizer, tmp_path, key):
    begin(tmp_path, config, tokenizer)
    value = "other" if key == "wandb" else 7.0 if "hyper" in key else 7
    old = (tmp_path / "config.json").read_text()
    config.update_from_flattened_dict({key: value})
    assert runs.create_or_check(tmp_path, config, tokenizer, "text")
    assert (tmp_path / "config.json").read_text() == old  # until it does go on
    runs.go_on(tmp_path, config, "text")
    assert runs.difference(runs.read_config(tmp_path), config) == []


@pytest.mark.parametrize("key", FIXED.split())
def test_a_run_is_refused_with_another(config, tokenizer, tmp_path, key):
    begin(tmp_path, config, tokenizer)
    before = (tmp_path / "config.json").read_text()
    value = "other" if key in ("init_from", "data.source") else 2
    config.steps = 12345
    config.update_from_flattened_dict({key: value})
    with pytest.raises(ValueError, match=rf"{key}: .* -> {value!r}") as error:
        runs.create_or_check(tmp_path, config, tokenizer, "text")
    assert "another --workdir" in str(error.value)
    assert "12345" not in str(error.value)
    assert (tmp_path / "config.json").read_text() == before


def test_a_run_that_ended_before_its_first_checkpoint_starts_anew_with_another_config(
    config, tokenizer, tmp_path
):
    assert not runs.create_or_check(tmp_path, config, tokenizer, "text")
    config.batch_size = 2
    assert not runs.create_or_check(tmp_path, config, tokenizer, "other text")
    assert runs.read_config(tmp_path).batch_size == 2


def test_a_folder_made_anew_forgets_what_was_said_of_other_data(
    config, tokenizer, tmp_path
):
    classes = runs.Classes(("ham", "spam"), 7)
    runs.create_or_check(tmp_path, config, tokenizer, "text", classes)
    runs.keep_test(tmp_path, [{"instruction": "a"}])
    assert runs.read_classes(tmp_path) == classes
    runs.create_or_check(tmp_path, config, tokenizer, "text")
    assert runs.read_classes(tmp_path) is None
    assert not (tmp_path / "test.json").exists()


def test_a_run_older_than_a_key_goes_on_where_the_key_changes_nothing(
    config, tokenizer, tmp_path
):
    begin(tmp_path, config, tokenizer)
    old = config.to_dict()
    del old["model"]["n_classes"], old["hyper"]["dropout_adapter"], old["spike_window"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    config.hyper.dropout_adapter = 0.1
    with pytest.raises(ValueError, match=r"hyper\.dropout_adapter: 0\.0 -> 0\.1"):
        runs.create_or_check(tmp_path, config, tokenizer, "text")
    config.hyper.dropout_adapter = 0.0
    assert runs.read_config(tmp_path).model.n_classes == 0
    assert runs.create_or_check(tmp_path, config, tokenizer, "text")


def test_every_resumable_pattern_matches_a_key_of_the_config():
    keys = runs.flat(common.base())
    for alternatives in runs.RESUMABLE:
        assert any(re.fullmatch(alternatives, key) for key in keys)


@pytest.mark.fault(12)
def test_another_tokenizer_or_other_data_is_refused(config, tokenizer, tmp_path):
    begin(tmp_path, config, tokenizer)
    other = tokenizers.train("char", iter([TEXT + "!"]))
    with pytest.raises(ValueError, match=r"another tokenizer \(char, 1"):
        runs.create_or_check(tmp_path, config, other, "text")
    with pytest.raises(ValueError, match="fingerprint was text and is texts now"):
        runs.create_or_check(tmp_path, config, tokenizer, "texts")


@pytest.mark.fault(11)
def test_other_data_is_taken_when_it_may_change_and_said(
    config, tokenizer, tmp_path, caplog
):
    begin(tmp_path, config, tokenizer)
    config.data.source = "other.txt"
    config.allow_data_change = True
    assert runs.create_or_check(tmp_path, config, tokenizer, "texts")
    assert "fingerprint was text and is texts now" in caplog.text
    runs.go_on(tmp_path, config, "texts")
    config.allow_data_change = False  # from now on that is its data
    assert runs.create_or_check(tmp_path, config, tokenizer, "texts")
    config.allow_data_change, config.data.seq_len = True, 8
    with pytest.raises(ValueError, match=r"data\.seq_len: 0 -> 8"):
        runs.create_or_check(tmp_path, config, tokenizer, "texts")


@pytest.mark.fault(12)
def test_weights_are_not_read_with_a_tokenizer_that_they_did_not_learn(
    tokenizer, tmp_path
):
    runs.check_tokenizer(tmp_path, tokenizer, {"tokenizer": tokenizer.sha256})
    runs.check_tokenizer(tmp_path, tokenizer, {})
    with pytest.raises(ValueError, match=r"tokenizer\.json is not the tokenizer that"):
        runs.check_tokenizer(tmp_path, tokenizer, {"tokenizer": "0" * 64})


@pytest.mark.fault(12)
def test_a_model_too_small_for_its_tokenizer_is_refused(config, tokenizer, tmp_path):
    config.model.vocab_size = 5
    runs.create(tmp_path, config, tokenizer)
    with pytest.raises(ValueError, match="the model has 5 tokens but the tokenizer"):
        runs.open(tmp_path)


def test_checkpoints_without_a_config_are_not_continued(config, tokenizer, tmp_path):
    save(tmp_path, config, tokenizer, steps=[1])
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="checkpoints but no config"):
        runs.create_or_check(tmp_path, config, tokenizer, "text")


@pytest.mark.fault(2)
def test_a_kill_between_the_first_files_leaves_a_folder_to_start_in(
    config, tokenizer, tmp_path
):
    tokenizer.save(tmp_path / "tokenizer.json")
    (tmp_path / "config.json.tmp").write_text("{")
    begin(tmp_path, config, tokenizer)
    assert runs.create_or_check(tmp_path, config, tokenizer, "text")


def test_samples_of_undone_steps_are_replaced(tmp_path):
    runs.add_samples(tmp_path, 10, ["ten"])
    runs.add_samples(tmp_path, 20, ["## Step 5\n```\nnot a heading"])
    runs.add_samples(tmp_path, 30, ["thirty"])
    runs.add_samples(tmp_path, 25, ["one", "two"])
    text = (tmp_path / "samples.md").read_text()
    assert "thirty" not in text
    order = [
        text.index(x) for x in ("Step 10", "ten", "not a", "Step 25", "one", "two")
    ]
    assert order == sorted(order)


HOLDER = """
import sys
from gpt_jax import runs
with runs.lock(sys.argv[1]):
    print("held", flush=True)
    sys.stdin.read()
"""


def hold(folder):
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout.readline() == "held\n"
    return process


@pytest.mark.fault(13, injections=2)
def test_a_second_process_is_told_the_pid_and_a_killed_one_gives_way(tmp_path, caplog):
    process = hold(tmp_path / "run")
    sentence = f"in use by process {process.pid} on"
    with pytest.raises(ValueError, match=sentence), runs.lock(tmp_path / "run"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    with runs.lock(tmp_path / "run"):
        assert (
            f"took over {tmp_path / 'run' / 'run.lock'} from process {process.pid}"
            in (caplog.text)
        )
    caplog.clear()
    with runs.lock(tmp_path / "run"):
        assert not caplog.records


@pytest.mark.fault(13)
def test_one_process_cannot_lock_twice_but_can_again(tmp_path):
    with runs.lock(tmp_path):
        sentence = f"in use by process {os.getpid()} on"
        for _ in range(2):  # a refusal does not free it
            with pytest.raises(ValueError, match=sentence), runs.lock(tmp_path):
                pass
    with pytest.raises(KeyError), runs.lock(tmp_path):
        raise KeyError
    with runs.lock(tmp_path):
        pass


@pytest.mark.fault(13)
@pytest.mark.parametrize(
    ("changes", "taken"),
    [
        ({}, False),
        ({"started": 1.0}, True),  # the number went to another process since
        ({"pid": 2**22 + 1}, True),  # beyond the largest pid
        ({"host": "elsewhere"}, True),
    ],
)
def test_without_file_locks_the_named_process_decides(
    tmp_path, monkeypatch, changes, taken
):
    monkeypatch.setattr(files, "_try_lock", lambda handle: True)
    pid = os.getppid()
    named = {
        "host": socket.gethostname(),
        "pid": pid,
        "started": psutil.Process(pid).create_time(),
    }
    (tmp_path / "run.lock").write_text(json.dumps({**named, **changes}))
    if taken:
        with runs.lock(tmp_path):
            assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    else:
        sentence = f"in use by process {pid} on"
        with pytest.raises(ValueError, match=sentence), runs.lock(tmp_path):
            pass


@pytest.mark.fault(13)
@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 1}'])
def test_a_half_written_lock_file_is_taken_over(tmp_path, text):
    (tmp_path / "run.lock").write_text(text)
    with runs.lock(tmp_path):
        pass


def test_a_workdir_that_is_a_file_is_refused(config, tokenizer, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="is a file; --workdir must name a folder"):
        runs.create_or_check(tmp_path / "file", config, tokenizer, "text")
    with pytest.raises(ValueError, match="is a file"), runs.lock(tmp_path / "file"):
        pass


def test_a_noted_end_holds_until_the_run_goes_on(tmp_path):
    assert runs.ended(tmp_path) is None
    runs.end(tmp_path, "pruned", 3)
    assert runs.ended(tmp_path) == ("pruned", 3)
    tree = {"params": {"kernel": np.zeros(2, np.float32)}}
    with Checkpoints(tmp_path / "checkpoints", keep=2) as saves:
        saves.save(3, tree, metric=None, meta={})
        saves.wait()
        assert runs.ended(tmp_path) == ("pruned", 3)
        saves.save(4, tree, metric=None, meta={})
    assert runs.ended(tmp_path) is None


def test_a_classifier_opens_with_its_classes(config, tokenizer, tmp_path):
    classes = runs.Classes(("ham", "spam", "eggs"), 12)
    runs.create_or_check(tmp_path, config, tokenizer, "text", classes)
    cfg = runs.model_config(config, tokenizer, classes)
    assert cfg.n_classes == 3
    with Checkpoints(tmp_path / "checkpoints", keep=1) as store:
        store.save(1, {"params": draw(cfg, 1)}, metric=None, meta={})
    run = runs.open(tmp_path)
    assert run.classes == classes
    logits, _ = run.model.apply({"params": run.params}, IDS % tokenizer.vocab_size)
    assert logits.shape == (1, 12, 3)
    (tmp_path / "classes.json").write_text('{"labels": 3}')
    with pytest.raises(ValueError, match="does not hold the classes"):
        runs.open(tmp_path)


def test_a_run_shows_itself_in_five_lines(config, tokenizer, tmp_path):
    save(tmp_path, config, tokenizer, steps=[7])
    lines = repr(runs.open(tmp_path)).splitlines()
    assert len(lines) == 5 and max(map(len, lines)) < 200
    assert lines[0].endswith(f"{tmp_path}, step 7") and "parameters" in lines[1]
    assert f"{tokenizer.vocab_size} tokens" in lines[2] and "params" in lines[4]
