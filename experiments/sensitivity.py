"""Which numbers of a run matter? The slope of the final loss in each of them.

  python -m experiments.sensitivity --run=runs/quickstart
  python -m experiments.sensitivity --run=runs/quickstart --knobs=lr,warmup_steps \\
      --seeds=5

Each number is made larger and smaller by a factor, under several seeds: 8 numbers and 3
seeds are 48 runs as long as this one, trained as one program. What comes out is the
change of the final validation loss where the number doubles (of beta1, beta2, momentum
and ema_decay: where what is missing to 1 doubles), with its interval over the seeds: an
interval that holds 0 says that nothing is known. The run folder gets sensitivity.json,
and its report.html shows it.
"""

from pathlib import Path

from absl import flags

from experiments import door

RUN = door.define_path("run", "", "Run folder.")
KNOBS = flags.DEFINE_list("knobs", [], "Keys of hyper (default: the first 8 it reads).")
SEEDS = flags.DEFINE_integer("seeds", 3, "How many seeds each.")
FIRST = flags.DEFINE_integer("first", 0, "The first seed.")
FACTOR = flags.DEFINE_float("factor", 1.25, "By which a number is changed.")
OUT = door.define_path("out", "", "Folder of the runs (default: RUN-sensitivity).")


def main(_: list[str]) -> None:
    """Trains the neighbours and prints what each number does."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/quickstart")
    out = OUT.value or f"{RUN.value.rstrip('/')}-sensitivity"
    door.check_writable("out", out, folder=True)

    from gpt_jax import files, sensitivity
    from gpt_jax.report import run as report

    folder = files.expand(RUN.value)
    found = sensitivity.measure(
        folder,
        Path(out),
        knobs=KNOBS.value,
        count=SEEDS.value,
        first=FIRST.value,
        factor=FACTOR.value,
        report=lambda *told: None,
    )
    for knob in found:
        print(sensitivity.in_words(knob))
    print(f"the page  {report.write(folder)}")


if __name__ == "__main__":
    door.run(main, __doc__)
