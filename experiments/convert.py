"""Weights in and out: from published models to runs, from runs to other software.

  python -m experiments.convert --from_hf=gpt2 --run=runs/gpt2
  python -m experiments.convert --from_hf=weights/SmolLM2-135M --run=runs/smollm
  python -m experiments.convert --run=runs/shakespeare --to_hf=exports/shakespeare
  python -m experiments.convert --run=runs/gpt2 --to_gguf=exports/gpt2.gguf
  python -m experiments.convert --run=runs/gpt2 --to_stablehlo=exports/gpt2

--from_hf takes a folder or a Hugging Face id (GPT-2, Llama 2 and 3, Mistral, Qwen 3,
Gemma 3 text, nanochat) and makes a run folder that experiments.sample works on. Only
safetensors are read; nothing in the folder is executed. --to_hf writes a folder that
transformers loads; --to_gguf one file for llama.cpp (GPT-2 and Llama); --to_stablehlo
compiled programs with weights, tokenizer and a runner that needs no gpt_jax. A LoRA
run is written merged; --weights=base writes what it started from, as it holds it.

Nothing is overwritten: the target must not exist.
"""

from pathlib import Path

from absl import flags

from configs import common
from experiments import door

RUN = door.define_path("run", "", "Run folder: made by --from_hf, else read.")
FROM_HF = door.define_path("from_hf", "", "Hugging Face folder or id to read.")
TO_HF = door.define_path("to_hf", "", "Hugging Face folder to write.")
TO_GGUF = door.define_path("to_gguf", "", "GGUF file to write, for llama.cpp.")
TO_STABLEHLO = door.define_path("to_stablehlo", "", "Folder of programs to write.")
PARAM_DTYPE = flags.DEFINE_enum(
    "param_dtype",
    "float32",
    ["float32", "bfloat16"],
    "How --from_hf keeps the weights: bfloat16 takes half the memory.",
)
SHARD_GB = flags.DEFINE_float("shard_gb", 5.0, "The most a file of --to_hf holds.")
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)
WEIGHTS = flags.DEFINE_enum(
    "weights",
    "",
    ["", "params", "ema", "base"],
    "Which weights; empty = ema where kept; base = those that a LoRA run started from.",
)


# Which flags go with each way, besides --run.
OF_A_RUN = ("step", "weights")
READS = {
    "from_hf": ("param_dtype",),
    "to_hf": ("shard_gb", *OF_A_RUN),
    "to_gguf": OF_A_RUN,
    "to_stablehlo": OF_A_RUN,
}


def main(_: list[str]) -> None:
    """Converts once; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/gpt2")
    ways = [f for f in (FROM_HF, TO_HF, TO_GGUF, TO_STABLEHLO) if f.value]
    if len(ways) != 1:
        raise ValueError(
            "give one of --from_hf, --to_hf, --to_gguf, --to_stablehlo (see --help)"
        )
    door.only_with(ways[0].name, READS)
    (import_hf if FROM_HF.value else export)()


def import_hf() -> None:
    """Makes a run folder of published weights."""
    from gpt_jax import checkpoint, commands, model, pretrained, runs

    workdir = Path(RUN.value)
    if workdir.exists():
        raise FileExistsError(f"{workdir} exists already; name a new --run")
    door.check_writable("run", RUN.value, folder=True)
    source = pretrained.find(FROM_HF.value)
    config = common.base()
    config.model.update(pretrained.fields(source), param_dtype=PARAM_DTYPE.value)
    config.data.update(source="", tokenizer=str(workdir / "tokenizer.json"))
    tokenizer = pretrained.tokenizer(source)
    cfg = runs.model_config(config, tokenizer)
    params = pretrained.load(source, cfg, place=lambda path, array: array)
    with pretrained.whole(workdir) as draft:
        runs.create(draft, config, tokenizer)
        pretrained.keep(source, draft)
        with checkpoint.Checkpoints(draft / "checkpoints", keep=1) as store:
            meta = {"from": FROM_HF.value}
            store.save(0, {"params": params}, metric=None, meta=meta)
    print(f"{model.count(params):,} parameters, {cfg.n_layers} layers of {cfg.d_model}")
    print(f"  sample  {commands.typed('sample')} --run={workdir} --prompt=...")


def export() -> None:
    """Writes the weights of a run for other software."""
    from gpt_jax import pretrained, runs

    target = Path(TO_HF.value or TO_GGUF.value or TO_STABLEHLO.value)
    if target.exists():
        raise FileExistsError(f"{target} exists already; name a new one, or remove it")
    way = next(flag for flag in (TO_HF, TO_GGUF, TO_STABLEHLO) if flag.value)
    door.check_writable(way.name, way.value, folder=not TO_GGUF.value)
    if not 0 < SHARD_GB.value < float("inf"):
        raise ValueError(f"--shard_gb={SHARD_GB.value}: it must be above 0")
    run = runs.open(RUN.value, step=door.step(STEP.value), weights=WEIGHTS.value)
    what = (run.params, run.model.cfg, run.tokenizer)
    if TO_HF.value:
        shard_bytes = int(SHARD_GB.value * 1e9)
        pretrained.save(target, *what, run=run.folder, shard_bytes=shard_bytes)
    elif TO_GGUF.value:
        pretrained.gguf.save(target, *what)
    else:
        with pretrained.whole(target) as draft:
            pretrained.stablehlo.save(draft, *what)
    print(f"wrote {target}")


if __name__ == "__main__":
    door.run(main, __doc__)
