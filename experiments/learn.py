"""The package with holes: write its functions yourself, and have them checked.

  python -m experiments.learn                     what there is to write
  python -m experiments.learn --start=attention   learn/attention.py, without its body
  python -m experiments.learn --check=attention   right, or the mistake by its name
  python -m experiments.learn --train=attention   a small run with it: both curves

A check compares your function with the real one: values, shapes, gradients, and the
same under jit and vmap. Where yours differs it says which of the usual mistakes it is.
Training puts it in its place in the quickstart (size=tiny), right or wrong.
"""

from absl import flags

from experiments import door

START = flags.DEFINE_string("start", "", "Begin this hole.")
CHECK = flags.DEFINE_string("check", "", "Check this hole; all = those begun.")
TRAIN = flags.DEFINE_string("train", "", "Train the quickstart with this one.")
FOLDER = door.define_path("folder", "learn", "Where your files are.")


def main(_: list[str]) -> int:
    """Lists, starts or checks; 1 where something that was checked is not right."""
    given = [flag.name for flag in (START, CHECK, TRAIN) if flag.value]
    if len(given) > 1:
        told = " and ".join(f"--{name}" for name in given)
        raise ValueError(f"{told} are {len(given)} commands: give one of them")

    from pathlib import Path

    from gpt_jax import commands, learn

    typed = commands.typed("learn")
    if START.value:
        command = f"{typed} --check={START.value}"
        print(f"write  {learn.start(START.value, FOLDER.value, command)}")
        print(f"then   {command}")
        return 0
    if TRAIN.value:
        made = learn.train(TRAIN.value, FOLDER.value)
        print("\n".join([*made.lines, f"drawn in {made.picture}"]))
        return 0
    begun = [
        name for name in learn.HOLES if (Path(FOLDER.value) / f"{name}.py").is_file()
    ]
    if not CHECK.value:
        _list(learn.HOLES, begun)
        print(f"\nbegin one with {typed} --start=NAME")
        return 0
    wanted = begun if CHECK.value == "all" else [CHECK.value]
    if not wanted:
        raise ValueError(f"--check=all: {FOLDER.value} holds no hole that was begun")
    wrong = 0
    for name in wanted:
        verdict = learn.check(name, FOLDER.value)
        wrong += not verdict.right
        print(f"{name}: {'right' if verdict.right else 'not yet'}")
        for line in verdict.lines:
            print(f"  {line}")
        if verdict.right and name in learn.trained.PLACES:
            print(f"  see it learn: {typed} --train={name}")
    return int(wrong > 0)


def _list(holes, begun: list[str]) -> None:
    """Prints the holes by chapter of the book."""
    for chapter in sorted({hole.chapter for hole in holes.values()}):
        print(f"chapter {chapter}" if chapter else "before and beside the book")
        for hole in holes.values():
            if hole.chapter == chapter:
                mark = "*" if hole.name in begun else " "
                print(f" {mark} {hole.name:20}{hole.title}")


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
