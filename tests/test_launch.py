"""The local launcher: its mistakes, and which GPUs it gives to whom."""

import os
import subprocess
import sys

import pytest

from experiments import launch

RUN = "--config=configs/quickstart.py:size=tiny"


@pytest.mark.parametrize(
    "flags, words",
    [
        ([], "flags of training are missing"),
        (["--processes=0", "--", RUN], "--processes=0"),
        (["--devices=0", "--", RUN], "--devices=0"),
        (["--", RUN, "--process=1"], "--process=1 is set here for each process"),
        ([RUN], "config"),
        (["--processes=3", "--", RUN], "needs 3 GPUs but there are 2: 4, 6"),
    ],
)
def test_a_mistake_is_one_sentence_and_exit_code_2(flags, words):
    env = {**os.environ, "CUDA_VISIBLE_DEVICES": "4,6", "JAX_PLATFORMS": ""}
    done = subprocess.run(
        [sys.executable, "-m", "experiments.launch", *flags],
        env=env,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    (said,) = done.stderr.strip().splitlines()
    assert said.startswith("error: ") and words in said


def test_each_process_has_gpus_of_its_own(monkeypatch):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,2,5,7,9")
    places = [place["CUDA_VISIBLE_DEVICES"] for place in launch.environments(2, 2)]
    assert places == ["0,2", "5,7"]


def test_without_gpus_the_processes_run_on_the_cpu(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    assert launch.environments(2, 3) == [{}, {}]
