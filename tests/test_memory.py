"""Limits of containers, as the kernel writes them down; files stand for its own."""

import math
import subprocess
import sys
from pathlib import Path

import pytest

from gpt_jax import memory

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
