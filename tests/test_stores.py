"""Run folders, texts and shards in stores: fsspec's own in memory, and of files."""

import gzip
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import fsspec
import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import (
    checkpoint,
    corpora,
    data,
    files,
    fork,
    metrics,
    prepare,
    runs,
    stores,
    train,
)
from tests import tiny

STORE = "memory://bucket/runs/a"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Returns a function that makes this process one of another machine, or back."""
    fsspec.filesystem("memory").store.clear()

    def become(name: str) -> None:
        monkeypatch.setattr(stores, "ROOT", str(tmp_path / name))
        monkeypatch.setattr(stores, "_copies", {})
        monkeypatch.setattr(files, "host", lambda: name)

    become("one")
    return become


def there(address: str = STORE) -> dict[str, bytes]:
    """Returns what a store holds, by names below the address."""
    store, root = fsspec.core.url_to_fs(address)
    return {name[len(root) + 1 :]: store.cat_file(name) for name in store.find(root)}


def sealed(run: Path, step: int) -> None:
    """Makes a checkpoint of two files."""
    folder = run / "checkpoints" / str(step)
    files.write(folder / "params" / "d" / "array", f"{step}" * 10)
    files.write(folder / "manifest.json", f'{{"step": {step}}}')


def test_what_is_written_on_one_machine_is_read_on_another(machine):
    run = stores.fetched(STORE)
    assert not run.exists()
    files.write(run / "config.json", "{}")
    sealed(run, 5)
    stores.put_back()
    machine("two")
    other = stores.fetched(STORE)
    assert other != run
    array = other / "checkpoints/5/params/d/array"
    assert not array.exists()  # until somebody reads it
    stores.complete(other / "checkpoints/5", ["state/none"])
    assert not array.exists()
    stores.complete(other / "checkpoints/5", ["params/d/array"])
    before = there()
    with stores.claim(other):
        pass
    assert there() == before
    assert {p.relative_to(other) for p in other.rglob("*")} == {
        p.relative_to(run) for p in run.rglob("*")
    }
    assert array.read_text() == "5555555555"


def test_arrays_that_stay_in_the_store_go_with_their_checkpoint(machine):
    run = stores.fetched(STORE)
    sealed(run, 5)
    sealed(run, 6)
    stores.put_back()
    machine("two")
    other = stores.fetched(STORE)
    with stores.claim(other):
        (other / "checkpoints/5/manifest.json").unlink()  # as Checkpoints prunes
    assert there().keys() == {
        "checkpoints/6/manifest.json",
        "checkpoints/6/params/d/array",
    }


def test_only_what_is_whole_goes_there(machine):
    run = stores.fetched(STORE)
    sealed(run, 5)
    (run / "checkpoints/5/manifest.json").unlink()
    files.write(run / "checkpoints/6.orbax-checkpoint-tmp/params/a", "half")
    files.write(run / "checkpoints/damaged-4/params/a", "aside")
    files.write(run / "config.json.77.tmp", "half")
    files.write(run / "run.lock", "{}")
    files.write(run / "metrics.jsonl", "{}")
    stores.put_back()
    assert there().keys() == {"metrics.jsonl", "checkpoints/damaged-4/params/a"}


@pytest.mark.fault(40)
@pytest.mark.parametrize("cut", range(9))
def test_a_kill_at_any_moment_leaves_whole_checkpoints(machine, monkeypatch, cut):
    run = stores.fetched(STORE)
    sealed(run, 5)
    with stores.claim(run):
        pass
    done = []

    def last_moments(method):
        def one(self, *args, **kwargs):
            done.append(args)
            if len(done) > cut:
                raise KeyboardInterrupt
            return method(self, *args, **kwargs)

        return one

    sealed(run, 6)
    sealed(run, 7)
    (run / "checkpoints/5/manifest.json").unlink()
    (run / "checkpoints/5/params/d/array").unlink()
    memory = type(fsspec.filesystem("memory"))
    monkeypatch.setattr(stores, "AT_ONCE", 1)
    with monkeypatch.context() as dying:
        for name in ("put_file", "rm_file"):
            dying.setattr(memory, name, last_moments(getattr(memory, name)))
        try:
            stores._copies[STORE].push(owner=True)
        except KeyboardInterrupt:
            assert len(done) == cut + 1
    machine("two")
    other = stores.fetched(STORE)
    steps = [5, 6, 7]
    whole = [n for n in steps if (other / f"checkpoints/{n}/manifest.json").exists()]
    assert whole
    stores.complete(other / "checkpoints")
    for step in whole:
        array = other / f"checkpoints/{step}/params/d/array"
        assert array.read_text() == f"{step}" * 10


@pytest.mark.fault(40)
def test_a_machine_that_was_killed_as_it_copied_goes_on_with_what_it_has(machine):
    run = stores.fetched(STORE)
    with pytest.raises(OSError, match="full"), stores.claim(run):
        sealed(run, 5)
        stores._copies[STORE].push(owner=True)
        sealed(run, 6)
        files.write(run / "metrics.jsonl", "6\n")
        stores._copies[STORE]._put("metrics.jsonl")  # and the index knows nothing of it
        note = there()["claim.json"]
        raise OSError("full")
    store, root = fsspec.core.url_to_fs(STORE)
    for name in ("checkpoints/6/manifest.json", "checkpoints/6/params/d/array"):
        store.rm_file(f"{root}/{name}")
    store.pipe_file(f"{root}/claim.json", note)
    machine("one")
    again = stores.fetched(STORE)
    assert (again / "checkpoints/6/manifest.json").is_file()


@pytest.mark.fault(40)
def test_a_folder_that_is_ahead_of_its_store_stays(machine):
    run = stores.fetched(STORE)
    sealed(run, 5)
    stores.put_back()
    sealed(run, 6)  # and then this machine was killed
    machine("one")
    again = stores.fetched(STORE)
    assert (again / "checkpoints/6/manifest.json").is_file()
    stores.put_back()
    assert "checkpoints/6/manifest.json" in there()


@pytest.mark.fault(40)
def test_a_store_that_went_on_elsewhere_is_followed(machine):
    run = stores.fetched(STORE)
    sealed(run, 5)
    files.write(run / "metrics.jsonl", "1\n")
    stores.put_back()
    sealed(run, 6)  # never copied: this machine was killed
    files.write(run / "metrics.jsonl", "1\n2\n")
    machine("two")
    other = stores.fetched(STORE)
    with stores.claim(other):
        files.write(other / "metrics.jsonl", "1\nother 2\n")
        sealed(other, 7)
        (other / "checkpoints/5/manifest.json").unlink()
    machine("one")
    run = stores.fetched(STORE)
    assert (run / "metrics.jsonl").read_text() == "1\nother 2\n"
    found = {path.parent.name for path in run.glob("checkpoints/*/manifest.json")}
    assert found == {"7"}


def test_a_reader_does_not_remove_what_the_owner_has_written_since(machine):
    run = stores.fetched(STORE)
    sealed(run, 5)
    stores.put_back()
    machine("two")
    reader = stores.fetched(STORE)
    (reader / "checkpoints/5/manifest.json").unlink()
    files.write(reader / "report.html", "seen")
    stores.put_back()
    assert {"report.html", "checkpoints/5/manifest.json"} <= there().keys()


@pytest.mark.fault(40)
def test_a_claim_keeps_the_store_in_step_and_others_out(machine, monkeypatch):
    monkeypatch.setattr(stores, "EVERY_S", 0.01)
    run = stores.fetched(STORE)
    with stores.claim(run):
        sealed(run, 5)
        until = time.monotonic() + 20
        while "checkpoints/5/manifest.json" not in there():
            assert time.monotonic() < until
        mine = stores._copies
        machine("two")
        stores.fetched(STORE)
        with (
            pytest.raises(ValueError, match=r"in use by process \d+ on one, which"),
            stores.claim(stores.fetched(STORE)),
        ):
            raise AssertionError("two hold one run")
        machine("one")
        stores._copies.update(mine)
    assert "claim.json" not in there()


@pytest.mark.fault(40)
@pytest.mark.parametrize("host, ago", [("one", 1.0), ("two", 1000.0)])
def test_the_claim_of_a_process_that_is_gone_is_taken_over(machine, host, ago):
    by = {"host": host, "pid": 2**22 + 5, "started": 1.5}
    gone = {"by": by, "time": time.time() - ago}
    store, root = fsspec.core.url_to_fs(STORE)
    store.pipe_file(f"{root}/claim.json", json.dumps(gone).encode())
    run = stores.fetched(STORE)
    with stores.claim(run):
        assert json.loads(there()["claim.json"])["by"]["pid"] == os.getpid()


@pytest.mark.fault(40)
@pytest.mark.parametrize("still_there", [True, False])
def test_who_lost_its_claim_writes_nothing_more(machine, still_there):
    run = stores.fetched(STORE)
    by = {"host": "two", "pid": 7, "started": 1.5}
    now = "pid 7 on two" if still_there else "nobody"
    with pytest.raises(ValueError, match=f"is now by {now}"), stores.claim(run):
        store, root = fsspec.core.url_to_fs(STORE)
        if still_there:
            note = json.dumps({"by": by, "time": time.time()})
            store.pipe_file(f"{root}/claim.json", note.encode())
        else:  # the other has ended meanwhile
            store.rm_file(f"{root}/claim.json")
        sealed(run, 5)
    assert there().keys() <= {"claim.json"}


def test_a_file_is_fetched_and_put_back_as_one(machine):
    store, root = fsspec.core.url_to_fs("memory://bucket/rows.jsonl")
    store.pipe_file(root, b"{}\n")
    found = stores.fetched("memory://bucket/rows.jsonl")
    assert found.name == "rows.jsonl"
    assert found.read_bytes() == b"{}\n"
    found.write_bytes(b"[]\n")
    stores.put_back()
    assert store.cat_file(root) == b"[]\n"


def test_files_of_a_disk_are_written_beside_their_place(machine, tmp_path):
    address = f"file://{tmp_path}/shared/a"
    run = stores.fetched(address)
    with stores.claim(run):
        sealed(run, 5)
    assert there(address).keys() == {
        "checkpoints/5/manifest.json",
        "checkpoints/5/params/d/array",
    }


def test_what_cannot_be_an_address_says_so(machine):
    with pytest.raises(ValueError, match="nothing is known of nowhere://"):
        stores.fetched("nowhere://bucket/a")
    with pytest.raises(ValueError, match="has to be on a disk of this machine"):
        files.expand("gs://bucket/a")


def test_shown_names_the_address(machine, tmp_path):
    run = stores.fetched(STORE)
    assert stores.shown(run) == STORE
    assert stores.shown(run / "report.html") == f"{STORE}/report.html"
    assert stores.shown(tmp_path) == str(tmp_path)


def test_a_pattern_means_the_addresses_that_are_there(machine):
    store, _ = fsspec.core.url_to_fs(STORE)
    for name in ("a", "b", "c/d"):
        store.pipe_file(f"/bucket/many/{name}", b"")
    assert stores.matching("memory://bucket/many/?") == [
        f"memory:///bucket/many/{name}" for name in "abc"
    ]
    for one in (STORE, "runs/*", "memory://bucket/nothing/*"):
        assert stores.matching(one) == [one]


def test_what_needs_a_folder_that_all_machines_see_is_refused(machine, tmp_path):
    """By a door, which puts a local folder in the place of an address."""
    out = f"file://{tmp_path}/out"
    flags = ("--sweep=experiments/sweeps/lr.py", f"--out={out}", "--shard=1/2")
    done = subprocess.run(
        [sys.executable, "-m", "experiments.sweep", *flags],
        cwd=Path(__file__).parents[1], env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert f"error: --shard and --out={out}: several machines need" in done.stderr
    assert not (tmp_path / "out").exists()


def test_several_processes_of_a_run_are_refused(machine, monkeypatch):
    run = stores.fetched(STORE)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(ValueError, match=f"{STORE} is worked on"), runs.lock(run):
        raise AssertionError("a store was shared")
    assert not there()


# --- runs -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """Returns the config of a run of eight steps."""
    folder = tmp_path_factory.mktemp("stores")
    config = tiny.on_text(folder)
    config.update(steps=8, eval_every=4, checkpoint_every=2, sample_every=0)
    return config


@pytest.fixture(scope="module")
def alone(config, tmp_path_factory):
    """Returns the folder of that run on a disk, never interrupted."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    train.train(config, folder)
    return folder


def state_of(folder: Path) -> str:
    tree, _, _ = checkpoint.Checkpoints(folder / "checkpoints", keep=None).restore(None)
    return checkpoint.digest(tree)


def rows_of(folder: Path) -> list[dict]:
    """Returns what a run logged, without what depends on the clock."""
    clock = ("seconds", "tokens_per_second", "mfu", "data_wait", "memory_gb")
    return [
        {key: value for key, value in row.items() if key not in clock}
        for row in metrics.read(folder)
    ]


@pytest.mark.fault(40)
def test_a_run_stopped_here_goes_on_there_and_ends_with_the_same_bits(
    machine, config, alone
):
    result = train.train(config, STORE, report=lambda step, numbers: "moved")
    assert (result.reason, result.step) == ("moved", 4)
    machine("two")
    result = train.train(config, STORE)
    assert (result.reason, result.step) == ("steps", 8)
    machine("three")
    run = stores.fetched(STORE)
    assert state_of(run) == state_of(alone)
    assert rows_of(run) == rows_of(alone)
    assert (runs.open(STORE).step, str(runs.open(STORE).folder)) == (8, str(run))


def test_a_new_run_begins_with_one_of_a_store(machine, config, alone, tmp_path):
    train.train(config, STORE)
    branch = config.copy_and_resolve_references()
    branch.update(fork=f"{STORE}:step=8", steps=10)
    assert fork.parse(branch.fork).step == 8
    train.train(branch, tmp_path / "branch")
    branch.fork = f"{alone}:step=8"
    train.train(branch, tmp_path / "of_alone")
    assert state_of(tmp_path / "branch") == state_of(tmp_path / "of_alone")
    tuned = config.copy_and_resolve_references()
    tuned.update(init_from=STORE, steps=1)
    assert train.train(tuned, tmp_path / "tuned").step == 1
    assert common.from_run(config.copy_and_resolve_references(), STORE).init_from == (
        STORE
    )


# --- texts and shards -----------------------------------------------------------------

HOW = {"field": "text", "tokenizer": "char", "val_fraction": 0.2, "split": "fraction"}
HOW |= {"workers": 1, "skip_bad_docs": False, "progress": False}


@pytest.fixture
def books(machine, tmp_path):
    """Returns a folder of texts, and the address of the same ones."""
    store, root = fsspec.core.url_to_fs("memory://bucket/books")
    for name, text in {
        "a.txt": tiny.SENTENCES,
        "b/c.txt": tiny.SENTENCES[::-1],
        ".d.txt": "no",
    }.items():
        files.write(tmp_path / "books" / name, text)
        store.pipe_file(f"{root}/{name}", text.encode())
    packed = gzip.compress(tiny.SENTENCES.upper().encode(), mtime=0)
    files.write(tmp_path / "books" / "e.txt.gz", packed)
    store.pipe_file(f"{root}/e.txt.gz", packed)
    return tmp_path / "books", "memory://bucket/books"


@pytest.mark.parametrize("pattern", ["", "/*.txt", "/**", "/a.txt"])
def test_a_text_of_a_store_is_the_text_of_a_disk(books, tmp_path, pattern):
    texts = [
        list(corpora.open(f"{top}{pattern}", field="text", cache=tmp_path).documents())
        for top in books
    ]
    assert texts[0] == texts[1]
    assert len(texts[0]) == {"": 3, "/*.txt": 1, "/**": 3, "/a.txt": 1}[pattern]


def test_shards_of_a_store_are_those_of_a_disk(books, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "SHARD_TOKENS", 10_000)
    here = prepare.prepare(
        source=str(books[0]), folder=tmp_path / "data", cache=tmp_path, **HOW
    )
    address = "memory://bucket/data"
    far = prepare.prepare(source=books[1], folder=address, cache=tmp_path, **HOW)
    assert len(far.train.index.shards) > 2
    assert far.train.index.fingerprint == here.train.index.fingerprint
    assert far.fingerprint == here.fingerprint
    for part in (slice(0, 50), slice(9_990, 10_020), slice(19_000, None)):
        np.testing.assert_array_equal(far.train[part], here.train[part])
    np.testing.assert_array_equal(far.val.documents(), here.val.documents())
    window = {"seq_len": 16, "stride": 7, "tail": True}
    ours, theirs = (data.Windows(p.train, **window) for p in (here, far))
    order = np.random.default_rng(0).permutation(len(ours))[:40]
    for key, rows in ours.take(order).items():
        np.testing.assert_array_equal(theirs.take(order)[key], rows)
    before = there(address)
    again = prepare.prepare(source=books[1], folder=address, cache=tmp_path, **HOW)
    assert again.fingerprint == far.fingerprint
    assert there(address) == before


@pytest.mark.fault(40)
@pytest.mark.parametrize("cut", range(7))
def test_a_preparation_that_was_cut_is_made_again(books, tmp_path, monkeypatch, cut):
    address = "memory://bucket/data"
    how = {**HOW, "source": books[1], "folder": address, "cache": tmp_path}
    memory, done = type(fsspec.filesystem("memory")), []
    put = memory.put_file

    def last_moments(self, *args, **kwargs):
        done.append(args)
        if len(done) > cut:
            raise KeyboardInterrupt
        return put(self, *args, **kwargs)

    with monkeypatch.context() as dying, pytest.raises(KeyboardInterrupt):
        dying.setattr(memory, "put_file", last_moments)
        prepare.prepare(**how)
    again = prepare.prepare(**how)
    whole = prepare.prepare(**{**how, "folder": tmp_path / "data"})
    assert again.fingerprint == whole.fingerprint


@pytest.mark.fault(40)
def test_a_cut_shard_of_a_store_is_refused_when_it_is_opened(books, tmp_path):
    address = "memory://bucket/data"
    how = {**HOW, "source": books[1], "folder": address, "cache": tmp_path}
    prepare.prepare(**how)
    store, _ = fsspec.core.url_to_fs(address)
    shard = next(
        n for n in store.find("/bucket/data") if n.endswith("train/shard-00000.bin")
    )
    store.pipe_file(shard, store.cat_file(shard)[:-2])
    with pytest.raises(ValueError, match="it is damaged"):
        prepare.prepare(**how)
