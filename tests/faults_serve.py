"""The slow half of test_serve_faults.py: loads, and a server that is a process.

Run by `make test-faults`; its name keeps it out of `make test`.
"""

import gc
import json
import os
import re
import signal
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest

from tests import serving
from tests.serving import running

CONTEXT = 256
CLIENTS = 32
PATH = "/v1/completions"
pytestmark = pytest.mark.timeout(900)


def requests(count):
    """Requests of mixed lengths, greedy."""
    return [
        {
            "model": "tiny",
            "prompt": f"request number {i} " + "ab " * (i * 7 % 40),
            "max_tokens": 5 + i * 11 % 60,
            "temperature": 0,
        }
        for i in range(count)
    ]


def together(live, jobs, clients):
    """Returns (answers in order, seconds) of jobs shared among so many clients."""
    answers, todo, lock = [None] * len(jobs), list(enumerate(jobs)), threading.Lock()

    def work():
        while True:
            with lock:
                if not todo:
                    return
                i, job = todo.pop(0)
            status, answer, _ = live.ask(PATH, job)
            assert status == 200, answer
            answers[i] = answer["choices"][0]["text"]

    began = time.monotonic()
    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers, time.monotonic() - began


def first_token_p99(live, jobs):
    """Returns the 99th percentile of the seconds to the first event, asked at once."""
    found, headers = [], {"Content-Type": "application/json"}

    def ask(job):
        body = json.dumps({**job, "stream": True}).encode()
        request = urllib.request.Request(live.url + PATH, body, headers)
        began = time.monotonic()
        with urllib.request.urlopen(request, timeout=60) as answer:
            answer.readline()
            found.append(time.monotonic() - began)
            answer.read()

    threads = [threading.Thread(target=ask, args=(job,)) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == len(jobs)
    return sorted(found)[int(0.99 * (len(found) - 1))]


def rss():
    (line,) = [
        line
        for line in Path("/proc/self/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) * 1024


@pytest.mark.fault(29, injections=0)  # all are served
def test_32_clients_get_what_each_would_get_alone_in_flat_memory():
    with running(serving.make_engine(CONTEXT, [1, 8, 32], 64)) as live:
        jobs = requests(CLIENTS)
        one_by_one, alone_s = together(live, jobs, 1)
        spent = []
        for _ in range(3):
            found, seconds = together(live, jobs, CLIENTS)
            assert found == one_by_one
            spent.append(seconds)
        print(f"throughput x {alone_s / min(spent):.1f} with {CLIENTS} clients")
        print(f"p99 of times to the first token {first_token_p99(live, jobs):.3f} s")
        together(live, requests(400), CLIENTS)  # allocators settle
        gc.collect()
        sizes = []
        for _ in range(8):
            found, _ = together(live, requests(200), CLIENTS)
            assert None not in found
            gc.collect()
            sizes.append(rss())
        assert max(sizes[-3:]) - min(sizes[:3]) < 20e6, sizes


@pytest.mark.fault(29, injections=200)
def test_200_clients_against_4_slots_and_16_waiting():
    with running(serving.make_engine(CONTEXT, [4], 16)) as live:
        found, start = [], threading.Barrier(200)
        job = {"model": "tiny", "prompt": "x", "max_tokens": 200}

        def ask():
            start.wait()
            began = time.monotonic()
            status, _, headers = live.ask(PATH, job)
            found.append((status, time.monotonic() - began, headers["Retry-After"]))

        threads = [threading.Thread(target=ask) for _ in range(200)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        statuses = [status for status, _, _ in found]
        assert set(statuses) == {200, 429} and statuses.count(200) >= 20
        assert all(int(after) >= 1 for status, _, after in found if status == 429)
        waits = sorted(seconds for status, seconds, _ in found if status == 200)
        assert waits[int(0.99 * len(waits))] < 60
        print(f"admitted {len(waits)}, median {statistics.median(waits):.2f} s")


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "bytes"
    return serving.byte_run(folder, context_length=2048, position="rope")


@pytest.mark.fault(29)
def test_sigterm_under_load_drains_within_its_grace_and_exits_0(run_folder):
    command = [sys.executable, "-m", "experiments.serve", f"--runs={run_folder}"]
    process = subprocess.Popen(
        [*command, "--port=0", "--batches=4", "--queue=16", "--grace_s=60"],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "GPT_JAX_API_KEY": ""},
    )
    try:
        while "serving" not in (line := process.stdout.readline()):
            assert line
        url = re.search(r"http://127.0.0.1:\d+", line)[0]
        found = []

        def ask():
            body = json.dumps({"prompt": "x", "max_tokens": 1000, "ignore_eos": True})
            headers = {"Content-Type": "application/json"}
            request = urllib.request.Request(url + PATH, body.encode(), headers)
            try:
                with urllib.request.urlopen(request, timeout=100) as answer:
                    found.append(answer.status)
            except urllib.error.HTTPError as error:
                found.append(error.code)

        threads = [threading.Thread(target=ask) for _ in range(40)]
        for thread in threads:
            thread.start()
        while not found:  # the first answers are refusals
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join()
        assert process.wait(70) == 0
        assert set(found) <= {200, 429, 503} and 200 in found
    finally:
        process.kill()
        process.communicate()
