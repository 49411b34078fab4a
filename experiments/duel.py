"""Is a change better, or was it luck? Pairs of seeds until a test knows.

  python -m experiments.duel configs/quickstart.py mine.py
  python -m experiments.duel --config=configs/quickstart.py:size=tiny \\
      --change=hyper.lr=0.002 --change=hyper.warmup_steps=10
  python -m experiments.duel --replay=runs/duels/duels.jsonl

Both sides train with the same seeds, so with the same data order and first weights, and
as one program where they differ in seed and hyper.* alone. After every --at_once pairs
the differences are tested. The test may be read at any time: that sides which are the
same are ever called better or worse has a chance of at most --alpha, in all looks
together (gpt_jax/sequential.py). It says: b is better, b is worse, no difference within
--within, or not yet and about how many more seeds that would need. The same command
goes on, and with more --seeds it goes further.

Sides that differ in data or budget are refused: their numbers do not compare. OUT gets
the run folders a/seed=0, b/seed=0, ...; beside it, duels.jsonl gets a line for every
look, and --replay computes its verdicts again from the recorded numbers.

Exit codes: 0 whatever the verdict; 1 a side diverged, or a ledger does not replay; 2 a
mistake in the flags; 130 and 143 stopped by a signal, the same command goes on.
"""

from pathlib import Path

from absl import flags

from experiments import door

CONFIG = flags.DEFINE_string("config", "", "The config of both sides, with --change.")
CHANGE = flags.DEFINE_multi_string("change", [], "KEY=VALUE that side b alone has.")
SET = flags.DEFINE_multi_string("set", [], "KEY=VALUE that both sides have.")
OUT = door.define_path(
    "out", "", "Folder of the runs (default: runs/duels/<digest of the configs>)."
)
METRIC = flags.DEFINE_string("metric", "val_loss", "A number of metrics.jsonl.")
DIRECTION = flags.DEFINE_enum(
    "direction", "minimize", ["minimize", "maximize"], "Better is."
)
AT = flags.DEFINE_string("at", "last", "Which evaluation counts: best, last, 'last 3'.")
WITHIN = flags.DEFINE_float("within", 0.01, "A difference that small is none.")
ALPHA = flags.DEFINE_float("alpha", 0.05, "The chance of an error, over all looks.")
SEEDS = flags.DEFINE_integer("seeds", 12, "At most so many pairs.")
FIRST = flags.DEFINE_integer("first", 0, "The first seed.")
AT_ONCE = flags.DEFINE_integer("at_once", 4, "Pairs between two looks.")
REPLAY = door.define_path("replay", "", "A duels.jsonl whose verdicts are recomputed.")


def main(words: list[str]) -> int:
    """Trains pairs, or replays a ledger; returns the exit code."""
    if REPLAY.value:
        if words or CONFIG.value or CHANGE.value or SET.value:
            raise ValueError("--replay goes with no config: it trains nothing")
        return replayed(REPLAY.value)
    told, configs = sides(words)
    if OUT.value:
        door.check_writable("out", OUT.value, folder=True)

    from gpt_jax import duel, files
    from gpt_jax.criterion import Criterion

    wanted = duel.Duel(
        told=told,
        configs=configs,
        criterion=Criterion(METRIC.value, DIRECTION.value, AT.value),
        within=WITHIN.value,
        alpha=ALPHA.value,
        first=FIRST.value,
        seeds=SEEDS.value,
        at_once=AT_ONCE.value,
    )
    text = "\n".join(config.to_json() for config in configs)
    out = Path(OUT.value or f"runs/duels/{files.digest(text)[:8]}")
    found = duel.fight(wanted, out, tell=lambda line: print(line, flush=True))
    if found.exit_code:
        print(f"stopped after {len(found.pairs)} pairs; the same command goes on")
        return found.exit_code
    print(f"  the runs    {out}")
    print(f"  the ledger  {out.parent / duel.LEDGER}")
    return 0


def sides(words: list[str]):
    """Returns what the two sides are called, and their configs.

    Raises:
      ValueError: they are not given in one of the two ways.
    """
    from gpt_jax.sweep import plan

    if bool(words) == bool(CONFIG.value):
        raise ValueError(
            "give two config files, A.py B.py, or --config=FILE.py with --change"
        )
    if words and (len(words) != 2 or CHANGE.value):
        raise ValueError(
            f"{' '.join(words)}: give two config files; --change goes with --config"
        )
    if CONFIG.value and not CHANGE.value:
        raise ValueError(
            "--change is missing: what is side b to have, as in --change=hyper.lr=0.002"
        )
    named = words or [CONFIG.value] * 2
    shared = plan.assignments(SET.value)
    changes = plan.assignments(CHANGE.value, "change")
    if both := sorted(shared.keys() & changes.keys()):
        raise ValueError(f"{both[0]} is in --set and in --change: leave one out")
    configs = []
    for name, extra in zip(named, ({}, changes), strict=True):
        config = door.load_config(name)
        wanted = plan.literals(config, {**shared, **extra})
        configs.append(plan.override(config, wanted))
    b = named[1] if words else " ".join(CHANGE.value)
    return (named[0], b), tuple(configs)


def replayed(path: str) -> int:
    """Prints a ledger with its verdicts computed again; returns the exit code."""
    from gpt_jax import duel, screen

    rows, wrong = [], 0
    for one in duel.replay(path):
        wrong += not one.same
        a, b = one.line["sides"]
        bounds = f"{one.evidence.low:+.4f} to {one.evidence.high:+.4f}"
        written = "yes" if one.same else f"NO: {one.line['verdict']}"
        mean = f"{one.evidence.mean:+.4f}"
        rows.append([a, b, one.evidence.n, mean, bounds, one.verdict.word, written])
    heads = ["a", "b", "seeds", "b - a", "interval", "verdict", "as written"]
    print(screen.table(heads, rows))
    return 1 if wrong else 0


if __name__ == "__main__":
    door.run(main, __doc__, words=True)
