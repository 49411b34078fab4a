"""The door of evaluation: every kind of it, in one process, as commands would."""

import json
import subprocess
import sys
import threading
from http.server import ThreadingHTTPServer

import pytest

from configs import common
from gpt_jax import prepare
from tests import runs_to_evaluate, test_judge

# One process for all commands: most of a command's time is Python's and XLA's start.
DOOR = """
import json, os, sys
from absl import flags
from absl.testing import flagsaver
from experiments import evaluate
from gpt_jax import screen
screen.take_over(product=True)
os.environ["KEY_OF_THE_JUDGE"] = "sk-secret"
for words in json.loads(sys.stdin.read()):
    with flagsaver.flagsaver():
        flags.FLAGS(["evaluate", *words])
        try:
            evaluate.main([])
        except (ValueError, OSError) as error:
            print("error:", error)
    print("=====")
"""
DATA = {k: v for k, v in common.base().data.items() if k not in ("seq_len", "stride")}
TEXT = "It is a truth universally acknowledged, that a single man in possession. " * 3


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """What each command printed, by name, and the folder of their files."""
    at = tmp_path_factory.mktemp("evaluate")
    for name, seed in (("base", 1), ("tuned", 2)):
        runs_to_evaluate.make(at / name, seed=seed)
    (at / "book.txt").write_text(TEXT)
    val = {"source": f"{at}/book.txt", "folder": f"{at}/data", "val_fraction": 0.5}
    runs_to_evaluate.make(at / "begun", init_from="a", tokenizer="char", **val)
    ready = prepare.prepare(
        **{**DATA, **val, "tokenizer": f"{at}/base/tokenizer.json"}, progress=False
    )
    told = json.dumps({"fingerprint": ready.fingerprint})
    (at / "begun/data.json").write_text(told)
    runs_to_evaluate.make(at / "changed", tokenizer="char", **val)
    (at / "changed/data.json").write_text(told)
    (at / "part.txt").write_text(TEXT[len(TEXT) // 2 :])
    rows = [{"instruction": f"Say {word}.", "output": word} for word in ("cat", "dog")]
    (at / "rows.json").write_text(json.dumps([*rows, {"instruction": "no answer"}]))
    question = {"context": "The sky is", "choices": [" blue", " red"], "answer": 0}
    (at / "choices.jsonl").write_text(json.dumps(question))
    server = ThreadingHTTPServer(("127.0.0.1", 0), test_judge.Handler)
    server.replies, server.seen = ["80", "good", "40", "60"], []
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    both = [f"--run={at}/base", f"--run={at}/tuned"]
    address = f"http://127.0.0.1:{server.server_address[1]}/v1"
    answered = [*both, f"--rows={at}/rows.json", "--max_new_tokens=4"]
    judged = [f"--judge={address}", "--judge_key_env=KEY_OF_THE_JUDGE"]
    commands = {
        "text": [*both, f"--text={at}/book.txt", "--stride=16", f"--out={at}/text"],
        "val": [f"--run={at}/begun", "--text=val"],
        "part": [f"--run={at}/begun", f"--text={at}/part.txt"],
        "changed": [f"--run={at}/changed", "--text=val"],
        "converted": [both[0], "--text=val"],
        "rows": [*answered, "--skip_bad_rows", *judged, f"--out={at}/rows"],
        "again": [*answered, "--skip_bad_rows", f"--out={at}/rows"],
        "bad row": [*answered, f"--out={at}/bad"],
        "choices": [both[0], f"--choices={at}/choices.jsonl"],
        "copied": [
            *(both[0], f"--copied_from={at}/book.txt", "--count=2", "--least=1"),
            *("--max_new_tokens=8", f"--out={at}/copied"),
        ],
        "none": both[:1],
        "not read": [both[0], f"--text={at}/book.txt", "--limit=3"],
        "no judge": [both[0], f"--rows={at}/rows.json", "--judge_tries=3"],
        "out": [both[0], f"--text={at}/book.txt", f"--out={at}/book.txt"],
        "file": [f"--run={at}/book.txt", "--text=a"],
        "two": [*both, "--text=a", "--rows=b"],
        "no run": ["--text=a"],
        "no key": [*answered, *judged[:1], "--judge_key_env=NOT_SET_ANYWHERE"],
    }
    done = subprocess.run(
        [sys.executable, "-c", DOOR],
        input=json.dumps(list(commands.values())),
        capture_output=True,
        text=True,
        timeout=110,
    )
    server.shutdown()
    server.server_close()
    assert done.returncode == 0, done.stderr
    assert "sk-secret" not in done.stdout + done.stderr
    printed = dict(zip(commands, done.stdout.split("=====\n")))
    return printed, at, server.seen


def cells(printed: str) -> list[list[str]]:
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]


def test_runs_stand_side_by_side_on_a_text(outputs):
    printed, at, _ = outputs
    heads, _, *lines = cells(printed["text"])
    assert heads[:4] == ["run", "loss", "perplexity", "bits per byte"]
    assert [line[0] for line in lines] == ["base", "tuned"]
    kept = json.loads((at / "text/scores.json").read_text())
    assert kept["base"]["tokens"] == kept["base"]["bytes"] == len(TEXT)
    assert lines[0][1] == f"{kept['base']['loss']:.4f}" and lines[0][5] == "49"
    assert (at / "text/scores.md").read_text() in printed["text"]


def test_val_is_the_validation_text_in_the_tokens_that_the_run_learnt(outputs):
    printed, *_ = outputs
    val, part = (cells(printed[name])[2] for name in ("val", "part"))
    assert val == part and int(val[4]) == len(TEXT[len(TEXT) // 2 :])


def test_answers_are_kept_scored_judged_and_compared(outputs):
    printed, at, seen = outputs
    heads, _, *lines = cells(printed["rows"])
    names = ["run", "rows", "exact", "f1", "rouge_l", "chrf", "judge"]
    assert heads[: len(names)] == names
    assert [line[0] for line in lines] == ["base", "tuned", "tuned - base"]
    assert [line[6].split()[0] for line in lines] == ["80.0", "50.0", "-40.0"]
    assert lines[0][-1] == "1 no reference, 1 without a number"
    assert seen[0][1]["Authorization"] == "Bearer sk-secret"
    kept = json.loads((at / "rows/tuned.json").read_text())
    assert [row["reference"] for row in kept["rows"]] == ["cat", "dog"]
    assert kept["skipped"] == {"no reference": 1}
    assert "sk-secret" not in "".join(
        file.read_text() for file in (at / "rows").rglob("*.json")
    )


def test_the_same_command_takes_the_answers_that_are_there(outputs):
    printed, _, _ = outputs
    rows, again = cells(printed["rows"]), cells(printed["again"])
    assert [line[:6] for line in again] == [line[:6] for line in rows]


def test_choices_and_copies_have_their_tables(outputs):
    printed, at, _ = outputs
    heads, _, line = cells(printed["choices"])
    assert heads[1:3] == ["questions", "right"] and line[-1] == "50.0"
    heads, _, line = cells(printed["copied"])
    assert heads[-1] == "in copies of 1+" and int(line[1]) <= 16
    kept = json.loads((at / "copied/scores.json").read_text())["base"]
    assert kept["longest_text"] in TEXT and kept["longest"] == int(line[2])


@pytest.mark.parametrize(
    "name, words",
    [
        ("bad row", "row 3: it has no answer to compare with"),
        ("none", "give one of --text, --rows, --choices, --copied_from, --lm_eval"),
        ("two", "give one of --text"),
        ("changed", "is no longer the text that"),
        ("converted", "was not trained on running text"),
        ("no run", "--run is missing"),
        (
            "not read",
            "--limit goes with --rows or --choices or --lm_eval, not with --te",
        ),
        ("no judge", "--judge_tries goes with --judge, not with --rows"),
        ("out", "book.txt is a file; name another"),
        ("file", "is not a run folder: it is a file"),
        ("no key", "$NOT_SET_ANYWHERE is not set"),
    ],
)
def test_mistakes_are_told_in_a_sentence(outputs, name, words):
    assert outputs[0][name].startswith("error: ") and words in outputs[0][name]
