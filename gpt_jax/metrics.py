"""Numbers of a run: the record, its copies, and how fast the device works.

`metrics.jsonl` is the record; TensorBoard and Weights & Biases are copies of it.
"""

import importlib
import json
import logging
import math
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gpt_jax import files

log = logging.getLogger(__name__)

FILE = "metrics.jsonl"
# Where TensorBoard shows the numbers whose names begin with no set of examples.
GROUPS = {
    **dict.fromkeys(("lr", "grad_norm", "skipped"), "update"),
    **dict.fromkeys(("tokens_per_second", "mfu"), "speed"),
    **dict.fromkeys(("tokens", "bytes", "seconds", "evaluated_since"), "progress"),
}


class Writer:
    """Appends one JSON object a line to metrics.jsonl, flushed, and to its copies.

    A line holds the numbers of one step; lines of training and of evaluation may share
    a step. Names:
      step: updates made.
      tokens: training tokens seen, over all devices.
      bytes: of training text, that these tokens stand for; where `max_bytes` is set.
      seconds: wall time of the run, over all its sittings.
      train_loss: mean of the trained loss per target since the last line, in nats;
        other means that the task's loss knows, as train_reward, beside it.
      val_loss, val_perplexity, val_bpb: of the validation set: nats per target, its
        exponential, and bits per byte of text. Other sets: their name for "val".
      evaluated_since: where evaluations are of other data or windows than they were:
        the first step whose numbers compare with those of this line.
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
        if wandb:
            _need_wandb(wandb)
        _cut(folder / FILE, resume_step)
        self._file = open(folder / FILE, "a", encoding="utf-8")  # noqa: SIM115
        self._copies: dict[str, Any] = {}
        if tensorboard:
            self._copy("TensorBoard", lambda: TensorBoard(folder, resume_step))
        if wandb:
            self._copy("Weights & Biases", lambda: Wandb(folder, wandb, config))

    def write(self, step: int, **numbers: Any) -> None:
        """Records numbers (anything `float` takes) of one step.

        Raises:
          OSError: the record cannot be written; a copy that cannot is told of.
        """
        row = {name: _number(value) for name, value in numbers.items()}
        line = json.dumps({"step": int(step), **row}, allow_nan=False)
        self._file.write(line + "\n")
        self._file.flush()
        finite = {name: value for name, value in row.items() if value is not None}
        for name, copy in list(self._copies.items()):
            self._copy(name, lambda copy=copy: copy.write(int(step), finite))

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Shows texts that were written after a step in the copies that show texts."""
        for name, copy in list(self._copies.items()):
            self._copy(name, lambda copy=copy: copy.samples(int(step), texts))

    def close(self) -> None:
        """Closes the record and its copies; a second call does nothing."""
        copies, self._copies = self._copies, {}
        for name, copy in copies.items():
            self._copy(name, copy.close)
        self._file.close()

    def _copy(self, name: str, work: Callable[[], Any]) -> None:
        """Opens a copy or has it do something; one that fails is told of and left."""
        try:
            if made := work():
                self._copies[name] = made
        except Exception as error:  # the edge to what others have written
            log.warning("%s fails, the run goes on without it: %s", name, error)
            self._copies.pop(name, None)


class TensorBoard:
    """The numbers as events in a run folder's `tensorboard/`."""

    def __init__(self, folder: Path, resume_step: int):
        # Imported late: it takes long to load and may be off.
        module = importlib.import_module("tensorboardX")
        self._events = module.SummaryWriter(
            logdir=str(folder / "tensorboard"),
            purge_step=resume_step + 1 if resume_step else 0,
            flush_secs=10,  # so that a running TensorBoard stays fresh
            max_queue=0,  # without bounds: a full queue would hold up the training
        )

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Writes the numbers of a step.

        Raises:
          OSError: the thread that writes the file has died of its first error. Whoever
            waits for its queue to be empty would wait for ever.
        """
        writer = self._events.file_writer.event_writer
        worker = getattr(writer, "_worker", None)  # a private part, which may go
        if worker is not None and not worker.is_alive():
            writer._event_queue.cancel_join_thread()
            raise OSError("its file cannot be written any more (a full disk?)")
        for name, value in numbers.items():
            self._events.add_scalar(_tag(name), value, global_step=step)

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Shows texts, as they are."""
        # Indented, Markdown leaves their lines and signs alone.
        blocks = [textwrap.indent(text, "    ", lambda line: True) for text in texts]
        text = "\n\n---\n\n".join(blocks)
        self._events.add_text("samples", text, global_step=step)

    def close(self) -> None:
        """Writes what is left; raises as `write` does."""
        self.write(0, {})
        self._events.close()


class Wandb:
    """The numbers as a run of Weights & Biases; that of the same folder goes on."""

    def __init__(self, folder: Path, project: str, config: dict[str, Any] | None):
        wandb = importlib.import_module("wandb")
        self._run = wandb.init(
            project=project,
            name=folder.name,
            id=files.digest(str(folder.resolve()))[:16],
            resume="allow",
            config=config,
            dir=str(folder),
        )
        # Our own step as the axis: a resumed run may go back, which W&B's counter
        # cannot.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """Logs the numbers of a step."""
        self._run.log({"step": step, **numbers})

    def samples(self, step: int, texts: Sequence[str]) -> None:
        """Shows none: they are in the run folder's samples.md."""

    def close(self) -> None:
        """Ends this sitting."""
        self._run.finish()


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


def points(rows: Sequence[Mapping[str, Any]], name: str) -> list[tuple[int, Any]]:
    """Returns (step, value) of every line that has a value of this name."""
    return [(row["step"], row[name]) for row in rows if row.get(name) is not None]


def since(rows: Sequence[Mapping[str, Any]]) -> int:
    """Returns the first step of a record whose evaluations compare with the last."""
    return max((int(row.get("evaluated_since", 0)) for row in rows), default=0)


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


def flops_per_token(
    n_params: int, *, n_layers: int, n_heads: int, head_dim: int, seq_len: int
) -> float:
    """Returns the FLOPs that training on one token needs: 6 N + 12 L H K T.

    Forward and backward pass of the matrices and of full attention, without what
    rematerialisation repeats (Chowdhery et al. 2022, PaLM, appendix B).
    """
    return 6.0 * n_params + 12.0 * n_layers * n_heads * head_dim * seq_len


def _need_wandb(project: str) -> None:
    try:
        importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config.wandb is {project!r} but the package wandb is not installed: "
            "`pip install wandb`, or leave config.wandb empty"
        ) from error


def _cut(path: Path, resume_step: int) -> None:
    """Keeps the lines up to a step; step 0 keeps none, as it is written again."""
    if not path.exists():
        return
    rows = [row for row in read(path.parent) if 0 < resume_step >= row["step"]]
    files.write(path, "".join(json.dumps(row) + "\n" for row in rows))


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
