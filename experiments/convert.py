"""Weights in and out: from published models to runs, from runs to other software.

  python -m experiments.convert --from_hf=gpt2 --run=runs/gpt2
  python -m experiments.convert --from_hf=weights/SmolLM2-135M --run=runs/smollm
  python -m experiments.convert --from_gguf=smollm2.gguf --run=runs/smollm2
  python -m experiments.convert --run=runs/shakespeare --to_hf=exports/shakespeare
  python -m experiments.convert --run=runs/gpt2 --to_gguf=exports/gpt2.gguf
  python -m experiments.convert --run=runs/gpt2 --to_stablehlo=exports/gpt2
  python -m experiments.convert --from_peft=adapter --base=runs/gpt2 --run=runs/tuned
  python -m experiments.convert --run=runs/tuned --to_peft=exports/adapter

--from_hf takes a folder or a Hugging Face id (docs/guide/7-pretrained.md lists the
families) and makes a run folder that experiments.sample works on; --from_gguf takes a
file of llama.cpp's. Only safetensors and GGUF are read; nothing in them is executed.
--to_hf writes a folder that transformers loads; --to_gguf one file for llama.cpp;
--to_stablehlo compiled programs with weights, tokenizer and a runner that needs no
gpt_jax. A LoRA run is written merged; --weights=base writes what it started from, as it
holds it; --to_peft writes its adapter alone, as the library PEFT keeps one. --from_peft
makes a LoRA run of such an adapter and of --base: a run, or what --from_hf or
--from_gguf takes; by default what the adapter names as its base.

Nothing is overwritten: the target must not exist.
"""

from pathlib import Path

from absl import flags

from configs import common
from experiments import door

RUN = door.define_path("run", "", "Run folder: made by --from_hf, else read.")
FROM_GGUF = door.define_path("from_gguf", "", "GGUF file to read.")
FROM_HF = door.define_path("from_hf", "", "Hugging Face folder or id to read.")
FROM_PEFT = door.define_path("from_peft", "", "Folder of a PEFT adapter to read.")
BASE = door.define_path(
    "base", "", "What --from_peft's adapter belongs to; empty = what it says."
)
TO_PEFT = door.define_path("to_peft", "", "PEFT folder to write: the adapter alone.")
TO_HF = door.define_path("to_hf", "", "Hugging Face folder to write.")
TO_GGUF = door.define_path("to_gguf", "", "GGUF file to write, for llama.cpp.")
TO_STABLEHLO = door.define_path("to_stablehlo", "", "Folder of programs to write.")
PARAM_DTYPE = flags.DEFINE_enum(
    "param_dtype",
    "float32",
    ["float32", "bfloat16"],
    "How --from_hf keeps the weights: bfloat16 takes half the memory.",
)
CONTEXT = flags.DEFINE_integer(
    "context",
    0,
    "The most tokens that an imported model sees at once; 0 = as many as it was made "
    "for. Fewer take less memory and time; only models with rope can have fewer.",
)
ADD_SPECIAL = flags.DEFINE_multi_string(
    "add_special",
    [],
    "A special token for an imported model to know; repeatable. Its row is the mean "
    "of the others.",
)
GGUF_TYPE = flags.DEFINE_enum(
    "gguf_type",
    "",
    ["", "F32", "F16", "BF16", "Q8_0", "Q5_1", "Q5_0", "Q4_1", "Q4_0"],
    "How --to_gguf keeps matrices; empty = as the run does. Q8_0 is 8 bits a number, "
    "Q4_1 and Q4_0 are 4, but 8 for the table of tokens.",
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
    "from_hf": ("param_dtype", "context", "add_special"),
    "from_gguf": ("param_dtype", "context", "add_special"),
    "from_peft": ("param_dtype", "context", "base"),
    "to_hf": ("shard_gb", *OF_A_RUN),
    "to_gguf": ("gguf_type", *OF_A_RUN),
    "to_stablehlo": OF_A_RUN,
    "to_peft": OF_A_RUN,
}


def main(_: list[str]) -> None:
    """Converts once; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/gpt2")
    every = (FROM_HF, FROM_GGUF, FROM_PEFT, TO_HF, TO_GGUF, TO_STABLEHLO, TO_PEFT)
    ways = [flag for flag in every if flag.value]
    if len(ways) != 1:
        names = ", ".join(f"--{flag.name}" for flag in every)
        raise ValueError(f"give one of {names} (see --help)")
    door.only_with(ways[0].name, READS)
    named = FROM_HF.value or FROM_GGUF.value
    if ways[0].name.startswith("to_"):
        return export(ways[0])
    if Path(RUN.value).exists():
        raise FileExistsError(f"{RUN.value} exists already; name a new --run")
    door.check_writable("run", RUN.value, folder=True)
    take(named) if named else adapt()


def take(named: str) -> None:
    """Makes a run folder of published weights."""
    from gpt_jax import pretrained

    source = pretrained.find(named)
    if FROM_GGUF.value and not source.is_file():
        raise ValueError(
            f"--from_gguf={named}: it is no GGUF file; --from_hf is for it"
        )
    config, tokenizer, cfg, params = published(source)
    write(source, config, tokenizer, params, named)
    tell(params, cfg)


def write(source: Path, config, tokenizer, params, named: str, *, base=None) -> None:
    """Writes the run folder whole.

    Args:
      source: of which what else a published folder says is kept.
      config, tokenizer: of the run.
      params: its weights, or what moves of them.
      named: where they come from.
      base: the weights that stay as they are, if there are such.
    """
    from gpt_jax import checkpoint, generation, pretrained, runs

    with pretrained.whole(Path(RUN.value)) as draft:
        runs.create(draft, config, tokenizer)
        pretrained.keep(source, draft)
        if told := generation.of(draft).told:
            print(f"note: {told}")
        with checkpoint.Checkpoints(draft / "checkpoints", keep=1) as store:
            meta = {"from": named}
            if base is not None:
                meta["frozen"] = store.save_frozen({"base": base})
            store.save(0, {"params": params}, metric=None, meta=meta)


def published(source: Path):
    """Returns the config of a run, the tokenizer, model and weights of a source."""
    from gpt_jax import pretrained, runs

    config = common.base()
    config.model.update(pretrained.fields(source), param_dtype=PARAM_DTYPE.value)
    if not 0 <= CONTEXT.value <= config.model.context_length:
        raise ValueError(
            f"--context={CONTEXT.value}: this model sees "
            f"{config.model.context_length:,} tokens at most"
        )
    config.model.context_length = CONTEXT.value or config.model.context_length
    own = str(Path(RUN.value) / "tokenizer.json")
    config.data.update(source="", tokenizer=own)
    tokenizer = pretrained.tokenizer(source)
    cfg = runs.model_config(config, tokenizer)
    params = pretrained.load(source, cfg, place=lambda path, array: array)
    if ADD_SPECIAL.value:
        tokenizer = tokenizer.add_special(ADD_SPECIAL.value)
        new = [tokenizer.specials[token] for token in ADD_SPECIAL.value]
        params, cfg = pretrained.vocabulary.grow(params, cfg, new)
        config.model.vocab_size = cfg.vocab_size
    return config, tokenizer, cfg, params


def tell(params, cfg) -> None:
    """Prints what a new run is, and how to use it."""
    from gpt_jax import commands, model

    print(
        f"{model.count(params):,} parameters, {cfg.n_layers} layers of {cfg.d_model}, "
        f"context {cfg.context_length:,}"
    )
    print(f"  sample  {commands.typed('sample')} --run={RUN.value} --prompt=...")


def adapt() -> None:
    """Makes a LoRA run of an adapter and its base."""
    from gpt_jax import files, pretrained, runs, special

    folder = Path(FROM_PEFT.value)
    named = BASE.value or pretrained.peft.base_of(folder)
    if not named:
        raise ValueError(f"{folder} does not name its base: give it as --base")
    source = files.expand(named)
    if (source / "config.json").is_file() and not special.is_published(source):
        base = runs.open(source)
        config, tokenizer, cfg = base.config, base.tokenizer, base.model.cfg
        params = base.params
        config.data.tokenizer = str(Path(RUN.value) / "tokenizer.json")
        config.model.scan_layers = False
    else:
        source = pretrained.find(named)
        config, tokenizer, cfg, params = published(source)
    found = pretrained.peft.load(folder, cfg)
    config.adapter = common.adapter_lora()
    config.adapter.update(
        rank=found.rank, alpha=found.alpha, targets=found.targets, base_dtype=""
    )
    write(source, config, tokenizer, found.params, FROM_PEFT.value, base=params)
    print(f"an adapter of rank {found.rank} on {named}")
    tell(params, cfg)


def export(way: flags.FlagHolder) -> None:
    """Writes the weights of a run for other software."""
    from gpt_jax import chat, pretrained, runs

    target = Path(way.value)
    if target.exists():
        raise FileExistsError(f"{target} exists already; name a new one, or remove it")
    door.check_writable(way.name, way.value, folder=not TO_GGUF.value)
    if not 0 < SHARD_GB.value < float("inf"):
        raise ValueError(f"--shard_gb={SHARD_GB.value}: it must be above 0")
    which = {"step": door.step(STEP.value), "weights": WEIGHTS.value}
    run = runs.open(RUN.value, **which, merge=not TO_PEFT.value)
    what = (run.params, run.model.cfg, run.tokenizer)
    if TO_HF.value:
        shard_bytes = int(SHARD_GB.value * 1e9)
        pretrained.save(target, *what, run=run.folder, shard_bytes=shard_bytes)
    elif TO_GGUF.value:
        template = chat.template_of(run.folder)
        how = {"kind": GGUF_TYPE.value, "template": template}
        pretrained.gguf.save(target, *what, **how)
    elif TO_PEFT.value:
        prefix, _, name = run.config.init_from.partition(":")
        with pretrained.whole(target) as draft:
            base = name if prefix == "hf" else ""
            pretrained.peft.save(draft, run.params, run.model.cfg, base=base)
    else:
        with pretrained.whole(target) as draft:
            pretrained.stablehlo.save(draft, *what)
    print(f"wrote {target}")


if __name__ == "__main__":
    door.run(main, __doc__)
