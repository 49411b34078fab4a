"""Commands and their files: found by name, typed as they can be, in a clone and not."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax import commands, configs

ROOT = Path(__file__).parents[1]
DOORS = commands.known(commands.DOORS)


def gpt_jax(*words, cwd):
    return subprocess.run(
        [sys.executable, "-m", "gpt_jax", *words],
        cwd=cwd,
        env={"PATH": "", "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        timeout=100,
    )


# --- files by name --------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gpt2.py", "configs/gpt2.py"])
def test_a_config_of_ours_is_found_from_any_folder(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert commands.find(commands.CONFIGS, name) == ROOT / "configs/gpt2.py"
    lr = commands.find(commands.SWEEPS, "lr")
    assert lr == ROOT / "experiments/sweeps/lr.py"


def test_a_file_of_the_user_comes_before_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs").mkdir()
    for name in ("gpt2.py", "configs/gpt2.py"):
        (tmp_path / name).write_text("def get_config(arg=None): return {'mine': arg}\n")
        assert commands.find(commands.CONFIGS, name) == Path(name)
        assert configs.load(f"{name}:a=1") == {"mine": "a=1"}
    # A name alone is ours: no file is called so.
    assert commands.find(commands.CONFIGS, "gpt2") == ROOT / "configs/gpt2.py"


@pytest.mark.parametrize(
    "name", ["gtp2", "gtp2.py", "configs/gtp2.py", "elsewhere/gpt2.py", "common"]
)
def test_what_is_neither_file_nor_name_is_refused_with_the_names(name):
    told = r"there is no config file .*quickstart, sft"
    with pytest.raises(ValueError, match=told) as error:
        commands.find(commands.CONFIGS, name)
    assert ("did you mean gpt2?" in str(error.value)) == (name != "common")


@pytest.mark.parametrize(
    "text, parts",
    [
        ("configs/gpt2.py:size=xl", ("configs/gpt2.py", "size=xl")),
        ("gpt2", ("gpt2", "")),
        (r"C:\mine\gpt2.py:size=xl", (r"C:\mine\gpt2.py", "size=xl")),
        ("d:/mine/gpt2.py", ("d:/mine/gpt2.py", "")),
        ("configs/sft.py:run=C:/runs/a", ("configs/sft.py", "run=C:/runs/a")),
    ],
)
def test_options_stand_behind_the_colon_that_is_no_drives(text, parts):
    assert commands.split(text) == parts


# --- configs in programs --------------------------------------------------------------


def test_a_config_is_loaded_whatever_is_called_configs_here(tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs/__init__.py").write_text("mine = True\n")
    code = (
        "import configs, sys; from gpt_jax import configs as ours\n"
        "before = list(sys.path)\n"
        "assert ours.load('quickstart:size=tiny').steps == 6\n"
        "assert ours.base().steps == 1000\n"
        "import configs as again; assert again is configs and again.mine\n"
        "assert sys.path == before and 'configs.common' not in sys.modules\n"
    )
    env = {"PATH": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_loaded_config_is_that_of_the_doors(tmp_path, monkeypatch):
    from configs import gpt2

    monkeypatch.chdir(tmp_path)
    loaded = configs.load("gpt2:size=medium")
    assert loaded.to_dict() == gpt2.get_config("size=medium").to_dict()


# --- how commands are typed -----------------------------------------------------------


def test_a_command_is_typed_as_it_works_here(tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert commands.typed("train") == "python -m experiments.train"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commands.typed("train") == "python -m gpt_jax train"
    (tmp_path / "gpt-jax").write_text("#!/bin/sh\n")
    (tmp_path / "gpt-jax").chmod(0o755)
    assert commands.typed("train") == "gpt-jax train"


def test_help_shows_commands_as_they_work_here(tmp_path, monkeypatch):
    monkeypatch.setattr(commands, "typed", lambda door: f"gpt-jax {door}")
    text = "python -m experiments.train, experiments.launch, experiments.benches.cpu"
    assert commands.here(text) == (
        "gpt-jax train, gpt-jax launch, experiments.benches.cpu"
    )


def test_no_sentence_spells_out_a_command_that_works_in_a_clone_only():
    """Docstrings may: a door's help is shown through `here`."""
    wrong = []
    for path in [*ROOT.glob("gpt_jax/**/*.py"), *ROOT.glob("experiments/**/*.py")]:
        tree = ast.parse(path.read_text())
        docs = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.FunctionDef | ast.ClassDef)
            and node.body
            and isinstance(node.body[0], ast.Expr)
        }
        for node in ast.walk(tree):
            if not (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                continue
            found = commands.here(node.value) != node.value
            if id(node) not in docs and (found or "requirements-extras" in node.value):
                wrong.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.value}")
    ours = ("gpt_jax/commands.py", "gpt_jax/doctor.py", "experiments/benches/cpu.py")
    assert [line for line in wrong if not line.startswith(ours)] == []


# --- the command ----------------------------------------------------------------------


def test_the_command_lists_what_there_is(tmp_path):
    done = gpt_jax("list", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = [line.split() for line in done.stdout.splitlines()]
    first = [words[0] for words in found if words]
    assert {*DOORS, "quickstart", "gpt2", "lr", "seeds"} <= set(first)
    assert not {"door", "trial", "common", "__init__"} & set(first)
    assert all(len(words) > 2 for words in found if words and len(words) > 1)


@pytest.mark.parametrize(
    "words, code, told",
    [
        ([], 0, "gpt-jax train quickstart"),
        (["--version"], 0, "gpt-jax 0."),
        (["trian"], 2, "no command 'trian'; did you mean train?"),
        (["sample", "--help"], 0, "python -m gpt_jax sample --run=runs/quickstart"),
        (["train", "quickstrat"], 2, "no config file quickstrat"),
        (["train", "gpt2:size=huge"], 2, "size 'huge' is not one of"),
        (["sample", "runs/none"], 2, "runs/none is not a run folder"),
        (["sweep", "batch_lt"], 2, "did you mean batch_lr?"),
    ],
)
def test_the_command_runs_a_door_from_any_folder(words, code, told, tmp_path):
    done = gpt_jax(*words, cwd=tmp_path)
    assert done.returncode == code, done.stderr
    assert told in done.stdout + done.stderr and "Traceback" not in done.stderr
