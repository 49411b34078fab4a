"""Programs of others at our server, unmodified: `make test-clients`.

Each talks to a tiny model in an environment of its own, asserts its own facts, and
prints the likeliest answer to one question, which has to be the one that the model
gives alone. tests/clients/ has what each does.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from gpt_jax import chat, runs
from gpt_jax.generation import OWN
from gpt_jax.serve.engine import Engine
from gpt_jax.serve.flow import Served
from tests import serving
from tests.serving import TOKENIZER, alone, running
from tests.test_serve_tools import MARKED

CLIENTS = Path(__file__).parent / "clients"
CONTEXT = 1024
YOU = chat.Message("user", "you")
BOTH = {
    "type": "object",
    "properties": {"sure": {"type": "boolean"}, "far": {"type": "boolean"}},
    "required": ["sure", "far"],
    "additionalProperties": False,
}
TASK = """\
task: local
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: 0
target_delimiter: ""
metric_list: [{{metric: acc}}]
"""
QUESTIONS = [
    {"question": "The sky is", "choices": [" blue", " red"]},
    {"question": "Once upon a", "choices": [" time", " stone", " river"]},
    {"question": "def main(", "choices": ["):", "x"]},
]


@pytest.fixture(scope="module")
def live():
    engine = serving.make_engine(CONTEXT, [1, 8], 32)
    with running(engine, key="sesame", templates=(None, MARKED)) as found:
        yield found


@pytest.fixture(scope="module")
def said():
    """The likeliest answer, by code that knows nothing of servers."""
    ids, _ = chat.render([YOU], TOKENIZER, MARKED, reply=True)
    return alone(ids, CONTEXT, max_new=24).text


@pytest.fixture
def ask(live, tmp_path):
    """Returns a function that runs a program there, and what it printed."""

    def run(command: list[str], **more: str) -> str:
        quiet = {"HF_HUB_OFFLINE": "1", "LITELLM_LOCAL_MODEL_COST_MAP": "True"}
        quiet |= {"LANGSMITH_TRACING": "false", "HOME": str(tmp_path)}
        done = subprocess.run(
            command, cwd=CLIENTS, env={**os.environ, **quiet, **more},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-4000:] + done.stdout[-2000:]
        return done.stdout

    return run


def python(name: str = "python") -> str:
    """Returns a program of the environment of the clients."""
    found = os.environ.get("CLIENTS", "")
    if not found:
        pytest.fail("CLIENTS must name the environment of clients: make test-clients")
    return str(Path(found) / name)


@pytest.mark.parametrize("name", ["langchain", "litellm", "instructor"])
def test_programs_in_python_run_their_main_features(live, said, ask, name):
    printed = ask([python(), f"{name}_client.py", f"{live.url}/v1"])
    assert printed.rstrip("\n") == said.rstrip("\n")


@pytest.mark.parametrize("name", ["openai", "ai_sdk"])
@pytest.mark.skipif(not shutil.which("node"), reason="needs Node.js")
def test_programs_in_javascript_run_their_main_features(live, said, ask, name):
    printed = ask(["node", f"{name}.mjs", f"{live.url}/v1"])
    assert printed.rstrip("\n") == said.rstrip("\n")


def test_llm_prompts_streams_and_holds_to_a_schema(live, said, ask, tmp_path):
    model = {"model_id": "ours", "model_name": "chatty", "api_base": f"{live.url}/v1"}
    model |= {"supports_schema": True, "supports_tools": True, "api_key_name": "ours"}
    (tmp_path / "extra-openai-models.yaml").write_text(yaml.safe_dump([model]))
    (tmp_path / "keys.json").write_text(json.dumps({"ours": "sesame"}))
    where = {"LLM_USER_PATH": str(tmp_path)}
    llm = [python("llm"), "-m", "ours", "-o", "temperature", "0"]
    llm += ["-o", "max_tokens"]
    for more in ([], ["--no-stream"]):
        printed = ask([*llm, "24", *more, "you"], **where)
        assert printed.rstrip("\n") == said.rstrip("\n")
    found = json.loads(ask([*llm, "200", "--schema", json.dumps(BOTH), "you"], **where))
    assert set(found) == {"sure", "far"}


def test_the_harness_scores_as_our_own_code_does(ask, tmp_path):
    """Likelihoods of choices over the wire; its tokens are those of an exported run."""
    run = serving.byte_run(tmp_path / "run", position="rope")
    convert = [sys.executable, "-m", "experiments.convert", f"--run={run}"]
    subprocess.run([*convert, f"--to_hf={tmp_path / 'hf'}"], check=True)
    opened = runs.open(run)
    engine = Engine(
        model=opened.model, params=opened.params, tokenizer=opened.tokenizer,
        sizes=[1, 8], queue=8,
    )  # fmt: skip
    rows = "\n".join(map(json.dumps, QUESTIONS))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "local.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    with serving.open_server({"tiny": Served(engine, None, {}, None, OWN)}) as live:
        where = f"base_url={live.url}/v1/completions,model=tiny,num_concurrent=2"
        ask(
            [
                *(python("lm_eval"), "run", "--model", "local-completions"),
                *("--model_args", f"{where},tokenizer={tmp_path / 'hf'}"),
                *("--tasks", "local", "--include_path", str(tmp_path)),
                *("--log_samples", "--output_path", str(tmp_path / "out")),
            ],
            OPENAI_API_KEY="unused",
        )
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    found = [json.loads(line)["filtered_resps"] for line in samples.open()]
    for row, answers in zip(QUESTIONS, found, strict=True):
        for choice, (told, _) in zip(row["choices"], answers, strict=True):
            ids = TOKENIZER.encode(row["question"] + choice)
            plain = opened.model.apply({"params": opened.params}, np.array([ids]))
            logp_TV = jax.nn.log_softmax(plain[0][0])
            first = len(row["question"].encode())
            wanted = sum(logp_TV[i - 1, ids[i]] for i in range(first, len(ids)))
            assert float(told) == pytest.approx(float(wanted), abs=1e-3)
