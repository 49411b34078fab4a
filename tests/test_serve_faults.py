"""What must survive what, over HTTP: hostile requests, clients that leave, overload.

Servers here have long contexts, so that there is something to interrupt. What takes
longer, or a process of its own, is in faults_serve.py (make test-faults).
"""

import contextlib
import json
import math
import socket
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest

from gpt_jax import sampling, tokenizers
from gpt_jax.serve.texts import Request
from tests import serving
from tests.serving import LIMITS, running, wait_until

CONTEXT = 2048
QUICK = 5.0  # seconds, of a busy machine; a user may expect a hundredth of it
PATH = "/v1/completions"


@pytest.fixture(scope="module")
def live():
    """Two slots, three waiting, half a second to send a request."""
    limits = replace(LIMITS, read_seconds=0.5)
    with running(serving.make_engine(CONTEXT, [2], 3), limits=limits) as found:
        yield found


def rss():
    """Returns the memory of this process, client and server, in bytes."""
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) * 1024


def body(**fields):
    return json.dumps({"model": "tiny", "prompt": "x", **fields}).encode()


HOSTILE = {
    "not JSON": b'{"prompt": ',
    "no object": b"[1, 2]",
    "not UTF-8": b'{"prompt": "\xff\xfe"}',
    "deep nesting": b"[" * 100_000,
    "deep in a field": b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "NaN": b'{"prompt": "x", "temperature": NaN}',
    "infinity": b'{"prompt": "x", "temperature": 1e999}',
    "endless digits": b'{"prompt": "x", "seed": ' + b"9" * 100_000 + b"}",
    "many choices": body(n=1_000_000),
    "many tokens": body(max_tokens=1_000_000_000),
    "a long list of texts": body(prompt=["x"] * 200_000),
    "a long list of ids": body(prompt=[7] * 300_000),
    "a list of anything": body(prompt=[{}] * 100_000),
    "an id below 0": body(prompt=[-1]),
    "an id beyond any": body(prompt=[2**40]),
    "a flood of biases": body(logit_bias={str(i): 1 for i in range(50_000)}),
    "many unknown keys": json.dumps({f"k{i}": 1 for i in range(50_000)}).encode(),
    "endless digits below 0": b'{"prompt": "x", "temperature": -1' + b"0" * 400 + b"}",
    "a flood of probabilities": body(
        prompt=["x" * 500] * 2, echo=True, logprobs=20, max_tokens=0
    ),
    "more texts than ever fit": body(n=6),
    "a number as text": body(temperature="1"),
    "a flag as number": body(stream=1),
    "a float as count": body(n=1.5),
    "a truth as count": body(n=True),
    "an empty prompt": body(prompt=""),
    "no prompts": body(prompt=[]),
    "an empty prompt of many": body(prompt=["x", ""]),
    "long stop strings": body(stop=["x" * 1000]),
    "half a surrogate pair": b'{"model": "tiny", "prompt": "\\ud800"}',
    "a prompt of more than the context": body(prompt="x" * (CONTEXT + 1)),
    "a long line of carets": body(prompt="^" * 1_000_000),
    "a long word": body(prompt="a" * 1_000_000),
    "many spaces": body(prompt=" " * 1_000_000),
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("fault", HOSTILE)
def test_a_hostile_request_is_refused_at_once(live, fault):
    began = time.monotonic()
    status, answer, _ = live.ask(PATH, HOSTILE[fault])
    assert time.monotonic() - began < QUICK
    assert status in (400, 413) and answer["error"]["message"]
    assert len(json.dumps(answer)) < 1000  # it does not send back what it was sent


@pytest.mark.fault(26)
def test_hostile_requests_leave_no_memory_behind_and_the_next_one_is_fine(live):
    for payload in HOSTILE.values():
        live.ask(PATH, payload)
    before = rss()
    for payload in HOSTILE.values():
        live.ask(PATH, payload)
    assert rss() - before < 20e6
    assert live.ask(PATH, body(max_tokens=1))[0] == 200


def raw(live, data: bytes, timeout=10.0):
    """Opens a connection, sends bytes and returns the socket."""
    link = socket.create_connection(("127.0.0.1", live.port), timeout=timeout)
    link.sendall(data)
    return link


def post(payload: bytes, *more: str) -> bytes:
    head = [
        f"POST {PATH} HTTP/1.1",
        "Host: localhost",
        "Content-Type: application/json",
    ]
    head += more or [f"Content-Length: {len(payload)}"]
    return "\r\n".join([*head, "", ""]).encode() + payload


def answer_of(link) -> bytes:
    """Returns all that comes until the other side closes or nothing more comes."""
    found = b""
    with contextlib.suppress(ConnectionError):
        while data := link.recv(65536):
            found += data
    link.close()
    return found


@pytest.mark.fault(26)
def test_a_body_of_50_megabytes_is_refused_without_being_held(live):
    before, chunk = rss(), b"x" * 65536
    link = raw(live, post(b"", f"Content-Length: {50 << 20}"))
    with contextlib.suppress(ConnectionError):
        for _ in range((50 << 20) // len(chunk)):
            link.sendall(chunk)
    assert answer_of(link).startswith(b"HTTP/1.1 413")
    assert rss() - before < 20e6


@pytest.mark.fault(26)
def test_a_body_without_a_length_is_counted_as_it_comes(live):
    link = raw(live, post(b"", "Transfer-Encoding: chunked"))
    chunk = b"10000\r\n" + b"x" * 65536 + b"\r\n"
    with contextlib.suppress(ConnectionError):
        for _ in range(40):
            link.sendall(chunk)
        link.sendall(b"0\r\n\r\n")
    assert answer_of(link).startswith(b"HTTP/1.1 413")


@pytest.mark.fault(26)
def test_a_post_without_a_body_is_refused(live):
    link = raw(live, post(b"", "Connection: close"))
    assert answer_of(link).startswith(b"HTTP/1.1 400")


@pytest.mark.fault(28)
@pytest.mark.parametrize(
    "beginning",
    [b"POST /v1/comp", post(b'{"pro', "Content-Length: 100")],
    ids=["headers", "body"],
)
def test_a_request_that_trickles_is_ended(live, beginning):
    link = raw(live, beginning)
    assert answer_of(link).startswith(b"HTTP/1.1 408")


@pytest.mark.fault(27)
@pytest.mark.parametrize("text", ["^", "a", " ", "ab ", "\u00e9"])
def test_text_below_the_cap_is_tokenized_in_time(text):
    words = "".join(f"{text * n} " for n in (1, 2, 3, 4, 8, 16, 64))
    tokenizer = tokenizers.train("bpe:400", [words * 50])
    many = (text * (1 << 17))[: (1 << 17) // len(text.encode())]  # the door's default
    began = time.monotonic()
    ids = tokenizer.encode(many)
    assert time.monotonic() - began < 2 * QUICK
    assert tokenizer.decode(ids) == many


# ---------------------------------------------------------------- clients that leave


LONG = {"max_tokens": 2000, "temperature": 0, "ignore_eos": True}


@pytest.mark.fault(28)
@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_client_that_leaves_frees_its_slot_and_the_count_stops(live, stream):
    link = raw(live, post(body(stream=stream, **LONG)))
    before = live.engine.tokens
    wait_until(lambda: live.engine.tokens > before + 5, 10)
    at = live.engine.tokens
    link.close()
    wait_until(lambda: live.engine.running == 0, 10)
    tokens = live.engine.tokens
    # The engine ends it before the next step (test_serve.py); word of it takes a few.
    assert tokens - at < 200
    assert live.ask(PATH, body(max_tokens=3, ignore_eos=True))[0] == 200
    assert live.engine.tokens == tokens + 3


@pytest.mark.fault(28)
def test_a_client_that_leaves_the_queue_is_not_written_for(live):
    busy = [raw(live, post(body(stream=True, **LONG))) for _ in range(2)]
    wait_until(lambda: live.engine.running == 2, 10)
    waiting = raw(live, post(body(**LONG)))
    wait_until(lambda: live.engine.waiting == 1, 10)
    waiting.close()
    wait_until(lambda: live.engine.waiting == 0, 10)
    for link in busy:
        link.close()
    wait_until(lambda: live.engine.running == 0, 10)


@pytest.mark.fault(28)
def test_a_slow_reader_holds_up_nobody(live):
    """Its text waits for it in memory; its slot is free as soon as that is written."""
    slow = raw(live, post(body(stream=True, logprobs=20, **LONG)))
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.recv(1)
    began = time.monotonic()
    for _ in range(5):
        assert live.ask(PATH, body(max_tokens=5))[0] == 200
    assert time.monotonic() - began < 10
    wait_until(lambda: live.engine.running == 0, 60)
    slow.close()


@pytest.mark.slow
@pytest.mark.fault(28)
def test_who_never_reads_is_cut_off_and_makes_room():
    limits = replace(LIMITS, read_seconds=0.5, connections=2)
    with running(serving.make_engine(CONTEXT, [2], 3), limits=limits) as live:
        links = []
        for _ in range(2):
            link = socket.socket()
            link.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            link.connect(("127.0.0.1", live.port))
            fields = {"prompt": "x", "logprobs": 20, "ignore_eos": True, **LONG}
            link.sendall(post(body(**fields, n=2)))  # over 2 MB of answer
            links.append(link)

        def free():
            with socket.create_connection(("127.0.0.1", live.port)) as link:
                link.sendall(b"GET /v1/models HTTP/1.1\r\nHost: localhost\r\n\r\n")
                return link.recv(100).startswith(b"HTTP/1.1 200")

        assert not free()
        assert live.ask("/healthz")[0] == 200  # whoever else is there
        wait_until(free, 60)
        for link in links:
            link.close()


@pytest.mark.fault(28)
def test_an_engine_that_hangs_makes_nobody_wait_for_ever():
    limits, go_on = replace(LIMITS, seconds=0.2), threading.Event()
    with running(serving.make_engine(CONTEXT, [2], 3), limits=limits) as live:
        step = live.engine._slots.step
        live.engine._slots.step = lambda **told: go_on.wait(60) and step(**told)
        status, answer, _ = live.ask(PATH, body(**LONG))
        go_on.set()
        assert status == 504 and answer["error"]["code"] == "timeout"


@pytest.mark.fault(26)
@pytest.mark.parametrize(
    "head, status",
    [
        ("Host: evil.example\r\nContent-Type: application/json", b"403"),
        ("Host: localhost:8000\r\nContent-Type: text/plain", b"415"),
    ],
)
def test_what_a_page_of_another_site_could_send_is_refused(live, head, status):
    more = "Connection: close\r\nContent-Length: 2\r\n\r\n{}"
    link = raw(live, f"POST {PATH} HTTP/1.1\r\n{head}\r\n{more}".encode())
    assert answer_of(link).startswith(b"HTTP/1.1 " + status)


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "path",
    [
        "/v1/models/../../../../etc/passwd",
        "/v1/models/%2e%2e/%2e%2e/%2e%2e/etc/passwd",
        "/v1/models/tiny%00",
        "/page.js/../../http.py",
        "/%2e%2e/http.py",
        "//etc/passwd",
    ],
)
def test_a_path_leads_to_no_file(live, path):
    link = raw(live, f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
    assert link.recv(65536).startswith(b"HTTP/1.1 404")
    link.close()


@pytest.mark.fault(28)
def test_what_is_late_ends_with_what_there_is_or_is_told_that_it_never_began():
    limits = replace(LIMITS, seconds=0.4)
    with running(serving.make_engine(CONTEXT, [1], 3), limits=limits) as hasty:
        how = sampling.settings(2000, temperature=0.0)
        endless = Request([65], how, 0, 0, (), None, score=False, deadline=math.inf)
        (row,) = hasty.engine.submit([(endless, lambda piece: None)])
        status, answer, _ = hasty.ask(PATH, body(**LONG))  # waits for its slot
        assert status == 504 and answer["error"]["code"] == "timeout"
        row.cancel()
        wait_until(lambda: hasty.engine.running == 0, 10)
        _, answer, _ = hasty.ask(PATH, body(**LONG))
        assert answer["choices"][0]["finish_reason"] == "length"
        assert 0 < answer["usage"]["completion_tokens"] < 2000
        asked = body(stream=True, **LONG)
        length = f"Content-Length: {len(asked)}"
        events = answer_of(raw(hasty, post(asked, "Connection: close", length)))
        assert b'"finish_reason":"length"' in events and b"[DONE]" in events


# ---------------------------------------------------------------- overload, leaving


def at_once(live, clients, payload):
    """Returns the (status, headers) that so many clients get who ask together."""
    found, start = [], threading.Barrier(clients)

    def ask():
        start.wait()
        status, _, headers = live.ask(PATH, payload)
        found.append((status, headers))

    threads = [threading.Thread(target=ask) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.fault(29)
def test_too_many_clients_are_told_when_to_come_again(live):
    found = at_once(live, 30, body(max_tokens=300, ignore_eos=True))
    statuses = [status for status, _ in found]
    assert set(statuses) == {200, 429} and statuses.count(200) >= 5
    assert all(int(h["Retry-After"]) >= 1 for status, h in found if status == 429)
    assert live.ask("/healthz")[0] == 200


@pytest.mark.fault(37)
def test_beyond_so_many_requests_the_newest_are_refused_and_the_others_served():
    limits = replace(LIMITS, connections=6)
    with running(serving.make_engine(CONTEXT, [2], 3), limits=limits) as live:
        idle = [raw(live, b"") for _ in range(40)]  # cost nobody a place
        busy = [raw(live, post(body(stream=True, **LONG))) for _ in range(5)]
        wait_until(lambda: live.engine.running + live.engine.waiting == 5, 10)
        found = at_once(live, 30, body(max_tokens=1))
        assert {status for status, _ in found} <= {429, 503}
        assert all(int(headers["Retry-After"]) >= 1 for _, headers in found)
        refused = sum(status == 503 for status, _ in found)
        assert refused > 0  # of 30, one at a time has the sixth place
        path = 'gpt_jax_answers_total{path="/v1/completions",status="503"}'
        assert live.number(path) == refused
        assert live.ask("/healthz")[0] == live.ask("/readyz")[0] == 200
        for link in busy:  # they were not disturbed
            link.settimeout(60)
            assert link.recv(100).startswith(b"HTTP/1.1 200")
            link.close()
        wait_until(lambda: live.engine.running == 0, 10)
        assert live.ask(PATH, body(max_tokens=1))[0] == 200
        for link in idle:
            link.close()


@pytest.mark.fault(37)
def test_one_too_many_is_told_in_json_when_to_come_again():
    limits = replace(LIMITS, connections=1)
    with running(serving.make_engine(CONTEXT, [2], 3), limits=limits) as live:
        busy = raw(live, post(body(stream=True, **LONG)))
        wait_until(lambda: live.engine.running == 1, 10)
        status, answer, headers = live.ask(PATH, body(max_tokens=1))
        assert status == 503 and answer["error"]["code"] == "overloaded"
        assert int(headers["Retry-After"]) >= 1
        assert live.ask("/healthz")[0] == 200  # is answered beyond any number
        busy.close()


@pytest.mark.fault(29)
def test_choices_that_have_no_room_together_are_refused_together(live):
    busy = raw(live, post(body(stream=True, **LONG)))
    wait_until(lambda: live.engine.running == 1, 10)
    status, _, headers = live.ask(PATH, body(n=5, max_tokens=1))
    assert status == 429 and headers["Retry-After"]
    assert live.engine.running == 1 and live.engine.waiting == 0
    busy.close()
    wait_until(lambda: live.engine.running == 0, 10)


@pytest.mark.fault(29)
def test_a_server_that_leaves_finishes_what_runs_and_takes_no_more():
    with running(serving.make_engine(CONTEXT, [2], 3), grace_s=30.0) as live:
        found = []
        thread = threading.Thread(
            target=lambda: found.append(live.ask(PATH, body(**LONG)))
        )
        thread.start()
        wait_until(lambda: live.engine.running == 1, 10)
        live.stop.signals += 1
        wait_until(lambda: live.ask("/readyz")[0] == 503, 10)
        assert live.ask("/healthz")[0] == 200
        status, answer, headers = live.ask(PATH, body())
        assert status == 503 and answer["error"]["code"] == "leaving"
        assert headers["Retry-After"]
        thread.join(30)
        assert found[0][0] == 200
        assert found[0][1]["usage"]["completion_tokens"] == 2000
        live.thread.join(30)
        assert not live.thread.is_alive()


@pytest.mark.fault(29)
def test_what_does_not_end_in_time_is_ended():
    with running(serving.make_engine(CONTEXT, [2], 3), grace_s=0.0) as live:
        link = raw(live, post(body(stream=True, **LONG)))
        wait_until(lambda: live.engine.running == 1, 10)
        live.stop.signals += 1
        events = answer_of(link)
        assert b"leaving" in events and b"[DONE]" not in events
        live.thread.join(10)
        assert not live.thread.is_alive()
