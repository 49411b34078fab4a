"""The package outside its clone: a wheel, installed, used from another folder."""

import json
import os
import re
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

from tests.test_project import ROOT, tracked

pytestmark = pytest.mark.slow
TINY = ["--config.sample_every=0", "--config.tensorboard=False"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel of what git would carry, so that nothing is written into the clone."""
    if int(metadata.version("setuptools").partition(".")[0]) < 77:
        pytest.skip("needs setuptools 77 (requirements-dev.txt)")
    source = tmp_path_factory.mktemp("source")
    for path in tracked():
        if "golden" not in path.parts and "images" not in path.parts:
            copy = source / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    out = source / "out"
    pip("wheel", "--no-build-isolation", f"--wheel-dir={out}", str(source))
    (built,) = out.glob("*.whl")
    return built


class There:
    """A folder that is no clone, where the wheel is installed."""

    def __init__(self, folder: Path, place: Path):
        self.folder = folder
        path = f"{place / 'bin'}{os.pathsep}{os.environ['PATH']}"
        self.env = {**os.environ, "PYTHONPATH": str(place), "PATH": path}

    def __call__(self, *command: str, code: int | None = 0) -> str:
        """Runs a command; returns all that it printed."""
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=110,
        )
        assert code in (None, done.returncode), done.stderr + done.stdout
        return done.stdout + done.stderr


@pytest.fixture(scope="module")
def there(wheel, tmp_path_factory):
    place = tmp_path_factory.mktemp("installed")
    pip("install", "--no-index", f"--target={place}", str(wheel))
    return There(tmp_path_factory.mktemp("elsewhere"), place)


def pip(*words):
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    done = subprocess.run([*command, "--no-deps"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_wheel_holds_the_package_with_doors_and_configs_inside_and_no_more(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    (info,) = {name.partition("/")[0] for name in names} - {"gpt_jax"}
    parts = [path.relative_to(ROOT) for path in tracked()]
    inside = {str(p) for p in parts if p.parts[0] == "gpt_jax"}
    inside |= {
        f"gpt_jax/_root/{p.as_posix()}"
        for p in parts
        if p.parts[0] in ("configs", "experiments")
    }
    assert {name for name in names if not name.startswith(info)} == inside
    entry = zipfile.ZipFile(wheel).read(f"{info}/entry_points.txt").decode()
    assert "gpt-jax = gpt_jax.__main__:main" in entry


def test_nothing_but_the_package_is_importable(there):
    code = "import importlib.util as u; print([*map(u.find_spec, 'abc')])"
    code = code.replace("'abc'", "('configs', 'experiments', 'tests')")
    assert there(sys.executable, "-c", code).strip() == "[None, None, None]"


def test_list_and_help_speak_of_the_command(there):
    assert "quickstart" in there("gpt-jax", "list")
    told = there("gpt-jax", "train", "--help")
    assert "gpt-jax train --config=configs/quickstart.py" in told
    assert "experiments." not in told


def test_a_model_is_trained_sampled_and_exported_by_name(there):
    run = ["gpt-jax", "train", "quickstart:size=tiny", "--workdir=runs/a", *TINY]
    told = there(*run)
    assert (there.folder / "runs/a/loss.png").is_file()
    hints = dict(re.findall(r"^  (.+?)  +(gpt-jax .*)$", told, re.M))
    assert hints["sample"] == "gpt-jax sample --run=runs/a --prompt=..."
    longer = hints["train longer"].split()
    assert longer[:3] == ["gpt-jax", "train", "--config=quickstart:size=tiny"]
    assert "done: steps reached after step 12" in there(*longer)
    there("gpt-jax", "sample", "runs/a", "--prompt=def", "--max_new_tokens=4")
    there("gpt-jax", "convert", "--run=runs/a", "--to_hf=exports/a")
    assert json.loads((there.folder / "exports/a/config.json").read_text())


def test_a_config_and_a_program_of_the_users_own(there):
    (there.folder / "mine.py").write_text(
        "from configs import common\n"
        "def get_config(arg=None):\n"
        "    config = common.tiny(common.base())\n"
        "    config.steps = 3\n"
        "    return config\n"
    )
    told = there("gpt-jax", "train", "mine.py", "--workdir=runs/mine", *TINY)
    assert "steps reached after step 3" in told
    code = "from gpt_jax import configs; print(configs.load('mine.py').steps)"
    assert there(sys.executable, "-c", code).strip() == "3"


def test_commands_that_start_others_find_them(there):
    run = ["launch", "--processes=2", "--", "quickstart:size=tiny", *TINY]
    assert "after step 6" in there("gpt-jax", *run, "--workdir=runs/two")
    run = ["verify_resume", "quickstart:size=tiny", "--steps=12", "--kills=1", *TINY]
    assert "bit-equal" in there("gpt-jax", *run)


def test_a_sweep_runs_its_trials(there):
    pytest.importorskip("optuna")
    pytest.importorskip("distributed")
    assert "8 trials" in there("gpt-jax", "sweep", "lr", "--dry_run")
    (there.folder / "two.py").write_text(
        "config = 'quickstart:size=tiny'\n"
        "fixed = {'sample_every': 0, 'tensorboard': False}\n"
        "def points(): return [{'hyper.lr': 0.01}, {'hyper.lr': 0.001}]\n"
    )
    told = there("gpt-jax", "sweep", "two.py", "--out=runs/sweep")
    assert "2 done" in told
    assert re.search(r"train best   gpt-jax train --config=quickstart:size=tiny", told)


def test_doctor_and_prepare_need_no_clone(there):
    told = there("gpt-jax", "doctor", "--min_free_gb=0", code=None)
    assert re.search(r"ok +packages +(\d+) of \1 are as gpt-jax asks", told)
    there("gpt-jax", "prepare", "--config.data.source=builtin:json")
