"""Numbers of a run: the record, the progress bar, and how fast the device works.

`metrics.jsonl` is the record; TensorBoard and Weights & Biases are copies of it.
"""

import hashlib
import importlib
import json
import logging
import math
import os
import re
import textwrap
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
# Where TensorBoard shows the numbers whose names begin with no set of examples.
GROUPS = {
    **dict.fromkeys(("lr", "grad_norm", "skipped"), "update"),
    **dict.fromkeys(("tokens_per_second", "mfu"), "speed"),
    **dict.fromkeys(("tokens", "seconds"), "progress"),
}
PLAIN_EVERY_S = 5.0  # the least time between two progress lines in a log file


class Writer:
    """Appends one JSON object a line to metrics.jsonl, flushed, and to its copies.

    A line holds the numbers of one step; lines of training and of evaluation may share
    a step. Names:
      step: updates made.
      tokens: training tokens seen, over all devices.
      seconds: wall time of the run, over all its sittings.
      train_loss: mean of the trained loss per target since the last line, in nats;
        other means that the task's loss knows, as train_reward, beside it.
      val_loss, val_perplexity, val_bpb: of the validation set: nats per target, its
        exponential, and bits per byte of text. Other sets: their name for "val".
      lr: learning rate.
      grad_norm: global norm of the gradient before clipping.
      tokens_per_second: training only, over all devices.
      mfu: model FLOP/s as a share of the devices' peak (PaLM, appendix B).
      skipped: updates left out because they were not finite, or a spike.
      sample_words: the share of the words of a sample that the training text has.
    A number that is not finite is written as null.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool,
        wandb: str,
        config: dict[str, Any] | None,
        resume_step: int,
    ):
        """Opens the record and cuts it back to `resume_step`.

        Args:
          folder: the run folder.
          tensorboard: also write TensorBoard events into `folder/tensorboard`.
          wandb: a Weights & Biases project to copy to; "" = none.
          config: what Weights & Biases shows as the config.
          resume_step: later lines are dropped; 0 starts over.

        Raises:
          ValueError: `wandb` is set but not installed, or the record is damaged.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        self._wandb = _open_wandb(folder, wandb, config) if wandb else None
        _cut(folder / FILE, resume_step)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._events = None
        if tensorboard:
            # Imported late: it takes long to load and may be off.
            module = importlib.import_module("tensorboardX")
            self._events = module.SummaryWriter(
                logdir=str(folder / "tensorboard"),
                purge_step=resume_step + 1 if resume_step else 0,
                flush_secs=10,  # so that a running TensorBoard stays fresh
                # Without bounds: nobody empties the queue of a thread that has died of
                # a full disk, and a full queue would hold up the training.
                max_queue=0,
            )

    def write(self, step: int, **numbers: Any) -> None:
        """Records numbers (anything `float` takes) of one step."""
        row = {name: _number(value) for name, value in numbers.items()}
        line = json.dumps({"step": int(step), **row}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        finite = {name: value for name, value in row.items() if value is not None}
        if self._events and not _alive(self._events):
            log.warning("TensorBoard's file cannot be written any more (a full disk?)")
            self._events = None
        if self._events:
            for name, value in finite.items():
                self._events.add_scalar(_tag(name), value, global_step=int(step))
        if self._wandb:
            self._wandb.log({"step": int(step), **finite})

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Shows texts that were written after a step in TensorBoard."""
        if self._events:  # indented, Markdown leaves their lines and signs alone
            blocks = [textwrap.indent(t, "    ", lambda line: True) for t in texts]
            text = "\n\n---\n\n".join(blocks)
            self._events.add_text("samples", text, global_step=int(step))

    def close(self) -> None:
        """Closes the record and its copies; a second call does nothing."""
        self._file.close()
        if self._events:
            self._events.close()
        if self._wandb:
            self._wandb.finish()
        self._events = self._wandb = None


def read(folder: str | Path) -> list[dict[str, Any]]:
    """Returns the lines of a run's record; null stays None.

    A last line that was cut short by a crash is left out.

    Raises:
      FileNotFoundError: the folder has no record.
      ValueError: another line is not a JSON object with a step.
    """
    path = Path(folder) / FILE
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist: {folder} holds no training run"
        )
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            row["step"] = int(row["step"])
        except (ValueError, TypeError, KeyError) as error:
            if number == len(lines):  # no newline after it: its write was cut short
                break
            raise ValueError(
                f"{path} line {number} is not a JSON object with a step: "
                f"{line[:60]!r}; delete that line"
            ) from error
        rows.append(row)
    return rows


class Progress:
    """Shows step, loss, speed and time left: a bar on a terminal, else plain lines."""

    def __init__(self, *, total: int, start: int):
        """Args: the last step of the run, and the step that it starts after."""
        self._total, self._start = total, start
        self._began: tuple[float, int] | None = None  # of the first update
        self._printed = -math.inf
        self._console = Console(highlight=False, markup=False, soft_wrap=True)
        self._bar = None
        if self._console.is_terminal:
            self._bar = Bar(
                TextColumn("step {task.completed:,.0f}/{task.total:,.0f}"),
                BarColumn(),
                TextColumn("{task.fields[text]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=self._console,
            )
            self._task = self._bar.add_task(
                "training", total=total, completed=start, text=""
            )
            self._bar.start()

    def update(self, step: int, **numbers: Any) -> None:
        """Shows a step and, of its numbers, those that `_describe` knows."""
        text = _describe(numbers)
        if self._bar:
            self._bar.update(self._task, completed=step, text=text)
            return
        now = time.monotonic()
        self._began = self._began or (now, step)
        if step >= self._total or now - self._printed >= PLAIN_EVERY_S:
            self._printed = now
            left = self._time_left(now, step)
            parts = [f"step {step:,}/{self._total:,}", text, left]
            print("  ".join(part for part in parts if part), flush=True)

    def print(self, text: str) -> None:
        """Prints lines above the bar."""
        if self._bar:
            self._console.print(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        """Leaves the bar where it stands; a second call does nothing."""
        if self._bar:
            self._bar.stop()
        self._bar = None

    def _time_left(self, now: float, step: int) -> str:
        began, first = self._began or (now, step)
        if step <= first or step >= self._total:
            return ""
        seconds = int((now - began) / (step - first) * (self._total - step))
        return f"{seconds // 3600}:{seconds // 60 % 60:02}:{seconds % 60:02} left"


class Silence:
    """A Progress that shows nothing, a Writer that writes nothing.

    Of a run among many, whose progress is shown, and of all processes but the first.
    """

    def write(self, step: int, **numbers: Any) -> None:
        """Does nothing."""

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Does nothing."""

    def update(self, step: int, **numbers: Any) -> None:
        """Does nothing."""

    def print(self, text: str) -> None:
        """Does nothing."""


class Throughput:
    """Training speed between two measurements; compilation and pauses do not count."""

    def __init__(
        self, *, flops_per_token: float, peak_flops: float | None, devices: int
    ):
        """Args: cost of a token, peak of one device (None = unknown), device count."""
        self._flops_per_token = flops_per_token
        self._peak = peak_flops * devices if peak_flops else None
        self._mark: tuple[int, float] | None = None

    def measure(self, tokens: int) -> dict[str, float]:
        """Returns "tokens_per_second" (and "mfu" of a known peak) since the last call.

        Call it when the device has finished the step. The first call only starts the
        clock, so what was compiled before it does not count: its answer is empty.

        Args:
          tokens: training tokens so far, over all devices.
        """
        now, mark = time.monotonic(), self._mark
        self._mark = (tokens, now)
        if mark is None or tokens <= mark[0] or now <= mark[1]:
            return {}
        rate = (tokens - mark[0]) / (now - mark[1])
        if not self._peak:
            return {"tokens_per_second": rate}
        return {
            "tokens_per_second": rate,
            "mfu": rate * self._flops_per_token / self._peak,
        }

    def pause(self) -> None:
        """Leaves out the time since the last measurement; call it after other work.

        Measure before that work: steps made in between would count without their time.
        """
        if self._mark:
            self._mark = (self._mark[0], time.monotonic())


# Dense bfloat16 FLOP/s of one JAX device, from the makers' data sheets (which often
# print the double, for sparse matrices). The first match wins.
PEAK_FLOPS = (
    (r"b200", 2250e12),  # NVIDIA HGX B200: 36 PFLOP/s sparse for 8 GPUs
    (r"h200 nvl", 835.5e12),  # NVIDIA H200 data sheet: 1,671 sparse
    (r"h200|gh200", 989.5e12),  # NVIDIA H200 data sheet: 1,979 sparse
    (r"h100 nvl", 835.5e12),  # NVIDIA H100 data sheet: 1,671 sparse
    (r"h100 pcie", 756e12),  # NVIDIA H100 data sheet, PCIe: 1,513 sparse
    (r"h100", 989.5e12),  # NVIDIA H100 data sheet, SXM: 1,979 sparse
    (r"a100", 312e12),  # NVIDIA A100 data sheet
    (r"l40s", 362.05e12),  # NVIDIA L40S data sheet
    (r"\bl4\b", 121e12),  # NVIDIA L4 data sheet: 242 sparse
    (r"a10g", 70e12),  # NVIDIA A10G data sheet
    (r"\ba10\b", 125e12),  # NVIDIA A10 data sheet
    (r"\bt4\b", 65e12),  # NVIDIA T4 data sheet: float16, the chip has no bfloat16
    (r"v100", 125e12),  # NVIDIA V100 data sheet, SXM2: float16, no bfloat16
    (r"tpu ?v6", 918e12),  # Google Cloud TPU v6e documentation ("TPU v6 lite")
    (r"tpu ?v5 ?(lite|e)", 197e12),  # Google Cloud TPU v5e documentation
    (r"tpu ?v5", 459e12),  # Google Cloud TPU v5p documentation ("TPU v5", "TPU v5p")
    (r"tpu ?v4", 275e12),  # Google Cloud TPU v4 documentation
    (r"tpu ?v3", 61.5e12),  # Google Cloud: 123 for a chip, which JAX shows as two
    (r"tpu ?v2", 22.5e12),  # Google Cloud: 45 for a chip, which JAX shows as two
)


def peak_flops(device_kind: str) -> float | None:
    """Returns the dense bfloat16 FLOP/s of a device by `jax.Device.device_kind`.

    None for a CPU and for a device that the table does not know.
    """
    kind = device_kind.lower()
    return next((peak for name, peak in PEAK_FLOPS if re.search(name, kind)), None)


def flops_per_token(
    n_params: int, *, n_layers: int, n_heads: int, head_dim: int, seq_len: int
) -> float:
    """Returns the FLOPs that training on one token needs: 6 N + 12 L H K T.

    Forward and backward pass of the matrices and of full attention, without what
    rematerialisation repeats (Chowdhery et al. 2022, PaLM, appendix B).
    """
    return 6.0 * n_params + 12.0 * n_layers * n_heads * head_dim * seq_len


def _cut(path: Path, resume_step: int) -> None:
    """Keeps the lines up to a step; step 0 keeps none, as it is written again."""
    if not path.exists():
        return
    rows = [row for row in read(path.parent) if 0 < resume_step >= row["step"]]
    part = path.with_suffix(".part")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    os.replace(part, path)


def _tag(name: str) -> str:
    """Returns what TensorBoard calls a number: val/loss, update/lr, speed/mfu."""
    group = GROUPS.get(name)
    return f"{group}/{name}" if group else name.replace("_", "/", 1)


def _number(value: Any) -> int | float | None:
    """Returns a JSON number, or None where the value is not finite."""
    if isinstance(value, int):
        return int(value)
    value = float(value)
    return value if math.isfinite(value) else None


def _alive(events: Any) -> bool:
    """Whether the thread that writes TensorBoard's file is: else its queue fills up.

    It dies of its first OSError, and whoever adds to the full queue waits for ever.
    """
    writer = getattr(events.file_writer, "event_writer", None)
    worker = getattr(writer, "_worker", None)
    return worker is None or worker.is_alive()


def _describe(numbers: dict[str, Any]) -> str:
    formats = {
        "members": "{:,} members",
        "best": "best {:.4f}",
        "train_loss": "loss {:.4f}",
        "tokens_per_second": "{:,.0f} tok/s",
        "mfu": "MFU {:.1%}",
    }
    known = [(text, numbers.get(name)) for name, text in formats.items()]
    return "  ".join(text.format(value) for text, value in known if value is not None)


def _open_wandb(folder: Path, project: str, config: dict[str, Any] | None):
    """Starts or continues the W&B run of a folder."""
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config.wandb is {project!r} but the package wandb is not installed: "
            "`pip install wandb`, or leave config.wandb empty"
        ) from error
    run = wandb.init(
        project=project,
        name=folder.name,
        id=hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:16],
        resume="allow",
        config=config,
        dir=str(folder),
    )
    # Our own step as the axis: a resumed run may go back, which W&B's counter cannot.
    run.define_metric("*", step_metric="step")
    return run
