"""Files and names from strangers: refused, kept inside, and never run as code.

Whatever is a trap here would create CANARY when its code ran. Headers of safetensors,
shards of weights and templates have their facts in test_pretrained.py and test_chat.py,
the cache of compiled programs in test_programs.py, requests in test_serve_faults.py.
"""

import io
import json
import pickle
import shutil
import zipfile
from pathlib import Path

import numpy as np
import pytest

from configs import common
from gpt_jax import corpora, data, downloads, instructions, pretrained, runs, tokenizers
from gpt_jax.checkpoint import Checkpoints, Damaged
from gpt_jax.labelled import files
from gpt_jax.model import GPTConfig
from gpt_jax.sweep import space
from tests.golden import make_run

CANARY = "canary"
GOLDEN = sorted(make_run.HERE.glob("run-*"))[-1]


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path(CANARY),))


@pytest.fixture(autouse=True)
def no_canary(tmp_path, monkeypatch):
    """Runs every test in a folder of its own, in which no code may leave its mark."""
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    yield
    assert not list(tmp_path.rglob(f"*{CANARY}*"))


def test_the_trap_works():
    pickle.loads(pickle.dumps(Trap()))
    Path(CANARY).unlink()


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["t.pt", "t.pkl", "tokenizer.json"])
def test_a_pickled_tokenizer_is_no_tokenizer(name):
    Path(name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError, match=r"is not a tokenizer.json"):
        tokenizers.load(name)


READERS = {
    "a text": lambda path: list(
        corpora.open(path, field="text", cache=".", progress=False).pieces()
    ),
    "instructions": lambda path: instructions.read(path, cache=".", progress=False),
    "a table": lambda path: files.read(
        path, files.Columns("text", "label", "", ()), "."
    ),
}


@pytest.mark.fault(30)
@pytest.mark.parametrize("suffix", [".pt", ".pkl", ".json", ".jsonl", ".csv"])
@pytest.mark.parametrize("what", READERS)
def test_a_pickle_is_no_file_of_rows(what, suffix):
    path = f"rows{suffix}"
    Path(path).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError):
        READERS[what](path)


def read_weights(folder):
    fields = {**common.base().model.to_dict(), **pretrained.fields(folder)}
    return pretrained.load(folder, GPTConfig(**fields))


def write_tokens(folder):
    about = {"vocab_size": 9, "eos_id": None, "meta": {}, "shard_tokens": 9}
    data.write([np.arange(9)], folder, **about)


FOLDERS = {
    "a run": (lambda to: shutil.copytree(GOLDEN, to), runs.open),
    "tokens": (write_tokens, lambda folder: data.open(folder).documents()),
    "weights": (
        lambda to: shutil.copytree(make_run.HERE / "gpt2", to),
        read_weights,
    ),
}
READ = [
    *(("a run", "config.json"), ("a run", "tokenizer.json")),
    *(("tokens", "index.json"), ("tokens", "documents.npy")),
    *(("weights", "config.json"), ("weights", "model.safetensors")),
]


@pytest.mark.fault(30)
@pytest.mark.parametrize(("what", "name"), READ)
def test_a_pickle_is_no_file_of_a_folder(what, name):
    make, read = FOLDERS[what]
    folder = Path("folder")
    make(folder)
    read(folder)  # as it is there is nothing wrong with it
    (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(ValueError) as refused:
        read(folder)
    # numpy names no file
    assert name in str(refused.value) or "allow_pickle" in str(refused.value)


@pytest.mark.fault(30)
def test_ends_of_documents_that_are_pickled_are_refused():
    index = data.write(
        [np.arange(9)], "tokens", vocab_size=9, eos_id=None, meta={}, shard_tokens=9
    )
    assert index.documents == 1
    np.save("tokens/documents.npy", np.array([Trap()], object), allow_pickle=True)
    with pytest.raises(ValueError):
        data.open("tokens").documents()


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "name",
    ["../../etc", "/etc", "%2e%2e/%2e%2e/etc", "gpt2\0", "a/../b", "..", "../gpt2"],
)
def test_a_model_name_leads_nowhere_else(name):
    with pytest.raises(
        ValueError, match=r"it is no Hugging Face id|not a Hugging Face folder"
    ):
        pretrained.find(name)


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["../../x.txt", "a/b.txt", "%2e%2e.txt", "..", "-x"])
def test_a_prepared_folder_has_a_name_without_paths(name):
    short = corpora._short(name)
    assert Path(short).name == short and not short.startswith((".", "-"))


@pytest.mark.fault(30)
@pytest.mark.parametrize("value", ["../../etc", "/etc/passwd", "a\0b", "..", "%2e%2e"])
def test_a_trial_has_a_name_without_paths(value):
    (name,) = space.names([{"data.source": value, "seed": 1}])
    assert Path(name).name == name and "\0" not in name and name != ".."


def sealed(change):
    """Returns a copy of a run whose manifest, by its own hash, is right."""
    from gpt_jax import checkpoint

    copy = Path(shutil.copytree(GOLDEN, "run"))
    found = copy / "checkpoints" / str(make_run.STEPS)
    body = checkpoint.sealing.read(found)
    change(body)
    told = {**body, "sha256": checkpoint.sealing._body_hash(body)}
    (found / checkpoint.MANIFEST).write_text(json.dumps(told))
    return Checkpoints(copy / "checkpoints", keep=None)


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["params/../../../secret", "/etc/hostname"])
def test_a_manifest_cannot_name_files_elsewhere(name):
    Path("run-secret").touch()
    store = sealed(lambda body: body["files"].update({name: "0" * 64}))
    with pytest.raises(Damaged, match="which is not beside it"):
        store.restore(None, step=make_run.STEPS)


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["../../elsewhere", "/etc", "..", "\0" * 64])
def test_frozen_weights_are_named_by_their_digest_only(name):
    store = Checkpoints("run/checkpoints", keep=None)
    with pytest.raises(ValueError, match="is not the digest"):
        store.load_frozen(name)


@pytest.mark.fault(30)
def test_an_archive_writes_nothing_by_the_names_in_it():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as archive:
        for name in (f"../{CANARY}", f"/tmp/{CANARY}", f"..\\{CANARY}", CANARY):
            archive.writestr(name, "slipped")
        archive.writestr("wanted", "text")
    assert downloads._member("wanted")([packed.getvalue()]) == b"text"
    with pytest.raises(ValueError, match="is not in the archive"):
        downloads._member("absent")([packed.getvalue()])


@pytest.mark.fault(30)
def test_an_archive_that_would_fill_the_memory_is_refused():
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("wanted", b"0" * (downloads.UNPACKED_BYTES + 1))
    with pytest.raises(ValueError, match="would unpack to"):
        downloads._member("wanted")([packed.getvalue()])
