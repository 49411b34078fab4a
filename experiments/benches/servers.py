"""Two servers of one shape under the same clients: ours, and Hugging Face `generate`.

Each side is a server in its process; `go()` starts the clients as another process and
returns tokens per second with the times to the first token. Requests are streamed, in
mixed lengths, the same for both sides.
"""

import json
import queue
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from http.client import HTTPConnection
from typing import Any

import numpy as np

from experiments.benches.peers import _gpt2, _threads
from experiments.benches.worker import ENTER, peak_mb, require
from gpt_jax import model, tokenizers
from gpt_jax.model import GPT, GPTConfig

Go = Callable[[], dict[str, Any]]
CLIENTS = f"{ENTER}from experiments.benches import servers; servers.be_clients()"
SECONDS = 600.0  # after which a request has failed


def requests(count: int, vocab: int, room: int) -> list[dict]:
    """Returns bodies of /v1/completions as of a chat, greedy, their prompts ids.

    Questions have 8 to 40 tokens and answers 40 to 159, as far as there is room.
    """
    rng = np.random.default_rng(0)
    bodies = []
    for i in range(count):
        length = min(8 + (i * 13) % 33, room // 4)
        prompt = rng.integers(1, vocab, length).tolist()
        new = min(40 + (i * 29) % 120, room - length)
        body = {"prompt": prompt, "max_tokens": new, "temperature": 0}
        bodies.append({**body, "stream": True, "ignore_eos": True})
    return bodies


def _spelling(vocab: int):
    """Returns a tokenizer that spells every id of a vocabulary, each as a character."""
    return tokenizers.train("char", ["".join(chr(0x20000 + i) for i in range(vocab))])


def ours(
    *, recipe: Mapping[str, Any], clients: int, count: int, batches: list[int]
) -> tuple[Go, dict]:
    """Tokens per second of `serve`, random weights, greedy.

    Args:
      recipe: config keys.
      clients: how many ask at once.
      count: requests in all.
      batches: rows that a decode step may have.
    """
    require("fastapi", "uvicorn", "prometheus_client")
    import jax

    from gpt_jax.serve import server
    from gpt_jax.serve.engine import Engine
    from gpt_jax.serve.flow import Served
    from gpt_jax.serve.limits import Limits

    cfg = GPTConfig(**recipe["model"])
    params = jax.jit(lambda key: model.init(cfg, key))(jax.random.key(0))
    engine = Engine(
        model=GPT(cfg),
        params=params,
        tokenizer=_spelling(cfg.vocab_size),
        sizes=batches,
        queue=clients,
        ahead=True,
    )
    limits = Limits(1 << 20, 1 << 17, 32, 1 << 18, SECONDS, 30.0, 512)
    lines: queue.Queue[str] = queue.Queue()
    place = server.Place("127.0.0.1", 0, "", 1.0)
    threading.Thread(
        target=lambda: server.serve(
            {"bench": Served(engine, None, {})},
            place,
            limits,
            stop=server.Stop(),
            tell=lines.put,
        ),
        daemon=True,
    ).start()
    while "serving" not in (line := lines.get(timeout=SECONDS)):
        pass
    engine.compiled.wait(SECONDS)  # nothing is to be compiled while it is measured
    port = int(line.split("http://")[1].split()[0].rpartition(":")[2])
    bodies = requests(count, cfg.vocab_size, cfg.context_length)
    return _go(port, bodies, clients), {"parameters": model.count(cfg)}


def hugging_face(
    *, shape: Mapping[str, int], clients: int, count: int
) -> tuple[Go, dict]:
    """Tokens per second of a FastAPI path round Hugging Face `generate`, streamed.

    One request at a time: texts that are written at once by threads of one PyTorch
    take turns at the cores and are slower together.
    """
    require("torch", "transformers", "fastapi", "uvicorn")
    import socket

    import torch
    import uvicorn
    from fastapi import FastAPI, Request
    from fastapi.responses import StreamingResponse

    gpt, spelling = _gpt2(shape).eval(), _spelling(shape["vocab_size"])
    app, turn = FastAPI(), threading.Lock()

    class Streamer:
        """Tells every new token; the first call brings the prompt."""

        def __init__(self):
            self.pieces: queue.Queue = queue.Queue()

        def put(self, value):
            self.pieces.put(value)

        def end(self):
            self.pieces.put(None)

    def write(ids, new, streamer):
        with turn, torch.inference_mode():
            gpt.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                min_new_tokens=new,
                max_new_tokens=new,
                eos_token_id=None,
                pad_token_id=0,
                streamer=streamer,
            )

    def event(text):
        choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None}
        head = {"id": "cmpl-0", "object": "text_completion", "created": 0}
        return {**head, "model": "bench", "choices": [choice]}

    def events(body):
        streamer, ids = Streamer(), torch.tensor([body["prompt"]])
        work = threading.Thread(target=write, args=(ids, body["max_tokens"], streamer))
        work.start()
        streamer.pieces.get()  # the prompt
        while (value := streamer.pieces.get()) is not None:
            yield f"data: {json.dumps(event(spelling.decode(value.tolist())))}\n\n"
        work.join()
        yield "data: [DONE]\n\n"

    async def completions(request):
        body = await request.json()
        return StreamingResponse(events(body), media_type="text/event-stream")

    completions.__annotations__["request"] = Request
    app.post("/v1/completions")(completions)
    listener = socket.create_server(("127.0.0.1", 0))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    threading.Thread(target=lambda: server.run(sockets=[listener]), daemon=True).start()
    bodies = requests(count, shape["vocab_size"], shape["context"])
    return _go(listener.getsockname()[1], bodies, clients), _threads()


def _go(port: int, bodies: list[dict], clients: int) -> Go:
    """Returns what measures once; the first requests warm the server up."""

    def load(bodies, clients) -> list[dict]:
        told = json.dumps({"port": port, "bodies": bodies, "clients": clients})
        command = [sys.executable, "-c", CLIENTS]
        done = subprocess.run(
            command, input=told, capture_output=True, text=True, check=True
        )
        return json.loads(done.stdout)

    def go() -> dict[str, Any]:
        found = load(bodies, clients)
        first = sorted(x["first"] for x in found)
        spent = max(x["end"] for x in found) - min(x["start"] for x in found)
        return {
            "value": sum(x["tokens"] for x in found) / spent,
            "first_token_median_s": statistics.median(first),
            "first_token_p99_s": first[int(0.99 * (len(first) - 1))],
            "peak_mb": peak_mb(),
        }

    load(bodies[: 2 * clients], clients)
    return go


def be_clients() -> None:
    """Is the clients' process: reads what to ask on stdin, prints what came."""
    told = json.loads(sys.stdin.read())
    todo, found, lock = list(told["bodies"]), [], threading.Lock()

    def client():
        while True:
            with lock:
                if not todo:
                    return
                body = todo.pop(0)
            found.append(_ask(told["port"], body))

    threads = [threading.Thread(target=client) for _ in range(told["clients"])]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    print(json.dumps(found))


def _ask(port: int, body: dict) -> dict:
    start = time.perf_counter()
    link = HTTPConnection("127.0.0.1", port, timeout=SECONDS)
    headers = {"Content-Type": "application/json"}
    link.request("POST", "/v1/completions", json.dumps(body), headers)
    answer, first, tokens, last = link.getresponse(), 0.0, 0, b""
    if answer.status != 200:
        raise RuntimeError(f"the server answered {answer.status}: {answer.read()}")
    for line in answer:
        if line.startswith(b"data: "):
            first = first or time.perf_counter() - start
            tokens, last = tokens + (b'"text"' in line), line
    link.close()
    if last.strip() != b"data: [DONE]" or tokens != body["max_tokens"]:
        wanted = f"{body['max_tokens']} tokens and [DONE]"
        raise RuntimeError(f"{tokens} tokens came, then {last!r:.200}, not {wanted}")
    times = {"start": start, "end": time.perf_counter(), "first": first}
    return {**times, "tokens": tokens}
