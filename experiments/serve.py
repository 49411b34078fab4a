"""Serve runs over HTTP: a chat page, and what OpenAI's clients speak.

  python -m experiments.serve --runs=runs/quickstart
  python -m experiments.serve --runs=runs/base,runs/tuned --port=9000
  GPT_JAX_API_KEY=secret python -m experiments.serve --runs=runs/tuned --host=0.0.0.0
  python -m experiments.serve --runs=runs/large --batches=1,4 --queue=16

Then open http://127.0.0.1:8000 or ask from anywhere on this machine:

  curl http://127.0.0.1:8000/v1/completions -H "Content-Type: application/json" \\
      -d '{"model": "quickstart", "prompt": "def main(", "max_tokens": 50}'

A model is called as its run folder is, or as --name says. A run that was tuned on
conversations has /v1/chat/completions, every run has /v1/completions. What is equal in
two runs is held once: of LoRA runs over one base all but their thin matrices.

--batches are the numbers of requests that a decode step may have: it takes the
smallest that does. The last is the most at once; --queue more may wait, and others are
told to come back (429). With one number alone an answer is the same to the last bit
whoever else asks; with several the numbers behind it differ by rounding.

SIGTERM and Ctrl-C let what runs end, up to --grace_s seconds, and exit with code 0. A
second signal ends it. Who can reach the port can use the model: the server listens on
this machine only unless --host says otherwise; set a key then.
"""

import os
import re
import sys

from absl import flags

from experiments import door

RUNS = door.define_paths("runs", "Run folders, separated by commas.")
HOST = flags.DEFINE_string("host", "127.0.0.1", "Address; 0.0.0.0 is every network.")
NAME = flags.DEFINE_list(
    "name", [], "What the models are called, in their order; else as their runs are."
)
ALLOWED_HOSTS = flags.DEFINE_list(
    "allowed_hosts", [], "Names by which the server may be asked, besides localhost."
)
CORS_ORIGIN = flags.DEFINE_list(
    "cors_origin", [], "Sites whose pages may ask from a browser, as https://a.b; or *."
)
ACCESS_LOG = flags.DEFINE_bool(
    "access_log", False, "A line for every answer, without what was sent."
)
PORT = flags.DEFINE_integer("port", 8000, "Port; 0 takes a free one.")
BATCHES = flags.DEFINE_list("batches", ["1", "8", "32"], "Rows of a decode step.")
CONTEXT = flags.DEFINE_integer(
    "context", 0, "Tokens of a text at most, with its prompt; 0 = the model's own."
)
PREFIX_MB = flags.DEFINE_integer(
    "prefix_mb", 256, "MB of what prompts begin with, not computed again; 0 = none."
)
QUEUE = flags.DEFINE_integer("queue", 64, "Requests that may wait for a slot.")
MAX_BODY_BYTES = flags.DEFINE_integer("max_body_bytes", 1 << 20, "Of a request.")
MAX_PROMPT_BYTES = flags.DEFINE_integer(
    "max_prompt_bytes", 1 << 17, "Of a request's texts, before they are tokenized."
)
MAX_CHOICES = flags.DEFINE_integer("max_choices", 32, "Texts of a request.")
MAX_TOLD = flags.DEFINE_integer(
    "max_told", 1 << 18, "Probabilities of prompts that a request may be told."
)
TIMEOUT_S = flags.DEFINE_float(
    "timeout_s", 120.0, "From a request to its end, with what there is by then."
)
READ_TIMEOUT_S = flags.DEFINE_float("read_timeout_s", 10.0, "For a request to come.")
CONNECTIONS = flags.DEFINE_integer(
    "connections", 512, "Requests in progress at once; the newest beyond get 503."
)
GRACE_S = flags.DEFINE_float("grace_s", 30.0, "For what runs when a signal comes.")
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "", ["", "params", "ema"], "Which weights; empty = ema where kept."
)
BITS = door.define_bits()
CACHE_DTYPE = door.define_cache_dtype()


def main(_: list[str]) -> None:
    """Serves until a signal; raises ValueError for what the user can mend."""
    sizes, step = _sizes(BATCHES.value), door.step(STEP.value)
    _check_numbers()

    from gpt_jax import programs, runs
    from gpt_jax.serve import server
    from gpt_jax.serve.limits import Limits

    paths = server.named(door.folders(RUNS.value), NAME.value)
    server.need_packages()
    programs.use_cache(runs.read_config(next(iter(paths.values()))).compile_cache)
    models = server.open_runs(
        paths,
        step=step,
        weights=WEIGHTS.value,
        bits=BITS.value,
        cache_dtype=CACHE_DTYPE.value,
        sizes=sizes,
        queue=QUEUE.value,
        context=CONTEXT.value,
        prefix_bytes=PREFIX_MB.value * 1_000_000,
        tell=lambda line: print(line, flush=True),
    )
    limits = Limits(
        body_bytes=MAX_BODY_BYTES.value,
        prompt_bytes=MAX_PROMPT_BYTES.value,
        choices=MAX_CHOICES.value,
        told=MAX_TOLD.value,
        seconds=TIMEOUT_S.value,
        read_seconds=READ_TIMEOUT_S.value,
        connections=CONNECTIONS.value,
    )
    key = os.environ.get("GPT_JAX_API_KEY", "")
    ended = server.serve(
        models,
        server.Place(
            *(HOST.value, PORT.value, key, GRACE_S.value),
            hosts=ALLOWED_HOSTS.value,
            origins=CORS_ORIGIN.value,
            access_log=ACCESS_LOG.value,
        ),
        limits,
        stop=server.Stop(),
        tell=lambda line: print(line, flush=True),
    )
    if not ended:  # a program is being compiled, which nothing can interrupt
        sys.stdout.flush()
        os._exit(0)


def _sizes(texts: list[str]) -> list[int]:
    """Returns what --batches says."""
    sizes = [int(text) for text in texts if text.strip().isdecimal()]
    if len(sizes) < max(1, len(texts)) or sizes != sorted({*sizes}) or sizes[0] < 1:
        raise ValueError(
            f"--batches={','.join(texts)} must be whole numbers above 0 that rise, as "
            "in --batches=1,8,32"
        )
    return sizes


def _check_numbers() -> None:
    """Raises ValueError for a number that cannot be, before any weights are read."""
    counts = (MAX_BODY_BYTES, MAX_PROMPT_BYTES, MAX_CHOICES, MAX_TOLD, CONNECTIONS)
    for flag in counts:
        if flag.value < 1:
            raise ValueError(f"--{flag.name}={flag.value} must be at least 1")
    for flag in (TIMEOUT_S, READ_TIMEOUT_S):
        if not 0 < flag.value < float("inf"):
            raise ValueError(f"--{flag.name}={flag.value} must be above 0 seconds")
    for flag in (QUEUE, GRACE_S, CONTEXT, PREFIX_MB):
        if not flag.value >= 0:
            raise ValueError(f"--{flag.name}={flag.value} must be at least 0")
    for origin in CORS_ORIGIN.value:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError(
                f"--cors_origin={origin} must be a site without a path, as "
                "https://chat.example.org, or *"
            )
    for host in ALLOWED_HOSTS.value:
        if not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:]+\]", host):
            raise ValueError(
                f"--allowed_hosts={host} must be a name without a port, as "
                "chat.example.org"
            )
    if not 0 <= PORT.value <= 65535:
        raise ValueError(f"--port={PORT.value} must be a number from 0 to 65535")


if __name__ == "__main__":
    door.run(main, __doc__)
