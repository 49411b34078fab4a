"""Measure gpt_jax against what people would use instead, on this machine.

  python -m experiments.bench --rows=train_step,decode --out=bench.jsonl
  python -m experiments.bench --rows=time_to_loss --text=tinyshakespeare.txt --seeds=3
  python -m experiments.bench --toy --repeats=1
  python -m experiments.bench --table=bench.jsonl --page=docs/performance.md

Each row runs beside its peer, A-B-A-B, every side in a process of its own; the medians,
their ratio as speeds (2 = twice as fast) and the spread (interquartile range / median)
are printed as a Markdown table, and --out keeps a JSON line for each row and shape.
The first thing measured is the machine: matmul rate and memory bandwidth.

  python -m experiments.bench --gpu_suite --out=gpu.jsonl

--gpu_suite is for a card that is lent for ten minutes: first whether the GPU computes
what the CPU does, then the rows below, the longest last. Each line is written as soon
as it is measured; what does not begin within the time is said to be left out.

Rows: train_step time_to_loss decode prepare loader checkpoint compile startup memory
population serving, and on a GPU gpu_correct gpu_train_124m gpu_train_1.5b
gpu_time_to_loss gpu_decode gpu_ablation gpu_population.
The peers: pip install -r requirements.txt -c requirements-extras.txt torch transformers
A row that cannot be measured says why. All of them take about an hour on 2 cores; run
them on a quiet machine.
"""

import tempfile
import time

from absl import flags

from experiments import door
from gpt_jax import names

ROWS = flags.DEFINE_list("rows", [], "Which rows; none = all of them.")
OUT = door.define_path("out", "", "Append a JSON line for each row and shape.")
REPEATS = flags.DEFINE_integer("repeats", 5, "Measurements of each side.")
SECONDS = flags.DEFINE_float("seconds", 2.0, "Length of a measurement of a rate.")
SEEDS = flags.DEFINE_integer("seeds", 3, "Runs of each side in a race to a loss.")
EVAL_EVERY = flags.DEFINE_multi_integer(
    "eval_every",
    [50, 250],
    "Steps between evaluations in a race to a loss, on both sides; repeatable.",
)
TEXT = door.define_path(
    "text", "tinyshakespeare", "What is learnt in such a race: a corpus or a file."
)
MEGABYTES = flags.DEFINE_float("megabytes", 100.0, "Text that the row prepare encodes.")
TOY = flags.DEFINE_bool("toy", False, "Tiny sizes: does it run? Figures mean nothing.")
LIMIT_S = flags.DEFINE_float("limit_s", 3600.0, "Longest wait for one measurement.")
GPU_SUITE = flags.DEFINE_bool(
    "gpu_suite", False, "The rows for a GPU, within ten minutes; see above."
)
SUITE_S = flags.DEFINE_float("suite_s", 600.0, "How long --gpu_suite may take.")
TABLE = door.define_path("table", "", "Measure nothing; show this JSONL file.")
PAGE = door.define_path("page", "", "With --table: a Markdown file to update.")
PLOT = door.define_path("plot", "", "Draw loss against wall time into this PNG.")


def main(_: list[str]) -> int:
    """Measures rows, or shows what was measured; returns the exit code."""
    for flag in (OUT, PAGE, PLOT):
        if flag.value:
            door.check_writable(flag.name, flag.value)

    from experiments.benches import report

    lines = report.read(TABLE.value) if TABLE.value else _measure()
    if PAGE.value:
        report.rewrite(PAGE.value, lines)
    else:
        print(report.page(lines))
    if PLOT.value and not report.plot(lines, PLOT.value):
        raise ValueError("--plot needs a line of time_to_loss with both sides")
    return int(any(line["failed"] for line in lines))


def _measure() -> list[dict]:
    from experiments.benches import cpu, gpu, machine, match, report, serving
    from experiments.benches.setting import Setting

    table = cpu.ROWS | serving.ROWS | gpu.ROWS
    for name in ROWS.value:
        names.choose("--rows", name, table)
    numbers = [("repeats", REPEATS.value), ("seeds", SEEDS.value)]
    for name, value in [*numbers, *(("eval_every", x) for x in EVAL_EVERY.value)]:
        if value < 1:
            raise ValueError(f"--{name}={value} must be at least 1")
    if GPU_SUITE.value and ROWS.value:
        raise ValueError("--gpu_suite has rows of its own: leave --rows out")
    wanted = ROWS.value or list(gpu.SUITE if GPU_SUITE.value else table)
    end = time.monotonic() + (SUITE_S.value if GPU_SUITE.value else float("inf"))
    repeats = min(2, REPEATS.value) if GPU_SUITE.value else REPEATS.value
    lines = []
    with tempfile.TemporaryDirectory(prefix="gpt_jax-bench-") as folder:
        print("measuring the machine", flush=True)
        ceilings = machine.ceilings(toy=TOY.value, limit_s=LIMIT_S.value)
        setting = Setting(
            folder=folder,
            text=_text(folder) if any("time_to_loss" in x for x in wanted) else "",
            toy=TOY.value,
            eval_every=(250,) if GPU_SUITE.value else tuple(EVAL_EVERY.value),
            seeds=1 if GPU_SUITE.value else SEEDS.value,
            megabytes=0.2 if TOY.value else MEGABYTES.value,
            seconds=0.0 if TOY.value else SECONDS.value,
        )
        for one in [one for name in wanted for one in table[name](setting)]:
            left = end - time.monotonic()
            if left <= 0:
                line = match.skipped(one, ceilings, "not measured: no time was left")
            else:
                line = match.play(
                    one,
                    repeats=repeats,
                    limit_s=min(left, LIMIT_S.value),
                    machine=ceilings,
                    say=lambda text: print(text, flush=True),
                )
            print(report.sentence(line), flush=True)
            if OUT.value:
                report.append(OUT.value, line)
            lines.append(line)
    return lines


def _text(folder: str) -> str:
    """Returns the path of the text to learn."""
    from pathlib import Path

    from configs import common
    from gpt_jax import downloads

    if TOY.value:
        from experiments.benches import texts

        path = Path(folder) / "toy.txt"
        texts.write_text(path, 30_000, "builtin:json")
        return str(path)
    if TEXT.value in downloads.DOWNLOADS:
        return str(downloads.fetch(TEXT.value, common.base().data.cache))
    if not Path(TEXT.value).is_file():
        raise ValueError(f"--text={TEXT.value} is neither a file nor a known corpus")
    return str(Path(TEXT.value).resolve())


if __name__ == "__main__":
    door.run(main, __doc__)
