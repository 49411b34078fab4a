"""What happened at step 900? Executes steps of a run again, with instruments.

  python -m experiments.reopen --run=runs/quickstart --steps=880:900
  python -m experiments.reopen --run=runs/quickstart --steps=595:605 \\
      --look=grad_norms,update_ratio,noise_scale,attention,per_token_loss

The run goes back to the nearest checkpoint before the first step (to its start where it
keeps none) and does what it did, with the same bits: every loss that it logged on the
way must be met, or nothing is told. Beside the steps, instruments look at what the run
did not record; the page names what stands out: the step, the weights, the example.

  grad_norms      the norm of each weight's gradient, before clipping
  update_ratio    the norm of what a step adds to a weight, over the weight's
  noise_scale     the batch above which more examples teach little, from the gradients
                  of single examples
  attention       the entropy of each head in the worst example (lm, sft, answers)
  per_token_loss  the loss of each token of the worst examples (lm, sft, answers)

The run is left as it is. Exit codes: 0 done; 1 a logged number is not met; 2 a mistake
in the flags; 130 Ctrl-C.
"""

import re
from pathlib import Path

from absl import flags

from experiments import door

RUN = door.define_path("run", "", "Run folder.")
STEPS = flags.DEFINE_string("steps", "", "FIRST:LAST, both executed, or one step.")
LOOK = flags.DEFINE_list("look", ["grad_norms", "update_ratio"], "Instruments.")
TOLERANCE = flags.DEFINE_float(
    "tolerance", 0.0, "How far logged numbers may be off, relative; 0 = the same bits."
)
OUT = door.define_path(
    "out", "", "The page; empty = reopened-FIRST-LAST.html in the run folder."
)


def main(_: list[str]) -> None:
    """Executes the steps, writes the page, and says what stands out."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/quickstart")
    found = re.fullmatch(r"(\d+)(?::(\d+))?", STEPS.value)
    if not found:
        raise ValueError(
            f"--steps={STEPS.value}: give the first and the last step, as in "
            "--steps=880:920"
        )
    first, last = int(found[1]), int(found[2] or found[1])
    if not TOLERANCE.value >= 0:
        raise ValueError(f"--tolerance={TOLERANCE.value}: it must not be negative")
    if OUT.value:
        door.check_writable("out", OUT.value)

    from gpt_jax import files, reopen
    from gpt_jax.report import reopened

    folder = files.expand(RUN.value)
    seen = reopen.reopen(
        folder,
        first,
        last,
        LOOK.value,
        tolerance=TOLERANCE.value,
        progress=True,
    )
    page = Path(OUT.value or folder / f"reopened-{first}-{last}.html")
    reopened.write(seen, page)
    how = "to the bit" if not seen.off else f"within {seen.off:.2g}"
    back = f"step {seen.began}" if seen.began else "the start"
    print(f"from {back} to step {last}; {len(seen.met)} logged lines met {how}")
    for line in reopened.findings(seen.frames):
        print(f"  {line}")
    print(f"the page  {page}")


if __name__ == "__main__":
    door.run(main, __doc__)
