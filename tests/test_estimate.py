"""Estimates: exact where arithmetic says so, near what XLA plans where it decides."""

import os
import subprocess
import sys
from functools import cache, partial
from math import prod

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import estimate, model, sharding, train
from gpt_jax.estimate import device as devices
from gpt_jax.estimate import dry, memory, residuals, table
from gpt_jax.estimate import plan as plans
from gpt_jax.estimate import program as programs
from tests import tiny

ONE = (1, 1, 1)
HERE = estimate.find("cpu", "")


def config(axes=ONE, *, modern=False, **fields):
    """Returns a small config on a mesh of `axes`; float32, 8 rows of 128 tokens."""
    made = common.base()
    keys = ("batch_size", "accumulate")
    made.update({key: fields.pop(key) for key in keys if key in fields})
    if modern:
        common.modern(made)
        made.optimizer.name = "adamw"
        made.model.update(gated=True, activation="silu", d_ff=384)
    sizes = {"n_layers": 3, "d_model": 128, "n_heads": 4, "context_length": 128}
    made.model.update({**sizes, "vocab_size": 1024, **fields})
    made.batch_size = 8 * made.accumulate
    made.mesh.update(dict(zip(sharding.AXES, axes, strict=True)))
    return made


def plan(made):
    return estimate.make(made, estimate.abstract(made, 0))


def measured(made):
    """Returns (plan, what one row needs on a CPU, the memory of one device)."""
    found = plan(made)
    one = memory.per_row(found, "cpu")
    return found, one, memory.measure(found, one, found.rows // found.sharers)


# ---------------------------------------------------------------- exact


OFTEN = ("adamw", (1, 4, 2))
slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name, axes",
    [
        OFTEN,
        pytest.param("adamw", (2, 2, 1), marks=slow),
        pytest.param("muon", (1, 4, 2), marks=slow),
        pytest.param("adafactor", (1, 4, 2), marks=slow),
    ],
)
def test_parameter_and_optimizer_bytes_are_those_of_the_shards(name, axes):
    made = config(axes, modern=True, n_layers=2, scan_layers=True, n_kv_heads=2)
    made.optimizer.name = name
    found = plan(made)
    mesh = sharding.make_mesh(8, **dict(found.mesh.shape), cpu_devices=0)
    tx, strategy = found.parts, sharding.mesh_strategy(mesh, found.strategy.declared)
    weights = model.init(found.cfg, jax.random.key(0))
    state = strategy.place(tx.fresh(weights, jax.random.key(0)))

    def held(tree):
        shards = [x.addressable_shards[0].data for x in jax.tree.leaves(tree)]
        return sum(shard.nbytes for shard in shards)

    on_one = found.strategy.held
    assert on_one(found.state.params) == held(state.params)
    assert on_one(found.state.opt_state) == held(state.opt_state)


def llama(**fields):
    sizes = {"n_layers": 32, "d_model": 4096, "n_heads": 32, "context_length": 32768}
    return tiny.cfg(**sizes, dtype="bfloat16", **fields)


def test_key_value_caches_have_their_published_sizes():
    whole = memory.kv_bytes(llama(), rows=1, length=32768)
    few = memory.kv_bytes(llama(n_kv_heads=8), rows=1, length=32768)
    assert (round(whole / 1e9, 2), round(few / 1e9, 2)) == (17.18, 4.29)
    assert few * 4 == whole
    cfg = tiny.cfg()
    cache = model.init_cache(cfg, 3, 16, np.float32)
    held = sum(x.nbytes for x in jax.tree.leaves(cache.layers))
    assert memory.kv_bytes(cfg, rows=3, length=16) == held


def test_heads_of_a_cache_are_split_where_they_divide():
    few = partial(memory.kv_bytes, llama(n_kv_heads=8), rows=1, length=1024)
    assert 4 * few(mesh={"tensor": 4}) == few()
    assert few(mesh={"tensor": 16}) == few()


def test_parts_of_the_parameters_add_up_to_the_true_count():
    made = config(vocab_size=1000, vocab_multiple=64, tie_embeddings=False)
    parts = estimate.parameters(plan(made))
    total, padding = parts.pop("total"), parts.pop("padding")
    assert total == model.count(plan(made).cfg) == parts.pop("trainable")
    assert sum(parts.values()) == total
    assert padding == 2 * 24 * 128  # 1,000 -> 1,024 rows of both tables
    assert parts["embeddings"] == (1000 + 128) * 128
    assert parts["head"] == 1000 * 128


@slow
def test_gpt2_small_has_its_published_count_and_flops():
    made = common.base()
    made.model.update(vocab_size=50257, context_length=1024, n_layers=12, d_model=768)
    made.model.n_heads = 12
    device = estimate.find("h100", "")
    found = estimate.estimate(plan(made), device, mfu=0.5)
    assert found["parameters"]["total"] == 124_439_808
    flops = 6 * 124_439_808 + 12 * 12 * 768 * 1024  # PaLM, appendix B
    assert found["flops_per_token"] == flops
    assert found["step_seconds"] == pytest.approx(32 * 1024 * flops / (989.5e12 / 2))
    assert found["run_seconds"] == pytest.approx(1000 * found["step_seconds"])


def test_lora_trains_its_own_matrices_and_holds_the_rest_frozen():
    made = config()
    made.adapter = common.adapter_lora()
    found, _, held = measured(made)
    parts = estimate.parameters(found)
    assert parts["trainable"] == parts["adapter"] < parts["total"] / 10
    assert held.frozen == 4 * parts["total"]
    assert held.optimizer >= 8 * parts["adapter"] > held.optimizer - 100


# ---------------------------------------------------------------- near

# Plain, several ways to loop and compute again, and meshes of each kind.
CASES = {
    "plain": {},
    "modern, scan, remat": {"modern": True, "scan_layers": True, "remat": "full"},
    "fsdp": {"axes": (1, 4, 1)},
    "modern": {"modern": True},
    "scan": {"scan_layers": True},
    "scan, dots": {"scan_layers": True, "remat": "dots"},
    "scan, attention, accumulation": {
        **{"scan_layers": True, "remat": "save_attn_out", "accumulate": 4}
    },
    "fsdp, scan, remat": {"axes": (1, 4, 1), "scan_layers": True, "remat": "full"},
    "every axis": {"axes": (2, 2, 2), "modern": True, "scan_layers": True},
}


@cache
def planned_by_xla(case):
    """Returns XLA's bytes of one device, and the collectives, for a case."""
    made = config(**CASES[case])
    mesh = {name: made.mesh[name] for name in sharding.AXES}
    lines = []
    found = dry.on_cpus(made, mesh, tell=lines.append)
    assert "compiling" in " ".join(lines)
    return found


@slow
@pytest.mark.parametrize("case", CASES)
def test_the_peak_is_within_a_fifth_of_what_xla_plans(case):
    _, _, held = measured(config(**CASES[case]))
    assert held.peak == pytest.approx(planned_by_xla(case)["memory"]["peak"], rel=0.2)


def test_residuals_are_what_the_backward_pass_needs():
    x, w = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((8, 16), (16, 32)))

    def forward(w, frozen, x):
        return jax.numpy.exp(x @ w)  # keeps x, which is given, and its own result

    kept = residuals.saved(forward, w, (), x, fuses=False, scores=0)
    assert kept == residuals.Saved(activations=8 * 32 * 4, casts=0)

    def rounded(w, frozen, x):
        return (x * 2) @ w.astype(np.float16).astype(np.float32)

    kept = residuals.saved(rounded, w, (), x, fuses=False, scores=0)
    assert kept.activations == 8 * 16 * 4  # x * 2, for the gradient of w


def test_what_fusion_computes_again_is_not_kept():
    x, w = (jax.ShapeDtypeStruct(shape, np.float32) for shape in ((8, 16), (16, 16)))

    def forward(w, frozen, x):
        y = x @ w
        return y * y * y  # y is kept; y * y is cheap to compute again

    both = [
        residuals.saved(forward, w, (), x, fuses=fuses, scores=0).activations
        for fuses in (False, True)
    ]
    assert both == [2 * 8 * 16 * 4, 8 * 16 * 4]


@slow
def test_fused_attention_keeps_no_scores():
    made = config(dtype="bfloat16", context_length=512)
    found = plan(made)
    cpu, gpu, tpu = (
        memory.per_row(found, on).whole.activations for on in ("cpu", "gpu", "tpu")
    )
    scores = 3 * 4 * 512 * 512 * 2  # one bfloat16 score per layer, head and pair
    assert cpu - gpu >= scores and cpu - tpu >= scores


def test_the_largest_batch_is_the_largest():
    found, one, _ = measured(config((2, 2, 1), scan_layers=True, remat="full"))
    rows = memory.largest(found, one, 40_000_000)
    assert rows > 1
    assert memory.measure(found, one, rows).peak <= 40_000_000
    assert memory.measure(found, one, rows + 1).peak > 40_000_000
    assert memory.largest(found, one, 1000) == 0


# ---------------------------------------------------------------- dry runs


def test_collectives_in_a_loop_count_as_often_as_it_goes_round():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    split, whole = sharding.P("data"), sharding.P()

    def body(total, x):
        return jax.lax.psum(total * x, "data"), None

    def work(x):
        return jax.lax.scan(body, x, jax.numpy.arange(5.0))[0]

    shard_map = partial(jax.shard_map, mesh=mesh, check_vma=False)
    function = shard_map(work, in_specs=split, out_specs=whole)
    x = jax.ShapeDtypeStruct((4 * 256,), np.float32)
    text = jax.jit(function).lower(x).compile().as_text()
    found = dry.totals(programs.Program(text or ""))
    assert found == {"all-reduce": {"count": 5, "bytes": 5 * 256 * 4}}


@slow
def test_a_dry_run_makes_no_weight_and_finds_the_gathers_of_fsdp():
    found = planned_by_xla("modern, scan, remat")
    assert found["collectives"] == {} and found["devices"] == 1
    assert found["memory"]["arguments"] > 0 and found["host_bytes"] > 1e8
    assert "collectives" in table.of_dry_run(found)


@slow
def test_what_fsdp_splits_is_gathered_in_every_layer_of_a_scan():
    found = planned_by_xla("fsdp, scan, remat")["collectives"]
    layers, kernels = 3, 6  # forward, and again in the backward pass
    assert found["all-gather"]["count"] >= 2 * layers * kernels


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    "change, message",
    [
        ({"data.tokenizer": "char"}, "known only when its text is read: set --config"),
        ({"mesh.tensor": 3}, r"4 .* not a multiple|does not divide over mesh.tensor=3"),
        ({"mesh.data": 3}, "micro-batch of 8 examples does not divide over 3 devices"),
        ({"batch_size": 0}, "batch_size is 0"),
    ],
)
def test_a_config_that_makes_no_run_is_refused_with_the_numbers(change, message):
    made = config(vocab_size=0 if "data.tokenizer" in change else 1024)
    if "task.name" in change:
        made.task, made.init_from = common.task_dpo(), "random"
    made.update_from_flattened_dict(change)
    with pytest.raises(ValueError, match=message):
        plan(made)


def test_a_task_that_cannot_be_estimated_names_those_that_can():
    made = config()
    made.task, made.init_from = common.TASKS["dpo"](), "random"
    made.task.template = "plain"
    with pytest.raises(ValueError, match="only lm, sft, answers can be estimated"):
        plan(made)


def test_devices_that_the_mesh_does_not_use_are_refused():
    made = config((-1, 4, 1))
    assert dict(estimate.abstract(made, 8).shape) == {"data": 2, "fsdp": 4, "tensor": 1}
    with pytest.raises(ValueError, match="6 devices are not used"):
        estimate.abstract(made, 6)


def test_the_vocabulary_is_told_by_the_name_of_the_tokenizer():
    made = config(vocab_size=0)
    sizes = {"gpt2": 50257, "byte": 257, "bpe:2000": 2000}
    for name, wanted in sizes.items():
        made.data.tokenizer = name
        assert plans.vocabulary(train.unpack(made)) == wanted


def test_sizes_of_memory_are_read_and_bad_ones_refused():
    assert devices.bytes_of("80GB") == 80 * 10**9
    assert devices.bytes_of("1.5GiB") == 1.5 * 2**30
    assert devices.bytes_of("1024") == 1024
    for bad in ("", "80 apples", "-1GB", "0GB", "GB"):
        with pytest.raises(ValueError, match="not a size such as 80GB"):
            devices.bytes_of(bad)
    with pytest.raises(ValueError, match=r"--device 'h1000' .*did you mean h100"):
        estimate.find("h1000", "")
    for name in devices.ACCELERATORS:
        found = estimate.find(name, "")
        assert found.memory and found.peak_flops, name


def test_a_table_shows_the_parts_the_peak_and_the_largest_batch():
    found = plan(config((1, 2, 1)))
    device = estimate.find("h100", "64MB")
    numbers = estimate.estimate(found, device, mfu=0.4)
    text = table.render(numbers, {"optimizer": "adamw"})
    rows = numbers["fits"]["rows"]
    assert f"{rows:,} rows on a device" in text and "fits into 64 MB" in text
    assert "optimizer" in text and "2 devices: data 1, fsdp 2, tensor 1" in text
    assert "tokens/s" in text
    small = estimate.find("cpu", "1MB")
    text = table.render(estimate.estimate(found, small, mfu=0.4), {})
    assert "DOES NOT FIT into 1 MB" in text and "no batch fits" in text
    assert prod(found.mesh.shape.values()) == 2


def test_the_mesh_fits_a_run_as_training_finds_it():
    made = config((2, 2, 2), n_heads=8)
    axes = {name: made.mesh[name] for name in sharding.AXES}
    mesh = sharding.make_mesh(8, **axes, cpu_devices=0)
    real = plans.make(made, mesh)
    assert train.tokens_per_step(real.config, real.task) == 8 * 128
    assert real.sharers == plan(made).sharers == 4


def test_the_door_compiles_for_devices_that_are_not_there():
    config = "--config=configs/quickstart.py:size=tiny"
    flags = ["--dry_run", "--devices=4", config, "--config.mesh.fsdp=2"]
    done = subprocess.run(
        [sys.executable, "-m", "experiments.estimate", *flags],
        capture_output=True,
        text=True,
        timeout=100,
        env={k: v for k, v in os.environ.items() if k != "XLA_FLAGS"},
    )
    assert done.returncode == 0, done.stderr
    assert "4 virtual devices: data 2, fsdp 2, tensor 1" in done.stdout
