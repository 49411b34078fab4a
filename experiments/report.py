"""One page for a run: curves, samples beside their steps, facts, what to do next.

  python -m experiments.report --run=runs/quickstart
  python -m experiments.report --run=runs/quickstart --out=quickstart.html

Training writes it at its end; this writes it anew, also while the run goes on. It is
one HTML file that needs no network and no server. (A sweep writes one of its own;
experiments.compare makes one of several runs.)
"""

from experiments import door

RUN = door.define_path("run", "", "Run folder.")
OUT = door.define_path("out", "", "The page; empty = report.html in the run folder.")


def main(_: list[str]) -> None:
    """Writes the page and says where it is."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/quickstart")
    if OUT.value:
        door.check_writable("out", OUT.value)

    from gpt_jax import files
    from gpt_jax.report import run

    path = run.write(files.expand(RUN.value), OUT.value or None)
    print(f"the page  {path}")


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
