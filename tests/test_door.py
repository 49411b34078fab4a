"""Doors: exit codes and sentences, before any JAX."""

import ast
import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

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
OUT = door.define_path("out", "", "A folder.")
RUNS = door.define_paths("runs", "Folders.")
EACH = door.define_multi_path("each", "A folder; repeatable.")
KIND = flags.DEFINE_enum("kind", "small", ["small", "large"], "A kind.")
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


GPT2 = "--config=configs/gpt2.py:size=tiny"


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
        (["--nmber=3"], "there is no flag --nmber; did you mean --number?"),
        (["--number=x"], "--number=x: it must be a whole number"),
        (["--kind=lrage"], "--kind=lrage is not one of: small, large; did you mean la"),
        (["3"], "flags are written --name=value"),
        (["--config=configs/nothing.py"], "configs/nothing.py"),
        (["--config=configs/gpt2.py:size=huge"], "small, medium, large, xl"),
        (["--config=configs/gpt2.py:wide=1"], "is not one of: size=small"),
        (["--config=configs/gpt2.py:sise=tiny"], "did you mean size?"),
        (["--config=configs/gpt2.py:small"], "has no name: write size=small"),
        (["--config.steps=3"], "--config.steps is given and --config is not"),
        ([GPT2, "--config.lr=1"], "no config key 'lr'; did you mean hyper.lr?"),
        ([GPT2, "--config.hyper.learning_rate=1"], "did you mean hyper.lr?"),
        ([GPT2, "--config.block_size=8"], "did you mean model.context_length?"),
        ([GPT2, "--config.hyper={'lr':0.1}"], "--config.hyper is a group of settings"),
        ([GPT2, "--config.mesh=3"], "is a group of settings: set them one by one"),
        ([GPT2, "--config.steps=1e3"], "--config.steps=1e3: it must be a whole number"),
        ([GPT2, "--config.hyper.lr=fast"], "lr=fast: it must be a number"),
        ([GPT2, "--config.model.gated=yes"], "gated=yes: it must be True or False"),
        ([GPT2, "--config.optimizer.freeze=a,b"], "it must be a tuple, as in"),
        (["--number=5"], "No such file or directory: no/such/file"),
        (["--number=7"], "File name too long: xxx"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_exit_code_2(args, words):
    code, _, err = call(*args)
    assert code == 2, err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "Traceback" not in err and words in err


def test_the_order_of_a_config_and_its_overrides_does_not_matter():
    code, out, _ = call("--config.steps=3", GPT2)
    assert code == 1 and "gpt2_size=tiny" in out


# One process for all cases: each has a fork of its own, made when all is imported.
EVERY = """
import json, os, sys
from experiments import door
door.define_config()
for words in json.load(sys.stdin):
    read, write = os.pipe()
    if not (pid := os.fork()):
        os.dup2(write, 1), os.dup2(write, 2)
        sys.argv = ["door", *words]
        try:
            door.run(lambda _: 0, "")
        except SystemExit as left:
            sys.stdout.flush(), sys.stderr.flush()
            os._exit(left.code)
    os.close(write)
    with open(read) as said:
        print(json.dumps([os.waitpid(pid, 0)[1] >> 8, said.read()]))
"""
# What is no value of a key at all; what is one and cannot be: test_checks.py.
WRONG = {bool: ["yes"], int: ["1.5"], float: ["fast"], tuple: ["(0.5,"]}
RECIPES = ("quickstart:", "classify:", "sft:adapter=lora,", "dpo:", "grpo:stage=rl,")


def keys(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@pytest.mark.fault(36, injections=116)
def test_every_key_refuses_every_text_that_is_not_of_its_type():
    """For all keys of all configs: exit code 2 and one sentence that names the key."""
    cases: dict[str, list[str]] = {}
    for recipe in RECIPES:
        name, _, arg = recipe.partition(":")
        get_config = importlib.import_module(f"configs.{name}").get_config
        for key, default in keys(get_config(f"{arg}size=tiny")):
            for text in WRONG.get(type(default), ()):
                words = [f"--config=configs/{name}.py:{arg}size=tiny"]
                cases.setdefault(f"--config.{key}={text}", words)
    assert len(cases) > 110
    asked = [[*words, case] for case, words in cases.items()]
    done = subprocess.run(
        [sys.executable, "-c", EVERY],
        input=json.dumps(asked),
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 0, done.stderr
    for case, line in zip(cases, done.stdout.splitlines(), strict=True):
        code, said = json.loads(line)
        name = case.partition("=")[0].rpartition(".")[2]
        assert (code, said.count("\n")) == (2, 1), (case, said)
        assert said.startswith("error: ") and name in said, (case, said)


def test_a_command_is_told_again_without_some_flags_and_their_values(monkeypatch):
    words = ["--config=a.py", "--config.steps", "5", "--workdir=x"]
    words += ["--config.seed", "3", "--debug"]
    monkeypatch.setattr(sys, "argv", ["experiments/train.py", *words])
    told = door.command(("--config.steps", "--workdir"))
    assert told.endswith("--config=a.py --config.seed 3 --debug")


def test_a_file_that_cannot_be_written_is_refused_and_not_made(tmp_path):
    (tmp_path / "file").write_text("a")
    door.check_writable("out", str(tmp_path / "new" / "a.json"))
    door.check_writable("out", str(tmp_path / "new"), folder=True)
    door.check_writable("out", str(tmp_path / "file"))
    for path, folder in (("file/a", False), ("file", True), (".", False)):
        with pytest.raises(ValueError, match="name another"):
            door.check_writable("out", str(tmp_path / path), folder=folder)
    with pytest.raises(ValueError, match="cannot be written: File name too long"):
        door.check_writable("out", str(tmp_path / ("a" * 300)))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file"]
    assert (tmp_path / "file").read_text() == "a"


def test_a_bug_keeps_its_traceback_and_exit_code_1():
    code, _, err = call("--number=6")
    assert code == 1 and "Traceback" in err


@pytest.mark.fault(35)
def test_a_tilde_in_a_path_is_the_home_folder():
    flags = ["--out=~/a", "--runs=~/b,c~", "--each=~", "--each=/d"]
    code, out, err = call(*flags, HOME="/far/me")
    assert code == 0, err
    assert out.split() == ["/far/me/a", "/far/me/b", "c~", "/far/me", "/d"]


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


def test_folders_whose_names_hold_commas_can_be_listed(tmp_path):
    """As the trials of a sweep are called."""
    for name in ("lr=1,seed=2", "lr=1", "b"):
        (tmp_path / name).mkdir()
    given = f"{tmp_path}/lr=1,seed=2,{tmp_path}/b,{tmp_path}/lr=*,absent"
    assert door.folders(given.split(",")) == [
        *(f"{tmp_path}/lr=1,seed=2", f"{tmp_path}/b", f"{tmp_path}/lr=*", "absent")
    ]
