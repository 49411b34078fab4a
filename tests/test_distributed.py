"""Runs of several processes: the same numbers, lost processes, signals, restarts."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from experiments.launch import free_port
from gpt_jax import checkpoint, metrics

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
BEAT = 6  # heartbeat_timeout_seconds where a process is lost
WAIT_S = 180.0  # for what takes seconds on a quiet machine
ENDLESS = 100_000  # steps


class Group:
    """The processes of one run, each with a file for what it says."""

    def __init__(self, said: Path, flags: list[str], *, processes: int, devices: int):
        self.said = said
        said.mkdir()
        port = free_port()
        command = [sys.executable, "-m", "experiments.train", *flags]
        command.append(f"--config.mesh.cpu_devices={devices}")
        if processes > 1:
            command += ["--distributed", f"--coordinator=127.0.0.1:{port}"]
            command.append(f"--processes={processes}")
        env = {**os.environ, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
        self.processes = []
        for index in range(processes):
            mine = [f"--process={index}"] if processes > 1 else []
            with (said / str(index)).open("wb") as file:
                one = subprocess.Popen(
                    [*command, *mine], cwd=ROOT, env=env, stdout=file, stderr=file
                )
            self.processes.append(one)

    def codes(self) -> list[int]:
        """Waits for the end of all; returns their exit codes."""
        try:
            return [process.wait(timeout=WAIT_S) for process in self.processes]
        finally:
            for process in self.processes:
                process.kill()

    def text(self, index: int = 0) -> str:
        return (self.said / str(index)).read_text(errors="replace")

    def done(self) -> "Group":
        assert set(self.codes()) == {0}, self.text() + self.text(
            -1 % len(self.processes)
        )
        return self


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("distributed")


def flags(folder: Path, name: str, *more: str) -> list[str]:
    return [
        "--config=configs/quickstart.py:size=tiny",
        f"--config.data.folder={folder / 'data'}",
        f"--workdir={folder / name}",
        "--config.sample_every=0",
        "--config.log_every=1",
        "--config.checkpoint_every=4",
        "--config.optimizer.name=adamw",  # Muon makes more of a rounding than 1e-5
        "--config.hyper.lr=1e-3",
        "--config.hyper.decay_steps=50.0",  # so that the rates do not depend on `steps`
        *more,
    ]


def train(folder: Path, name: str, *more: str, processes: int, devices: int) -> Group:
    said = folder / f"said-{name}-{len(list(folder.iterdir()))}"
    return Group(said, flags(folder, name, *more), processes=processes, devices=devices)


def saved(folder: Path, name: str) -> tuple[dict, int]:
    store = checkpoint.Checkpoints(folder / name / "checkpoints", keep=None)
    tree, _, step = store.restore(None)
    return tree, step


def params(folder: Path, name: str) -> dict:
    return saved(folder, name)[0]["params"]


def losses(folder: Path, name: str) -> list[float]:
    rows = metrics.read(folder / name)
    return [
        row[key] for row in rows for key in ("train_loss", "val_loss") if key in row
    ]


def close(tree: dict, other: dict) -> None:
    import jax

    for a, b in zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5)


def until_saved(group: Group, folder: Path, name: str) -> None:
    """Waits for the first finished checkpoint of a run that goes on."""
    store = checkpoint.Checkpoints(folder / name / "checkpoints", keep=None)
    end = time.monotonic() + WAIT_S
    while not store.steps():
        ended = [process.poll() for process in group.processes]
        assert ended == [None] * len(ended), group.text()
        assert time.monotonic() < end, group.text()
        time.sleep(0.02)


@pytest.fixture(scope="module")
def killed(folder):
    """A run of 2 processes x 2 devices whose process 1 was killed: what came of it."""
    beat = f"--config.heartbeat_timeout_seconds={BEAT}"
    more = [f"--config.steps={ENDLESS}", beat]
    group = train(folder, "killed", *more, processes=2, devices=2)
    until_saved(group, folder, "killed")
    group.processes[1].send_signal(signal.SIGKILL)
    began = time.monotonic()
    codes = group.codes()
    return codes, time.monotonic() - began, group.text()


@pytest.fixture(scope="module")
def end(folder, killed):
    """The step at which the comparisons end: 8 after the last checkpoint."""
    return saved(folder, "killed")[1] + 8


@pytest.fixture(scope="module")
def whole(folder, end):
    """The same run, never interrupted."""
    train(folder, "whole", f"--config.steps={end}", processes=2, devices=2).done()
    return params(folder, "whole")


def test_a_lost_process_ends_the_others_in_time_and_is_named(killed):
    codes, seconds, text = killed
    assert codes[1] == -signal.SIGKILL and codes[0] not in (0, 2)
    assert seconds < BEAT + 3, text  # 3 s to write the message and to end
    lost = "lost another process of this run" in text
    named = "tasks are unhealthy (stopped sending heartbeats):\n1\n" in text
    assert lost or named, text


def test_two_processes_have_the_losses_of_one_with_as_many_devices(folder, end, whole):
    train(folder, "one", f"--config.steps={end}", processes=1, devices=4).done()
    np.testing.assert_allclose(
        losses(folder, "whole"), losses(folder, "one"), rtol=1e-5
    )
    close(whole, params(folder, "one"))


def test_both_restarted_end_with_the_same_bits(folder, end, whole):
    shutil.copytree(folder / "killed", folder / "again")
    group = train(folder, "again", f"--config.steps={end}", processes=2, devices=2)
    assert f"resuming after step {end - 8}" in group.done().text()
    assert checkpoint.digest(params(folder, "again")) == checkpoint.digest(whole)
    steps = [row["step"] for row in metrics.read(folder / "again") if "lr" in row]
    assert steps == list(range(1, end + 1))


def test_restarted_as_one_process_of_two_devices_it_ends_alike(folder, end, whole):
    shutil.copytree(folder / "killed", folder / "alone")
    group = train(folder, "alone", f"--config.steps={end}", processes=1, devices=2)
    assert f"resuming after step {end - 8}" in group.done().text()
    close(whole, params(folder, "alone"))


def test_split_weights_are_saved_by_both_and_resumed_by_one(folder):
    split = ["--config.mesh.fsdp=2", "--config.mesh.data=1"]
    more = [*split, "--config.steps=4"]
    train(folder, "split", *more, processes=2, devices=1).done()
    more = [*split, "--config.steps=8"]
    train(folder, "split", *more, processes=1, devices=2).done()
    train(folder, "unsplit", *more, processes=2, devices=1).done()
    found = checkpoint.digest(params(folder, "split"))
    assert found == checkpoint.digest(params(folder, "unsplit"))
    # The same mesh over one device, from the middle on.
    train(folder, "unsplit", "--config.steps=10", processes=1, devices=1).done()


def test_frozen_weights_are_stored_once_and_samples_are_written_by_one(folder):
    wide = "--config.model.context_length=256"  # the shortest conversations fit
    train(folder, "base", "--config.steps=4", wide, processes=1, devices=1).done()
    options = f"run={folder / 'base'},adapter=lora,template=plain,size=tiny"
    tuned = [f"--config=configs/sft.py:{options}"]
    tuned += [f"--config.data.folder={folder / 'data'}", "--config.task.too_long=cut"]
    tuned += [f"--workdir={folder / 'tuned'}", "--config.mesh.data=1"]
    tuned += ["--config.mesh.fsdp=2", "--config.sample_every=2"]
    for name, steps, processes in (("tune", 4, 2), ("tune-on", 6, 1)):
        more = [f"--config.steps={steps}", "--config.checkpoint_every=2"]
        devices = 2 // processes
        Group(
            folder / name, [*tuned, *more], processes=processes, devices=devices
        ).done()
    assert len(list((folder / "tuned" / "frozen").iterdir())) == 1
    written = (folder / "tuned" / "samples.md").read_text()
    assert [written.count(f"## Step {n}\n") for n in (0, 2, 4, 6)] == [1] * 4
    assert saved(folder, "tuned")[1] == 6


def test_sigterm_of_one_process_stops_both_at_the_same_saved_step(folder):
    more = [f"--config.steps={ENDLESS}", "--config.max_seconds=1000.0"]
    group = train(folder, "stopped", *more, processes=2, devices=1)
    until_saved(group, folder, "stopped")
    group.processes[1].send_signal(signal.SIGTERM)
    assert group.codes() == [143, 143], group.text() + group.text(1)
    step = saved(folder, "stopped")[1]
    assert f"stopped after step {step}; the same command resumes" in group.text()
    assert metrics.read(folder / "stopped")[-1]["step"] == step


def test_time_that_is_up_in_one_process_ends_both(folder):
    more = [f"--config.steps={ENDLESS}", "--config.max_seconds=1.0"]
    group = train(folder, "timed", *more, processes=2, devices=1).done()
    assert "done: max_seconds reached" in group.text()


def test_a_mistake_is_told_by_every_process_with_exit_code_2(folder):
    group = train(
        folder, "wrong", "--config.data.source=no.txt", processes=2, devices=1
    )
    assert group.codes() == [2, 2], group.text()
    for index in range(2):
        assert "error: " in group.text(index) and "no.txt" in group.text(index)
        assert "Check failure" not in group.text(index)
    assert not (folder / "wrong" / "config.json").exists()


def test_a_folder_that_is_in_use_is_refused_by_both(folder):
    from gpt_jax import runs

    with runs.lock(folder / "locked"):
        group = train(folder, "locked", processes=2, devices=1)
        assert group.codes() == [2, 2], group.text()
    assert f"is in use by process {os.getpid()}" in group.text(1)


def launch(folder: Path, name: str, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "experiments.launch", "--processes=2", "--"]
    with (folder / f"launched-{name}").open("wb") as said:
        return subprocess.Popen(
            [*command, *flags(folder, name, *more)], cwd=ROOT, stdout=said, stderr=said
        )


def children(launched: subprocess.Popen) -> list[int]:
    path = Path(f"/proc/{launched.pid}/task/{launched.pid}/children")
    return sorted(map(int, path.read_text().split()))


@pytest.mark.parametrize(
    "name, number, whom, code, words",
    [
        ("term", signal.SIGTERM, "launcher", 143, "the same command resumes"),
        ("kill", signal.SIGKILL, "a process", 137, "process 1 of 2 ended by SIGKILL"),
    ],
)
def test_the_launcher_forwards_signals_and_ends_all(
    folder, name, number, whom, code, words
):
    launched = launch(folder, name, f"--config.steps={ENDLESS}")
    store = checkpoint.Checkpoints(folder / name / "checkpoints", keep=None)
    end = time.monotonic() + WAIT_S
    while not store.steps() and launched.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    both = children(launched)
    assert len(both) == 2
    os.kill(both[1] if whom == "a process" else launched.pid, number)
    assert launched.wait(timeout=WAIT_S) == code
    assert words in (folder / f"launched-{name}").read_text()
    assert not any(Path(f"/proc/{pid}").exists() for pid in both)
