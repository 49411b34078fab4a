"""Limits of containers, as the kernel writes them down; files stand for its own."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from gpt_jax import memory, model, population, pretrained, screen, train
from gpt_jax.model import GPTConfig
from tests import tiny

GB = 2**30


def group(folder, limit, used, files=0, v1=False):
    folder.mkdir(parents=True, exist_ok=True)
    names = memory.V1 if v1 else memory.V2
    (folder / names[0]).write_text(f"{limit}\n")
    (folder / names[1]).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 5\n{names[2]} {files}\n")


def of(root, line):
    (root / "proc/self").mkdir(parents=True, exist_ok=True)
    (root / "proc/self/cgroup").write_text(line)


def test_a_container_of_version_2_leaves_what_its_limit_and_use_say(tmp_path):
    of(tmp_path, "0::/\n")
    group(tmp_path / "sys/fs/cgroup", 3 * GB, 2 * GB, files=GB)
    assert memory.left(tmp_path) == 2 * GB  # files in memory can be dropped


def test_the_tightest_of_nested_groups_counts(tmp_path):
    of(tmp_path, "0::/slurm/job_7/step_0\n")
    top = tmp_path / "sys/fs/cgroup"
    group(top / "slurm/job_7/step_0", "max", GB)
    group(top / "slurm/job_7", 4 * GB, GB)
    group(top / "slurm", 8 * GB, 7 * GB)
    assert memory.left(tmp_path) == GB


def test_version_1_is_read_too_and_its_no_limit_is_none(tmp_path):
    top = tmp_path / "sys/fs/cgroup/memory"
    of(tmp_path, "12:cpu,cpuacct:/x\n5:memory:/docker/abc\n")
    group(top, 2 * GB, GB, v1=True)  # seen from inside, the group is the top
    assert memory.left(tmp_path) == GB
    group(top, 9223372036854771712, GB, v1=True)
    assert memory.left(tmp_path) == math.inf


def test_without_limits_or_without_linux_nothing_is_limited(tmp_path):
    assert memory.left(tmp_path) == math.inf
    of(tmp_path, "0::/user.slice\n")
    group(tmp_path / "sys/fs/cgroup/user.slice", "max", GB)
    assert memory.left(tmp_path) == math.inf


@pytest.mark.skipif(not Path("/proc/self/cgroup").exists(), reason="needs Linux")
def test_what_is_left_here_is_a_number_above_zero():
    code = "from gpt_jax import memory; print(memory.left() > 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "True"


# ---------------------------------------------------------------- plans


@pytest.fixture
def with_only(monkeypatch):
    """Returns (bytes) -> nothing: so much memory is free from then on."""
    return lambda free: monkeypatch.setattr(memory, "of_process", lambda: free)


@pytest.mark.fault(38)
@pytest.mark.parametrize("strategy", ["mesh", "pmap"])
def test_a_run_that_cannot_fit_is_refused_before_it_compiles(
    strategy, tmp_path, with_only
):
    config = tiny.on_text(tmp_path)
    config.optimizer.name = "adamw"
    config.mesh.update(strategy=strategy, cpu_devices=1)
    count = model.count(tiny.task(config).model.cfg)
    need = 4 * 4 * count + 4  # weight, gradient, two moments, of float32; a counter
    with_only(need - 1)
    with pytest.raises(ValueError, match="training this model needs") as refused:
        train.train(config, tmp_path / "run")
    said = str(refused.value)
    assert f"needs {screen.size(need)} in any batch" in said
    assert f"{screen.size(need - 1)} are free; about 100% of its" in said
    assert "\n" not in said and not (tmp_path / "run").exists()
    with_only(need)
    train.parts_of(config, tmp_path / "run")


@pytest.mark.fault(38)
def test_a_population_of_which_no_member_fits_is_refused(tmp_path, with_only):
    config = tiny.on_text(tmp_path)
    with_only(1000)
    with pytest.raises(ValueError, match="1 kB are free; about"):
        population.train(
            [config], [tmp_path / "a"], members=0, rungs=[], report=lambda *_: None
        )
    assert not (tmp_path / "a").exists()


@pytest.mark.fault(38)
def test_weights_that_do_not_fit_are_refused_before_one_is_read(with_only):
    folder = Path(__file__).parent / "golden" / "llama"
    cfg = GPTConfig(**{**common.base().model, **pretrained.fields(folder)})
    need = 4 * model.count(cfg)
    with_only(need - 1)
    for place in (None, lambda path, array: array):
        with pytest.raises(ValueError, match=f"holds {screen.size(need)} of weights"):
            pretrained.load(folder, cfg, place=place)
    with_only(need)
    pretrained.load(folder, cfg)
