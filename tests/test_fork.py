"""Forks: what they take of their trunk, what they may change, what is refused."""

import re
import shutil

import pytest

from experiments.sweeps import decay_branches
from gpt_jax import checkpoint, fork, metrics, population, runs, train
from tests import tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Returns a config, and the folder where its trunk is trained for six steps."""
    folder = tmp_path_factory.mktemp("fork")
    config = tiny.on_text(folder)
    config.optimizer.update(schedule="wsd", ema=True)
    config.hyper.update(dropout_residual=0.1, decay_fraction=0.0)
    config.update(steps=6, eval_every=4, checkpoint_every=3, spike_window=3)
    train.train(config, folder / "trunk")
    return config, folder


@pytest.fixture
def branch(made):
    """Returns the trunk's config as a fork of step 6 that decays to step 8."""
    config, folder = made
    config = config.copy_and_resolve_references()
    config.fork = f"{folder / 'trunk'}:step=6"
    config.hyper.decay_fraction = 0.25
    config.steps = 8
    return config


def state_of(folder):
    """Returns the digest of all that a step changes, as last saved."""
    tree, _, _ = checkpoint.Checkpoints(folder / "checkpoints", keep=None).restore(None)
    return checkpoint.digest(tree)


def test_a_decay_branch_is_bit_for_bit_the_run_of_its_length(made, branch, tmp_path):
    before = state_of(made[1] / "trunk")
    result = train.train(branch, tmp_path / "branch")
    assert (result.reason, result.step) == ("steps", 8)
    alone = branch.copy_and_resolve_references()
    alone.fork = ""
    train.train(alone, tmp_path / "alone")
    assert state_of(tmp_path / "branch") == state_of(tmp_path / "alone")
    assert state_of(made[1] / "trunk") == before  # which nobody has touched
    rows = metrics.read(tmp_path / "branch")
    assert min(row["step"] for row in rows) > 6  # the trunk's stay with the trunk
    assert rows[-1]["tokens"] == 8 * 4 * 16
    (last,) = [row for row in metrics.read(tmp_path / "alone") if row["step"] == 8][-1:]
    assert rows[-1]["val_loss"] == last["val_loss"]


def test_a_fork_goes_on_when_its_trunk_is_gone(made, branch, tmp_path):
    shutil.copytree(made[1] / "trunk", tmp_path / "trunk")
    branch.fork = f"{tmp_path / 'trunk'}:step=6"
    branch.hyper.decay_steps = 9.0
    train.train(branch, tmp_path / "branch")
    shutil.rmtree(tmp_path / "trunk")
    branch.steps = 9
    result = train.train(branch, tmp_path / "branch")
    assert (result.step, result.trained) == (9, True)
    with pytest.raises(ValueError, match="does not exist"):
        train.train(branch, tmp_path / "another")


@pytest.mark.slow
def test_forks_under_several_numbers_train_as_one_population(made, branch, tmp_path):
    other = branch.copy_and_resolve_references()
    other.hyper.lr *= 2
    folders = [tmp_path / "a", tmp_path / "b"]
    train.train(other, tmp_path / "alone")
    quiet = {"members": 0, "report": lambda *told: None}
    results = population.train([branch, other], folders, rungs=[], **quiet)
    assert [result.step for result in results] == [8, 8]
    alone = metrics.read(tmp_path / "alone")[-1]["val_loss"]
    assert results[1].numbers["val_loss"] == pytest.approx(alone, rel=1e-5)
    assert results[0].numbers["val_loss"] != results[1].numbers["val_loss"]
    with pytest.raises(ValueError, match="the members begin as a fork"):
        folders = [tmp_path / "c", tmp_path / "d"]
        early = [population.Rung(step=4, keep=1)]
        population.train([branch, other], folders, rungs=early, **quiet)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("runs/a", "as in fork=runs/a:step=600"),
        ("runs/a:step=best", "the step of one of its checkpoints"),
        ("runs/a:600", "the step of one of its checkpoints"),
        (":step=3", "it names a run folder"),
        ("hf:gpt2", "init_from=hf:gpt2"),
    ],
)
def test_a_fork_that_is_none_is_refused_by_its_text(text, sentence):
    with pytest.raises(ValueError, match=sentence):
        fork.parse(text)


def test_a_fork_is_a_folder_and_a_step():
    assert fork.parse("") is None
    found = fork.parse("runs/a:step=600")
    assert found and (str(found.trunk), found.step) == ("runs/a", 600)


def test_what_cannot_be_forked_is_refused_before_there_is_a_run(made, branch, tmp_path):
    def refused(sentence, **changes):
        config = branch.copy_and_resolve_references()
        config.update(changes)
        with pytest.raises(ValueError, match=sentence):
            train.train(config, tmp_path / "run")
        assert not (tmp_path / "run" / "config.json").exists()

    trunk = made[1] / "trunk"
    refused(r"no checkpoint of step 5 to fork: it has 4, 6", fork=f"{trunk}:step=5")
    refused("is not a run folder", fork=f"{tmp_path}:step=5")
    refused("but it forks after step 6", steps=6)
    refused(r"seed: 1337 -> 7(.|\n)*init_from=", seed=7)
    refused("batch_size: 4 -> 8", batch_size=8)
    refused("optimizer.name: 'adamw' -> 'lion'", optimizer={"name": "lion"})
    with pytest.raises(ValueError, match="this run's own folder"):
        fork.check_there(fork.Fork(trunk, 6), trunk)
    with pytest.raises(ValueError, match=r"--config\.fork=.*:step=6"):
        runs.read_config(f"{trunk}:step=6")


def test_the_trunk_of_the_branches_keeps_the_steps_that_they_fork():
    told = dict(re.findall(r"--config\.(\w+)=(\d+)", decay_branches.__doc__ or ""))
    every, keep = int(told["checkpoint_every"]), int(told["keep"])
    assert told["eval_every"] == told["checkpoint_every"]  # whose best are saved too
    kept = range(every, int(told["steps"]) + 1, every)[-keep:]
    points = decay_branches.points()
    assert [fork.parse(point["fork"]).step for point in points] == [*kept]
