"""Look into a run while it reads a text: one HTML page, to be opened in a browser.

  python -m experiments.look --run=runs/quickstart --prompt="def __init__(self, name):"
  python -m experiments.look --run=runs/a --prompt="Paris is in" --against="Rome is in"
  python -m experiments.look --run=runs/a --prompt="One." --prompt="Two." --step=best

The page shows the loss of every token and what was expected instead, the attention of
every head, what each layer would say next (the logit lens), how the residual stream
grows, which heads and MLPs a logit comes from, and all of it at every checkpoint that
the run keeps. It needs no network and no server.

--against patches another text, of as many tokens, into the first: at which layer and
token does its residual stream decide what comes next? Several --prompt are documents of
one row, which do not see each other. --nohistory looks at one checkpoint only.
"""

from pathlib import Path

from absl import flags

from experiments import door

RUN = door.define_path("run", "", "Run folder.")
PROMPT = flags.DEFINE_multi_string(
    "prompt", [], "The text; several are documents of one row."
)
AGAINST = flags.DEFINE_string("against", "", "A text to be patched into the first.")
OUT = door.define_path("out", "", "The page; empty = look.html in the run folder.")
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)
WEIGHTS = flags.DEFINE_enum(
    "weights", "", ["", "params", "ema"], "Which weights; empty = ema where kept."
)
HISTORY = flags.DEFINE_bool("history", True, "Look at every other checkpoint as well.")


def main(_: list[str]) -> None:
    """Writes the page and says where it is."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/quickstart")
    if not any(PROMPT.value):
        raise ValueError('--prompt is missing, e.g. --prompt="def main("')
    step = door.step(STEP.value)
    out = OUT.value or str(Path(RUN.value) / "look.html")
    if OUT.value:
        door.check_writable("out", out)

    from gpt_jax import microscope

    found = microscope.look(
        RUN.value,
        PROMPT.value,
        against=AGAINST.value,
        step=step,
        weights=WEIGHTS.value,
        history=HISTORY.value,
        progress=True,
    )
    steps = microscope.write(out, found)
    print(f"looked at step {found.opened}, {len(found.row.tokens_T)} tokens")
    if left := len(found.frames) - len(steps):
        print(f"  {left} of {len(found.frames)} checkpoints did not fit into the page")
    print(f"  the page  {out}")


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
