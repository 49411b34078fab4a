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
It takes minutes. XLA for a CPU has no fused attention and computes in float32 where it
likes to, so its memory is an upper bound of a GPU's.

Devices: b200 h200 h100 h100-pcie a100-80gb a100-40gb l40s l4 a10g t4 v100-32gb
v100-16gb tpu-v6e tpu-v5p tpu-v5e tpu-v4 tpu-v3 tpu-v2, or just gpu, tpu, cpu.
"""

import json

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
DRY_RUN = flags.DEFINE_bool("dry_run", False, "Compile the step and ask XLA.")


def main(_: list[str]) -> None:
    """Prints the estimate; raises ValueError for what the user can mend."""
    config = door.given(CONFIG.value, "configs/gpt2.py")
    if DEVICES.value < 0:
        raise ValueError(f"--devices={DEVICES.value} is not a number of devices")

    import jax

    from gpt_jax import estimate, train
    from gpt_jax.estimate import dry, table

    train.check(config, door.recipe())

    jax.config.update("jax_platforms", "cpu")  # no accelerator's memory is taken
    if DRY_RUN.value:
        tell = (lambda text: None) if JSON.value else print
        mesh = estimate.abstract(config, DEVICES.value)
        compiled = dry.run(config, dict(mesh.shape), tell=tell)
        print(json.dumps(compiled) if JSON.value else table.of_dry_run(compiled))
        return
    device = estimate.find(DEVICE.value, MEMORY.value)
    plan = estimate.make(config, estimate.abstract(config, DEVICES.value))
    found = estimate.estimate(plan, device, mfu=MFU.value, rows=KV_ROWS.value)
    if JSON.value:
        print(json.dumps(found))
    else:
        print(table.render(found, notes(config, plan)))


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
