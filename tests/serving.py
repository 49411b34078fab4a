"""What the tests of the server share: a tiny model of bytes, a real server round it."""

import contextlib
import json
import re
import threading
import time
import urllib.error
import urllib.request

import jax

from configs import common
from gpt_jax import model as models
from gpt_jax import runs, sample, sampling, tokenizers
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.generation import OWN
from gpt_jax.serve import server
from gpt_jax.serve.engine import Engine
from gpt_jax.serve.flow import Served
from gpt_jax.serve.limits import Limits
from tests import tiny

TOKENIZER = tokenizers.train("byte", [])
LIMITS = Limits(
    body_bytes=1 << 20,
    prompt_bytes=1 << 16,
    choices=8,
    told=2000,
    seconds=60.0,
    read_seconds=5.0,
    connections=400,
)


def build(context):
    """A tiny model of bytes that says things and hardly ever ends by itself."""
    cfg = tiny.cfg(context_length=context, vocab_size=257, position="rope")
    params = jax.tree.map(lambda x: 5 * x, models.init(cfg, jax.random.key(3)))
    table_VD = params["embed"]["embedding"]
    params["embed"]["embedding"] = table_VD.at[TOKENIZER.eos_id].set(0)
    return models.GPT(cfg), params


def byte_run(folder, **model):
    """Makes a run of the tiny config whose tokens are bytes, at step 4; returns it."""
    config = common.tiny(common.base())
    config.model.update(model)
    runs.create(folder, config, TOKENIZER)
    params = models.init(runs.model_config(config, TOKENIZER), jax.random.key(3))
    with Checkpoints(folder / "checkpoints", keep=2) as store:
        store.save(4, {"params": params}, metric=None, meta={})
    return folder


def make_engine(context, sizes, queue):
    model, params = build(context)
    return Engine(
        model=model, params=params, tokenizer=TOKENIZER, sizes=sizes, queue=queue
    )


def alone(prompt, context, *, number=0, seed=0, stop=(), **settings):
    """The Completion of a request of its own, by code that knows nothing of servers."""
    model, params = build(context)
    plain = sampling.settings(16, temperature=0.0)
    done = sample.texts(
        model=model,
        params=params,
        tokenizer=TOKENIZER,
        prompts=[prompt],
        count=number + 1,
        seed=seed,
        stop=list(stop),
        **{**plain, **settings},
    )
    return done[number]


@contextlib.contextmanager
def running(
    engine,
    *,
    limits=LIMITS,
    key="",
    grace_s=5.0,
    templates=(None, "plain"),
    drawn=OWN,
    look=None,
    **options,
):
    """Serves an engine in a thread: as `tiny` it continues, as `chatty` it talks.

    How `chatty` is drawn from is `drawn`; `look` is the microscope of both.
    """
    cfg = engine.model.cfg
    facts = {"context_length": cfg.context_length, "vocab_size": cfg.vocab_size}
    facts |= {"parameters": models.count(cfg), "step": 0}
    served = {
        name: Served(engine, template, facts, look, how)
        for name, template, how in zip(
            ("tiny", "chatty"), templates, (OWN, drawn), strict=True
        )
    }
    with open_server(
        served, limits=limits, key=key, grace_s=grace_s, **options
    ) as found:
        yield found


@contextlib.contextmanager
def open_server(served, *, limits=LIMITS, key="", grace_s=5.0, **options):
    """Serves models by name in a thread."""
    lines, stop = [], server.Stop()
    place = server.Place("127.0.0.1", 0, key, grace_s, **options)

    def work():
        server.serve(served, place, limits, stop=stop, tell=lines.append)

    thread = threading.Thread(target=work)
    thread.start()
    try:
        yield Running(lines, stop, thread, served)
    finally:
        stop.signals += 2
        thread.join(30)
        assert not thread.is_alive()


class Running:
    """A server in a thread."""

    def __init__(self, lines, stop, thread, models):
        self.lines, self.stop, self.thread, self.models = lines, stop, thread, models
        self.engine = next(iter(models.values())).engine
        wait_until(lambda: any("serving" in line for line in lines), 100)
        line = next(line for line in lines if "serving" in line)
        self.url = re.search(r"http://\S+:\d+", line)[0]
        self.port = int(self.url.rpartition(":")[2])

    def ask(self, path, body=None, key=""):
        """Returns (status, JSON of the answer, headers)."""
        return ask(self.url, path, body, key)

    def number(self, name):
        """Returns a number of /metrics."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=60) as answer:
            text = answer.read().decode()
        return float(re.search(rf"^{re.escape(name)}(?:{{.*}})? (\S+)$", text, re.M)[1])


def ask(url, path, body=None, key=""):
    """Returns (status, JSON of the answer, headers)."""
    data = body if isinstance(body, bytes | None) else json.dumps(body).encode()
    headers = {"Content-Type": "application/json"}
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    request = urllib.request.Request(url + path, data, headers)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, json.loads(answer.read()), answer.headers
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read()), error.headers


def wait_until(true, seconds):
    """Waits for a fact of another thread or process."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.005)
