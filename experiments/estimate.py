"""What will a run need? Parameters, FLOPs, memory and time, before money is spent.

  python -m experiments.estimate --config=configs/gpt2.py --device=h100
  python -m experiments.estimate --config=configs/gpt2.py:size=xl --device=a100-80gb \\
      --devices=64 --config.mesh.fsdp=64 --config.batch_size=512 \\
      --config.accumulate=1 --config.model.remat=full
  python -m experiments.estimate --config=configs/quickstart.py --device=cpu \\
      --memory=8GiB --json

No data is read and no device is needed; it takes seconds. The config is the one that
you would train with, and so are its overrides: config.mesh splits the run over
--devices (data=-1 takes those that fsdp and tensor leave).

Memory is counted by part for one device, as XLA uses it: the parts that come and go
never all meet, so "at most at once" is less than their sum. It does not count what
evaluation and sampling between steps need, nor what the driver keeps for itself; JAX
takes three quarters of a GPU unless XLA_PYTHON_CLIENT_MEM_FRACTION says otherwise.
FLOPs and MFU are those of the training log (PaLM, appendix B): 30 to 50 % is common.

  python -m experiments.estimate --config=configs/gpt2.py:size=xl --dry_run \\
      --devices=64 --config.mesh.fsdp=64 --config.batch_size=512 \\
      --config.accumulate=1 --config.model.remat=full

--dry_run compiles the real train step for that many virtual CPU devices, without
making a weight, and prints what XLA says of its memory and which collectives it uses.
XLA for a CPU has no fused attention and computes in float32 where it likes to, so its
memory is an upper bound of a GPU's; --compile is nearer.

  python -m experiments.estimate --compile --device=v5e-8 --config=configs/gpt2.py \\
      --config.batch_size=64 --config.accumulate=1 --decode --out=programs

--compile asks the compilers of the devices themselves, which need not be there: v4-N,
v5e-N, v5p-N, v6e-N (slices of N chips; 2xv5e-256 is two of them) and h100-N. It prints
memory, products by dtype, collectives with loops counted, kernels of attention, and a
model of the time beside our own estimate; --evaluate and --decode add the evaluation of
a batch, and prefill, decode and the server's step for --kv_rows texts; --out keeps the
programs' texts. It takes minutes, and one package, best in an environment of its own:
    pip install -r requirements.txt "jax[tpu]"       or "jax[cuda13]"

Devices: b200 h200 h100 h100-pcie a100-80gb a100-40gb l40s l4 a10g t4 v100-32gb
v100-16gb tpu-v6e tpu-v5p tpu-v5e tpu-v4 tpu-v3 tpu-v2, or just gpu, tpu, cpu.
"""

import json
import os

from absl import flags

from experiments import door

CONFIG = door.define_config()
DEVICE = flags.DEFINE_string("device", "gpu", "What it would run on, see above.")
DEVICES = flags.DEFINE_integer(
    "devices", 0, "How many of them; 0 = as many as config.mesh says."
)
MEMORY = flags.DEFINE_string(
    "memory", "", "Of one device, e.g. 80GB or 24GiB; empty = what the device has."
)
MFU = flags.DEFINE_float("mfu", 0.4, "Share of the peak FLOP/s, for the times.")
KV_ROWS = flags.DEFINE_integer("kv_rows", 1, "Texts that are written at once.")
JSON = flags.DEFINE_bool("json", False, "Print one JSON object instead of a table.")
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step and ask XLA for CPUs.")
COMPILE = flags.DEFINE_bool("compile", False, "Compile for --device, such as v5e-8.")
EVALUATE = flags.DEFINE_bool("evaluate", False, "With --compile: the evaluation too.")
DECODE = flags.DEFINE_bool("decode", False, "With --compile: the writing of text too.")
OUT = door.define_path("out", "", "With --compile: a folder for programs' texts.")
SURVEY = door.define_path(
    "survey", "", "Compile well-known models into this JSONL file."
)
ROWS = flags.DEFINE_list("rows", [], "With --survey: which; none = all that fit.")
PAGE = door.define_path("page", "", "With --survey: a Markdown file to update with it.")


def main(_: list[str]) -> None:
    """Prints the estimate; raises ValueError for what the user can mend."""
    if SURVEY.value:
        survey_for_devices()
        return
    if ROWS.value or PAGE.value:
        raise ValueError("--rows and --page need --survey")
    config = door.given(CONFIG.value, "configs/gpt2.py")
    if DEVICES.value < 0:
        raise ValueError(f"--devices={DEVICES.value} is not a number of devices")

    if not COMPILE.value and (EVALUATE.value or DECODE.value or OUT.value):
        raise ValueError("--evaluate, --decode and --out need --compile")
    if COMPILE.value:
        compile_for_devices(config)
        return

    import jax

    from gpt_jax import estimate, train
    from gpt_jax.estimate import dry, table

    train.check(config, door.recipe())

    jax.config.update("jax_platforms", "cpu")  # no accelerator's memory is taken
    if DRY_RUN.value:
        tell = (lambda text: None) if JSON.value else print
        mesh = estimate.abstract(config, DEVICES.value)
        compiled = dry.on_cpus(config, dict(mesh.shape), tell=tell)
        print(json.dumps(compiled) if JSON.value else table.of_dry_run(compiled))
        return
    device = estimate.find(DEVICE.value, MEMORY.value)
    plan = estimate.make(config, estimate.abstract(config, DEVICES.value))
    found = estimate.estimate(plan, device, mfu=MFU.value, rows=KV_ROWS.value)
    if JSON.value:
        print(json.dumps(found))
    else:
        print(table.render(found, notes(config, plan)))


def compile_for_devices(config) -> None:
    """Compiles for --device and prints what its compiler says."""
    from gpt_jax.estimate import targets

    os.environ.update(targets.ENVIRONMENT)  # read when the compilers are loaded
    import jax

    from gpt_jax import estimate, files
    from gpt_jax.estimate import dry, fit, table

    jax.config.update("jax_platforms", "cpu")  # no accelerator is taken
    kind, count, slices = targets.parse(DEVICE.value)
    if DEVICES.value not in (0, count * slices):
        raise ValueError(
            f"--devices={DEVICES.value} and --device={DEVICE.value} differ: leave "
            "--devices out"
        )
    mesh = estimate.abstract(config, count * slices)
    plan = estimate.make(config, mesh)
    device = estimate.find(kind.device, MEMORY.value)
    target = targets.find(DEVICE.value)
    own = estimate.estimate(plan, device, mfu=MFU.value, rows=KV_ROWS.value)
    which = ["train", *["evaluate"] * EVALUATE.value, *["decode"] * DECODE.value]
    tell = (lambda text: None) if JSON.value else print
    tell(table.heading(own, f"{count * slices:,} x {kind.device}"))
    found = []
    for one in dry.on(
        target,
        config,
        dict(mesh.shape),
        which=which,
        rows=KV_ROWS.value,
        peak=device.peak_flops or 0.0,
        out=OUT.value,
        tell=lambda text: tell(text),
    ):
        beside = own if one["program"] == dry.TRAIN else None
        tell(table.of_program(one, beside, device))
        needs, has = dry.need(one, device.memory)
        if beside and has and needs > has:
            one["helps"] = fit.helps(config, mesh, kind.platform, needs=needs, has=has)
            tell(table.of_help(one["helps"]))
        found.append(one)
    host = files.peak_memory()
    if JSON.value:
        told = {"device": DEVICE.value, "jax": jax.__version__, "host_bytes": host}
        print(json.dumps({**told, "estimate": own, "programs": found}))
    else:
        print(f"at most {table.size(host)} of this machine's memory")


def survey_for_devices() -> None:
    """Compiles well-known models for --device, or shows what was compiled."""
    if PAGE.value:
        from gpt_jax.estimate import survey

        survey.rewrite(PAGE.value, survey.read(SURVEY.value))
        return
    door.check_writable("survey", SURVEY.value)

    from gpt_jax.estimate import targets

    os.environ.update(targets.ENVIRONMENT)  # read when the compilers are loaded
    import jax

    from gpt_jax.estimate import survey

    jax.config.update("jax_platforms", "cpu")
    _, count, slices = targets.parse(DEVICE.value)
    wanted = survey.find(ROWS.value, count * slices)
    survey.compile(
        targets.find(DEVICE.value),
        wanted,
        SURVEY.value,
        mfu=MFU.value,
        tell=print,
    )


def notes(config, plan) -> dict[str, str]:
    """Returns what stands beside the parts of the memory."""
    rows, tokens = plan.rows // plan.sharers, plan.task.tokens
    return {
        "parameters": config.model.param_dtype,
        "optimizer": config.optimizer.name,
        "gradients": "float32",
        "activations": (
            f"{rows} row{'s' * (rows > 1)} of {tokens:,} tokens, "
            f"{config.model.dtype}, remat {config.model.remat}"
        ),
        "logits": "float32, with their gradient",
        "update": "beside the old one, until it is known to be finite",
    }


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
