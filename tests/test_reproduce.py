"""The door that measures claims again."""

import subprocess
import sys

import pytest

from experiments import reproduce, targets
from experiments.targets import exact, learning


@pytest.fixture(scope="module")
def fast(tmp_path_factory):
    at = tmp_path_factory.mktemp("reproduce")
    flags = ["--fast", f"--out={at}/runs", f"--page={at}/results.md"]
    command = [sys.executable, "-m", "experiments.reproduce", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    return done, at


def test_the_fast_table_holds_every_exact_fact(fast):
    done, at = fast
    assert done.returncode == 0, done.stderr + done.stdout
    lines = [line for line in done.stdout.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(exact.ROWS)
    verdicts = [line.split("|")[5].strip() for line in lines[2:]]
    assert verdicts.count("met") == 6  # those that need no text
    absent = [v for v in verdicts if v != "met"]
    assert all(v.startswith("not measured: needs ") for v in absent)
    assert f"{verdicts.count('met')} met, 0 missed" in done.stdout
    page = (at / "results.md").read_text()
    assert page.startswith("# Results") and "\n".join(lines) in page


def place(tmp_path, **files):
    for name, text in files.items():
        (tmp_path / name.replace("_", ".")).write_text(text)
    return targets.Place(tmp_path, tmp_path / "out", None)


def test_a_fact_is_met_only_when_it_is_equal(tmp_path):
    row = targets.exactly("three", (3, 4000), lambda place: (3, 4001))
    assert row.claimed == "3 / 4,000"
    assert row.measure(place(tmp_path)) == ("3 / 4,001", False)
    assert targets.exactly("x", 3, lambda place: 3).measure(place(tmp_path)).met


def test_a_missing_file_says_its_name(tmp_path):
    with pytest.raises(targets.Absent, match=r"needs a\.txt in --data"):
        place(tmp_path).file("a.txt")
    assert place(tmp_path, a_txt="").file("a.txt") == tmp_path / "a.txt"


def test_a_failed_command_says_why_and_where(tmp_path):
    code = "print('it begins'); raise SystemExit('error: no such thing')"
    with pytest.raises(targets.Failed, match=r"exit code 1: error: no such thing.*log"):
        targets.run([sys.executable, "-c", code], tmp_path / "log")


def test_a_row_whose_command_fails_is_missed_and_one_without_its_text_is_not():
    def measure(error):
        def found(place):
            raise error

        return targets.Row("x", "1", "exact", found)

    failed = reproduce._measured(measure(targets.Failed("exit code 1")), None)
    assert failed[-1] == "missed" and "exit code 1" in failed
    absent = reproduce._measured(measure(targets.Absent("needs a.txt")), None)
    assert absent[-1] == "not measured: needs a.txt"


def test_evaluations_are_read_from_metrics():
    lines = [
        {"step": 0, "val_loss": 4.0, "seconds": 0.5},
        {"step": 1, "train_loss": 3.9},
        {"step": 2, "val_loss": 3.0, "seconds": 1.5},
    ]
    assert learning._evaluated(lines) == [(0, 4.0, 0.5), (2, 3.0, 1.5)]
