"""Facts about the project's own files: locks, versions, documents and the Makefile."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import gpt_jax

ROOT = Path(__file__).parents[1]
LOCKS = (
    *("requirements.txt", "requirements-dev.txt", "requirements-extras.txt"),
    "requirements-lm-eval.txt",
)
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def read(name: str) -> str:
    return (ROOT / name).read_text()


def entries(name: str) -> list[str]:
    """Returns the lines of a requirements file that ask for a package."""
    lines = [line.partition("#")[0].strip() for line in read(name).splitlines()]
    return [line for line in lines if line and not line.startswith("-")]


def package(entry: str) -> str:
    return re.split(r"[\[<>=!~ ;]", entry)[0].lower().replace("_", "-")


def pins(lock: str) -> set[str]:
    """Returns package==version; markers may be wider in one lock than in another."""
    return {entry.partition(" ;")[0] for entry in entries(lock)}


def tracked() -> list[Path]:
    """Returns the files that git would carry; without git, those beside the code."""
    if shutil.which("git") and (ROOT / ".git").exists():
        command = [
            "git",
            "ls-files",
            "-z",
            "--cached",
            "--others",
            "--exclude-standard",
        ]
        out = subprocess.run(command, cwd=ROOT, capture_output=True, check=True).stdout
        paths = [ROOT / name for name in out.decode().split("\0") if name]
    else:
        paths = [path for path in ROOT.rglob("*") if ".venv" not in str(path)]
    return [path for path in paths if path.is_file()]


# --- requirements ---------------------------------------------------------------------


@pytest.mark.parametrize("lock", LOCKS)
def test_every_line_of_a_lock_pins_one_version(lock):
    pin = re.compile(r"[A-Za-z0-9._-]+(\[[a-z0-9,-]+\])?==[0-9][^ *,<>]*( ; .+)?")
    assert entries(lock)
    assert [line for line in entries(lock) if not pin.fullmatch(line)] == []


@pytest.mark.parametrize(
    ("wishes", "lock"),
    [
        ("requirements.in", "requirements.txt"),
        ("requirements-dev.in", "requirements-dev.txt"),
        ("requirements-lm-eval.in", "requirements-lm-eval.txt"),
    ],
)
def test_every_wish_is_locked(wishes, lock):
    locked = {package(entry) for entry in entries(lock)}
    assert {package(entry) for entry in entries(wishes)} <= locked


def test_the_development_lock_holds_the_runtime_lock():
    assert pins("requirements.txt") <= pins("requirements-dev.txt")


def test_the_extras_agree_with_the_runtime():
    runtime, extras = pins("requirements.txt"), pins("requirements-extras.txt")
    names = {package(pin) for pin in runtime}
    assert {pin for pin in extras if package(pin) in names} <= runtime


def test_every_extra_is_locked_except_the_accelerators():
    extras = PROJECT["project"]["optional-dependencies"]
    locks = ("requirements-extras.txt", "requirements-lm-eval.txt")
    locked = {package(entry) for lock in locks for entry in entries(lock)}
    for name in extras.keys() - {"gpu", "tpu"}:
        assert {package(entry) for entry in extras[name]} <= locked, name


def test_no_lock_names_an_accelerator_package():
    # They follow from jax's extras (or from torch), in the versions that these want.
    names = {package(entry) for lock in LOCKS for entry in entries(lock)}
    assert [n for n in names if re.match(r"nvidia|cuda|libtpu|jax-cuda", n)] == []


def test_python_3_11_keeps_the_last_jax_that_supports_it():
    pins = [entry for entry in entries("requirements.txt") if package(entry) == "jax"]
    old = [pin for pin in pins if "python_full_version < '3.12'" in pin]
    assert [pin.split(" ")[0] for pin in old] == ["jax==0.10.2"]
    assert len(pins) == 2


# --- documents ------------------------------------------------------------------------


def test_one_version_everywhere():
    dynamic = PROJECT["tool"]["setuptools"]["dynamic"]
    assert dynamic["version"] == {"attr": "gpt_jax.__version__"}
    cited = re.search(r"^version: (\S+)$", read("CITATION.cff"), re.M)
    assert cited and cited[1] == gpt_jax.__version__
    newest = re.search(r"^## (\S+)", read("CHANGELOG.md"), re.M)
    assert newest and newest[1] == gpt_jax.__version__


def test_one_licence_everywhere():
    assert PROJECT["project"]["license"] == "Apache-2.0"
    assert "license: Apache-2.0" in read("CITATION.cff")
    licence = read("LICENSE")
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    assert "END OF TERMS AND CONDITIONS" in licence


def test_no_file_names_a_package_registry():
    names = ("pypi" + ".org", "python" + "hosted", "registry" + ".npmjs")
    options = ("--index" + "-url", "--extra-index" + "-url", "--find" + "-links")
    found = []
    for path in tracked():
        text = path.read_text(errors="ignore")
        found += [f"{path}: {word}" for word in (*names, *options) if word in text]
    assert found == []


def test_no_file_names_a_folder_of_one_machine():
    home = re.compile(r"(?<![\w.~/-])/(?:home|root|work|Users)/\w")
    found = []
    for path in tracked():
        found += [f"{path}: {m}" for m in home.findall(path.read_text(errors="ignore"))]
    assert found == []


DOCUMENTS = [path for path in tracked() if path.suffix == ".md"]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_command_in_a_document_names_what_exists(path):
    # A diff names what it makes.
    text = re.sub(r"^```diff\n.*?^```$", "", path.read_text(), flags=re.M | re.S)
    doors = set(re.findall(r"python3? -m experiments\.(\w+)", text))
    configs = set(re.findall(r"--config[= ](configs/\w+\.py)", text))
    targets = set(re.findall(r"^\s*(?:\$ )?make (?:[A-Z]+=\S+ )*([a-z-]+)", text, re.M))
    missing = [d for d in doors if not (ROOT / f"experiments/{d}.py").exists()]
    missing += [c for c in configs if not (ROOT / c).exists()]
    missing += [t for t in targets if f"\n{t}:" not in read("Makefile")]
    assert missing == []


# --- Makefile and .ci/run -------------------------------------------------------------

# Stands in for an interpreter: `venv` copies it, `pip` writes down what it is asked.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
  *version_info*) exit {old} ;;
  *python_version*) echo 3.99.1 ;;
  *venv*) for venv; do :; done; mkdir -p "$venv/bin"; cp "$0" "$venv/bin/python" ;;
  *install*) echo "$*" >> pip.log; exit $(cat pip.exit) ;;
  *) echo "$*" >> run.log ;;
esac
"""


class Clone:
    """A folder with the Makefile, the locks and a stand-in for Python; runs make."""

    def __init__(self, folder: Path):
        self.folder = folder
        for name in ("Makefile", *LOCKS):
            shutil.copy(ROOT / name, folder)
        (folder / "pip.exit").write_text("0")
        self.replace_python(old=0)

    def replace_python(self, *, old: int) -> None:
        python = self.folder / "python"
        python.write_text(FAKE_PYTHON.format(old=old))
        python.chmod(0o755)

    def make(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # pytest may itself run under make, whose variables reach every make below it.
        env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFL"))}
        return subprocess.run(
            ["make", f"PYTHON={self.folder / 'python'}", *arguments],
            cwd=self.folder,
            env=env,
            capture_output=True,
            text=True,
        )

    def log(self, name: str) -> list[str]:
        return (self.folder / name).read_text().splitlines()


@pytest.fixture
def clone(tmp_path):
    if not shutil.which("make"):
        pytest.skip("needs make")
    return Clone(tmp_path)


def test_make_alone_lists_every_documented_target(clone):
    listed = re.findall(r"^  ([a-z-]+) +\S", clone.make().stdout, re.M)
    assert {
        "demo",
        "test",
        "test-data",
        "test-docs",
        "check",
        "format",
        "lock",
        "clean",
    } <= set(listed)
    documented = re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.M)
    assert listed == documented


def test_make_demo_installs_once_and_trains(clone):
    assert clone.make("demo").returncode == 0
    assert clone.make("demo").returncode == 0
    assert len(clone.log("pip.log")) == 1
    assert "-r requirements.txt" in clone.log("pip.log")[0]
    trains = [line for line in clone.log("run.log") if "experiments.train" in line]
    assert len(trains) == 2


def test_make_test_parity_adds_torch_once_to_the_development_environment(clone):
    assert clone.make("test-parity").returncode == 0
    assert clone.make("test-parity").returncode == 0
    installs = clone.log("pip.log")
    assert len(installs) == 2 and installs[1].endswith("torch transformers")
    assert "-c requirements-extras.txt" in installs[1]
    runs = [line for line in clone.log("run.log") if "tests/test_parity.py" in line]
    assert len(runs) == 2


def test_make_installs_again_when_the_lock_changes(clone):
    clone.make("demo")
    with open(clone.folder / "requirements.txt", "a") as lock:
        lock.write("new==1.0\n")
    clone.make("demo")
    clone.make("demo")
    assert len(clone.log("pip.log")) == 2


def test_a_failed_install_is_not_taken_for_done(clone):
    clone.make("demo")
    lock = clone.folder / "requirements.txt"
    before = lock.read_text()
    lock.write_text(before + "new==1.0\n")
    (clone.folder / "pip.exit").write_text("1")
    assert clone.make("demo").returncode != 0
    lock.write_text(before)  # the environment may be half changed: install again
    (clone.folder / "pip.exit").write_text("0")
    assert clone.make("demo").returncode == 0
    assert len(clone.log("pip.log")) == 3


def test_the_development_environment_serves_the_demo_too(clone):
    clone.make("test")
    clone.make("demo")
    assert len(clone.log("pip.log")) == 1
    assert "-r requirements-dev.txt" in clone.log("pip.log")[0]


def test_make_test_passes_arguments_on_and_caps_its_workers(clone):
    clone.make("test", "PYTEST_ARGS=-k cache")
    (run,) = [line for line in clone.log("run.log") if "pytest" in line]
    assert run.endswith("-k cache") and "--maxprocesses=4" in run


def test_an_old_python_is_refused_with_one_sentence(clone):
    clone.replace_python(old=1)
    done = clone.make("demo")
    assert done.returncode != 0
    assert "needs Python 3.11 or newer" in done.stderr
    assert "3.99.1" in done.stderr
    assert not (clone.folder / "pip.log").exists()


def test_make_test_data_asks_for_a_folder(clone):
    done = clone.make("test-data")
    assert done.returncode != 0
    assert "DATA=folder" in done.stderr


def test_continuous_integration_checks_and_tests():
    script = ROOT / ".ci/run"
    assert os.access(script, os.X_OK)
    commands = script.read_text()
    assert "set -euo pipefail" in commands
    assert re.search(r"^make .*check$", commands, re.M)
    assert re.search(r"^make .*test$", commands, re.M)


def test_the_workflow_runs_it_on_the_three_systems_with_every_stated_python():
    workflow = read(".github/workflows/ci.yml")
    for system in ("ubuntu", "macos", "windows"):
        assert re.search(rf"os: .*{system}-", workflow), system
    assert re.search(r"^      - run: \.ci/run$", workflow, re.M)
    stated = {
        line.rpartition(":: ")[2]
        for line in PROJECT["project"]["classifiers"]
        if re.fullmatch(r".*Python :: 3\.\d+", line)
    }
    run = set(re.findall(r'"(3\.\d+)"', workflow))
    assert run == stated == {"3.11", "3.12", "3.13", "3.14"}


# --- the plugin of `make test-data` ---------------------------------------------------

FACTS = """
import pytest

@pytest.fixture
def corpus_file():
    def find(name):
        pytest.skip(f"needs {name}") if name == "absent" else None
    return find

def test_present(corpus_file): corpus_file("present")
def test_absent(corpus_file): corpus_file("absent")
def test_without_a_text(): assert False
"""


@pytest.mark.slow
def test_only_facts_about_texts_run_and_a_skip_fails(tmp_path):
    facts = tmp_path / "test_facts.py"
    facts.write_text(FACTS)
    options = ["-q", "-p", "tests.corpus_facts", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, f"--rootdir={tmp_path}", facts],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert "1 failed, 1 passed, 1 deselected" in done.stdout
    assert "needs absent" in done.stdout
