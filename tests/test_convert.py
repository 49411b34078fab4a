"""The door experiments.convert, from a Hugging Face folder to one and back."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from gpt_jax import generation, metrics, pretrained, runs, sample, sampling, tokenizers

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests/golden"
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"
DRAWN = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "penalty_alpha": 0.6}
TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"


def convert(*arguments: str, door: str = "convert") -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", f"experiments.{door}", *arguments]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A Hugging Face folder: the golden Llama, a tokenizer and a chat template."""
    folder = tmp_path_factory.mktemp("hf") / "llama"
    shutil.copytree(GOLDEN / "llama", folder)
    words = tokenizers.train("char", [PRINTABLE]).add_special(["</s>"])
    words.save(folder / "tokenizer.json")
    settings = {"eos_token": "</s>", "chat_template": TEMPLATE}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    (folder / "generation_config.json").write_text(json.dumps(DRAWN))
    return folder


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("runs") / "llama"
    done = convert(f"--from_hf={published}", f"--run={run}")
    assert done.returncode == 0, done.stderr
    assert f"--run={run}" in done.stdout
    assert "generation_config.json says penalty_alpha 0.6" in done.stdout
    return run


def test_an_import_is_a_run_that_computes_what_transformers_does(imported):
    run = runs.open(imported)
    answers = np.load(GOLDEN / "llama/answers.npz")
    (done,) = sample.texts(
        model=run.model,
        params=run.params,
        tokenizer=run.tokenizer,
        prompts=[answers["prompt_1"].tolist()],
        count=1,
        seed=0,
        stop=[],
        **sampling.settings(32, temperature=0.0),
    )
    wanted = answers["greedy_1"].tolist()
    eos = run.tokenizer.eos_id
    assert eos == len(PRINTABLE)
    assert done.ids == wanted[: wanted.index(eos)] if eos in wanted else wanted


@pytest.mark.slow
def test_the_door_of_sampling_works_on_an_import(imported):
    done = convert(
        f"--run={imported}", "--prompt=Hello", "--max_new_tokens=5", door="sample"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello")


def test_an_export_brings_weights_tokenizer_and_chat_template(
    imported, published, tmp_path
):
    target = tmp_path / "out"
    done = convert(f"--run={imported}", f"--to_hf={target}")
    assert done.returncode == 0, done.stderr
    before = load_file(published / "model.safetensors")
    after = load_file(target / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(before[k].tobytes() == after[k].tobytes() for k in before)
    settings = json.loads((target / "tokenizer_config.json").read_text())
    assert settings["chat_template"] == TEMPLATE
    config = json.loads((target / "config.json").read_text())
    assert config["eos_token_id"] == len(PRINTABLE)
    drawn = json.loads((target / "generation_config.json").read_text())
    assert drawn == {**DRAWN, "eos_token_id": len(PRINTABLE)}
    assert generation.of(target) == generation.of(imported)
    made = pretrained.tokenizer(target)
    assert made.json == runs.open(imported).tokenizer.json


def test_an_export_has_a_model_card_with_the_facts_of_the_run(tmp_path):
    run = GOLDEN / "run-0.1.0"
    shutil.copytree(run, tmp_path / "story")
    done = convert(f"--run={tmp_path / 'story'}", f"--to_hf={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    card = (tmp_path / "out/README.md").read_text()
    head, _, body = card.removeprefix("---\n").partition("\n---\n")
    assert "library_name: transformers" in head.splitlines()
    opened = runs.open(run)
    count = sum(x.size for x in load_file(tmp_path / "out/model.safetensors").values())
    assert body.startswith("# out\n") and f"{count:,} parameters" in body
    rows = [row for row in metrics.read(run) if row.get("val_loss")]
    best = min(rows, key=lambda row: row["val_loss"])
    assert f"loss {best['val_loss']:.4f} nats at step {best['step']}" in body
    assert f"`{opened.config.data.source}`" in body and "licence" in body


def test_an_export_to_stablehlo_runs(imported, tmp_path):
    pytest.importorskip("flatbuffers", reason="needs the package flatbuffers")
    done = convert(f"--run={imported}", f"--to_stablehlo={tmp_path}/programs")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "programs/run.py").is_file()


def test_nothing_is_overwritten_and_mistakes_are_one_sentence(
    imported, published, tmp_path
):
    for arguments, named in (
        ((f"--from_hf={published}", f"--run={imported}"), "exists already"),
        ((f"--run={imported}", f"--to_hf={published}"), "exists already"),
        ((f"--run={imported}",), "--from_hf"),
        ((f"--run={imported}", f"--to_gguf={imported}"), "exists already"),
        ((f"--run={imported}", f"--to_gguf={tmp_path}/a"), "char"),
        ((f"--from_hf={published}",), "--run is missing"),
        ((f"--from_hf={tmp_path}", f"--run={tmp_path}/a"), "no config.json"),
    ):
        done = convert(*arguments)
        assert done.returncode == 2, done.stderr
        assert named in done.stderr and "Traceback" not in done.stderr
        assert done.stderr.count("\n") == 1
    assert not (tmp_path / "a").exists()


def test_an_id_without_a_network_is_refused_with_one_sentence(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    done = convert("--from_hf=nobody/nothing", f"--run={tmp_path}/a")
    assert done.returncode == 2, done.stderr
    assert "nobody/nothing" in done.stderr and "without a network" in done.stderr
