"""Doors: exit codes and sentences, before any JAX."""

import subprocess
import sys

import pytest

from experiments import door

DOOR = """
'''Help that teaches.

  python -m example --config=FILE
'''
import sys
from absl import flags
from experiments import door
CONFIG = door.define_config()
NUMBER = flags.DEFINE_integer("number", 1, "A number.")
def main(_):
    if NUMBER.value == 5:
        open("no/such/file")
    if NUMBER.value == 6:
        raise KeyError("a bug of ours")
    print("config", door.config_file(), door.config_name(), "jax" in sys.modules)
    return NUMBER.value
door.run(main, __doc__)
"""


def call(*args):
    done = subprocess.run(
        [sys.executable, "-c", DOOR, *args], capture_output=True, text=True, timeout=60
    )
    return done.returncode, done.stdout, done.stderr


def test_help_shows_the_docstring_and_the_flags_and_exits_0():
    code, out, err = call("--help")
    assert code == 0 and not err
    assert "Help that teaches." in out and "--number: A number. (default: 1)" in out


def test_main_decides_the_exit_code_and_the_config_gives_a_run_name():
    code, out, _ = call("--config=configs/gpt2.py:size=tiny", "--number=3")
    assert code == 3
    assert out.split() == [
        "config",
        "configs/gpt2.py:size=tiny",
        "gpt2_size=tiny",
        "False",
    ]


@pytest.mark.fault(21)
@pytest.mark.parametrize(
    "args, words",
    [
        (["--nmber=3"], "number"),
        (["--number=x"], "invalid literal"),
        (["3"], "flags are written --name=value"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/gpt2.py:size=huge"], "small, medium, large, xl"),
        (["--config=configs/gpt2.py:wide=1"], "is not one of: size=small"),
        (["--config=configs/gpt2.py", "--config.hyper.lrr=1"], "lr"),
        (["--config=configs/gpt2.py", "--config.steps=1e3"], "steps"),
        (["--config=configs/gpt2.py", "--config.hyper.lr=fast"], "lr"),
        (["--number=5"], "No such file or directory: no/such/file"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(args, words):
    code, _, err = call(*args)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in err and words in err


def test_a_bug_keeps_its_traceback_and_exit_code_1():
    code, _, err = call("--number=6")
    assert code == 1 and "Traceback" in err


def test_folders_whose_names_hold_commas_can_be_listed(tmp_path):
    """As the trials of a sweep are called."""
    for name in ("lr=1,seed=2", "lr=1", "b"):
        (tmp_path / name).mkdir()
    given = f"{tmp_path}/lr=1,seed=2,{tmp_path}/b,{tmp_path}/lr=*,absent"
    assert door.folders(given.split(",")) == [
        *(f"{tmp_path}/lr=1,seed=2", f"{tmp_path}/b", f"{tmp_path}/lr=*", "absent")
    ]
