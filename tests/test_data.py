"""Token shards, windows and batches: what is stored is read, in a seekable order."""

import functools
import gc
import itertools
import json
import os
import shutil
import subprocess
import sys
import threading
import weakref
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt_jax import data


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes documents and returns the folder."""

    def to_folder(documents, name="tokens", **changes):
        options = {"vocab_size": 100, "eos_id": None, "meta": {}, "shard_tokens": 1000}
        data.write(map(np.array, documents), tmp_path / name, **options | changes)
        return tmp_path / name

    return to_folder


# --- shards ---------------------------------------------------------------------------


@pytest.mark.parametrize("shard_tokens", [1, 2, 3, 7, 8, 1000])
def test_what_is_written_is_read_across_shards(write, shard_tokens):
    text = list(range(17))
    tokens = data.open(write([text[:5], text[5:]], shard_tokens=shard_tokens))
    assert len(tokens) == 17
    assert len(tokens.index.shards) == -(-17 // shard_tokens)
    for start, stop in itertools.product(range(19), range(-2, 19)):
        np.testing.assert_array_equal(tokens[start:stop], text[start:stop])


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_536, "<u2"), (65_537, "<u4")])
def test_a_shard_is_flat_and_as_narrow_as_the_vocabulary_allows(
    write, vocab_size, dtype
):
    ids = [0, 1, vocab_size - 1]
    folder = write([ids], vocab_size=vocab_size)
    stored = np.frombuffer((folder / "shard-00000.bin").read_bytes(), dtype)
    np.testing.assert_array_equal(stored, ids)
    np.testing.assert_array_equal(data.open(folder)[:], ids)


def test_eos_stands_between_documents_and_their_ends_are_kept(write):
    tokens = data.open(write([[1, 2], [], [3], [4, 5]], eos_id=99))
    np.testing.assert_array_equal(tokens[:], [1, 2, 99, 3, 99, 4, 5])
    np.testing.assert_array_equal(tokens.documents(), [2, 4, 7])
    assert (tokens.index.documents, tokens.index.tokens) == (3, 7)


def test_without_eos_documents_follow_each_other(write):
    np.testing.assert_array_equal(data.open(write([[1, 2], [3]]))[:], [1, 2, 3])


def test_pieces_of_a_document_are_one_document(tmp_path):
    pieces = [
        data.Piece(np.array([1, 2]), ends=False),
        data.Piece(np.array([], int), ends=False),
        data.Piece(np.array([3]), ends=True),
        data.Piece(np.array([], int), ends=True),
        data.Piece(np.array([4]), ends=False),
        data.Piece(np.array([], int), ends=True),
        data.Piece(np.array([5]), ends=False),
    ]
    options = {"vocab_size": 9, "eos_id": 0, "meta": {}, "shard_tokens": 2}
    data.write(pieces, tmp_path / "t", **options)
    tokens = data.open(tmp_path / "t")
    np.testing.assert_array_equal(tokens[:], [1, 2, 3, 0, 4, 0, 5])
    np.testing.assert_array_equal(tokens.documents(), [3, 5, 7])


def test_the_fingerprint_is_that_of_the_contents(write):
    one = data.open(write([[1, 2]], "a", meta={"x": 1})).index
    same = data.open(write([[1, 2]], "b", meta={"x": 2})).index
    other = data.open(write([[1, 3]], "c")).index
    cut = data.open(write([[1], [2]], "d")).index
    assert one.fingerprint == same.fingerprint
    assert len({one.fingerprint, other.fingerprint, cut.fingerprint}) == 3


def test_a_failed_write_leaves_nothing_behind(write, tmp_path):
    def documents():
        yield np.array([1, 2])
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write(documents())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([[1], [2, 100]], "document 1 holds the id 100, .* vocabulary of 100 tokens"),
        ([[-1]], "document 0 holds the id -1"),
        ([], "no text to write"),
        ([[], []], "no text to write"),
    ],
)
def test_what_cannot_be_written_is_refused(write, tmp_path, documents, message):
    with pytest.raises(ValueError, match=message):
        write([np.array(ids, int) for ids in documents])
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_written_over(write):
    write([[1]])
    with pytest.raises(ValueError, match="exists already"):
        write([[2]])


def damage_index(folder, **changes):
    path = folder / "index.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


DAMAGE = {
    "one byte short": (
        lambda f: (f / "shard-00001.bin").write_bytes(b"abc"),
        r"shard-00001.bin has 3 bytes where .*index.json says 4",
    ),
    "a missing shard": (
        lambda f: (f / "shard-00001.bin").unlink(),
        r"shard-00001.bin is missing",
    ),
    "a missing index": (
        lambda f: (f / "index.json").unlink(),
        r"holds no tokens: .*index.json is missing",
    ),
    "missing boundaries": (
        lambda f: (f / "documents.npy").unlink(),
        r"documents.npy is missing",
    ),
    "a cut index": (
        lambda f: (f / "index.json").write_text('{"format": 1, "tok'),
        r"index.json is damaged",
    ),
    "an index of something else": (
        lambda f: (f / "index.json").write_text("[]"),
        r"index.json is damaged",
    ),
    "a later format": (lambda f: damage_index(f, format=2), "has format 2"),
    "another dtype": (lambda f: damage_index(f, dtype="int8"), "dtype int8"),
    "a wrong sum": (lambda f: damage_index(f, tokens=9), "do not add up"),
}


@pytest.mark.fault(23)
@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named_when_tokens_are_opened(write, kind):
    folder = write([[1, 2, 3, 4]], shard_tokens=2)
    break_it, message = DAMAGE[kind]
    break_it(folder)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        data.open(folder)


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("name", "at", "message"),
    [
        ("shard-00001.bin", 2, r"shard-00001.bin was changed after it was written"),
        (
            "shard-00001.bin",
            3,
            r"shard-00001.bin is damaged: at byte 2 it holds the id",
        ),
        ("documents.npy", -1, r"documents.npy was changed"),
    ],
)
def test_verify_finds_a_changed_byte_of_the_same_size(write, name, at, message):
    folder = write([[1, 2, 3, 4]], shard_tokens=2)
    data.open(folder).verify()
    changed = bytearray((folder / name).read_bytes())
    changed[at] ^= 0x08
    (folder / name).write_bytes(changed)
    with pytest.raises(ValueError, match=message):
        data.open(folder).verify()


@pytest.mark.fault(30)
@pytest.mark.parametrize("name", ["../other/shard-00000.bin", "{}/shard-00000.bin"])
def test_a_shard_outside_its_folder_is_refused(write, name):
    folder = write([[1, 2, 3, 4]], shard_tokens=4)
    other = Path(shutil.copytree(folder, folder.parent / "other"))
    shard = json.loads((folder / "index.json").read_text())["shards"][0]
    damage_index(folder, shards=[{**shard, "name": name.format(other)}])
    with pytest.raises(ValueError, match="which is not beside it"):
        data.open(folder)


@pytest.mark.fault(23)
def test_a_shard_that_is_cut_while_it_is_read_is_named(write):
    """Its memory map would end the process with SIGBUS."""
    folder = write([list(range(100))] * 500, shard_tokens=25_000)
    windows = data.Windows(data.open(folder), seq_len=8, stride=8, tail=False)
    os.truncate(folder / "shard-00001.bin", 8192)
    assert windows[0]["tokens"].tolist() == list(range(8))
    with pytest.raises(ValueError, match=r"shard-00001.bin was cut to 8,192 of 50,"):
        windows[len(windows) - 1]


@pytest.mark.fault(23)
def test_a_shard_that_is_removed_while_it_is_read_is_missed_at_the_next_start(write):
    folder = write([list(range(100))] * 9, shard_tokens=300)
    windows = data.Windows(data.open(folder), seq_len=8, stride=8, tail=False)
    before = windows.take(range(len(windows)))
    (folder / "shard-00001.bin").unlink()
    after = windows.take(range(len(windows)))
    np.testing.assert_array_equal(before["tokens"], after["tokens"])
    with pytest.raises(FileNotFoundError, match=r"shard-00001.bin is missing"):
        data.open(folder)


# --- windows --------------------------------------------------------------------------


def test_a_window_predicts_every_next_token():
    windows = data.Windows(np.arange(10), seq_len=4, stride=2, tail=False)
    assert len(windows) == 3
    for i in range(3):
        window = windows[i]
        np.testing.assert_array_equal(window["tokens"], np.arange(4) + 2 * i)
        np.testing.assert_array_equal(window["targets"], np.arange(4) + 2 * i + 1)
        np.testing.assert_array_equal(window["mask"], np.ones(4))
    assert {key: x.dtype.name for key, x in windows[0].items()} == {
        "tokens": "int32",
        "targets": "int32",
        "mask": "float32",
    }


@given(st.integers(2, 60), st.integers(1, 9), st.integers(1, 9), st.booleans())
@settings(max_examples=150, deadline=None)
def test_windows_hold_what_plain_slicing_gives(length, seq_len, stride, tail):
    text = np.arange(100, 100 + length)
    wanted = []
    for start in range(0, length, stride):
        part = text[start : start + seq_len + 1]
        done = wanted and tail and start - stride + seq_len + 1 >= length
        if len(part) == seq_len + 1 or (tail and len(part) > 1 and not done):
            wanted.append(part)
    if not wanted:
        with pytest.raises(ValueError, match=r"lower data\.seq_len"):
            data.Windows(text, seq_len=seq_len, stride=stride, tail=tail)
        return
    windows = data.Windows(text, seq_len=seq_len, stride=stride, tail=tail)
    assert len(windows) == len(wanted)
    for i, part in enumerate(wanted):
        real = windows[i]["mask"] == 1
        assert real.sum() == len(part) - 1 and windows[i]["mask"].sum() == real.sum()
        np.testing.assert_array_equal(
            windows[i]["tokens"][: len(part)][:seq_len], part[:seq_len]
        )
        np.testing.assert_array_equal(windows[i]["targets"][real], part[1:])
        assert not windows[i]["targets"][~real].any()


@pytest.mark.parametrize("length", [2, 4, 5, 6, 8, 9, 10, 33])
def test_with_a_tail_every_target_is_predicted_exactly_once(length):
    text = np.arange(length)
    windows = data.Windows(text, seq_len=4, stride=4, tail=True)
    seen = Counter()
    for batch in data.once(windows, batch_size=3):
        seen.update(batch["targets"][batch["mask"] == 1].tolist())
    assert seen == Counter(range(1, length))


def test_too_little_text_for_a_window_is_told_with_the_numbers():
    with pytest.raises(ValueError, match=r"has 8 tokens .* seq_len 8 needs 9"):
        data.Windows(np.arange(8), seq_len=8, stride=8, tail=False)
    # Shorter windows would not help here.
    with pytest.raises(ValueError, match=r"validate with has 1 token, .*val_fraction"):
        data.Windows(np.arange(1), seq_len=8, stride=8, tail=True)
    with pytest.raises(ValueError, match="stride is 0"):
        data.Windows(np.arange(8), seq_len=2, stride=0, tail=False)
    with pytest.raises(IndexError):
        data.Windows(np.arange(9), seq_len=8, stride=8, tail=False)[1]


# --- batches --------------------------------------------------------------------------


class Numbers:
    """Example i holds i, twice."""

    def __init__(self, count):
        self.count = count

    def __len__(self):
        return self.count

    def __getitem__(self, index):
        return {"x": np.array([index, index]), "mask": np.ones(1, np.float32)}


def make(examples=None, count=10, **changes):
    examples = Numbers(count) if examples is None else examples
    options: dict[str, Any] = {"batch_size": 4, "accumulate": 1, "seed": 7, "start": 0}
    options |= {"timeout_s": 60.0, **changes}
    options.setdefault("rows", range(options["batch_size"] // options["accumulate"]))
    return data.batches(examples, **options)


def taken(count, **changes):
    """Returns the example numbers of the first `count` batches, one row a batch."""
    batches = make(**changes)
    rows = [next(batches)["x"][..., 0].ravel().tolist() for _ in range(count)]
    batches.close()
    return rows


def flat(rows):
    return list(itertools.chain.from_iterable(rows))


def test_an_epoch_is_a_permutation_and_the_next_one_is_another():
    order = flat(taken(25))
    epochs = [order[i : i + 10] for i in range(0, 100, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 10


@pytest.mark.slow
def test_every_example_comes_first_about_equally_often():
    count = Counter(data._order(5, seed)([0])[0] for seed in range(1000))
    assert set(count) == set(range(5))
    assert max(abs(n - 200) for n in count.values()) < 80  # over 6 sigma


@pytest.mark.fault(10, injections=5)
def test_start_begins_where_an_uninterrupted_run_would_be():
    run = taken(20)
    for start in (1, 2, 3, 7, 15):
        assert taken(20 - start, start=start) == run[start:]
    far = taken(2, start=10**9)
    assert far == taken(2, start=10**9) and far != run[:2]


def test_the_seed_decides_the_order():
    assert taken(3) == taken(3)
    assert taken(3) != taken(3, seed=8)
    # Neighbouring seeds share no epoch.
    assert flat(taken(5, seed=8, batch_size=2)) != flat(taken(10, batch_size=2))[10:]


def test_the_order_is_the_one_that_earlier_versions_gave():
    # A resumed run relies on it; a new version of grain might draw it differently.
    assert taken(5, seed=0, batch_size=2) == [[5, 8], [9, 7], [4, 2], [1, 0], [3, 6]]


@pytest.mark.fault(10)
@pytest.mark.parametrize("prefetch", [1, 16])
def test_the_prefetch_does_not_change_the_batches(monkeypatch, prefetch):
    run = taken(20)
    monkeypatch.setattr(data, "PREFETCH", prefetch)
    assert taken(20) == run


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_together_see_what_one_host_sees(hosts):
    changes = {"batch_size": 8, "accumulate": 2}
    whole = make(**changes)
    each = 4 // hosts
    parts = [
        make(**changes, rows=range(i * each, (i + 1) * each)) for i in range(hosts)
    ]
    for _ in range(6):
        expected = next(whole)["x"]
        batches = [next(part)["x"] for part in parts]
        assert {x.shape for x in batches} == {(2, each, 2)}
        np.testing.assert_array_equal(np.concatenate(batches, axis=1), expected)


def test_micro_batches_split_the_same_examples():
    one, four = make(batch_size=8), make(batch_size=8, accumulate=4)
    for _ in range(4):
        x, y = next(one)["x"], next(four)["x"]
        assert (x.shape, y.shape) == ((1, 8, 2), (4, 2, 2))
        np.testing.assert_array_equal(x.reshape(y.shape), y)


def test_windows_in_batches_are_the_windows_themselves(write):
    folder = write([np.arange(100)], shard_tokens=13)
    windows = data.Windows(data.open(folder), seq_len=8, stride=3, tail=False)
    batch = next(make(windows, batch_size=6, accumulate=3))
    assert {key: x.shape for key, x in batch.items()} == {
        "tokens": (3, 2, 8),
        "targets": (3, 2, 8),
        "mask": (3, 2, 8),
    }
    for row in batch["tokens"].reshape(6, 8):
        np.testing.assert_array_equal(row, windows[row[0] // 3]["tokens"])


def test_once_gives_every_example_in_order_and_fills_up_with_weight_zero():
    batches = list(data.once(Numbers(7), batch_size=3))
    assert [batch["x"].shape for batch in batches] == [(1, 3, 2)] * 3
    x = np.concatenate([batch["x"][0, :, 0] for batch in batches])
    mask = np.concatenate([batch["mask"][0, :, 0] for batch in batches])
    assert x.tolist() == [0, 1, 2, 3, 4, 5, 6, 0, 0]
    assert mask.tolist() == [1] * 7 + [0] * 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 6, "accumulate": 4}, "6 is not a multiple of accumulate 4"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"start": -1}, "start -1 must not be negative"),
        ({"rows": [3, 4]}, r"rows \[3, 4\] must be below 4"),
        ({"count": 0}, "there are 0 examples"),
        ({"count": 2**32 + 1}, "a larger data.stride"),
    ],
)
def test_impossible_batches_are_refused_at_once(changes, message):
    with pytest.raises(ValueError, match=message):
        make(**changes)


# --- the thread -----------------------------------------------------------------------


@pytest.mark.fault(24)
def test_an_error_while_loading_reaches_the_consumer_with_the_shard(write):
    folder = write([np.arange(100)], shard_tokens=50)
    windows = data.Windows(data.open(folder), seq_len=8, stride=8, tail=False)
    path = folder / "shard-00001.bin"
    with path.open("r+b") as file:  # the file changes under its memory map
        file.seek(20)
        file.write(b"\xff\xff" * 40)
    batches = make(windows, batch_size=1)
    with pytest.raises(ValueError, match=r"shard-00001.bin is damaged: at byte 20 "):
        for _ in range(40):
            next(batches)
    assert list(batches) == []


@pytest.mark.fault(24)
def test_batches_before_a_failing_one_still_arrive():
    class Failing(Numbers):
        def __getitem__(self, index):
            if index == 3:
                raise OSError("bad sector")
            return super().__getitem__(index)

    whole = flat(taken(10, batch_size=1))
    batches = make(Failing(10), batch_size=1)
    for expected in whole[: whole.index(3)]:
        assert next(batches)["x"].ravel()[0] == expected
    with pytest.raises(OSError, match="bad sector") as caught:
        next(batches)
    assert caught.value.__notes__ == [f"while batch {whole.index(3)} was made"]


@pytest.mark.fault(24)
def test_a_source_that_hangs_is_named_after_a_while():
    release = threading.Event()

    class Hanging(Numbers):
        def __getitem__(self, index):
            release.wait()
            return super().__getitem__(index)

        def where(self, index):
            return "shard-of-the-hanging-disk"

    with pytest.raises(
        TimeoutError, match=r"batch 5 .* shard-of-the-hanging-disk hangs"
    ):
        next(make(Hanging(10), start=5, timeout_s=0.05))
    release.set()


def threads():
    return [t for t in threading.enumerate() if t.name == "gpt_jax-batches"]


@pytest.mark.parametrize("used", [0, 1, 30])
@pytest.mark.parametrize("end", ["close", "forget"])
def test_the_thread_ends_with_its_iterator(end, used):
    before = threads()
    batches = make()
    for _ in range(used):
        next(batches)
    (thread,) = set(threads()) - set(before)
    gone = weakref.ref(batches)
    if end == "close":
        batches.close()
        assert list(batches) == []
    else:
        del batches
        gc.collect()
        assert gone() is None
    thread.join(timeout=10)
    assert not thread.is_alive()


@pytest.mark.fault(24)
def test_a_process_ends_while_batches_are_being_made():
    code = (
        "import numpy as np, threading\n"
        "from gpt_jax import data\n"
        "class Slow(data.Windows):\n"
        "    def take(self, indices):\n"
        "        if slow: threading.Event().wait()\n"
        "        return super().take(indices)\n"
        "slow = False\n"
        "windows = Slow(np.arange(99), seq_len=4, stride=1, tail=False)\n"
        "options = dict(accumulate=1, seed=0, rows=range(4), timeout_s=60.0)\n"
        "a = data.batches(windows, batch_size=4, start=0, **options)\n"
        "next(a)\n"
        "slow = True\n"
        "b = data.batches(windows, batch_size=4, start=9, **options)\n"
        "print('end')\n"
    )
    run = functools.partial(subprocess.run, capture_output=True, text=True, timeout=60)
    done = run([sys.executable, "-c", code])
    assert (done.returncode, done.stdout, done.stderr) == (0, "end\n", "")


def test_a_digest_is_of_the_examples_that_a_pass_goes_through():
    examples = data.Windows(np.arange(99), seq_len=3, stride=3, tail=True)
    others = data.Windows(np.arange(1, 100), seq_len=3, stride=3, tail=True)
    few = data.digest(examples, at_most=5)
    assert few == data.digest(examples, at_most=5) != data.digest(examples)
    assert few != data.digest(others, at_most=5)
    assert data.digest(examples) == data.digest(examples, at_most=10**6)


def test_a_limited_pass_takes_evenly_spaced_examples():
    windows = data.Windows(
        np.arange(101, dtype=np.uint16), seq_len=10, stride=10, tail=True
    )
    found = list(data.once(windows, batch_size=2, at_most=4))
    starts = [int(row[0]) for batch in found for row in batch["tokens"][0]]
    assert starts == [0, 30, 60, 90]
    whole = list(data.once(windows, batch_size=3, at_most=99))
    assert sum(float(b["mask"].sum()) for b in whole) == 100
