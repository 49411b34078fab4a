"""Doors: exit codes and sentences, before any JAX."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

DOOR = """
'''Help that teaches.

  python -m example --config=FILE
'''
import sys
from absl import flags
from experiments import door
CONFIG = door.define_config()
NUMBER = flags.DEFINE_integer("number", 1, "A number.")
OUT = door.define_path("out", "", "A folder.")
RUNS = door.define_paths("runs", "Folders.")
EACH = door.define_multi_path("each", "A folder; repeatable.")
def main(_):
    if NUMBER.value == 5:
        open("no/such/file")
    if NUMBER.value == 6:
        raise KeyError("a bug of ours")
    if NUMBER.value == 7:
        open("x" * 300)
    if OUT.value:
        print(OUT.value, *RUNS.value, *EACH.value)
        return
    print("config", door.config_file(), door.config_name(), "jax" in sys.modules)
    return NUMBER.value
door.run(main, __doc__)
"""


def call(*args, **env):
    done = subprocess.run(
        [sys.executable, "-c", DOOR, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **env},
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
        (["--number=7"], "File name too long: xxx"),
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


@pytest.mark.fault(35)
def test_a_tilde_in_a_path_is_the_home_folder():
    flags = ["--out=~/a", "--runs=~/b,c~", "--each=~", "--each=/d"]
    code, out, err = call(*flags, HOME="/home/me")
    assert code == 0, err
    assert out.split() == ["/home/me/a", "/home/me/b", "c~", "/home/me", "/d"]


def test_every_flag_that_names_a_file_knows_the_home_folder():
    wrong = []
    for file in (Path(__file__).parents[1] / "experiments").glob("*.py"):
        calls = [
            n for n in ast.walk(ast.parse(file.read_text())) if type(n) is ast.Call
        ]
        for words in map(ast.unparse, calls):
            of_text = re.match(r"flags\.DEFINE_(string|multi_string|list)\(", words)
            if of_text and re.search(r"\b([Ff]olders?|[Ff]ile|PNG|Table of)\b", words):
                wrong.append(f"{file.name}: {words}")
    assert all("'storage'" in words for words in wrong), wrong  # a URL
