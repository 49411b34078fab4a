"""A user's path through the doors: prepare, train, resume, sample, and mistakes."""

import subprocess
import sys

import pytest

from gpt_jax import metrics
from tests.cases import few

TINY = "--config=configs/quickstart.py:size=tiny"


def door(name, *flags, code=0):
    """Runs a door; returns its output after checking the exit code."""
    done = subprocess.run(
        [sys.executable, "-m", f"experiments.{name}", *flags],
        capture_output=True,
        text=True,
        timeout=110,
    )
    assert done.returncode == code, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout if code == 0 else done.stderr


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A tiny run, prepared and trained through the doors."""
    folder = tmp_path_factory.mktemp("runs")
    data = f"--config.data.folder={folder / 'data'}"
    said = door("prepare", TINY, data)
    assert "training" in said and "tokens" in said
    said = door("train", TINY, data, f"--workdir={folder / 'run'}")
    assert "step 6: val_loss" in said and "done: steps reached after step 6" in said
    assert f"--run={folder / 'run'}" in said
    assert f"--workdir={folder / 'run'} --config.steps=12\n" in said
    assert {"loss.png", "report.html"} <= {
        path.name for path in (folder / "run").iterdir()
    }
    return folder / "run"


@pytest.mark.slow
def test_a_finished_run_goes_on_with_more_steps(run):
    data = f"--config.data.folder={run.parent / 'data'}"
    flags = [TINY, data, f"--workdir={run}", "--config.steps=8"]
    said = door("train", *flags)
    assert "resuming after step 6" in said
    assert metrics.read(run)[-1]["step"] == 8
    kept = (run / "config.json").read_bytes()
    for flags[-1] in ("--config.steps=8", "--config.steps=4"):
        said = door("train", *flags)
        assert f"nothing to do: {run} has 8 steps" in said and "done:" not in said
    assert (run / "config.json").read_bytes() == kept


def test_sampling_continues_the_prompt_and_repeats_itself_with_the_same_seed(run):
    flags = [f"--run={run}", "--prompt=def", "--max_new_tokens=9", "--seed=3"]
    first, again = door("sample", *flags), door("sample", *flags)
    assert first.startswith("def") and len(first) > len("def\n")
    assert first == again


@pytest.mark.parametrize(
    "name, flags, words",
    few(
        [
            ("sample", [], "--run is missing"),
            ("sample", ["--run=configs"], "configs is not a run folder"),
            ("train", [], "--config is missing"),
            (
                "train",
                [TINY, "--config.model.n_heads=5"],
                "not a multiple of n_heads 5",
            ),
            ("train", [TINY, "--config.data.source=no/file.txt"], "no/file.txt"),
            ("train", [TINY, "--config.data.source={}/empty.txt"], "empty"),
            ("train", [TINY, "--config.data.source={}/latin1.txt"], "UTF-8"),
            ("train", [TINY, "--config.data.source={}/short.txt"], "window"),
            ("train", [TINY, "--config.hyper.lrate=1"], "did you mean hyper.lr?"),
            ("train", [TINY, "--config.adapter.name=lora"], "sft.py:adapter=lora"),
            ("train", [TINY, "--config.hyper.beta2=nan"], "beta2 is nan"),
            (
                "train",
                [TINY, "--config.hyper.ema_decay=0.9"],
                "a run without optimizer.ema",
            ),
            ("train", ["--config=configs/sft.py"], "run=none begins at random weights"),
            (
                "train",
                [TINY, "--config.batch_size=3", "--config.mesh.data=2"],
                "3 examples",
            ),
        ],
        ("sample", [], "--run is missing"),
        ("train", [TINY, "--config.data.source={}/latin1.txt"], "UTF-8"),
        ("train", [TINY, "--config.hyper.lrate=1"], "did you mean hyper.lr?"),
        (
            "train",
            [TINY, "--config.batch_size=3", "--config.mesh.data=2"],
            "3 examples",
        ),
    ),
)
def test_a_mistake_is_one_sentence_exit_code_2_and_no_run(tmp_path, name, flags, words):
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "latin1.txt").write_bytes("caf\u00e9 ".encode("latin-1") * 99)
    (tmp_path / "short.txt").write_text("too short")
    flags = [flag.format(tmp_path) for flag in flags]
    if name == "train" and flags:
        flags += [f"--workdir={tmp_path / 'run'}"]
        flags += [f"--config.data.folder={tmp_path / 'data'}"]
    said = door(name, *flags, code=2)
    last = said.strip().splitlines()[-1]
    assert last.startswith("error: ") and words in last
    assert not (tmp_path / "run" / "config.json").exists()


def test_a_damaged_run_is_named_and_left_as_it_is(run, tmp_path):
    (tmp_path / "config.json").write_text("{not json")
    assert "is not a config" in door("sample", f"--run={tmp_path}", code=2)
    assert "99" in door("sample", f"--run={run}", "--step=99", code=2)
