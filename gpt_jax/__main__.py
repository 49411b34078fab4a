"""gpt-jax: train, sample, tune, serve and measure GPT models.

  gpt-jax list                                 what there is
  gpt-jax train quickstart --workdir=runs/a    a config by its name
  gpt-jax train my_config.py:size=small        or a file of yours
  gpt-jax sample runs/a --prompt="def"
  gpt-jax train --help                         every flag of a command

The first word after a command is its config, run folder or sweep; everything else is
written --name=value. `python -m gpt_jax` is the same.
"""

import runpy
import sys

import gpt_jax
from gpt_jax import commands, names

# What the first word after a door is, when it is no flag.
FIRST = {
    **dict.fromkeys(("train", "prepare", "estimate", "verify_resume"), "config"),
    **dict.fromkeys(
        (
            "sample",
            "chat",
            "classify",
            "evaluate",
            "doctor",
            "look",
            "reopen",
            "sensitivity",
        ),
        "run",
    ),
    **dict.fromkeys(("convert",), "run"),
    **dict.fromkeys(("serve", "compare"), "runs"),
    "sweep": "sweep",
}


def main() -> None:
    """Runs the door that the command line names, as `python -m experiments.*` does."""
    word, rest = (sys.argv[1] if sys.argv[1:] else "--help"), sys.argv[2:]
    if word in ("--help", "-h", "-help", "help"):
        print((__doc__ or "").strip(), end="\n\n")
        return _list(commands.DOORS)
    if word == "--version":
        return print(f"gpt-jax {gpt_jax.__version__}")
    if word == "list":
        return _list(commands.DOORS, commands.CONFIGS, commands.SWEEPS)
    doors = commands.known(commands.DOORS)
    if word not in (*doors, "trial"):
        near = names.did_you_mean(word, doors)
        print(f"error: there is no command {word!r}{near} (see gpt-jax list)",
              file=sys.stderr)  # fmt: skip
        sys.exit(2)
    if rest and not rest[0].startswith("-") and word in FIRST:
        rest[0] = f"--{FIRST[word]}={rest[0]}"
    commands.enter()
    sys.argv = [f"gpt-jax {word}", *rest]
    runpy.run_module(f"experiments.{word}", run_name="__main__", alter_sys=True)


def _list(*folders: str) -> None:
    """Prints the names in some folders, with what each is."""
    for folder in folders:
        print(f"{commands.ROOT / folder}:" if len(folders) > 1 else "Commands:")
        for name in commands.known(folder):
            print(f"  {name:18}{commands.first_line(folder, name)}")
        print()


if __name__ == "__main__":
    main()
