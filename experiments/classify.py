"""Label texts with a classifier, and say how good it is.

  python -m experiments.classify --run=runs/spam --text="You won! Call 0900 now"
  python -m experiments.classify --run=runs/spam --file=messages.txt --json=out.json
  echo "See you at six" | python -m experiments.classify --run=runs/spam --file=-
  python -m experiments.classify --run=runs/spam --labelled=mine.csv --image=mine.png
  python -m experiments.classify --run=runs/spam --labelled=raw.tsv --columns=label,text
  python -m experiments.classify --run=runs/spam --test

--text (repeatable) and --file (a text in each line; - is stdin) print the likeliest
class of each text and how likely every class is. --labelled reads a table (.tsv, .csv,
.jsonl, .json, hf:<dataset>) and prints accuracy, macro F1 and the confusion matrix,
which --image draws. Its columns are called as in training unless --text_column,
--label_column or --columns (all names, for a file without a header) say otherwise.

--test judges the run with the test part of its own table, once: the report is kept in
the run folder (test_report.json, .png), and a second --test shows what is kept. Choose
everything by the validation part, which training reports, and look here last.
"""

import json
import sys
from pathlib import Path

from absl import flags

from experiments import door

RUN = door.define_path("run", "", "Run folder of a classifier.")
TEXT = flags.DEFINE_multi_string("text", [], "Text to label; repeatable.")
FILE = door.define_path("file", "", "File with a text in each line; - is stdin.")
LABELLED = door.define_path("labelled", "", "Table of labelled texts to report on.")
TEXT_COLUMN = flags.DEFINE_string("text_column", "", "Its column of the text.")
LABEL_COLUMN = flags.DEFINE_string("label_column", "", "Its column of the class.")
COLUMNS = flags.DEFINE_list("columns", [], "Its columns, where it has no header.")
SKIP = flags.DEFINE_bool(
    "skip", False, "Leave out empty texts and unknown labels, and count them."
)
TEST = flags.DEFINE_bool("test", False, "Report on the run's test part, read once.")
JSON = door.define_path("json", "", "File for what is printed, as JSON.")
IMAGE = door.define_path("image", "", "PNG file for the confusion matrix.")
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)


# Which flags go with what is asked for, besides --run and --json.
READS = {
    "text": ("file", "skip", "step"),
    "file": ("text", "skip", "step"),
    "labelled": ("text_column", "label_column", "columns", "skip", "image", "step"),
    "test": ("image", "step"),
}


def main(_: list[str]) -> None:
    """Labels or reports; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/spam")
    step = door.step(STEP.value)
    asked = (bool(TEXT.value or FILE.value), bool(LABELLED.value), TEST.value)
    if sum(asked) != 1:
        raise ValueError(
            "give texts (--text, --file), or a table (--labelled), or --test: "
            "one of the three"
        )
    flags_of = {"text": TEXT, "file": FILE, "labelled": LABELLED, "test": TEST}
    door.only_with(next(name for name in READS if flags_of[name].value), READS)
    for flag in (JSON, IMAGE):
        if flag.value:
            door.check_writable(flag.name, flag.value)
    if TEST.value and (kept := Path(RUN.value) / "test_report.json").is_file():
        numbers = json.loads(kept.read_text(encoding="utf-8"))
        if STEP.value and step != numbers["step"]:
            raise ValueError(
                f"--step={STEP.value}: the test part was read once, with step "
                f"{numbers['step']}, and is not read again"
            )
        print(f"the test part was read before; this is what {kept} keeps")
        _draw(_report_of(numbers), IMAGE.value)
        _show(numbers)
        return
    texts = [*TEXT.value, *(_lines(FILE.value) if FILE.value else [])]

    from gpt_jax import commands, programs, runs

    run = runs.open(RUN.value, step=step)
    if run.classes is None:
        raise ValueError(
            f"{RUN.value} is a language model; a classifier is made of it by "
            f"{commands.typed('train')} --config=configs/classify.py:run={RUN.value}"
        )
    programs.use_cache(run.config.compile_cache)
    if LABELLED.value:
        _report_on_table(run)
    elif TEST.value:
        _report_on_test(run)
    else:
        _label(run, texts)


def _label(run, texts: list[str]) -> None:
    from gpt_jax import classify
    from gpt_jax.tasks.classify import probabilities

    if SKIP.value:
        used = [text for text in texts if text.strip()]
        if len(used) < len(texts):
            print(f"left out: {len(texts) - len(used)} empty texts", file=sys.stderr)
        texts = used
    if not texts:
        raise ValueError("there is no text to label")
    if blank := [i for i, text in enumerate(texts, start=1) if not text.strip()]:
        raise ValueError(f"text {blank[0]} is empty; --skip leaves such out")
    done = classify.labelled(texts, probabilities(run, texts), run.classes.labels)
    for one in done:
        chances = ", ".join(f"{k} {v:.4f}" for k, v in one.probabilities.items())
        print(f"{one.label}  ({chances})  {' '.join(one.text.split())}")
    _write_json([one._asdict() for one in done])


def _report_on_table(run) -> None:
    from gpt_jax import labelled
    from gpt_jax.tasks import classify

    task = run.config.task
    # How rows are divided is the business of training's own table, not of this one.
    columns = labelled.Columns(
        text=TEXT_COLUMN.value or task.text_column,
        label=LABEL_COLUMN.value or task.label_column,
        part="",
        names=tuple(COLUMNS.value),
    )
    unread: list[str] = []
    bad = unread.append if SKIP.value else None
    rows = labelled.read(LABELLED.value, columns, run.config.data.cache, bad)
    rows, left = labelled.clean(rows, run.classes.labels, skip=SKIP.value)
    if unread:
        left[f"that cannot be read (the first: {unread[0]})"] = len(unread)
    for why, count in left.items():
        print(f"left out: {count} {why}", file=sys.stderr)
    found = classify.report(run, rows)
    _draw(found, IMAGE.value)
    _show({**found.numbers(), "step": run.step})


def _report_on_test(run) -> None:
    from gpt_jax.tasks import classify

    result = classify.report(run, classify.test_rows(run))
    numbers = {**result.numbers(), "step": run.step}
    text = json.dumps(numbers, indent=1) + "\n"
    (run.folder / "test_report.json").write_text(text, encoding="utf-8")
    _draw(result, IMAGE.value or str(run.folder / "test_report.png"))
    _show(numbers)


def _show(numbers: dict) -> None:
    """Prints a report and writes it where --json says."""
    print(_report_of(numbers).text())
    _write_json(numbers)


def _report_of(numbers: dict):
    """Returns the report that its numbers were written from."""
    from gpt_jax import classify

    fields = {key: value for key, value in numbers.items() if key != "step"}
    return classify.Report(**fields)


def _draw(found, path: str) -> None:
    from gpt_jax import plots

    if path:
        plots.confusion(path, found.labels, found.confusion)
        print(f"the picture  {path}")


def _write_json(content) -> None:
    if JSON.value:
        text = json.dumps(content, indent=1, ensure_ascii=False) + "\n"
        Path(JSON.value).write_text(text, encoding="utf-8")


def _lines(path: str) -> list[str]:
    """Returns the lines of a file or of stdin."""
    from gpt_jax import files, plaintext

    if path != "-":
        file = files.expand(path)
        lines = (plaintext.decoded(file, line) for line in plaintext.lines(file))
        return [line.rstrip("\r\n") for line in lines]
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig").removesuffix("\n")
        return [line.removesuffix("\r") for line in text.split("\n")]
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--file=- is not UTF-8 text (byte {error.start}); convert it"
        ) from error


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
