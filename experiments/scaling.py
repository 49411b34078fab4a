"""How does the loss fall with size and tokens? A miniseries, its law, a prediction.

  python -m experiments.scaling --config=configs/quickstart.py:size=tiny \\
      --config.data.source=builtin --config.batch_size=16 --config.eval_windows=256 \\
      --widths=32,48,64,96,128,160 --steps=800 --out=runs/scaling

Of every width but the last a trunk is trained at the full rate, and --horizons forks of
it decay, each for a fifth of its length: L(N, D) is fitted to their last losses, with
bootstrap intervals. The last width, at --steps, is predicted before it is trained; the
page shows prediction, interval and truth, and the sizes that a compute is best spent
on. The same command goes on after a stop. Heads keep their features, so widths are
multiples of those.
"""

from absl import flags

from experiments import door

CONFIG = door.define_config()
WIDTHS = flags.DEFINE_list(
    "widths", ["32", "48", "64", "96", "128", "192"], "Rising; the last is held out."
)
STEPS = flags.DEFINE_integer("steps", 800, "Of the longest horizon.")
HORIZONS = flags.DEFINE_integer("horizons", 4, "How many, evenly spaced up to it.")
OUT = door.define_path("out", "runs/scaling", "Folder of the runs and the page.")


def main(_: list[str]) -> int:
    """Trains, fits, predicts, checks, and writes the page; returns the exit code."""
    config = door.given(CONFIG.value, "configs/quickstart.py:size=tiny")
    if bad := [word for word in WIDTHS.value if not word.isdecimal()]:
        raise ValueError(
            f"--widths has {bad[0]!r}: give whole numbers, as in 32,64,128"
        )
    door.check_writable("out", OUT.value, folder=True)

    from gpt_jax import files, scaling
    from gpt_jax.report import law

    ladder = scaling.Ladder(
        config, [*map(int, WIDTHS.value)], STEPS.value, HORIZONS.value
    )
    out = files.expand(OUT.value)
    found = scaling.climb(ladder, out, tell=lambda line: print(line, flush=True))
    if isinstance(found, int):
        print("stopped; the same command goes on")
        return found
    missing = law.write(out, found)
    print(f"  the numbers  {out / scaling.FILE}")
    print(f"  the page     {missing or out / 'scaling.html'}")
    return 0


if __name__ == "__main__":
    door.run(main, __doc__)
