"""Train one model with several processes of this machine.

  python -m experiments.launch --processes=2 -- --config=configs/quickstart.py
  python -m experiments.launch --processes=2 --devices=2 -- \\
      --config=configs/quickstart.py --config.batch_size=16 --workdir=runs/four
  CUDA_VISIBLE_DEVICES=0,1,2,3 python -m experiments.launch --processes=4 -- \\
      --config=configs/gpt2.py --workdir=runs/gpt2

What follows -- are the flags of experiments.train. Every process has --devices GPUs of
its own where there are GPUs (CUDA_VISIBLE_DEVICES says which), else so many virtual
devices of the CPU. All of them share the batch, unless --config.mesh says otherwise.

Process 0 writes the run folder, and its output is shown; that of the others when they
fail, or always with --verbose. SIGTERM and Ctrl-C go to all: they save and stop at the
same step. When one is lost the others are ended; the same command, with any number of
processes, goes on from the last checkpoint. The exit code is the worst of theirs.

On several machines Slurm, Kubernetes or mpirun start the processes, as
docs/guide/14-scale.md shows; this needs none of them.
"""

import collections
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time

from absl import flags

from experiments import door
from gpt_jax import commands, signals

PROCESSES = flags.DEFINE_integer("processes", 2, "How many processes.")
DEVICES = flags.DEFINE_integer("devices", 1, "GPUs or CPU devices of each process.")
VERBOSE = flags.DEFINE_bool("verbose", False, "Show the output of all processes.")

OWN = ("--distributed", "--coordinator", "--processes", "--process")  # set here
IN_ORDER = (0, 128 + signal.SIGINT, 128 + signal.SIGTERM)  # exit codes
LAST_LINES = 40  # of a process that failed
LAST_WORDS_S = 5.0  # what the others have to end by themselves when one has failed


class Child:
    """One process of the run; the output of all but the first is kept back."""

    def __init__(self, index: int, command: list[str], env: dict[str, str]):
        self.index, self.ended_here = index, False
        self.lines: collections.deque[str] = collections.deque(maxlen=LAST_LINES)
        self.process = subprocess.Popen(
            command,
            env=env,
            text=True,
            errors="replace",
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C comes from here alone, and once
            stdout=subprocess.PIPE if index else None,
            stderr=subprocess.STDOUT if index else None,
        )
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    @property
    def code(self) -> int | None:
        """The exit code as a shell tells it, 128 + a signal's number; None: it runs."""
        code = self.process.poll()
        return 128 - code if code is not None and code < 0 else code

    def kill(self) -> None:
        """Ends the process; its exit code then says nothing."""
        self.ended_here = True
        self.process.kill()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.lines.append(line)
            if VERBOSE.value:
                print(f"[{self.index}] {line}", end="", flush=True)


def main(train: list[str]) -> int:
    """Starts the processes, waits for them, and returns the worst exit code."""
    check(train)
    places = environments(PROCESSES.value, DEVICES.value)
    port = free_port()
    shared = [*commands.argv("train"), *train, "--distributed"]
    shared += [f"--coordinator=127.0.0.1:{port}", f"--processes={PROCESSES.value}"]
    if not gpus() and not any("mesh.cpu_devices" in word for word in train):
        shared.append(f"--config.mesh.cpu_devices={DEVICES.value}")
    children: list[Child] = []

    def forward(number: int) -> None:
        for child in children:
            if child.code is None:
                signals.send(child.process, number)

    with signals.told(forward):
        for index, place in enumerate(places):
            # The coordinator would else listen on every address of the machine.
            env = {
                **os.environ,
                **place,
                "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}",
            }
            children.append(Child(index, [*shared, f"--process={index}"], env))
        return attend(children)


def check(train: list[str]) -> None:
    """Refuses flags that no run can have."""
    for name, value in (("processes", PROCESSES.value), ("devices", DEVICES.value)):
        if value < 1:
            raise ValueError(f"--{name}={value}: it must be at least 1")
    if not train:
        raise ValueError(
            "the flags of training are missing: give them after --, e.g. "
            f"{commands.typed('launch')} -- --config=configs/quickstart.py"
        )
    for word in train:
        if word.startswith(OWN):
            raise ValueError(f"{word} is set here for each process: leave it out")


def attend(children: list[Child]) -> int:
    """Waits for the end of all, and ends all when one has failed."""
    failed, deadline = None, float("inf")
    while any(child.code is None for child in children):
        time.sleep(0.1)
        wrong = [child for child in children if child.code not in (None, *IN_ORDER)]
        if wrong and failed is None:
            failed, deadline = wrong[0], time.monotonic() + LAST_WORDS_S
        if time.monotonic() > deadline:
            for child in children:
                if child.code is None:
                    child.kill()
    for child in children:
        child.reader.join()
    codes = [child.code or 0 for child in children if not child.ended_here]
    if failed:
        tell(failed, children)
    return max(codes)


def tell(failed: Child, children: list[Child]) -> None:
    """Says which process failed first, and shows what the first one did not say."""
    first = children[0]
    for child in children[1:]:
        own = child.code not in (*IN_ORDER, first.code) and not child.ended_here
        # Of those that failed alike, the first says why; a mistake is the same in all.
        own = own or (child is failed and failed.code != 2)
        if own and not VERBOSE.value:
            print(*(f"[{child.index}] {line}" for line in child.lines), sep="", end="")
    code = failed.code or 0
    if code == 2:  # a mistake: its sentence says all
        return
    how = f"with exit code {code}"
    if 128 < code <= 128 + signal.NSIG:
        how = f"by {signal.Signals(code - 128).name}"
    print(
        f"process {failed.index} of {len(children)} ended {how}, so all were ended; "
        "the same command goes on from the last checkpoint",
        file=sys.stderr,
    )


def environments(processes: int, devices: int) -> list[dict[str, str]]:
    """Returns what the environment of each process says of its GPUs."""
    found = gpus()
    if found and processes * devices > len(found):
        raise ValueError(
            f"--processes={processes} --devices={devices} needs {processes * devices} "
            f"GPUs but there are {len(found)}: {', '.join(found)}; with "
            "JAX_PLATFORMS=cpu in the environment they are devices of the CPU"
        )
    parts = [found[i * devices : (i + 1) * devices] for i in range(processes)]
    return [{"CUDA_VISIBLE_DEVICES": ",".join(part)} if part else {} for part in parts]


def gpus() -> list[str]:
    """Returns the GPUs that may be used, by number or name."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return []
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        names = itertools.takewhile(lambda n: n != "-1", named.split(","))
        return [name for name in names if name]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    lines = [line for line in listed.stdout.splitlines() if line.startswith("GPU ")]
    return [str(number) for number in range(len(lines))]


def free_port() -> int:
    """Returns a port of the loopback address that nobody listens on."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


if __name__ == "__main__":
    at = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    sys.argv, after = sys.argv[:at], sys.argv[at + 1 :]
    door.run(lambda _: main(after), __doc__)
