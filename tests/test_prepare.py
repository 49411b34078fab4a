"""Preparing text: exact splits, nothing lost, found again, and bounded memory."""

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from gpt_jax import corpora, data, files, plaintext, prepare, tokenizers
from gpt_jax.screen import progress

TEXT = "".join(f"line {i} of the text\n" for i in range(200))


@pytest.fixture
def run(tmp_path):
    """Returns prepare.prepare with the options of a small text file."""

    def with_options(source, **changes):
        options = {"field": "text", "tokenizer": "char", "folder": tmp_path / "data"}
        options |= {"cache": tmp_path / "cache", "val_fraction": 0.1}
        options |= {"split": "fraction", "workers": 2, "progress": False}
        options |= {"skip_bad_docs": False}
        return prepare.prepare(**{"source": str(source), **options, **changes})

    return with_options


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def rows(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def texts_of(prepared):
    parts = prepared.train, prepared.val
    return [prepared.tokenizer.decode(part[:]) for part in parts]


# --- the split ------------------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_the_two_parts_are_the_text_cut_at_the_fraction(run, text_file, tokenizer):
    prepared = run(text_file, tokenizer=tokenizer, val_fraction=0.3)
    cut = int(len(TEXT) * 0.7)
    assert texts_of(prepared) == [TEXT[:cut], TEXT[cut:]]
    assert prepared.train.index.meta["characters"] == cut


def test_the_fraction_counts_characters_over_all_documents(run, tmp_path):
    texts = ["aé☃" * 5, "b" * 30, "", "𝄞" * 15]
    prepared = run(rows(tmp_path / "a.jsonl", texts), val_fraction=0.5)
    whole = "".join(texts)
    assert texts_of(prepared) == [whole[:30], whole[30:]]
    ends = [part.documents().tolist() for part in (prepared.train, prepared.val)]
    assert ends == [[15, 30], [15, 30]]


def test_every_nth_document_is_kept_for_validation(run, tmp_path):
    texts = [f"<{i:02}>" for i in range(50)]
    path = rows(tmp_path / "a.jsonl", texts)
    train, val = texts_of(run(path, split="documents", val_fraction=0.1))
    assert re.findall("<..>", val) == texts[9::10]
    assert re.findall("<..>", train) == [t for t in texts if t not in texts[9::10]]


def test_eos_stands_between_whole_documents_only(run, tmp_path):
    path = rows(tmp_path / "a.jsonl", ["ab", "cd", "ef"])
    prepared = run(path, tokenizer="byte", val_fraction=0.5)
    eos = prepared.tokenizer.eos_id
    assert prepared.train[:].tolist() == [*b"ab", eos, *b"c"]
    assert prepared.val[:].tolist() == [*b"d", eos, *b"ef"]


def test_tinyshakespeare_splits_into_the_known_numbers_of_characters(run, corpus_file):
    cache = corpus_file("tinyshakespeare.txt").parent
    prepared = run("tinyshakespeare", cache=cache)
    assert (len(prepared.train), len(prepared.val)) == (1_003_854, 111_540)
    assert prepared.tokenizer.vocab_size == 65


def test_the_verdict_has_the_known_number_of_gpt2_tokens(run, corpus_file):
    corpus_file("gpt2_tokenizer/encoder.json")
    cache = corpus_file("the-verdict.txt").parent
    prepared = run("the_verdict", cache=cache, tokenizer="gpt2", val_fraction=0.1)
    assert prepared.train[:4].tolist() == [40, 367, 2885, 1464]
    # The cut falls inside a word, so it may add a token or two.
    assert 5_145 <= len(prepared.train) + len(prepared.val) <= 5_147


# --- the tokenizer --------------------------------------------------------------------


def test_bpe_is_trained_on_the_training_part_alone(run, tmp_path):
    one = rows(tmp_path / "one.jsonl", ["abab" * 90, "xyxy" * 10])
    two = rows(tmp_path / "two.jsonl", ["abab" * 90, "zqzq" * 10])
    first, second = (run(path, tokenizer="bpe:300") for path in (one, two))
    assert first.tokenizer.sha256 == second.tokenizer.sha256
    assert first.fingerprint != second.fingerprint


@pytest.mark.parametrize("tokenizer", ["char", "word"])
def test_characters_and_words_are_collected_from_the_whole_text(
    run, tmp_path, tokenizer
):
    path = rows(tmp_path / "a.jsonl", ["alpha beta " * 9, "omega "])
    prepared = run(path, tokenizer=tokenizer)
    assert texts_of(prepared)[1].strip().endswith("omega")


def test_a_saved_tokenizer_is_used_as_it_is(run, text_file, tmp_path):
    first = run(text_file, tokenizer="bpe:280")
    path = tmp_path / "other" / "tokenizer.json"
    first.tokenizer.save(path)
    second = run(text_file, tokenizer=str(path))
    assert second.tokenizer.sha256 == first.tokenizer.sha256
    np.testing.assert_array_equal(second.train[:], first.train[:])


def test_a_long_text_gives_the_sample_an_even_share_of_itself(monkeypatch):
    monkeypatch.setattr(prepare, "SAMPLE_CHARS", 100)
    texts = [f"{i:02}" * 5 for i in range(40)]  # 400 characters
    taken = list(prepare._sample(texts, share=0.25))
    assert taken == texts[::4]
    assert sum(map(len, prepare._sample(texts, share=1.0))) == 100
    assert list(prepare._sample(texts[:3], share=9.9)) == texts[:3]


# --- pieces and groups ----------------------------------------------------------------


@pytest.mark.parametrize("tokenizer", ["char", "word", "byte", "bpe:300"])
def test_reading_in_pieces_does_not_change_one_id(
    run, tmp_path, monkeypatch, tokenizer
):
    source = Path(prepare.__file__).read_text() + "\n\n  \nx \n y\n" * 3
    (tmp_path / "a.py").write_text(source)
    whole = run(tmp_path / "a.py", tokenizer=tokenizer, folder=tmp_path / "whole")
    monkeypatch.setattr(corpora, "PIECE_CHARS", 200)
    monkeypatch.setattr(plaintext, "READ_BYTES", 64)
    monkeypatch.setattr(prepare, "GROUP_CHARS", 500)
    # The tokenizer itself is the same, so that only the cuts differ.
    made = str(whole.folder / "tokenizer.json")
    pieces = run(tmp_path / "a.py", tokenizer=made, folder=tmp_path / "pieces")
    for part in ("train", "val"):
        np.testing.assert_array_equal(getattr(pieces, part)[:], getattr(whole, part)[:])
    assert pieces.fingerprint == whole.fingerprint


@pytest.mark.fault(17)
@pytest.mark.parametrize("workers", [1, 3, 8])
def test_the_number_of_workers_does_not_change_one_id(
    run, text_file, tmp_path, monkeypatch, workers
):
    monkeypatch.setattr(corpora, "PIECE_CHARS", 100)
    monkeypatch.setattr(plaintext, "READ_BYTES", 50)
    monkeypatch.setattr(prepare, "GROUP_CHARS", 150)
    prepared = run(text_file, tokenizer="byte", workers=workers, val_fraction=0.5)
    np.testing.assert_array_equal(
        np.concatenate([prepared.train[:], prepared.val[:]]), list(TEXT.encode())
    )


def test_a_corpus_of_any_size_needs_the_memory_of_a_few_groups(tmp_path, monkeypatch):
    alive = read = peak = 0

    class Text(str):
        def __new__(cls, text):
            nonlocal alive, read, peak
            alive, read, peak = alive + 1, read + 1, max(peak, alive + 1)
            return super().__new__(cls, text)

        def __del__(self):
            nonlocal alive
            alive -= 1

    def pieces():
        for _ in range(500):
            yield corpora.Piece(Text("x" * 100), "memory", 0, True)

    corpus = corpora.Corpus("memory", "0" * 64, None, pieces)
    monkeypatch.setattr(corpora, "open", lambda *args, **options: corpus)
    monkeypatch.setattr(prepare, "GROUP_CHARS", 1000)
    options = {"field": "", "tokenizer": "byte", "folder": tmp_path, "cache": tmp_path}
    options |= {"val_fraction": 0.1, "split": "documents", "workers": 2}
    options |= {"skip_bad_docs": False}
    prepare.prepare(source="memory", **options, progress=False)
    assert read == 500  # one pass
    assert peak <= 10 * (2 + 3)  # texts in a group x (workers + those on their way)


# --- found again ----------------------------------------------------------------------


def test_a_prepared_text_is_found_again_and_nothing_is_encoded(
    run, text_file, monkeypatch, capsys
):
    first = run(text_file)
    monkeypatch.setattr(prepare, "_encode", lambda *args: pytest.fail("encoded again"))
    second = run(text_file, progress=True)
    assert (second.folder, second.fingerprint) == (first.folder, first.fingerprint)
    assert f"using the prepared text {first.folder}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "changes",
    [
        {"val_fraction": 0.2},
        {"tokenizer": "byte"},
        {"tokenizer": "bpe:300"},
        {"split": "documents", "val_fraction": 0.5},
    ],
)
def test_other_settings_are_prepared_elsewhere(run, tmp_path, changes):
    path = rows(tmp_path / "a.jsonl", ["abc", "bca", "cab", "acb"])
    assert run(path).folder != run(path, **changes).folder


def test_a_changed_text_is_prepared_anew(run, text_file):
    first = run(text_file)
    text_file.write_text(TEXT.replace("line 7 ", "line 8 "))
    second = run(text_file)
    assert second.folder != first.folder and second.fingerprint != first.fingerprint


def test_nothing_is_left_over_beside_the_prepared_folder(run, text_file, tmp_path):
    prepared = run(text_file)
    assert list((tmp_path / "data").iterdir()) == [prepared.folder]
    names = sorted(path.name for path in prepared.folder.iterdir())
    assert names == ["tokenizer.json", "train", "val"]


def test_a_failed_run_leaves_nothing_and_what_a_dead_one_left_is_removed(
    run, text_file, tmp_path, monkeypatch
):
    folder = run(text_file).folder
    shutil.rmtree(folder)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    host = files.host()
    left = folder.with_name(f"{folder.name}.{host}-{ended.pid}.tmp")
    busy = folder.with_name(f"{folder.name}.{host}-{os.getppid()}.tmp")
    left.mkdir()
    busy.mkdir()
    with monkeypatch.context() as patch:
        patch.setattr(tokenizers.Tokenizer, "encode_batch", lambda *args: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(text_file)
    assert list((tmp_path / "data").iterdir()) == [busy]


def test_when_two_processes_prepare_the_same_the_first_result_is_kept(
    run, text_file, monkeypatch
):
    encode = prepare._encode

    def slow(*args):
        monkeypatch.setattr(prepare, "_encode", encode)
        run(text_file)  # the other process ends while this one is at work
        encode(*args)

    monkeypatch.setattr(prepare, "_encode", slow)
    monkeypatch.setattr(files.os, "getpid", iter(range(10**6, 10**6 + 99)).__next__)
    assert "".join(texts_of(run(text_file))) == TEXT


# --- mistakes -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"split": "random"},
            r"data.split 'random' is not one of: fraction, documents",
        ),
        ({"val_fraction": 0.0}, r"data.val_fraction is 0.0"),
        ({"val_fraction": 1.0}, r"data.val_fraction is 1.0"),
        ({"workers": -1}, r"data.workers is -1"),
        ({"split": "documents"}, r"in 1 document leave nothing for val; .*data.split"),
        ({"val_fraction": 1e-18}, r"nothing for val"),
        ({"tokenizer": "bpe:100"}, r"at least 257"),
        ({"tokenizer": "bpe"}, r"cannot be trained"),
        ({"tokenizer": "absent.json"}, r"'absent.json' is neither char, word, byte"),
    ],
)
def test_impossible_settings_are_refused(run, text_file, tmp_path, changes, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(text_file, **changes)
    assert not (tmp_path / "data").exists() or not list((tmp_path / "data").iterdir())


def test_an_unseen_character_is_named_with_its_file(run, text_file, tmp_path):
    made = run(text_file)
    (tmp_path / "new.txt").write_text("line ☃")
    with pytest.raises(
        ValueError, match=r"new.txt, from character 5 on: character '☃' "
    ):
        run(tmp_path / "new.txt", tokenizer=str(made.folder / "tokenizer.json"))


@pytest.mark.fault(23)
def test_bad_text_is_refused_with_its_file_and_offset(run, tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    with pytest.raises(ValueError, match=r"bad.txt is not UTF-8 .* offset 3"):
        run(tmp_path / "bad.txt")
    rows(tmp_path / "empty.jsonl", ["", ""])
    with pytest.raises(ValueError, match=r"there is no text|too short|no text"):
        run(tmp_path / "empty.jsonl")
    with pytest.raises(FileNotFoundError, match=r"no file and no corpus is called"):
        run(tmp_path / "absent.txt")


@pytest.mark.fault(23, injections=6)
def test_documents_that_cannot_be_read_are_left_out_and_counted_if_wanted(
    run, tmp_path, capfd
):
    good = b'{"text": "kept"}\n'
    damaged = [b'{"text"\n', b'{"body": 1}\n', b'{"text": "\xff"}\n']
    damaged += [b'{"text": "\\ud800"}\n']
    (tmp_path / "a.jsonl").write_bytes(good + good.join(damaged) + good)
    (tmp_path / "b.txt").write_bytes(b"good up to here \xc3(")
    (tmp_path / "c.txt.gz").write_bytes(gzip.compress(b"cut" * 999)[:-9])
    (tmp_path / "d.txt").write_text("\ufeffwhole")
    (tmp_path / "e.txt").write_bytes(b"")
    source, options = tmp_path / "[a-e].*", {"split": "documents", "tokenizer": "byte"}
    with pytest.raises(ValueError, match=r"a.jsonl, line 2 is not JSON"):
        run(source, val_fraction=0.2, **options)
    options |= {"skip_bad_docs": True, "progress": True}
    done = run(source, val_fraction=0.2, **options)
    texts = "<|endoftext|>".join(texts_of(done)).split("<|endoftext|>")
    assert sorted(texts) == [*["kept"] * 5, "whole"]
    said = capfd.readouterr().out
    assert "left out 6 that cannot be read" in said and "line 2 is not JSON" in said
    reasons = (done.folder / "left_out.txt").read_text().splitlines()
    assert len(reasons) == 6 and "b.txt is not UTF-8" in reasons[4]


@pytest.mark.fault(34)
def test_a_text_of_which_nothing_is_left_tells_why(run, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "a"}\n' * 9)
    with pytest.raises(ValueError, match=r"no text .*; left out 9 .* no field 'text'"):
        run(tmp_path / "a.jsonl", skip_bad_docs=True)
    assert not list((tmp_path / "data").iterdir())


def test_a_text_shorter_than_a_window_is_the_windows_error(run, tmp_path):
    (tmp_path / "short.txt").write_text("0123456789")
    prepared = run(tmp_path / "short.txt")
    with pytest.raises(ValueError, match=r"has 9 tokens .* seq_len 16 needs 17"):
        data.Windows(prepared.train, seq_len=16, stride=16, tail=False)


@pytest.mark.fault(23)
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("train/shard-00000.bin", r"train.shard-00000.bin was changed"),
        ("val/documents.npy", r"val.documents.npy was changed"),
        ("tokenizer.json", r"tokenizer.json is not what made the ids"),
    ],
)
def test_a_prepared_text_that_was_edited_is_refused(run, text_file, name, message):
    prepared = run(text_file)
    path = prepared.folder / name
    if name == "tokenizer.json":
        tokenizers.train("char", [TEXT[:50]]).save(path)
    else:
        stored = path.read_bytes()
        path.write_bytes(stored[:-2] + bytes([stored[-2] ^ 1, stored[-1]]))
    with pytest.raises(ValueError, match=message):
        run(text_file)


# --- the screen -----------------------------------------------------------------------


def test_progress_without_a_terminal_is_plain_lines(
    run, text_file, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    prepared = run(text_file, tokenizer="bpe:300", progress=True)
    shown = capsys.readouterr()
    assert shown.err == "" and "\x1b" not in shown.out
    first, second, third, *_, last = shown.out.splitlines()
    assert re.fullmatch(r"counting ([\d.]+ kB)/\1  [\d.]+ [kMG]?B/s", first)
    assert second == "training the tokenizer bpe:300"
    assert re.match(r"tokenizing [\d.]+ k?B/[\d.]+ kB  ", third)
    assert last.startswith(f"prepared {prepared.folder} in ")
    assert f"{len(prepared.train):,} training and" in last


def test_without_progress_nothing_is_printed(run, text_file, capsys):
    run(text_file)
    run(text_file)
    assert capsys.readouterr() == ("", "")


def test_the_door_prints_what_was_prepared(text_file, tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.prepare"),
            f"--config.data.source={text_file}",
            f"--config.data.folder={tmp_path / 'data'}",
            "--config.data.tokenizer=char",
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    cut = int(len(TEXT) * 0.9)
    assert f"training    {cut:,} characters, {cut:,} tokens (1.00" in done.stdout
    assert "begins      'l' 'i' 'n' 'e' ' '" in done.stdout


def test_the_door_ends_with_code_2_and_a_sentence_for_a_missing_file(tmp_path):
    done = subprocess.run(
        [
            *(sys.executable, "-m", "experiments.prepare"),
            f"--config.data.source={tmp_path / 'absent.txt'}",
        ],
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: no file and no corpus is called .*\n", done.stderr)
