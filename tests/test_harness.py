"""Runs on EleutherAI's harness, offline; `make test-lm-eval` has it installed."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from gpt_jax import corpora, runs, sample
from gpt_jax.evaluate import choices, harness, likelihood, text
from tests import runs_to_evaluate

BYTES = runs_to_evaluate.BYTES
TEXTS = ["Ein Käse. " * 30, "Short.", "x" * 64, "It was the best of times, " * 9]
TASK = """\
task: local_text
dataset_path: json
dataset_kwargs:
  data_files: {{test: {file}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{text}}}}"
metric_list:
  - metric: bits_per_byte
  - metric: byte_perplexity
"""
installed = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None,
    reason="lm-eval is not installed: make test-lm-eval",
)


def quiet(more: int) -> None:
    """A progress display that shows nothing."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return runs_to_evaluate.make(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture(scope="module")
def run(folder):
    return runs.open(folder)


@pytest.fixture(scope="module")
def lm(run):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before datasets is imported
    return harness.adapt(run, seed=1)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    """A folder with a task of our own, read from a local file."""
    made = tmp_path_factory.mktemp("tasks")
    lines = [json.dumps({"text": text}) for text in TEXTS]
    (made / "texts.jsonl").write_text("\n".join(lines))
    (made / "local.yaml").write_text(TASK.format(file=made / "texts.jsonl"))
    return made


def ours(run, task) -> float:
    """Bits per byte as experiments.evaluate --text counts them."""
    file = str(task / "texts.jsonl")
    documents = corpora.open(file, field="text", cache=task)
    found = text.evaluate(
        likelihood.scorer(run.model, run.params),
        text.documents(documents, BYTES),
        length=64,
        stride=64,
        show=quiet,
    )
    return found["bpb"]


def instances(*arguments):
    from lm_eval.api.instance import Instance

    return [Instance("loglikelihood", {}, each, i) for i, each in enumerate(arguments)]


@installed
def test_bits_per_byte_of_an_offline_task_are_ours(run, lm, task):
    found = harness.evaluate(lm, ["local_text"], include=str(task), limit=0)
    bits = found["local_text"]["bits_per_byte,none"]
    assert bits == pytest.approx(ours(run, task), rel=1e-5)


@installed
def test_the_door_runs_a_task_on_a_run_folder(run, folder, task):
    flags = [f"--run={folder}", "--lm_eval=local_text", f"--lm_eval_tasks={task}"]
    command = [sys.executable, "-m", "experiments.evaluate", *flags]
    done = subprocess.run(command, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    (line,) = [x for x in done.stdout.splitlines() if "bits_per_byte" in x]
    assert float(line.split("|")[4]) == pytest.approx(ours(run, task), abs=1e-3)


@installed
def test_log_likelihoods_are_those_of_multiple_choice(run, lm):
    row = {"context": "The sky is ", "choices": ["blue", "red"], "answer": 0}
    empty = {"context": "", "choices": ["blue", "red"], "answer": 0}
    questions = [choices.question(row), choices.question(empty)]
    scorer = likelihood.scorer(run.model, run.params)
    picks = choices.pick(scorer, BYTES, questions, show=quiet)
    pairs = [(q.context, choice) for q in questions for choice in q.choices]
    found = lm.loglikelihood(instances(*pairs), disable_tqdm=True)
    wanted = [logp for pick in picks for logp in pick.logp]
    assert [logp for logp, _ in found] == pytest.approx(wanted, rel=1e-6)


@installed
def test_generation_stops_where_the_task_says(run, lm):
    options = {"until": ["\n\n"], "max_gen_toks": 12}
    found = lm.generate_until(instances(("Once", options), ("y" * 200, options)))
    cut = [*b"y" * 200][-52:]  # 64 less room for 12
    done = sample.texts(
        model=run.model,
        params=run.params,
        tokenizer=BYTES,
        prompts=["Once", cut],
        count=1,
        seed=1,
        stop=["\n\n"],
        temperature=0.0,
        max_new=12,
        **harness.PLAIN,
    )
    assert found == [completion.text for completion in done]


@installed
def test_an_unknown_task_is_told(lm):
    with pytest.raises(ValueError, match="no task nothing_like_it"):
        harness.evaluate(lm, ["nothing_like_it"], include="", limit=0)


def test_an_absent_harness_is_told_with_the_command(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ValueError, match=r"pip install -r requirements-lm-eval\.txt"):
        harness.adapt(run, seed=1)
