"""Train a model, or go on with a run that was stopped.

  python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m experiments.train --config=configs/shakespeare_char.py:recipe=nanogpt
  python -m experiments.train --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.source=my_book.txt --config.steps=2000 --config.hyper.lr=3e-4

A config file says how much (configs/common.py explains every key); any key can be
overridden with --config.KEY=VALUE. The same command resumes an interrupted run: Ctrl-C
and SIGTERM save first, and even after a crash at most checkpoint_every steps are lost.
--config.steps=N extends a finished run.

The run folder (--workdir, default runs/<config name>) holds config.json,
tokenizer.json, metrics.jsonl, loss.png, samples.md and checkpoints/.
"""

from pathlib import Path

from absl import flags

from experiments import door

CONFIG = door.define_config()
WORKDIR = flags.DEFINE_string(
    "workdir", "", "Run folder (default: runs/<config name>)."
)
PROFILE = flags.DEFINE_integer("profile", 0, "Trace so many steps for TensorBoard.")


def main(_: list[str]) -> int:
    """Trains and says what can be done next; returns the exit code."""
    config = CONFIG.value
    if config is None:
        raise ValueError("--config is missing, e.g. --config=configs/quickstart.py")
    workdir = WORKDIR.value or str(Path("runs") / door.config_name())

    from gpt_jax import train

    result = train.train(config, workdir, profile=PROFILE.value)
    command = f"python -m experiments.train --config={door.config_file()}"
    mine = "--workdir=runs/mine --config.data.source=FILE.txt"
    again = f"{command} --workdir={workdir}"
    if result.reason == "signal":
        print(f"stopped after step {result.step}; the same command resumes")
        return result.exit_code
    print(f"done: {result.reason} reached after step {result.step}")
    print(f"  the loss curve   {workdir}/loss.png")
    print(
        f"  sample           python -m experiments.sample --run={workdir} --prompt=..."
    )
    if result.reason == "steps":
        print(f"  train longer     {again} --config.steps={2 * result.step}")
    print(f"  your own text    {command} {mine}")
    return result.exit_code


if __name__ == "__main__":
    door.run(main, __doc__)
