"""How fast does this machine train? Measured in seconds, and kept.

  python -m experiments.calibrate
  python -m experiments.calibrate --again

A few steps of a small model on the built-in text give the FLOP/s that training reaches
here. configs/budget.py asks for them, and has them measured where they are not kept.
They are kept in ~/.cache/gpt_jax/speed, for this machine and this version of JAX.
"""

from absl import flags

from experiments import door

AGAIN = flags.DEFINE_bool("again", False, "Measure although a speed is kept.")
CACHE = door.define_path("cache", "~/.cache/gpt_jax", "Folder of what is kept.")


def main(_: list[str]) -> None:
    """Measures unless it is known, and prints what is known."""
    from gpt_jax import calibration

    known = None if AGAIN.value else calibration.kept(CACHE.value)
    if known is None:
        from gpt_jax import configs

        known = calibration.measure(CACHE.value, configs.load("quickstart"))
    print(calibration.in_words(known))


if __name__ == "__main__":
    door.run(main, __doc__)
