"""Exported programs: the same numbers as the model, without any of its code."""

import ast
import datetime
import inspect
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors import safe_open

from configs import common
from gpt_jax import pretrained, tokenizers
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import runner

pytest.importorskip("flatbuffers", reason="needs the package flatbuffers")

GOLDEN = Path(__file__).parent / "golden" / "gemma3"
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    target = tmp_path_factory.mktemp("exports") / "gemma3"
    cfg = GPTConfig(**{**common.base().model.to_dict(), **pretrained.fields(GOLDEN)})
    params = pretrained.load(GOLDEN, cfg)
    with pretrained.whole(target) as draft:
        tokenizer = tokenizers.train("char", [PRINTABLE])
        pretrained.stablehlo.save(draft, params, cfg, tokenizer)
    return target


def program(folder: Path, name: str):
    blob = bytearray((folder / f"{name}.stablehlo").read_bytes())
    exported = jax.export.deserialize(blob)
    assert set(exported.platforms) >= {"cpu", "cuda", "tpu"}
    return jax.jit(exported.call)


def test_prefill_and_decode_compute_what_transformers_does(folder):
    names = json.loads((folder / "model.json").read_text())["weights"]
    with safe_open(folder / "model.safetensors", framework="numpy") as file:
        weights = [file.get_tensor(name) for name in names]
    prefill, decode = program(folder, "prefill"), program(folder, "decode")
    answers = np.load(GOLDEN / "answers.npz")
    ids = answers["ids"][:1].astype(np.int32)
    wanted = answers["logits"][0]
    padded = np.where(np.arange(20) < 17, ids[:, :20], 0)
    found, cache = prefill(weights, padded, np.array([17], np.int32))
    assert np.abs(found[0] - wanted[16]).max() < 1e-4
    for position in range(17, 40):
        token = ids[:, position : position + 1]
        found, cache = decode(weights, token, cache)
        assert np.abs(found[0] - wanted[position]).max() < 1e-4


def test_the_runner_writes_the_likeliest_text_on_its_own(folder, tmp_path):
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    # -P and the folder: nothing of this repository can be imported.
    command = [sys.executable, "-P", "-s", str(moved / "run.py"), "Hello", "20"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("Hello") and len(done.stdout) >= 5 + 20


def test_the_folder_says_which_jax_wrote_it_and_the_runner_tells_of_it(
    folder, tmp_path
):
    about = json.loads((folder / "model.json").read_text())
    assert about["jax"] == jax.__version__
    assert datetime.date.fromisoformat(about["date"]) <= datetime.date.today()
    moved = Path(shutil.copytree(folder, tmp_path / "elsewhere"))
    (moved / "decode.stablehlo").write_bytes(b"of a release that is to come")
    (moved / "model.json").write_text(json.dumps({**about, "jax": "9.9"}))
    command = [sys.executable, str(moved / "run.py"), "Hello", "20"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert f"exported by jax 9.9 on {about['date']}" in done.stderr


def test_the_runner_needs_only_four_packages_and_fits_a_page():
    source = inspect.getsource(runner)
    roots = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            roots |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            roots.add((node.module or "").split(".")[0])
    assert roots - sys.stdlib_module_names == {
        "jax",
        "numpy",
        "safetensors",
        "tokenizers",
    }
    assert len([line for line in source.splitlines() if line.strip()]) <= 36


def test_a_classifier_is_refused(tmp_path):
    config = common.base().model.to_dict() | {"vocab_size": 9, "n_classes": 2}
    with pytest.raises(ValueError, match="2 classes"):
        pretrained.stablehlo.save(tmp_path, {}, GPTConfig(**config), None)  # type: ignore
    assert not list(tmp_path.iterdir())
