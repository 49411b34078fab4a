"""The judge against a real HTTP server, which answers well, badly, or not at all."""

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from gpt_jax.evaluate import judge

ROW = {"question": "2 + 2? {answer}", "reference": "4", "answer": "{reference} four"}
KEY = "sk-secret"


class Handler(BaseHTTPRequestHandler):
    """Gives the server's next reply: a text, (status, headers), or None: silence."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        server = self.server
        server.seen.append((self.path, dict(self.headers), json.loads(body)))
        reply = server.replies.pop(0)
        if reply is None:
            server.enough.wait(20)
            return
        status, headers, text = (200, {}, reply) if isinstance(reply, str) else reply
        message = {"choices": [{"message": {"role": "assistant", "content": text}}]}
        sent = json.dumps(message).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(sent)))
        self.end_headers()
        self.wfile.write(sent)

    def log_message(self, format, *args):
        """Says nothing."""


@pytest.fixture
def server():
    made = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    made.replies, made.seen, made.enough = [], [], threading.Event()
    thread = threading.Thread(target=made.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield made
    made.enough.set()
    made.shutdown()
    made.server_close()


def ask(server, replies, rows=(ROW,), **changes):
    server.replies += replies
    settings = {
        "url": f"http://127.0.0.1:{server.server_address[1]}/v1",
        "model": "tiny",
        "prompt": "Q {question} R {reference} A {answer} {other}",
        "key": KEY,
        "cache": None,
        "tries": 3,
        "wait_s": 0.0,
        "timeout_s": 10.0,
        **changes,
    }
    return judge.verdicts(judge.Judge(**settings), rows, show=lambda more: None)


def test_a_good_judge_is_asked_in_openai_s_words(server):
    assert ask(server, ["87"]) == [judge.Verdict(87.0, "87")]
    ((path, headers, body),) = server.seen
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == f"Bearer {KEY}"
    assert body["model"] == "tiny" and body["temperature"] == 0
    # Texts of rows are put in as they are, whatever they spell.
    asked = "Q 2 + 2? {answer} R 4 A {reference} four {other}"
    assert body["messages"] == [{"role": "user", "content": asked}]


@pytest.mark.parametrize(
    "text, score",
    [
        ("0", 0),
        (" 100\n", 100),
        ("72.5", 72.5),
        ("Score: 85/100.", 85),
        ("**40**", 40),
        ("101", None),
        ("-5", None),
        ("The answer is good: 80", None),
        ("8 or 9", None),
        ("", None),
    ],
)
def test_only_a_number_alone_is_a_score(text, score):
    assert judge.number(text) == score


def test_prose_is_told_from_a_number(server):
    found = ask(server, ["Well said!", "12"], [ROW, {**ROW, "answer": "no"}])
    assert [verdict.score for verdict in found] == [None, 12.0]
    assert found[0].text == "Well said!"


def test_overload_and_faults_are_tried_again(server):
    busy = (429, {"Retry-After": "0"}, "busy")
    assert ask(server, [busy, (503, {}, "starting"), "55"])[0].score == 55
    assert len(server.seen) == 3


def test_a_judge_that_stays_overloaded_is_told(server):
    with pytest.raises(ValueError, match=r"answered 429 .*3 times"):
        ask(server, [(429, {}, "busy")] * 3)


def test_a_judge_that_is_down_is_told(server):
    with pytest.raises(ValueError, match=r"127.0.0.1:9/v1.*does not answer.*2 times"):
        ask(server, [], url="http://127.0.0.1:9/v1", tries=2)


def test_a_judge_that_is_too_slow_is_told_in_time(server):
    with pytest.raises(ValueError, match=r"does not answer \(timed out\), 1 times"):
        ask(server, [None], tries=1, timeout_s=0.2)


def test_a_refusal_is_final_and_says_what_the_judge_said(server):
    with pytest.raises(ValueError, match=r"answered 404 .*no such model") as told:
        ask(server, [(404, {}, "no such model")])
    assert len(server.seen) == 1 and KEY not in str(told.value)


def test_a_redirect_is_not_followed_with_the_key(server):
    away = {"Location": f"http://127.0.0.1:{server.server_address[1]}/elsewhere"}
    with pytest.raises(ValueError, match="answered 302"):
        ask(server, [(302, away, ""), "99"])
    assert len(server.seen) == 1


def test_replies_are_kept_by_request_and_without_the_key(server, tmp_path):
    rows = [ROW, {**ROW, "answer": "five"}]
    first = ask(server, ["90", "10"], rows, cache=tmp_path)
    again = ask(server, [], rows, cache=tmp_path, key="another key")
    assert first == again and len(server.seen) == 2
    assert len(list(tmp_path.iterdir())) == 2
    assert all(KEY not in file.read_text() for file in tmp_path.iterdir())
    ask(server, ["1", "2"], rows, cache=tmp_path, model="other")
    assert len(server.seen) == 4


def test_something_else_behind_the_address_is_told(server):
    with pytest.raises(ValueError, match="no chat endpoint"):
        ask(server, [(200, {}, None)])


@pytest.mark.parametrize(
    "change, words",
    [
        ({"url": "localhost:11434"}, "begins with http:// or https://"),
        ({"prompt": "Judge this."}, r"no \{answer\} in it"),
        ({"tries": 0}, "one try or more"),
    ],
)
def test_a_judge_that_cannot_be_asked_is_told_before(server, change, words):
    with pytest.raises(ValueError, match=words):
        ask(server, [], **change)
