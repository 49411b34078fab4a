"""Continue a text with the model of a run.

  python -m experiments.sample --run=runs/quickstart --prompt="def main("
  python -m experiments.sample --run=runs/shakespeare --temperature=0.5 --top_k=40
  python -m experiments.sample --run=runs/shakespeare --prompt=ROMEO: \\
      --prompt=JULIET: --count=3 --max_new_tokens=100 --stop="\\n\\n" --seed=7
  echo "Once upon a time" | python -m experiments.sample --run=runs/tiny --prompt_file=-

One prompt with --count=1 appears as it is written; otherwise each completion follows a
header. Why a text ended is told on stderr: end of text, a stop string, enough new
tokens, or a full context (the model sees no further back, so it writes no further).
--beyond_context goes on there: the model then sees the last half of its context only.

Without a prompt the model begins with its end-of-text token, or with a newline. The
same seed gives the same text; completion number k of a prompt depends on the seed, the
prompt and k only. --temperature=0 always takes the likeliest token. An imported model
is drawn from as its generation_config.json says, where no flag says otherwise.
"""

import sys
from pathlib import Path

from absl import flags

from experiments import door
from gpt_jax import sampling

RUN = door.define_path("run", "", "Run folder.")
PROMPT = flags.DEFINE_multi_string("prompt", [], "Text to continue; repeatable.")
PROMPT_FILE = door.define_path(
    "prompt_file", "", "File whose text, less a last newline, is a prompt; - is stdin."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Most tokens to write.")
SAMPLING = door.define_sampling()
SEED = flags.DEFINE_integer("seed", 1337, "Another seed gives another text.")
COUNT = flags.DEFINE_integer("count", 1, "Completions of each prompt.")
STOP = flags.DEFINE_multi_string(
    "stop", [], r"Text at which to stop, cut off (\n is a newline); repeatable."
)
BEYOND_CONTEXT = flags.DEFINE_bool(
    "beyond_context", False, "When the context is full, go on from its last half."
)
LOOKUP = flags.DEFINE_integer(
    "lookup",
    0,
    "Guess so many tokens from the text so far and try them out in one pass: the same "
    "text, sooner where it repeats itself.",
)
DRAFT = door.define_path(
    "draft",
    "",
    "A smaller run with the same tokenizer that guesses --lookup tokens (4 unless "
    "said), instead of the text: the same text, sooner where the two agree.",
)
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "", ["", "params", "ema"], "Which weights; empty = ema where kept."
)
BITS = door.define_bits()
CACHE_DTYPE = door.define_cache_dtype()

GOES_ON = "--beyond_context goes on when the context is full"


def main(_: list[str]) -> None:
    """Prints completions; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/quickstart")
    step = door.step(STEP.value)
    prompts = list(PROMPT.value)
    if PROMPT_FILE.value:
        prompts.append(_read(PROMPT_FILE.value))
    prompts = prompts or [""]

    given = door.given_sampling(SAMPLING, MAX_NEW_TOKENS.value)

    from gpt_jax import generation, programs, runs, sample, screen

    found = generation.of(RUN.value)  # before the weights are read
    settings = sampling.settings(MAX_NEW_TOKENS.value, **{**found.settings, **given})
    if found.told:
        print(f"[{found.told}]", file=sys.stderr)
    few = {"bits": BITS.value, "cache_dtype": CACHE_DTYPE.value}
    run = runs.open(RUN.value, step=step, weights=WEIGHTS.value, **few)
    programs.use_cache(run.config.compile_cache)
    for prompt in prompts:
        if told := sample.advice(prompt, run.tokenizer):
            print(f"[{told}]", file=sys.stderr)
    options = {
        "model": run.model,
        "params": run.params,
        "tokenizer": run.tokenizer,
        "seed": SEED.value,
        "stop": [text.replace("\\n", "\n") for text in STOP.value],
        "beyond_context": BEYOND_CONTEXT.value,
        "lookup": LOOKUP.value,
        "draft": _draft(run, few) if DRAFT.value else None,
        **settings,
    }
    if len(prompts) == 1 and COUNT.value == 1:
        _show(sample.stream(prompt=prompts[0], **options), prompts[0])
        return
    done = sample.texts(prompts=prompts, count=COUNT.value, **options)
    for i, completion in enumerate(done):
        prompt, number = divmod(i, COUNT.value)
        print(
            f"--- prompt {prompt + 1} of {len(prompts)}, "
            f"completion {number + 1} of {COUNT.value}, stopped: {completion.detail}"
        )
        words = screen.Words()
        words.write(f"{completion.prompt}{completion.text}")
        words.end()
    if any(map(_is_full, done)):
        print(f"[{GOES_ON}]", file=sys.stderr)


def _draft(run, few: dict):
    """Returns the model that guesses what a run writes, opened as that is."""
    from gpt_jax import runs, sample

    found = runs.open(DRAFT.value, **few)
    if found.tokenizer.vocab != run.tokenizer.vocab:
        raise ValueError(
            f"--draft={DRAFT.value} has another tokenizer than --run={RUN.value}: what "
            "it guesses would be other tokens"
        )
    return sample.Draft(found.model, found.params)


def _show(pieces, prompt: str) -> None:
    """Prints a stream as it comes, then why it ended."""
    from gpt_jax import screen

    words = screen.Words()
    words.write(prompt)
    while True:
        try:
            words.write(next(pieces))
        except StopIteration as end:
            words.end()
            more = f"; {GOES_ON}" if _is_full(end.value) else ""
            print(f"[stopped: {end.value.detail}{more}]", file=sys.stderr)
            return


def _is_full(completion) -> bool:
    """Whether a text ended before its time because the context was full."""
    short = len(completion.ids) < MAX_NEW_TOKENS.value
    return completion.reason == "length" and short and not BEYOND_CONTEXT.value


def _read(path: str) -> str:
    """Returns a prompt from a file or stdin, without its last newline."""
    data = sys.stdin.buffer.read() if path == "-" else Path(path).read_bytes()
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"--prompt_file={path} is not UTF-8 text (byte {error.start}); convert it"
        ) from error


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
