"""Keys and passwords appear nowhere: not in answers, logs, numbers, errors, caches."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from gpt_jax.evaluate import judge
from gpt_jax.sweep import storage
from tests import serving
from tests.golden import make_run
from tests.serving import running

GOLDEN = sorted(make_run.HERE.glob("run-*"))[-1]
KEY = "sk-never-to-be-seen-7a1f"


def asked(ask, model="tiny"):
    """Returns all that a server says to the right key, wrong ones and none."""
    said = []
    for key in (KEY, f"{KEY}x", ""):
        for path in ("/v1/models", "/v1/nothing", "/openapi.json"):
            said.append(ask(path, key=key))
        for body in (b'{"prompt": ', {"model": model, "max_tokens": 1}):
            said.append(ask("/v1/completions", body, key=key))
    assert {status for status, *_ in said} == {200, 400, 401, 404}
    return "".join(f"{answer}{headers}" for _, answer, headers in said)


def test_the_key_of_a_server_is_in_nothing_that_it_says():
    with running(serving.make_engine(16, [1], 1), key=KEY) as live:
        said = asked(live.ask)
        assert KEY not in said + "".join(live.lines)


@pytest.mark.slow
@pytest.mark.fault(30)
def test_the_key_of_a_server_is_not_in_its_log():
    command = [sys.executable, "-m", "experiments.serve", f"--runs={GOLDEN}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--batches=1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "GPT_JAX_API_KEY": KEY},
    )
    lines = []
    try:
        while not lines or "serving" not in lines[-1]:
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        url = re.search(r"http://127.0.0.1:\d+", lines[-1])[0]
        said = asked(partial(serving.ask, url), GOLDEN.name)
        process.send_signal(signal.SIGTERM)
        rest, _ = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0 and KEY not in said + "".join(lines) + rest


@pytest.fixture
def refusing():
    """The address of a judge that says no, and repeats what it was sent."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(401)
            self.end_headers()
            self.wfile.write(f"no: {self.headers['Authorization']}".encode())

        def log_message(self, format, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def ask(url, tmp_path):
    asked = judge.Judge(
        url=url,
        model="m",
        prompt="{question} {reference} {answer}",
        key=KEY,
        cache=tmp_path,
        tries=1,
        wait_s=0.0,
        timeout_s=10.0,
    )
    row = {"question": "q", "reference": "r", "answer": "a"}
    with pytest.raises(ValueError) as caught:
        judge.verdicts(asked, [row], show=lambda _: None)
    return str(caught.value)


def test_the_key_of_a_judge_is_not_in_its_refusal(refusing, tmp_path):
    said = ask(refusing, tmp_path)
    assert "401" in said and KEY not in said
    assert not any(KEY in path.read_text() for path in tmp_path.rglob("*.json"))


def test_a_judges_address_with_a_password_is_refused_and_not_repeated(tmp_path):
    said = ask(f"http://me:{KEY}@127.0.0.1:1/v1", tmp_path)
    assert "--judge_key_env" in said and KEY not in said


def test_the_password_of_a_storage_is_not_in_the_error_that_names_it():
    with pytest.raises(ValueError) as caught:
        storage.open_storage(f"nosuchdatabase://me:{KEY}@host/sweeps")
    assert "host/sweeps" in str(caught.value) and KEY not in str(caught.value)


def test_no_key_of_a_config_is_a_secret():
    """A config is written into every run folder."""
    from configs import common

    for word in ("secret", "password", "api_key", "credential"):
        assert word not in json.dumps(common.base().to_dict())
