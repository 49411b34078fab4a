"""The rows that every machine can measure: which sizes, against whom, with what goal.

Each function returns the matches of the row of its name. Goals are ratios (2 = twice
as fast) or, without a peer, the most that a value may be.
"""

from typing import Any

from experiments.benches.match import Match
from experiments.benches.setting import (
    GPT2,
    GPT2_TOKENS,
    Setting,
    recipe,
    shape,
    two_sizes,
)
from experiments.benches.worker import ENTER, Side
from gpt_jax import commands

OURS, PEERS = "experiments.benches.ours", "experiments.benches.peers"
FRESH, RACE = "experiments.benches.race:fresh", "experiments.benches.race:to_loss"
HF = "Hugging Face GPT-2, torch eager"
NANOGPT = "nanoGPT's recipe in PyTorch"
GET_BATCH = "nanoGPT's get_batch"
TARGET_LOSS = 1.898  # what nanoGPT's recipe reaches after 2,000 steps


def train_step(setting: Setting) -> list[Match]:
    """A training step: same architecture, float32, AdamW with clipping."""
    matches = []
    for name, (fixed, batch) in two_sizes(setting).items():
        common = {"batch": batch, "seconds": setting.seconds}
        ours = _training(fixed, **common, accumulate=1)
        peer = Side(HF, f"{PEERS}:train_step_rate", {"shape": fixed, **common})
        side = Side("gpt_jax", f"{OURS}:train_step_rate", ours)
        matches.append(Match("train_step", name, side, peer, "tokens/s", 1.0))
    return matches


def time_to_loss(setting: Setting) -> list[Match]:
    """From a process's launch to a validation loss, everything included."""
    shakespeare = {"seq_len": 64, "n_layers": 4, "n_heads": 4, "d_model": 128}
    name = "size=tiny" if setting.toy else "size=cpu"
    stop_at, plan = TARGET_LOSS, {"steps": 2000, "batch": 12}
    if setting.toy:
        shakespeare |= {"seq_len": 16, "n_layers": 1, "d_model": 32}
        stop_at, plan = 20.0, {"steps": 4, "batch": 4}
    train = {"shape": shakespeare, "recipe": plan, "device": "cpu", "compiled": False}
    config = f"configs/shakespeare_char.py:{name}"
    return races("time_to_loss", setting, config, train, stop_at, 4.0)


def races(
    row: str,
    setting: Setting,
    config: str,
    train: dict[str, Any],
    stop_at: float,
    goal: float | None,
) -> list[Match]:
    """Returns the race to a loss, once for each interval between evaluations."""
    matches = []
    for every in setting.eval_every:
        ours = race_ours(setting, config, stop_at, every)
        peer = race_peer(setting, train, stop_at, every)
        shown = f"shakespeare_char to {stop_at:g}, evaluated every {every}"
        match = Match(row, shown, ours, peer, "s", goal, repeats=setting.seeds)
        matches.append(match)
    return matches


def race_ours(setting: Setting, config: str, stop_at: float, every: int) -> Side:
    """Returns our side of a race to a loss: the modern recipe, nothing cached."""
    words = [*commands.argv("train")[1:], f"--config={config},recipe=modern"]
    overrides = {
        "data.source": setting.text,
        "data.folder": "{folder}-data",
        "compile_cache": "{folder}-cache",
        "eval_every": every,
        "early_from": 0,  # as often as the peer
        "sample_every": 0,
        "tensorboard": "false",
        "seed": "{seed}",
    }
    words += [f"--config.{key}={value}" for key, value in overrides.items()]
    words += ["--workdir={folder}"]
    options = {"words": words, "stop_at": stop_at, "seeds": seeds(setting)}
    return Side("gpt_jax", RACE, options)


def race_peer(
    setting: Setting, train: dict[str, Any], stop_at: float, every: int
) -> Side:
    """Returns the peer's side: nanoGPT's recipe, a process of its own."""
    train = {**train, "text": setting.text, "eval_every": every}
    train |= {"folder": "{folder}", "stop_at": stop_at}
    code = f"{ENTER}from experiments.benches import nanogpt as n; "
    code += f"n.train(seed={{seed}}, **{train!r})"
    options = {"words": ["-c", code], "stop_at": stop_at, "seeds": seeds(setting)}
    options |= {"end_counts": True, "needs": ["torch"]}
    return Side(NANOGPT, RACE, options)


def seeds(setting: Setting) -> list[int]:
    """Returns the seeds of a race."""
    return [1337 + i for i in range(setting.seeds)]


def decode(setting: Setting) -> list[Match]:
    """Greedy text from random weights of GPT-2's size, and what the cache brings."""
    fixed = shape(GPT2, GPT2_TOKENS, setting)
    prompt, new, longest = (4, 4, 8) if setting.toy else (16, 128, 256)
    matches = []
    for batch, goal in ((1, 2.0), (8, 1.2))[: 1 if setting.toy else 2]:
        sizes = {"batch": batch, "prompt": prompt, "new": new}
        peer = {"shape": fixed, "device": "cpu", **sizes}
        matches.append(
            Match(
                "decode",
                f"batch {batch}, {new} tokens",
                _decoding(fixed, cached=True, **sizes),
                Side("Hugging Face generate", f"{PEERS}:decode_rate", peer),
                "tokens/s",
                goal,
            )
        )
    sizes = {"batch": 1, "prompt": prompt, "new": new}
    whole = _decoding(fixed, cached=True, **sizes)._replace(name="our own, float32")
    for bits, goal in ((8, 1.6), (4, 2.2)):
        few = _decoding(fixed, cached=True, bits=bits, **sizes)
        shown = f"batch 1, {bits} bits"
        matches.append(Match("decode", shown, few, whole, "tokens/s", goal))
    sizes = {"batch": 1, "prompt": prompt, "new": longest - prompt}
    without = _decoding(fixed, cached=False, **sizes)._replace(name="our own, no cache")
    ours = _decoding(fixed, cached=True, **sizes)
    shown = f"cache, {longest} tokens"
    matches.append(Match("decode", shown, ours, without, "tokens/s", 5.0))
    return matches


def prepare(setting: Setting) -> list[Match]:
    """Text to verified token shards, against tokenizers alone."""
    text = _text(setting, setting.megabytes)
    peer = Side("tokenizers, encode_batch_fast", f"{PEERS}:encode_rate", text)
    ours = Side("gpt_jax", f"{OURS}:prepare_rate", {**text, "workers": 0})
    return [Match("prepare", f"{setting.megabytes:g} MB, BPE", ours, peer, "MB/s", 0.9)]


def loader(setting: Setting) -> list[Match]:
    """Batches from disk, and how long training waits for them."""
    count, tokens = (3, 200) if setting.toy else (2000, 40_000)
    where = {"folder": setting.folder}
    matches = []
    for name, (fixed, batch) in two_sizes(setting).items():
        sizes = {**where, "seq_len": fixed["context"], "batch": batch}
        ours = Side("gpt_jax", f"{OURS}:loader_rate", {**sizes, "count": count})
        peer = Side(GET_BATCH, f"{PEERS}:loader_rate", {**sizes, "count": count})
        matches.append(Match("loader", f"{name} alone", ours, peer, "batches/s"))
        steps = tokens // (batch * fixed["context"])
        options = {**sizes, "recipe": recipe(fixed), "steps": steps}
        wait = Side("gpt_jax", f"{OURS}:data_wait", options)
        matches.append(Match("loader", f"{name}, wait", wait, None, "% of a step", 1.0))
        cost = Side("gpt_jax", f"{OURS}:data_cost", options)
        matches.append(Match("loader", f"{name}, cost", cost, None, "% of a step"))
    return matches


def checkpoint(setting: Setting) -> list[Match]:
    """How long a save holds training up, against waiting for its end."""
    trained = recipe(_largest(setting)[0])
    options = {"recipe": trained, "folder": setting.folder}
    make = f"{OURS}:checkpoint_stall"
    ours = Side("gpt_jax", make, {**options, "wait": False})
    peer = Side("our own, waiting for it", make, {**options, "wait": True})
    return [Match("checkpoint", "baby", ours, peer, "s", 5.0)]


def compile(setting: Setting) -> list[Match]:
    """What the compile cache spares the second process."""
    matches = []
    for name, (fixed, batch) in two_sizes(setting).items():
        options = _first_step(fixed, batch)
        cache = f"{setting.folder}/compile-{name}"
        warm = {**_fresh(options | {"cache": cache}, "compile"), "before": True}
        cold = {**_fresh(options, "compile"), "new_folder": "cache"}
        ours = Side("gpt_jax", FRESH, warm)
        peer = Side("our own, empty cache", FRESH, cold)
        matches.append(Match("compile", name, ours, peer, "s", 4.0))
    return matches


def startup(setting: Setting) -> list[Match]:
    """How soon a command answers, and how soon training begins."""
    words = {"words": [*commands.argv("train")[1:], "--help"]}
    help_ = Side("gpt_jax", "experiments.benches.race:command", words)
    fixed, batch = _largest(setting)
    options = _first_step(fixed, batch) | {"cache": f"{setting.folder}/compile"}
    ours = Side("gpt_jax", FRESH, {**_fresh(options, "seconds"), "before": True})
    theirs = {"shape": fixed, "batch": batch}
    peer = {"make": f"{PEERS}:first_step", "options": theirs, "value": "seconds"}
    first = "launch to first step, warm cache"
    return [
        Match("startup", "experiments.train --help", help_, None, "s", 1.0),
        Match("startup", first, ours, Side(HF, FRESH, peer), "s"),
    ]


def memory(setting: Setting) -> list[Match]:
    """Peak memory: of preparing much text against little, and of training."""
    large, small = (0.4, 0.2) if setting.toy else (200, 10)
    made: list[Side] = []
    for size in (large, small):
        text = {**_text(setting, size), "workers": 0}
        peak = {"make": f"{OURS}:prepare_peak", "options": text, "value": "peak_mb"}
        name = "our own, 10 MB" if made else "gpt_jax"
        made.append(Side(name, FRESH, peak))
    fixed, batch = _largest(setting)
    ours = _training(fixed, batch=batch, seconds=0, accumulate=1)
    theirs: dict[str, Any] = {"shape": fixed, "batch": batch, "seconds": 0}
    taken = {"value": "peak_mb", "turns": 2}
    training = [
        Side(name, FRESH, {"make": f"{where}:train_step_rate", "options": x, **taken})
        for name, where, x in (("gpt_jax", OURS, ours), (HF, PEERS, theirs))
    ]
    return [
        Match("memory", f"prepare {large:g} MB", made[0], made[1], "MB", 0.67),
        Match("memory", "train baby", training[0], training[1], "MB"),
    ]


def population(setting: Setting) -> list[Match]:
    """Trials of a tiny model in one program, against processes and a warm process."""
    trials, steps = (2, 2) if setting.toy else (16, 300)
    how = f"'{{folder}}', {trials}, {steps}"
    ours = _trials("gpt_jax, vmapped", f"together({how})")
    at_once = {"copies": trials, "at_once": 0}
    alone = _trials("our own, as processes", f"alone({how}, {{index}})", **at_once)
    warm = _trials("our own, in one warm process", f"one_after_another({how})")
    return [
        Match("population", f"{trials} trials, processes", ours, alone, "s", 3.0),
        Match("population", f"{trials} trials, warm process", ours, warm, "s", 1.0),
    ]


ROWS = {
    "train_step": train_step,
    "time_to_loss": time_to_loss,
    "decode": decode,
    "prepare": prepare,
    "loader": loader,
    "checkpoint": checkpoint,
    "compile": compile,
    "startup": startup,
    "memory": memory,
    "population": population,
}


def _largest(setting: Setting) -> tuple[dict[str, int], int]:
    return list(two_sizes(setting).values())[-1]


def _training(fixed: dict, **options: Any) -> dict[str, Any]:
    return {"recipe": recipe(fixed), "seq_len": fixed["context"], **options}


def _first_step(fixed: dict, batch: int) -> dict[str, Any]:
    return {"recipe": recipe(fixed), "seq_len": fixed["context"], "batch": batch}


def _trials(name: str, call: str, **options: Any) -> Side:
    code = f"{ENTER}from experiments.benches import trials as t; t.{call}"
    words = ["-c", code]
    return Side(name, "experiments.benches.race:command", {"words": words, **options})


def _fresh(options: dict, value: str) -> dict[str, Any]:
    return {"make": f"{OURS}:first_step", "options": options, "value": value}


def _decoding(fixed: dict, **options: Any) -> Side:
    given = {"recipe": recipe(fixed), **options}
    return Side("gpt_jax", f"{OURS}:decode_rate", given)


def _text(setting: Setting, megabytes: float) -> dict[str, Any]:
    source = "builtin:json" if setting.toy else "builtin"
    tokenizer = "bpe:300" if setting.toy else "bpe:8000"
    text = {"source": source, "megabytes": megabytes, "tokenizer": tokenizer}
    return {"folder": setting.folder, "text": text}
