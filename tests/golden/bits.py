"""What training computed when bits.json was written: losses, texts, places of weights.

    python -m tests.golden.bits            # compares with bits.json, to the bit
    python -m tests.golden.bits --write    # writes it anew

Each case is a run of 20 steps of a very small model. Floats are kept as they are
printed, which is exact. Another machine's or JAX's additions differ in the last bits,
so the tests allow for that; on the machine that wrote the file nothing may differ.
"""

import json
import math
import os
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
FILE, TEXT = HERE / "bits.json", HERE / "run.txt"
STEPS = 20
OPTIMIZERS = ("adamw", "muon", "lion", "adafactor", "sgd")
WORDS = (
    *("the", "cat", "sat", "on", "a", "mat", "while"),
    *("one", "dog", "ran", "far", "away", "over", "hills"),
)


def lm(**changes: Any):
    """Returns a config of running text: dotted keys (__ for the dot) as they change."""
    from configs import common

    config = common.tiny(common.base())
    config.data.update(source=os.path.relpath(TEXT), tokenizer="byte", workers=1)
    config.model.update(context_length=16, d_model=16, n_layers=2, n_heads=2)
    return changed(config, {"hyper__warmup_steps": 4.0, "batch_size": 4, **changes})


def changed(config, changes: dict[str, Any]):
    """Returns the config with the keys a__b set, and the rhythm of a case."""
    for name, value in changes.items():
        *groups, key = name.split("__")
        part = config
        for group in groups:
            part = part[group]
        part[key] = value
    config.update(steps=STEPS, log_every=1, eval_every=10, checkpoint_every=0)
    config.update(compile_cache="", tensorboard=False, sample_every=0)
    config.mesh.cpu_devices = config.mesh.cpu_devices or 1
    return config


def modern(**changes: Any):
    """Returns `lm` with the modern block, grouped queries and a window."""
    from configs import common

    config = common.modern(lm())
    full = {"window": 0, "rope_base": 10000.0, "rope_scaling": None}
    config.model.update(n_kv_heads=1, gated=True, n_layers=3)
    config.model.pattern = (full, {**full, "window": 4})
    return changed(config, changes)


def rows(folder: str) -> list[dict[str, str]]:
    """Returns rows that serve as instructions, preferences and labelled texts."""
    made = []
    for i in range(48):
        word, other = WORDS[i % len(WORDS)], WORDS[(i * 5 + 3) % len(WORDS)]
        row = {"instruction": f"Say {word}.", "input": "", "output": f"{word} {other}"}
        made.append(row | {"rejected": f"{other}!", "text": f"{word} is {other} {i}"})
        made[-1]["label"] = "even" if i % 2 else "odd"
    return made


def task(name: str, **changes: Any) -> Callable[[str], Any]:
    """Returns what makes the config of another task, given a folder for its rows."""

    def make(folder: str):
        from configs import common
        from gpt_jax import tasks

        config = lm()
        config.task = common.TASKS[name]()
        config.init_from = "random" if tasks.TABLE[name].tuned else ""
        path = Path(folder) / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows(folder)))
        config.data.update(source=str(path), val_fraction=0.2)
        if name in ("sft", "dpo"):
            config.model.context_length = 224
            config.task.template = "alpaca"
        if name == "classify":
            config.model.context_length = 32
        if name in ("answers", "grpo"):
            config.data.tokenizer = "char"
            config.task.update(problems=1000, held_out=16)
        if name == "grpo":
            config.task.group = 4
        adapter = changes.pop("adapter", None)
        if adapter:
            config.adapter = common.ADAPTERS[adapter]()
        return changed(config, dict(changes))

    return make


def adapted(name: str, **changes: Any):
    """Returns `lm` with an adapter."""
    from configs import common

    config = lm()
    config.adapter = common.ADAPTERS[name]()
    return changed(config, changes)


CASES: dict[str, Callable[[str], Any]] = {
    **{f"gpt2 {o}": lambda _, o=o: lm(optimizer__name=o) for o in OPTIMIZERS},
    **{f"modern {o}": lambda _, o=o: modern(optimizer__name=o) for o in OPTIMIZERS},
    "gpt2 scan": lambda _: lm(model__scan_layers=True),
    "modern scan": lambda _: modern(model__scan_layers=True),
    "modern scan adafactor": lambda _: modern(
        model__scan_layers=True, optimizer__name="adafactor"
    ),
    "gpt2 remat full": lambda _: lm(model__remat="full"),
    "gpt2 remat dots": lambda _: lm(model__remat="dots"),
    "gpt2 remat save_attn_out": lambda _: lm(model__remat="save_attn_out"),
    "gpt2 accumulate": lambda _: lm(accumulate=2),
    "gpt2 bfloat16": lambda _: lm(model__dtype="bfloat16"),
    "gpt2 torch_default": lambda _: lm(model__init="torch_default"),
    "gpt2 padded chunks": lambda _: lm(model__vocab_multiple=64, task__loss_chunk=5),
    "gpt2 numbers": lambda _: lm(
        hyper__dropout_embed=0.1,
        hyper__dropout_attn=0.1,
        hyper__dropout_residual=0.1,
        hyper__label_smoothing=0.1,
        hyper__z_loss=1e-3,
        optimizer__ema=True,
        optimizer__schedule="wsd",
        optimizer__freeze=("block_0/mlp/",),
        optimizer__rates=(("embed/", 0.5),),
        optimizer__moment_dtype="bfloat16",
    ),
    "gpt2 two devices": lambda _: lm(mesh__cpu_devices=2),
    "gpt2 pmap": lambda _: lm(mesh__cpu_devices=2, mesh__strategy="pmap"),
    "modern fsdp tensor": lambda _: modern(
        mesh__cpu_devices=4,
        mesh__fsdp=2,
        mesh__tensor=2,
        model__n_kv_heads=2,
        model__vocab_multiple=2,
    ),
    "gpt2 lora": lambda _: adapted("lora", hyper__dropout_adapter=0.1),
    "gpt2 lora int8": lambda _: adapted("lora", adapter__base_dtype="int8"),
    "gpt2 lora scan": lambda _: adapted("lora", model__scan_layers=True),
    "gpt2 only": lambda _: adapted("only", adapter__train=("mlp/",)),
    "classify": task("classify"),
    "sft": task("sft"),
    "dpo": task("dpo"),
    "dpo lora": task("dpo", adapter="lora"),
    "ipo": task("dpo", task__variant="ipo", task__logp="mean"),
    "orpo": task("dpo", task__variant="orpo", task__logp="mean"),
    "answers": task("answers"),
    "grpo": task("grpo", task__kl=0.1, task__updates=2, task__reward="partial"),
}
FEW = ("gpt2 adamw", "modern muon")  # in every test run


def run(name: str) -> dict[str, Any]:
    """Trains a case; returns its losses and, of language models, a greedy text."""
    from gpt_jax import metrics, runs, sample, sampling, train

    with tempfile.TemporaryDirectory() as place:
        config = CASES[name](place)
        config.data.folder = f"{place}/data"
        train.train(config, f"{place}/run")
        lines = metrics.read(f"{place}/run")
        found: dict[str, Any] = {
            key: [line[key] for line in lines if key in line]
            for key in ("train_loss", "grad_norm", "val_loss")
        }
        if name != "classify":
            opened = runs.open(f"{place}/run")
            (text,) = sample.texts(
                model=opened.model,
                params=opened.params,
                tokenizer=opened.tokenizer,
                prompts=["The " if opened.tokenizer.kind == "byte" else "ab"],
                count=1,
                seed=1,
                stop=[],
                **sampling.settings(10, temperature=0.0),
            )
            found["text"] = text.text
    return found


def places() -> dict[str, dict[str, str]]:
    """Returns, of ready configs, how each weight and memory lies on a mesh of 2x2x2.

    Layers are told once: their number reads {i}.
    """
    import jax
    from jax.sharding import AxisType

    from experiments import door
    from gpt_jax import sharding

    def mesh_of(rule: str, heads: int):
        # Version 0.1 could not split what Adafactor keeps of biases over `tensor`.
        tensor = heads % 2 == 0 and rule != "adafactor"
        lengths = (2, 2, 2) if tensor else (2, 4, 1)
        devices = jax.devices()[: math.prod(lengths)]
        kinds = (AxisType.Auto,) * 3
        return jax.make_mesh(lengths, sharding.AXES, axis_types=kinds, devices=devices)

    configs = {
        "gpt2 small": "configs/gpt2.py:size=small",
        "gpt2 large": "configs/gpt2.py:size=large",
        "quickstart": "configs/quickstart.py",
        "shakespeare": "configs/shakespeare_char.py:size=gpu,recipe=modern",
        "verdict": "configs/the_verdict.py",
        "grpo": "configs/grpo.py",
        "austen": "configs/austen_15m.py",
    }
    found = {}
    for name, config in configs.items():
        for rule in OPTIMIZERS:
            made = door.load_config(config)
            made.model.vocab_size = made.model.vocab_size or 1024
            made.optimizer.name = rule
            if name.startswith("gpt2"):  # as they were when the file was written
                made.model.scan_layers = True
            shapes, declared = state_shapes(made)
            lines, mesh = {}, mesh_of(rule, made.model.n_heads)
            for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
                words = [
                    str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k))))
                    for k in path
                ]
                key = re.sub(r"block_\d+", "block_{i}", "/".join(words))
                where = sharding.layout(declared, {"/".join(words): leaf}, mesh)
                (place,) = jax.tree.leaves(where)
                lines[key] = f"{leaf.dtype.name}{list(leaf.shape)} {place.spec}"
            found[f"{name} {rule}"] = lines
    return found


def state_shapes(config) -> tuple[Any, Any]:
    """Returns the train state of a config as shapes, and what its weights are."""
    import jax

    from gpt_jax import model, optimizer, step

    cfg = model.GPTConfig(**config.model)
    declared = model.declared(cfg)
    rule = config.optimizer.to_dict()
    ema = rule.pop("ema")
    tx = optimizer.make(declared, **rule)

    def first(key):
        return step.start(model.init(cfg, key), {}, tx, ema=ema)

    return jax.eval_shape(first, jax.random.key(0)), declared


def main() -> int:
    """Writes the file, or tells what is not what it says."""
    import jax

    from tests import conftest  # noqa: F401  the devices and flags of the tests

    jax.devices()  # all eight: a run asks for fewer, unless there are some already
    found: dict[str, Any] = {"places": places(), "runs": {}}
    if "--write" in sys.argv and FILE.is_file():
        found = json.loads(FILE.read_text())
    for name in CASES.keys() - found["runs"].keys():
        found["runs"][name] = run(name)
        print(f"computed: {name}", file=sys.stderr, flush=True)
        if "--write" in sys.argv:
            FILE.write_text(json.dumps(found, indent=1) + "\n")
    if "--write" in sys.argv:
        return 0
    kept = json.loads(FILE.read_text())
    wrong = [
        f"{part} {name}"
        for part in found
        for name in {*found[part], *kept[part]}
        if found[part].get(name) != kept[part].get(name)
    ]
    print("\n".join(wrong) or "nothing differs")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
