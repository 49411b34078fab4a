"""Train a model, or go on with a run that was stopped.

  python -m experiments.train --config=configs/quickstart.py --workdir=runs/quickstart
  python -m experiments.train --config=configs/shakespeare_char.py:recipe=nanogpt
  python -m experiments.train --config=configs/quickstart.py --workdir=runs/mine \\
      --config.data.source=my_book.txt --config.steps=2000 --config.hyper.lr=3e-4

A config file says how much (configs/common.py explains every key); any key can be
overridden with --config.KEY=VALUE. The same command resumes an interrupted run: Ctrl-C
and SIGTERM save first; a crash costs the steps since the last checkpoint.
--config.steps=N extends a finished run.

  python -m experiments.train --config=configs/budget.py:minutes=10 --workdir=runs/best
  python -m experiments.train --config=configs/budget.py:minutes=10 --explain

configs/budget.py chooses sizes, batch and rates by rules from a budget; --explain shows
them. With --config.fit_seconds=600 any config chooses its steps to take so long.

Several processes, on one machine or many, train one model with --distributed:
experiments.launch starts them here; docs/guide/14-scale.md says how on clusters.

The run folder (--workdir, default runs/<config name>) holds config.json,
tokenizer.json, metrics.jsonl, loss.png, samples.md and checkpoints/.
It may lie in a store: --workdir=gs://bucket/runs/a (docs/guide/14-scale.md).
"""

import itertools
from pathlib import Path

from absl import flags

from experiments import door

CONFIG = door.define_config()
WORKDIR = door.define_path("workdir", "", "Run folder (default: runs/<config name>).")
ALLOW = flags.DEFINE_bool(
    "allow_data_change", False, "Go on with a run though its data is another now."
)
flags.DEFINE_alias("allow-data-change", "allow_data_change")
PROFILE = flags.DEFINE_integer("profile", 0, "Trace so many steps for TensorBoard.")
EXPLAIN = flags.DEFINE_bool(
    "explain", False, "Print what the config chose by which rule, and train nothing."
)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed",
    False,
    "This is one of several processes. Slurm, Open MPI, Kubernetes and Cloud TPU say "
    "which; elsewhere the next three flags do.",
)
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of the first process.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
PROCESS = flags.DEFINE_integer("process", None, "Which one this is, from 0.")


def main(_: list[str]) -> int:
    """Trains and says what can be done next; returns the exit code."""
    config = door.given(CONFIG.value)
    if EXPLAIN.value:
        return explained()
    workdir = WORKDIR.value or str(Path("runs") / door.config_name())

    if PROFILE.value < 0:
        raise ValueError(
            f"--profile={PROFILE.value}: give the number of steps to trace"
        )

    place = {
        "coordinator": COORDINATOR.value,
        "count": PROCESSES.value,
        "index": PROCESS.value,
    }
    if any(value not in (None, "") for value in place.values()) > DISTRIBUTED.value:
        raise ValueError("--coordinator, --processes and --process need --distributed")
    config.allow_data_change |= ALLOW.value

    from gpt_jax import commands, processes, stores, train

    train.check(config, door.recipe())
    if DISTRIBUTED.value:
        beat = config.heartbeat_timeout_seconds
        processes.join(**place, heartbeat_timeout_seconds=beat)
    try:
        result = train.train(config, workdir, profile=PROFILE.value)
    except RuntimeError as error:
        if told := processes.lost(error):
            raise ConnectionError(told) from error
        raise
    processes.leave(0)
    if processes.index():
        return result.exit_code
    if result.reason == "signal":
        print(f"stopped after step {result.step}; the same command resumes")
        return result.exit_code
    from gpt_jax.report import run as report

    named = stores.shown(workdir)
    sample = commands.typed("sample")
    use = f"sample           {sample} --run={named} --prompt=..."
    if (Path(workdir) / "classes.json").is_file():
        classify = commands.typed("classify")
        use = f"label texts      {classify} --run={named} --text=..."
    answers = "template" in config.task
    if answers:
        use = f"talk with it     {commands.typed('chat')} --run={named}"
    # Whatever started several processes starts them again.
    same = "" if not DISTRIBUTED.value else "the same, with"
    longer = same or door.command(("--config.steps", "--workdir"))
    mine = same or door.command(("--config.data.source", "--workdir"))
    if result.trained:
        print(f"done: {result.reason} reached after step {result.step}")
    else:
        print(
            f"nothing to do: {named} has {result.step} steps, and no more were "
            "asked for"
        )
    if skipped := result.numbers.get("skipped"):
        print(f"  skipped          {skipped:,.0f} updates: not finite, or spikes")
    curves = (Path(workdir) / f"{name}.png" for name in ("margins", "reward", "loss"))
    if curve := next((curve for curve in curves if curve.is_file()), None):
        print(f"  the curve        {curve}")
    if page := report.of_run(workdir) if result.trained else None:
        print(f"  the report       {page}")
    print(f"  {use}")
    if result.reason == "steps":
        steps = 2 * max(result.step, 1)
        print(f"  train longer     {longer} --workdir={named} --config.steps={steps}")
    file = "rows    " if answers else "text    "
    if config.task.name not in ("answers", "grpo"):  # they make their own problems
        new = f"--workdir={_unused('runs/mine')} --config.data.source=FILE"
        print(f"  your own {file}{mine} {new}")
    return result.exit_code


def explained() -> int:
    """Prints the choices of a config and their rules."""
    from gpt_jax import configs, screen

    rows = configs.explain(door.config_file())
    print(screen.table(["what", "chosen", "by which rule"], rows))
    return 0


def _unused(folder: str) -> str:
    """Returns the name of a folder that is not there yet: runs/mine, runs/mine2, ..."""
    names = (f"{folder}{number}" for number in itertools.count(2))
    return next(
        name for name in itertools.chain([folder], names) if not Path(name).exists()
    )


if __name__ == "__main__":
    door.run(main, __doc__)
