"""Facts about the server over HTTP, mostly through OpenAI's own client."""

import base64
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import urllib.request

import jax
import numpy as np
import openai
import pytest
from flax.traverse_util import flatten_dict

from configs import common
from gpt_jax import adapters, runs, sample, sampling
from gpt_jax import model as models
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.serve import http, server
from gpt_jax.serve.flow import Served
from tests import serving
from tests.cases import few
from tests.serving import TOKENIZER, alone, open_server, running, wait_until

CONTEXT = 32


@pytest.fixture(scope="module")
def live():
    """A server with the models `tiny` (texts) and `chatty` (conversations)."""
    with running(serving.make_engine(CONTEXT, [1, 4], 8)) as found:
        yield found


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="any", max_retries=0)


def test_models_are_listed_with_what_a_client_needs_to_know(client, live):
    assert [model.id for model in client.models.list()] == ["tiny", "chatty"]
    assert client.models.retrieve("chatty").id == "chatty"
    _, listed, _ = live.ask("/v1/models")
    assert [model["chat"] for model in listed["data"]] == [False, True]


def test_a_completion_is_that_of_the_sampler(client):
    done = client.completions.create(
        model="tiny", prompt="Once", max_tokens=9, temperature=0
    )
    wanted = alone("Once", CONTEXT, max_new=9)
    assert done.choices[0].text == wanted.text
    assert done.choices[0].finish_reason == wanted.reason == "length"
    assert done.usage.prompt_tokens == 4 and done.usage.completion_tokens == 9
    assert done.usage.total_tokens == 13


def test_a_seed_repeats_a_text_and_its_choices_differ(client):
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 8, "n": 3, "seed": 7}
    first, again = (client.completions.create(**asked) for _ in range(2))
    texts = [choice.text for choice in first.choices]
    assert texts == [choice.text for choice in again.choices]
    assert len(set(texts)) == 3
    wanted = [
        alone("Once", CONTEXT, number=n, seed=7, temperature=1.0, max_new=8).text
        for n in range(3)
    ]
    assert texts == wanted
    other = client.completions.create(**{**asked, "seed": 8})
    assert texts != [choice.text for choice in other.choices]


def test_several_prompts_are_answered_in_their_order(client):
    prompts = ["a", "bc", [100, 101]]
    done = client.completions.create(
        model="tiny", prompt=prompts[:2], n=2, temperature=0, max_tokens=3
    )
    assert [choice.index for choice in done.choices] == [0, 1, 2, 3]
    wanted = [alone(p, CONTEXT, max_new=3).text for p in ("a", "a", "bc", "bc")]
    assert [choice.text for choice in done.choices] == wanted
    ids = client.completions.create(
        model="tiny", prompt=prompts[2], temperature=0, max_tokens=3
    )
    assert ids.choices[0].text == alone([100, 101], CONTEXT, max_new=3).text


def test_equal_prompts_of_one_request_get_texts_of_their_own(client):
    asked = {"model": "tiny", "max_tokens": 8, "seed": 7}
    twice = client.completions.create(**asked, prompt=["Once", "Once"])
    choices = client.completions.create(**asked, prompt="Once", n=2)
    texts = [choice.text for choice in twice.choices]
    assert len({*texts}) == 2 and texts == [choice.text for choice in choices.choices]


def test_a_stream_joins_to_the_whole_text(client):
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0}
    events = list(
        client.completions.create(
            **asked, stream=True, stream_options={"include_usage": True}
        )
    )
    text = "".join(choice.text for event in events for choice in event.choices)
    assert text == alone("Once", CONTEXT, max_new=12).text
    assert len(events) > 4
    assert events[-2].choices[0].finish_reason == "length"
    assert events[-1].choices == [] and events[-1].usage.completion_tokens == 12


def test_every_event_can_tell_the_counts_so_far(client):
    """As guidellm wishes; a last event tells them by a wish of its own."""
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0}
    for options in ({}, {"include_usage": True}):
        options |= {"continuous_usage_stats": True}
        made = client.completions.create(**asked, stream=True, stream_options=options)
        *events, last = made
        counts = [event.usage.completion_tokens for event in [*events, last]]
        assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] == 12
        assert {event.usage.prompt_tokens for event in events} == {4}
        assert (last.choices == []) == ("include_usage" in options)
    said = {"model": "chatty", "messages": [{"role": "user", "content": "a"}]}
    made = client.chat.completions.create(
        **said, max_tokens=3, stream=True, stream_options=options
    )
    assert all(event.usage.total_tokens > 1 for event in made)


def test_a_stop_string_ends_whole_and_streamed_texts(client):
    free = alone("Once", CONTEXT, max_new=12).text
    stop = free[5:7]
    asked = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0}
    whole = client.completions.create(**asked, stop=stop).choices[0]
    assert whole.text == free[: free.index(stop)] and whole.finish_reason == "stop"
    events = list(client.completions.create(**asked, stop=[stop, "\x00"], stream=True))
    assert "".join(event.choices[0].text for event in events) == whole.text
    assert events[-1].choices[0].finish_reason == "stop"


def test_echo_with_log_probabilities_scores_a_prompt(client):
    done = client.completions.create(
        model="tiny", prompt="score me", max_tokens=0, echo=True, logprobs=2
    )
    told = done.choices[0].logprobs
    model, params = serving.build(CONTEXT)
    ids = np.array([list(b"score me")])
    logp = jax.nn.log_softmax(model.apply({"params": params}, ids)[0][0])
    wanted = [float(logp[i, token]) for i, token in enumerate(ids[0, 1:])]
    np.testing.assert_allclose(told.token_logprobs[1:], wanted, atol=1e-4)
    assert told.token_logprobs[0] is None and done.choices[0].text == "score me"
    assert "".join(told.tokens) == "score me" and told.text_offset == list(range(8))
    assert done.usage.completion_tokens == 0


def prompt_of(messages):
    """What the template `plain` makes of a conversation: a line a message."""
    return "".join(f"{text}\n" for text in messages)


def test_a_chat_follows_its_template_whole_and_streamed(client):
    asked = {
        "model": "chatty",
        "messages": [
            {"role": "system", "content": "hi"},
            {"role": "user", "content": [{"type": "text", "text": "you"}]},
        ],
        "temperature": 0,
        "max_completion_tokens": 10,
    }
    whole = client.chat.completions.create(**asked)
    wanted = alone(prompt_of(["hi", "you"]), CONTEXT, max_new=10)
    assert whole.choices[0].message.content == wanted.text
    assert whole.choices[0].message.role == "assistant"
    events = list(client.chat.completions.create(**asked, stream=True))
    pieces = [event.choices[0].delta.content or "" for event in events]
    assert "".join(pieces) == wanted.text
    assert events[0].choices[0].delta.role == "assistant"
    assert events[-1].choices[0].finish_reason == "length"


def test_the_tokens_of_a_chat_join_to_its_text_and_are_likely(client):
    done = client.chat.completions.create(
        model="chatty",
        messages=[{"role": "user", "content": "you"}],
        temperature=0,
        max_tokens=9,
        logprobs=True,
        top_logprobs=3,
    )
    told = done.choices[0].logprobs.content
    assert "".join(token.token for token in told) == done.choices[0].message.content
    for token in told:  # greedy: each is the likeliest
        best = max(token.top_logprobs, key=lambda other: other.logprob)
        assert len(token.top_logprobs) == 3 and token.logprob == best.logprob


def test_text_of_users_never_ends_an_answer(client):
    """The name of the end token, written by a user, is plain text."""
    done = client.chat.completions.create(
        model="chatty",
        messages=[{"role": "user", "content": "<|endoftext|>"}],
        temperature=0,
        max_tokens=1,
    )
    assert done.usage.prompt_tokens == len("<|endoftext|>\n")


def test_a_cancelled_stream_frees_its_slot(client, live):
    stream = client.completions.create(
        model="tiny", prompt="x", max_tokens=28, stream=True, temperature=0
    )
    next(iter(stream))
    stream.close()
    wait_until(lambda: live.engine.running == 0, 10)


@pytest.mark.parametrize(
    "form, changes, status, words",
    [
        ("", {"model": "../../etc"}, 404, "there is no model"),
        ("", {"model": "/etc/passwd\x00"}, 404, "there is no model"),
        ("chat/", {"model": "tiny"}, 400, "/v1/completions"),
        ("", {"prompt": "x" * (CONTEXT + 1)}, 400, "context"),
        ("", {"prompt": [1, 2, 400]}, 400, "vocabulary"),
        ("", {"max_tokens": CONTEXT + 1}, 400, "context"),
        ("", {"temprature": 1}, 400, "did you mean temperature"),
        ("", {"logit_bias": {"400": 2}}, 400, "vocabulary"),
        ("", {"frequency_penalty": 2.5}, 400, "frequency_penalty"),
        ("", {"suffix": "x"}, 400, "suffix is not supported"),
        ("", {"temperature": -1}, 400, "temperature"),
        ("", {"top_p": 0}, 400, "top_p"),
        ("", {"stop": ["x"] * 17}, 400, "stop"),
        ("chat/", {"messages": []}, 400, "messages"),
        ("chat/", {"messages": [{"role": "tool", "content": "x"}]}, 400, "role"),
        ("chat/", {"messages": [{"role": "user", "content": 3}]}, 400, "content"),
    ],
)
def test_what_cannot_be_is_refused_in_words(live, form, changes, status, words):
    body = {"model": "chatty", "messages": [{"role": "user", "content": "x"}]}
    body = body if form else {"model": "tiny", "prompt": "x"}
    found, answer, _ = live.ask(f"/v1/{form}completions", {**body, **changes})
    assert found == status and words in answer["error"]["message"]


def test_the_client_reads_errors_by_their_kind(client):
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="gpt-9", prompt="x")
    with pytest.raises(openai.BadRequestError, match="context") as refused:
        client.completions.create(model="tiny", prompt="x" * 99)
    assert refused.value.code == "context_length_exceeded"


def test_harmless_keys_of_other_servers_are_passed_over(client):
    done = client.completions.create(
        model="tiny", prompt="x", user="me", best_of=1, logit_bias={}, max_tokens=1
    )
    assert done.usage.completion_tokens == 1
    done = client.chat.completions.create(
        model="chatty",
        messages=[{"role": "user", "content": "x"}],
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        max_tokens=1,
    )
    assert done.usage.completion_tokens == 1


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tool_choice": "required"}, "tool_choice is not supported by this server"),
        ({"tools": [{}]}, "tools is not supported by this server"),
        ({"best_of": True}, "best_of must be a whole number from 1 to 8, not true"),
        ({"parallel_tool_calls": 1}, "parallel_tool_calls is not supported"),
        ({"seed": 2**70}, "to 18446744073709551616, not 1180591620717411303424"),
        (
            {"temperature": [1]},
            "must be a number of at least 0, not a list",
        ),
        ({"stream": "yes"}, 'stream must be true or false, not "yes"'),
        ({"temperature": True}, "must be a number of at least 0, not true"),
    ],
)
def test_what_asks_for_something_else_is_refused_in_words_of_json(live, fields, words):
    status, answer, _ = live.ask("/v1/completions", {"prompt": "x", **fields})
    assert status == 400 and words in answer["error"]["message"]


def test_health_and_numbers_and_the_page_are_there(live):
    assert live.ask("/healthz")[:2] == (200, {"ok": True})
    assert live.ask("/readyz")[:2] == (200, {"ready": True})
    assert live.number("gpt_jax_slots") == 4
    before = live.number("gpt_jax_generated_tokens_total")
    live.ask("/v1/completions", {"model": "tiny", "prompt": "x", "max_tokens": 5})
    assert live.number("gpt_jax_generated_tokens_total") == before + 5
    assert live.number("gpt_jax_time_to_first_token_seconds_count") > 0
    with urllib.request.urlopen(live.url, timeout=60) as page:
        assert b"<html" in page.read()
        assert "default-src 'self'" in page.headers["Content-Security-Policy"]
    status, answer, _ = live.ask("/nowhere")
    assert status == 404 and answer["error"]["code"] == "not_found"


def test_every_file_of_the_page_is_sent_and_never_kept_beyond_an_upgrade(live):
    kinds = {".html": "text/html", ".css": "text/css", ".js": "javascript"}
    files = [*http.PAGE.iterdir()]
    assert len(files) > 3
    for file in files:
        name = "" if file.name == "index.html" else file.name
        with urllib.request.urlopen(f"{live.url}/{name}", timeout=60) as sent:
            assert sent.read() == file.read_bytes()
            assert kinds[file.suffix] in sent.headers["Content-Type"]
            assert sent.headers["Cache-Control"] == "no-cache"
            assert "script-src 'self'" in sent.headers["Content-Security-Policy"]


def test_a_key_is_asked_for_except_by_health_and_page():
    with running(serving.make_engine(CONTEXT, [1, 4], 8), key="sesame") as found:
        assert found.ask("/v1/models")[0] == 401
        assert found.ask("/v1/models", key="sesam")[0] == 401
        assert found.ask("/metrics")[0] == 401
        assert found.ask("/v1/models", key="sesame")[0] == 200
        assert found.ask("/healthz")[0] == found.ask("/readyz")[0] == 200


# ---------------------------------------------------------------- runs and the door


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A run of the tiny config whose tokens are bytes."""
    return serving.byte_run(tmp_path_factory.mktemp("runs") / "bytes")


def test_every_path_that_is_told_of_is_described(live):
    described = live.ask("/openapi.json")[1]["paths"]
    told, listed = set(), http.__doc__ or ""
    for verb, paths in re.findall(r"^    (GET|POST) +((?:/\S* *)+?)  ", listed, re.M):
        told |= {(verb.lower(), path) for path in paths.split()}
    told -= {("get", "/"), ("get", "/openapi.json")}  # the page; the description
    found = {(verb, path) for path, of in described.items() for verb in of}
    found = {(verb, path.replace("{name}", "NAME")) for verb, path in found}
    assert told == found - {("parameters", "/v1/models/NAME")}
    for verb, path in told:
        if verb == "get" and path != "/metrics":  # which is no JSON
            assert live.ask(path.replace("NAME", "tiny"))[0] == 200, path


def test_the_port_takes_connections_before_the_server_runs():
    with server._listen("127.0.0.1", 0) as listener:
        address = listener.getsockname()
        with socket.create_connection(address, timeout=60):
            pass
        with pytest.raises(ValueError, match=f"port {address[1]}: Address already in"):
            server._listen(*address)


def test_runs_are_named_by_their_folders(tmp_path):
    names = server.named([str(tmp_path / "a"), f"{tmp_path}/c/b/", ""])
    assert list(names) == ["a", "b"]
    with pytest.raises(ValueError, match="would both be served as 'a'"):
        server.named(["x/a", "y/a"])
    with pytest.raises(ValueError, match="no run to serve"):
        server.named([])
    other = server.named(["x/a", "y/a"], ["small", "org/large"])
    assert [path.parent.name for path in other.values()] == ["x", "y"]
    assert list(other) == ["small", "org/large"]
    for names in (["one"], ["one", "two", "three"], ["", "b"], ["a b", "c"]):
        with pytest.raises(ValueError, match="--name="):
            server.named(["x/a", "y/a"], names)


def test_equal_weights_of_several_models_are_held_once():
    base = {"kernel": np.arange(6.0), "bias": np.zeros(2)}
    tuned = {"kernel": np.arange(6.0), "bias": np.zeros(2), "head": np.ones(2)}
    held = {}
    first, second = server.share(base, held), server.share(tuned, held)
    assert second["kernel"] is first["kernel"] and second["bias"] is first["bias"]
    assert "head" in second and len(held) == 3


def test_a_text_is_looked_at_with_the_weights_that_are_served(run_folder, monkeypatch):
    folders = server.named([str(run_folder)])
    models = server.open_runs(folders, step=None, weights="", sizes=[1], queue=4)
    with open_server(models) as found:
        assert found.ask("/v1/models")[1]["data"][0]["look"] is True
        status, answer, _ = found.ask(
            "/v1/look", {"prompt": "ab ab", "against": "ab ac"}
        )
        assert status == 200 and answer["page"].startswith("<!doctype html>")
        assert str(run_folder.parent) not in answer["page"]
        with urllib.request.urlopen(found.url, timeout=60) as page:
            policy = page.headers["Content-Security-Policy"]
        for kind in ("script", "style"):  # a browser runs what has this hash, no more
            code = answer["page"].split(f"<{kind}>")[1].split(f"</{kind}>")[0]
            digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
            assert f"'sha256-{digest}'" in policy
        monkeypatch.setattr(server, "LOOKED_AT", 4)
        for body, told in (
            ({}, "prompt is missing: it must be a text"),
            ({"prompt": "x" * 5}, "has 5 tokens; here at most 4 are looked at"),
            ({"prompt": "ab", "against": "abc"}, "texts of as many tokens"),
            ({"prompt": "ab", "promt": "a"}, "did you mean prompt"),
        ):
            status, answer, _ = found.ask("/v1/look", body)
            assert status == 400 and told in answer["error"]["message"], answer


def test_texts_are_looked_at_one_at_a_time_and_only_where_that_is_offered(live):
    status, answer, _ = live.ask("/v1/look", {"model": "tiny", "prompt": "ab"})
    assert status == 404 and "not looked into" in answer["error"]["message"]
    began, go_on = threading.Event(), threading.Event()

    def slow(prompt, against):
        began.set()
        go_on.wait(60)
        return prompt

    engine = serving.make_engine(CONTEXT, [1], 4)
    with open_server({"slow": Served(engine, None, {}, slow)}) as found:
        first = []
        ask = threading.Thread(
            target=lambda: first.append(found.ask("/v1/look", {"prompt": "ab"}))
        )
        ask.start()
        assert began.wait(60)
        status, answer, headers = found.ask("/v1/look", {"prompt": "cd"})
        assert status == 429 and headers["Retry-After"] == "5"
        go_on.set()
        ask.join(60)
    assert first[0][:2] == (200, {"page": "ab"})


@pytest.fixture(scope="module", params=few(["", "int8"], ""))
def lora_folders(run_folder, request):
    """Two LoRA runs over the weights of that run, with thin matrices of their own."""
    base = runs.open(run_folder)
    folders = []
    for number in (1, 2):
        folder = run_folder.parent / f"lora_{number}{request.param}"
        config = base.config.copy_and_resolve_references()
        config.adapter = common.adapter_lora()
        config.adapter.base_dtype = request.param
        runs.create(folder, config, TOKENIZER)
        split = adapters.make(models.declared(base.model.cfg), **config.adapter).split
        params, frozen = split(base.params, jax.random.key(number))
        params = jax.tree.map(lambda x, n=number: x + 0.05 * n, params)
        with Checkpoints(folder / "checkpoints", keep=2) as store:
            meta = {"frozen": store.save_frozen(frozen)}
            store.save(4, {"params": params}, metric=None, meta=meta)
        folders.append(str(folder))
    return folders


def test_lora_runs_over_one_base_share_it_and_write_as_when_merged(lora_folders):
    models = server.open_runs(
        server.named(lora_folders), step=None, weights="", sizes=[1, 4], queue=4
    )
    slots = [served.engine._slots for served in models.values()]
    for name in ("_params", "_params_of_one"):
        first, second = (
            flatten_dict(getattr(one, name), sep="/")  # type: ignore[misc]
            for one in slots
        )
        assert {path for path in first if first[path] is not second[path]} == {
            path for path in first if path.endswith(("/lora_a", "/lora_b"))
        }
        assert any(path.endswith("/lora_a") for path in first)
    with open_server(models) as found:
        for folder, name in zip(lora_folders, models):
            body = {"model": name, "prompt": "Once", "max_tokens": 9, "temperature": 0}
            _, answer, _ = found.ask("/v1/completions", body)
            run = runs.open(folder)  # merged
            wanted = sample.texts(
                model=run.model,
                params=run.params,
                tokenizer=run.tokenizer,
                prompts=["Once"],
                count=1,
                seed=0,
                stop=(),
                **sampling.settings(9, temperature=0.0),
            )
            assert answer["choices"][0]["text"] == wanted[0].text


def test_the_door_serves_a_run_and_leaves_in_good_order(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "bytes")
    drawn = {"do_sample": False, "penalty_alpha": 0.6}
    (folder / "generation_config.json").write_text(json.dumps(drawn))
    command = [sys.executable, "-m", "experiments.serve", f"--runs={folder}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--batches=2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "GPT_JAX_API_KEY": ""},
    )
    try:
        lines = []
        while "serving" not in (line := process.stdout.readline()):
            assert line, process.stderr.read()
            lines.append(line)
        assert "bytes: generation_config.json says penalty_alpha 0.6" in "".join(lines)
        url = re.search(r"http://127.0.0.1:\d+", line)[0]
        with urllib.request.urlopen(f"{url}/v1/models/bytes", timeout=60) as answer:
            assert json.loads(answer.read())["suggested"]["temperature"] == 0
        body = json.dumps({"prompt": "x", "max_tokens": 2, "temperature": 0}).encode()
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(f"{url}/v1/completions", body, headers)
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read())["model"] == "bytes"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()


@pytest.mark.parametrize(
    "args, words",
    [
        (["--runs=absent"], "not a run folder"),
        ([], "no run to serve"),
        (["--runs=absent", "--batches=two"], "--batches=two"),
        (["--runs=absent", "--max_choices=0"], "--max_choices=0"),
        (["--runs=absent", "--port=70000"], "--port=70000"),
        (["--runs=absent", "--batches=4,2"], "--batches=4,2"),
        (["--runs=absent", "--context=-1"], "--context=-1"),
        (["--runs=absent", "--cors_origin=chat.example.org"], "must be a site"),
        (["--runs=absent", "--allowed_hosts=a:80"], "without a port"),
    ],
)
def test_the_door_refuses_with_a_sentence(args, words):
    done = subprocess.run(
        [sys.executable, "-m", "experiments.serve", *args],
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == 2 and words in done.stderr
    assert "Traceback" not in done.stderr
