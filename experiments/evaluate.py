"""Measure how good a run is; several runs stand side by side.

  python -m experiments.evaluate --run=runs/shakespeare --text=val
  python -m experiments.evaluate --run=runs/a --run=runs/b --text=book.txt --stride=32
  python -m experiments.evaluate --run=runs/base --run=runs/sft --rows=test.json
  python -m experiments.evaluate --run=runs/sft --rows=test.json \\
      --judge=http://localhost:11434/v1 --judge_model=llama3
  python -m experiments.evaluate --run=runs/a --choices=questions.jsonl
  python -m experiments.evaluate --run=runs/a --copied_from=book.txt --count=20
  python -m experiments.evaluate --run=runs/a --lm_eval=lambada_openai

--text     loss, perplexity and bits per byte of a text, every token once. --stride
           below the context gives each token more to be predicted from, for more time.
           "val" is the run's own validation text.
--rows     answers to a test file (JSON or JSONL: instruction, input, output; or chat
           messages), kept in OUT; the same command goes on where it was stopped.
           Scored by exact match, token F1, ROUGE-L and chrF, and by --judge if given.
--choices  multiple choice (JSONL: context, choices, answer) by log-likelihood.
--copied_from  the longest spans of sampled texts that stand in another text.
--lm_eval  tasks of EleutherAI's harness: pip install -r requirements-lm-eval.txt

A Markdown table is printed; --out=FOLDER keeps it with everything behind it as JSON.
The judge's API key is read from the environment variable that --judge_key_env names.
"""

import json
import os
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from gpt_jax import sampling

RUN = door.define_multi_path("run", "Run folder; repeatable.")
OUT = door.define_path(
    "out", "", "Folder to write to; --rows needs one (default: runs/evaluate)."
)
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "", ["", "params", "ema"], "Which weights; empty = ema where kept."
)
BITS = door.define_bits()
SEED = flags.DEFINE_integer("seed", 1337, "Of sampling and of the intervals.")

TEXT = door.define_path("text", "", "A file, a corpus, or val.")
FIELD = flags.DEFINE_string("field", "text", "The field of a .jsonl row with the text.")
CACHE = flags.DEFINE_string("cache", "~/.cache/gpt_jax", "Where downloads are kept.")
WINDOW = flags.DEFINE_integer("window", 0, "Tokens read at once; 0 = the context.")
STRIDE = flags.DEFINE_integer("stride", 0, "Tokens a window scores; 0 = all of it.")

ROWS = door.define_path("rows", "", "Test file whose rows are answered.")
TEMPLATE = flags.DEFINE_string(
    "template", "", "How rows are written: a template's name; empty = the run's own."
)
SKIP_BAD_ROWS = flags.DEFINE_bool(
    "skip_bad_rows", False, "Leave out and count rows that cannot be used."
)
LIMIT = flags.DEFINE_integer("limit", 0, "At most so many rows; 0 = all.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Most tokens of a text.")
TEMPERATURE = flags.DEFINE_float(
    "temperature", -1.0, "-1 = 0 (the likeliest) for --rows, 0.8 for --copied_from."
)

JUDGE = flags.DEFINE_string("judge", "", "Endpoint that judges, up to and with /v1.")
JUDGE_MODEL = flags.DEFINE_string("judge_model", "llama3", "Its name there.")
JUDGE_PROMPT = door.define_path(
    "judge_prompt", "", "File with {question}, {reference}, {answer}; empty = ours."
)
JUDGE_KEY_ENV = flags.DEFINE_string(
    "judge_key_env", "", "Environment variable that holds the API key."
)
JUDGE_TRIES = flags.DEFINE_integer("judge_tries", 5, "Before the judge counts as down.")
JUDGE_WAIT_S = flags.DEFINE_float(
    "judge_wait_s", 1.0, "Before the second try; doubles."
)
JUDGE_TIMEOUT_S = flags.DEFINE_float("judge_timeout_s", 120.0, "For one reply.")
JUDGE_PROSE = flags.DEFINE_enum(
    "judge_prose", "count", ["count", "refuse"], "When the judge gives no number."
)

CHOICES = door.define_path("choices", "", "JSONL file of multiple-choice questions.")

COPIED_FROM = door.define_path("copied_from", "", "A file or corpus: the original.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Begins the sampled texts.")
COUNT = flags.DEFINE_integer("count", 20, "Sampled texts for each prompt.")
LEAST = flags.DEFINE_multi_integer(
    "least", [20, 50, 100], "Shares are of copies of so many characters; repeatable."
)

LM_EVAL = flags.DEFINE_list("lm_eval", [], "Tasks of the harness, with commas.")
LM_EVAL_TASKS = door.define_path("lm_eval_tasks", "", "Folder of your own tasks.")

# Which flags each of the measures reads, besides --run, --step, --weights and --seed.
OF_ANSWERS = ("max_new_tokens", "temperature")
READS = {
    "text": ("field", "cache", "window", "stride"),
    "rows": ("template", "skip_bad_rows", "limit", "judge", *OF_ANSWERS),
    "choices": ("limit",),
    "copied_from": ("field", "cache", "prompt", "count", "least", *OF_ANSWERS),
    "lm_eval": ("lm_eval_tasks", "limit"),
}
OF_THE_JUDGE = tuple(
    f"judge_{name}"
    for name in ("model", "prompt", "key_env", "tries", "wait_s", "timeout_s", "prose")
)

PROMPT_OF_THE_JUDGE = """\
You grade an answer to an instruction, on a scale from 0 to 100, where 100 is best.

Instruction:
{question}

A correct answer:
{reference}

The answer to grade:
{answer}

Reply with one whole number and nothing else."""


def main(_: list[str]) -> None:
    """Evaluates; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/quickstart")
    kinds = (
        (TEXT, _text),
        (ROWS, _rows),
        (CHOICES, _choices),
        (COPIED_FROM, _copied),
        (LM_EVAL, _harness),
    )
    given = [(flag.name, measure) for flag, measure in kinds if flag.value]
    if len(given) != 1:
        names = ", ".join(f"--{flag.name}" for flag, _ in kinds)
        raise ValueError(f"give one of {names} (see --help)")
    (name, measure) = given[0]
    door.only_with(name, READS)
    if not JUDGE.value:
        door.only_with(name, {name: (), "judge": OF_THE_JUDGE})
    if OUT.value or ROWS.value:
        door.check_writable("out", str(_out()), folder=True)

    from gpt_jax import files, screen

    heads, lines, details = measure()
    table = screen.table(heads, lines)
    kept = ""
    if OUT.value or ROWS.value:  # before it is shown, which may fail
        files.write(_out() / "scores.md", table + "\n")
        files.write_json(_out() / "scores.json", details)
        kept = f"\n\n  kept in   {_out()}/scores.md and scores.json"
    print(f"{table}{kept}")


def _out() -> Path:
    return Path(OUT.value or "runs/evaluate")


def _opened():
    """Yields the runs one after the other, with their names."""
    from gpt_jax import commands, programs, runs, sharding

    # What multiplies weights of few bits takes all cores by itself.
    one = 1 if BITS.value else 0
    sharding.set_cpu_devices(64, data=-1, fsdp=1, tensor=1, cpu_devices=one)
    which = {"step": door.step(STEP.value), "weights": WEIGHTS.value}
    for folder in RUN.value:
        run = runs.open(folder, **which, bits=BITS.value)
        if run.model.cfg.n_classes:
            raise ValueError(
                f"{folder} sorts texts into classes: {commands.typed('classify')}"
            )
        programs.use_cache(run.config.compile_cache)
        yield _name(folder), run


def _name(folder: str) -> str:
    """Returns a run's folder, without its parent where that tells nothing apart."""
    names = [Path(other).name for other in RUN.value]
    name = Path(folder).name
    return name if names.count(name) == 1 else folder


def _text():
    """Returns the table's head and lines, and all numbers by run."""
    from gpt_jax import corpora, screen
    from gpt_jax.evaluate import likelihood, text

    found = {}
    for name, run in _opened():
        scorer = likelihood.scorer(run.model, run.params)
        if TEXT.value == "val" and not Path("val").exists():
            texts = [_validation(run)]
        else:
            corpus = corpora.open(TEXT.value, field=FIELD.value, cache=CACHE.value)
            texts = text.documents(corpus, run.tokenizer)
        length = WINDOW.value or run.model.cfg.context_length
        with screen.counted(f"{name}: windows", None) as show:
            found[name] = text.evaluate(
                scorer,
                texts,
                length=length,
                stride=STRIDE.value or length,
                show=show,
            )
    heads = ("run", "loss", "perplexity", "bits per byte", "tokens", "context from")
    lines = [
        (
            name,
            f"{n['loss']:.4f}",
            f"{n['perplexity']:.2f}",
            f"{n['bpb']:.4f}",
            f"{n['tokens']:,}",
            n["context"],
        )
        for name, n in found.items()
    ]
    return heads, lines, found


def _validation(run):
    """Returns the text that a run was validated on, as one document.

    Raises:
      ValueError: there is none, or it is no longer the same.
    """
    from gpt_jax import checks, prepare
    from gpt_jax.evaluate import text

    told = run.folder / "data.json"  # weights that were converted have none
    if run.config.task.name != "lm" or not told.is_file():
        raise ValueError(f"--text=val: {run.folder} was not trained on running text")
    keys = dict(run.config.data)
    for key in ("seq_len", "stride"):
        keys.pop(key)
    if (
        checks.begins(run.config.init_from) != checks.RANDOM
    ):  # it learnt in the tokens of the run that it started from
        keys["tokenizer"] = str(run.folder / "tokenizer.json")
    prepared = prepare.prepare(**keys, progress=True)
    if prepared.fingerprint != json.loads(told.read_text("utf-8"))["fingerprint"]:
        raise ValueError(
            f"--text=val: {keys['source']} is no longer the text that {run.folder} was "
            "trained on; put it back, or name a file with --text"
        )
    ids = prepared.val[:].astype("int32")
    size = int(run.tokenizer.token_bytes()[ids].sum())
    return text.document(ids, size, run.tokenizer)


def _rows():
    """Answers the rows with every run, and scores the answers."""
    from gpt_jax import chat, instructions, screen
    from gpt_jax.evaluate import answers, compare

    judge = _judge() if JUDGE.value else None
    lost: list[str] = []
    leave_out = lost.append if SKIP_BAD_ROWS.value else None
    test = instructions.read_file(ROWS.value, leave_out)
    test = test[: LIMIT.value or len(test)]
    found, scored = {}, {}
    for name, run in _opened():
        template = TEMPLATE.value or chat.template_of(run.folder) or "plain"
        chat.check(template)
        asked, skipped = answers.ask(
            test,
            run.tokenizer,
            template,
            context=run.model.cfg.context_length,
            skip=SKIP_BAD_ROWS.value,
        )
        skipped |= {"unreadable": len(lost)} if lost else {}
        with screen.counted(f"{name}: answers", len(asked)) as show:
            said = answers.answer(
                run,
                asked,
                _out() / f"{name.replace('/', '_')}.json",
                template=template,
                skipped=skipped,
                seed=SEED.value,
                settings=_settings(0.0),
                show=show,
            )
        measured = answers.measure(said)
        scored[name] = dict(zip([row["number"] for row in said.rows], measured))
        found[name] = answers.summary(said, measured, seed=SEED.value)
        if judge:
            found[name]["judge"], numbers = _judged(judge, name, said.rows)
            for row, number in zip(scored[name].values(), numbers, strict=True):
                row["judge"] = number
    compare.gain(found, scored, seed=SEED.value)
    return *compare.table(found), found


def _settings(temperature: float) -> dict[str, Any]:
    temperature = TEMPERATURE.value if TEMPERATURE.value >= 0 else temperature
    return sampling.settings(MAX_NEW_TOKENS.value, temperature=temperature)


def _judge():
    """Returns the judge of the flags; its key comes from the environment."""
    from gpt_jax.evaluate import judge

    key = os.environ.get(JUDGE_KEY_ENV.value, "") if JUDGE_KEY_ENV.value else ""
    if JUDGE_KEY_ENV.value and not key:
        raise ValueError(f"--judge_key_env: ${JUDGE_KEY_ENV.value} is not set")
    prompt = PROMPT_OF_THE_JUDGE
    if JUDGE_PROMPT.value:
        prompt = Path(JUDGE_PROMPT.value).read_text(encoding="utf-8")
    found = judge.Judge(
        url=JUDGE.value,
        model=JUDGE_MODEL.value,
        prompt=prompt,
        key=key,
        cache=_out() / "judge",
        tries=JUDGE_TRIES.value,
        wait_s=JUDGE_WAIT_S.value,
        timeout_s=JUDGE_TIMEOUT_S.value,
    )
    judge.check(found)
    return found


def _judged(who, name: str, said: list[dict]):
    """Returns the judge's mean with its interval, and the numbers; None for prose."""
    from gpt_jax import screen
    from gpt_jax.evaluate import judge, scores

    with screen.counted(f"{name}: judged", len(said)) as show:
        verdicts = judge.verdicts(who, said, show=show)
    prose = [verdict for verdict in verdicts if verdict.score is None]
    if prose and JUDGE_PROSE.value == "refuse":
        raise ValueError(
            f"the judge gave no number for {len(prose)} of {len(said)} answers of "
            f"{name}, first: {prose[0].text[:80]!r}; take another judge or prompt, or "
            "--judge_prose=count"
        )
    numbers = [verdict.score for verdict in verdicts]
    counted = [number for number in numbers if number is not None]
    if not counted:
        raise ValueError(
            f"the judge gave not one number for {name}; it said {prose[0].text[:80]!r}"
        )
    mean = scores.bootstrap(counted, seed=SEED.value)._asdict()
    return {**mean, "prose": len(prose)}, numbers


def _choices():
    """Picks a choice for every question, with every run."""
    from gpt_jax import screen
    from gpt_jax.evaluate import choices, compare, likelihood

    lost: list[str] = []
    leave_out = lost.append if SKIP_BAD_ROWS.value else None
    questions = choices.read(CHOICES.value, leave_out)
    if lost:
        print(f"left out: {len(lost)} rows, the first because {lost[0]}")
    questions = questions[: LIMIT.value or len(questions)]
    total = sum(len(question.choices) for question in questions)
    found = {}
    for name, run in _opened():
        scorer = likelihood.scorer(run.model, run.params)
        with screen.counted(f"{name}: choices", total) as show:
            picks = choices.pick(scorer, run.tokenizer, questions, show=show)
        found[name] = choices.summary(questions, picks, seed=SEED.value)
        found[name]["picks"] = [pick._asdict() for pick in picks]
    heads = ("run", "questions", "right", "right, per byte", "by chance")
    lines = [
        (
            name,
            n["questions"],
            compare.mean(n["accuracy"]),
            compare.mean(n["accuracy_per_byte"]),
            f"{n['chance']:.1f}",
        )
        for name, n in found.items()
    ]
    return heads, lines, found


def _copied():
    """Samples texts from every run and finds what of them stands in the original."""
    from gpt_jax import corpora, sample, screen
    from gpt_jax.evaluate import copied

    original = corpora.open(COPIED_FROM.value, field=FIELD.value, cache=CACHE.value)
    least = sorted(LEAST.value)
    if least[0] < 1:
        raise ValueError(f"--least={least[0]}: give a number of characters above 0")
    found = {}
    for name, run in _opened():
        completions = sample.texts(
            model=run.model,
            params=run.params,
            tokenizer=run.tokenizer,
            prompts=PROMPT.value or [""],
            count=COUNT.value,
            seed=SEED.value,
            stop=[],
            **_settings(0.8),
        )
        texts = [completion.text for completion in completions]
        with screen.counted(f"{name}: documents", None) as show:
            documents = _counted(original.documents(), show)
            matches = copied.find(texts, documents, least=least[0])
        found[name] = copied.summary(matches, least)
        print(f"{name}, longest: {found[name]['longest_text']!r}")
    heads = ["run", "characters", "longest copy", "median longest"]
    heads += [f"in copies of {n}+" for n in least]
    lines = [
        [name, n["characters"], n["longest"], f"{n['median_longest']:.0f}"]
        + [f"{100 * n['copied'][size]:.1f} %" for size in least]
        for name, n in found.items()
    ]
    return heads, lines, found


def _counted(documents, show):
    for document in documents:
        yield document
        show(1)


def _harness():
    """Runs tasks of the EleutherAI harness on every run."""
    from gpt_jax.evaluate import harness

    found, lines = {}, []
    for name, run in _opened():
        lm = harness.adapt(run, seed=SEED.value)
        results = harness.evaluate(
            lm, LM_EVAL.value, include=LM_EVAL_TASKS.value, limit=LIMIT.value
        )
        found[name] = results
        for task, numbers in results.items():
            for key, value in numbers.items():
                metric = key.partition(",")[0]
                if isinstance(value, float) and not metric.endswith("_stderr"):
                    lines.append((name, task, metric, f"{value:.4f}"))
    return ("run", "task", "metric", "value"), lines, found


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
