"""docs/extending.md: its diffs apply to the code as it stands, and do what they say."""

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import FENCE, ROOT, programs

PAGE = ROOT / "docs/extending.md"
COPIED = ("gpt_jax", "configs", "experiments", "tests")


def additions() -> dict[str, tuple[str, str]]:
    """Returns heading -> (diff, check)."""
    found = {}
    for section in re.split(r"^## ", PAGE.read_text(), flags=re.M)[1:]:
        name, _, text = section.partition("\n")
        parts = dict(FENCE.findall(text))
        found[name] = parts["diff"], parts["python"]
    return found


ADDITIONS = additions()


def apply(diff: str, root: Path) -> None:
    """Changes the files of a copy; what is replaced must stand there, once."""
    for old_name, new_name, body in re.findall(
        r"^--- (.*)\n\+\+\+ b/(.*)\n((?:(?!--- ).*\n)*)", diff, re.M
    ):
        path = root / new_name
        assert path.exists() == (old_name == f"a/{new_name}"), new_name
        text = path.read_text() if path.exists() else ""
        for hunk in re.split(r"^@@\n", body, flags=re.M)[1:]:
            lines = [line if line.strip() else " \n" for line in hunk.splitlines(True)]
            old = "".join(line[1:] for line in lines if line[0] != "+")
            new = "".join(line[1:] for line in lines if line[0] != "-")
            assert text.count(old) == 1 or not text, f"{new_name} lacks:\n{old}"
            text = text.replace(old, new, 1)
        path.write_text(text)


def copy(folder: Path) -> Path:
    for name in COPIED:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done


def test_there_are_five_additions_and_each_has_a_check():
    assert len(ADDITIONS) == len(programs(PAGE)) == 5


@pytest.fixture(scope="module")
def changed(tmp_path_factory):
    """A copy of the package with all five additions."""
    folder = copy(tmp_path_factory.mktemp("extended"))
    for diff, _ in ADDITIONS.values():
        apply(diff, folder)
    return folder


def test_every_addition_applies_to_the_code_as_it_is(changed):
    for path in changed.rglob("*.py"):
        compile(path.read_text(), path, "exec")


@pytest.mark.slow
def test_all_additions_do_together_what_they_say(changed):
    checks = [check for _, check in ADDITIONS.values()]
    code = "".join(f"exec({check!r}, {{}})\n" for check in checks)
    python(changed, "-c", f"from tests import conftest\n{code}")


TRAIN = ("-m", "experiments.train", "--workdir=run", "--config.compile_cache=")
TINY = "--config=configs/quickstart.py:size=tiny"
FLAGS = {
    "A sampling filter": None,
    "An optimizer": (TINY, "--config.optimizer.name=adabelief"),
    "A task": ("--config=configs/restore.py:size=tiny",),
    "A Hugging Face family": None,
    "A kind of layer": (TINY, "--config.model.n_experts=4"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ADDITIONS)
def test_each_addition_stands_alone_and_what_can_be_trained_trains(name, tmp_path):
    folder = copy(tmp_path)
    diff, check = ADDITIONS[name]
    apply(diff, folder)
    python(folder, "-c", f"from tests import conftest\n{check}")
    if flags := FLAGS[name]:
        assert "val_loss" in python(folder, *TRAIN, *flags).stdout
    if name == "A kind of layer":  # stacked, split over devices, with one more adapter
        more = ("--config.model.scan_layers=True", "--config.mesh.tensor=2")
        more += ("--config.model.vocab_multiple=2",)
        python(folder, *TRAIN, *flags, *more, "--workdir=split")


@pytest.mark.slow
def test_the_tests_of_weights_and_published_models_hold_with_all_additions(changed):
    files = ("weights", "checks", "sampling", "configs", "imports")
    names = [f"tests/test_{name}.py" for name in files]
    python(changed, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider", *names)
