"""Compiled programs as they are read, and the devices that they are compiled for.

Oracles are counted by hand, from a text as XLA writes it or from a program that this
CPU compiles. The compilers of GPUs and TPUs themselves: test_compilers.py.
"""

import json
import math
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh, AxisType

from gpt_jax import estimate
from gpt_jax.estimate import dry, fit, roofline, survey, table, targets
from gpt_jax.estimate import program as programs
from gpt_jax.mesh import AXES
from tests.test_estimate import config

# As XLA writes it: a loop of 5 whose body gathers 4 KiB and multiplies, then cuDNN's
# attention of 2 rows, 4 heads, 256 tokens of 64, and an all-reduce over machines.
TEXT = """
HloModule jit_step

%fused (p0: f32[8,128], p1: s32[]) -> f32[1,128] {
  %p0 = f32[8,128]{1,0} parameter(0)
  %p1 = s32[] parameter(1)
  %zero = s32[] constant(0)
  ROOT %slice.1 = f32[1,128]{1,0} dynamic-slice(%p0, %p1, %zero), dynamic_slice_sizes={1,128}
}

%condition (c: (s32[], f32[8,128])) -> pred[] {
  %c = (s32[], f32[8,128]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %five = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %five), direction=LT
}

%body (b: (s32[], f32[8,128])) -> (s32[], f32[8,128]) {
  %b = (s32[], f32[8,128]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%b), index=0
  %x = f32[8,128]{1,0} get-tuple-element(%b), index=1
  %all-gather.1 = f32[8,128]{1,0} all-gather(%x), channel_id=1, replica_groups=[2,4]<=[8], dimensions={0}
  %dot.1 = f32[8,8]{1,0} dot(%x, %all-gather.1), lhs_contracting_dims={1}, rhs_contracting_dims={1}, metadata={op_name="jit(step)/mlp/dot"}
  %row.1 = f32[1,128]{1,0} fusion(%x, %j), kind=kLoop, calls=%fused
  ROOT %next = (s32[], f32[8,128]{1,0}) tuple(%j, %x)
}

ENTRY %main (a: f32[8,128], q: bf16[2,256,4,64]) -> f32[8,128] {
  %a = f32[8,128]{1,0} parameter(0)
  %q = bf16[2,256,4,64]{3,2,1,0} parameter(1)
  %start = (s32[], f32[8,128]{1,0}) tuple(%a)
  %while.1 = (s32[], f32[8,128]{1,0}) while(%start), condition=%condition, body=%body
  %attn.1 = (bf16[2,4,256,64]{3,2,1,0}, u8[0]{0}) custom-call(%q, %q, %q), custom_call_target="__cudnn$fmhaSoftmax", metadata={op_name="jit(step)/attn/fwd"}
  ROOT %all-reduce.1 = f32[8,128]{1,0} all-reduce(%a), channel_id=2, replica_groups={{0,8},{1,9}}, to_apply=%fused
}
"""  # noqa: E501
H100 = targets.KINDS["h100"]
TINY = ("--config=configs/quickstart.py:size=tiny", "--config.batch_size=8")


@pytest.fixture(scope="module")
def text():
    return programs.Program(TEXT)


def test_what_stands_in_a_loop_counts_as_often_as_it_goes_round(text):
    assert dry.totals(text) == {
        "all-gather": {"count": 5, "bytes": 5 * 4096},
        "all-reduce": {"count": 1, "bytes": 4096},
    }
    assert text.calls() == {"__cudnn$fmhaSoftmax": 1}


def test_groups_of_devices_are_read_in_every_spelling(text):
    gather, reduce = text.collectives()
    assert gather.group == (0, 1, 2, 3) and reduce.group == (0, 8)
    told = "replica_groups=mesh['a'=2,'b'=2,'c'=2] {'b'}, dimensions={1}"
    assert programs.group(told) == (0, 2)
    turned = "replica_groups=[4,2]<=[2,4]T(1,0), dimensions={1}"
    assert programs.group(turned) == (0, 4)
    assert programs.group("channel_id=3, dimensions={0}") == ()


def test_a_link_between_machines_is_slower(text):
    gather, reduce = text.collectives()
    near, far = roofline.sending(gather, H100), roofline.sending(reduce, H100)
    assert near == pytest.approx(4096 * 3 / 4 / 450e9)
    assert far == pytest.approx(2 * 4096 / 2 / 50e9)  # an all-reduce sends twice


def test_of_what_is_sliced_only_the_slice_is_traffic(text):
    (row,) = (one for _, one in text.walk() if one.name == "row.1")
    assert text.traffic(row) == 2 * 128 * 4 + 4  # read, written, and the index
    (dot,) = (one for _, one in text.walk() if one.name == "dot.1")
    assert text.traffic(dot) == (2 * 8 * 128 + 8 * 8) * 4


def test_products_and_attention_have_their_flops(text):
    (dot,) = (one for _, one in text.walk() if one.name == "dot.1")
    assert roofline.product(text, dot) == (2 * 8 * 8 * 128, "f32")
    (attn,) = (one for _, one in text.walk() if one.name == "attn.1")
    whole = 2 * 2.0 * 2 * 4 * 256 * 256 * 64
    found = roofline.attention(text, attn, lanes=1, block=128)
    assert found == whole * (1 + 128 / 256) / 2  # the diagonal's blocks are whole


def test_time_is_by_kernel_and_by_part(text):
    found = roofline.measure(text, H100, 989.5e12)
    assert found.by.keys() == {"launches"} and found.bound == "launches"
    assert found.kernels >= 11 * roofline.LAUNCH  # 2 in each of 5 rounds, and cuDNN's
    assert set(roofline.parts(text, H100, 989.5e12)) == {
        *("MLP", "attention", "the rest")
    }


def test_tiles_of_a_tpu_are_memory_and_its_fast_memory_is_none():
    assert programs.physical("bf16[8,64]{1,0:T(8,128)(2,1)}") == 8 * 128 * 2
    assert programs.physical("bf16[8,64]{1,0:T(8,128)(2,1)S(1)}") == 0
    assert programs.size("(f32[2,3], pred[5], bf16[4])") == 24 + 5 + 8


def test_products_of_a_trace_are_counted_with_their_loops():
    def run(x, w):
        def body(x, _):
            return x @ w, None

        rounded = w.astype(jnp.bfloat16).astype(jnp.float32)
        return jax.lax.scan(body, x, None, length=3)[0] @ rounded

    shapes = [jax.ShapeDtypeStruct((16, 16), "float32")] * 2
    found = dry.of_trace(jax.jit(run).trace(*shapes).jaxpr)
    one = 2 * 16**3
    assert found["products"] == {"float32": 4 * one}
    assert sum(found["float32"].values()) == 4 * one


def test_a_program_that_a_cpu_compiles_is_read_as_it_is():
    def run(x):
        return jax.lax.fori_loop(0, 7, lambda _, x: jnp.sin(x @ x), x)

    shape = jax.ShapeDtypeStruct((64, 64), "float32")
    found = programs.Program(jax.jit(run).lower(shape).compile().as_text() or "")
    times = {times for times, one in found.walk(within=True) if one.kind == "dot"}
    assert times <= {7} and max(times for times, _ in found.walk()) == 7


# ---------------------------------------------------------------- devices


@pytest.mark.parametrize(
    "name, found",
    [
        ("v5e-8", ("tpu-v5e", 8, 1)),
        ("2xv5e-256", ("tpu-v5e", 256, 2)),
        ("v5p-64", ("tpu-v5p", 64, 1)),
        ("h100-64", ("h100", 64, 1)),
    ],
)
def test_devices_are_named_by_kind_and_number(name, found):
    kind, *numbers = targets.parse(name)
    assert (kind.device, *numbers) == found
    assert kind.bandwidth > 0 and kind.platform in ("tpu", "gpu")


@pytest.mark.parametrize(
    "name, message",
    [
        ("v5-8", "nothing to compile for: give one of v4, .*did you mean v5p"),
        ("gpu", "nothing to compile for"),
        ("v5e-7", "no slice of 7 v5e; sizes are 1, 4, 8"),
        ("h100-12", "machines of 8"),
        ("2xh100-8", "is no number of devices"),
    ],
)
def test_devices_that_do_not_exist_are_refused(name, message):
    with pytest.raises(ValueError, match=message):
        targets.parse(name)


def test_every_slice_has_as_many_chips_as_its_name_says():
    for kind in targets.KINDS.values():
        for number, shape in kind.slices.items():
            assert math.prod(map(int, shape.split("x"))) == number


@pytest.mark.parametrize("name, extra", [("v5e-8", "tpu"), ("h100-8", "cuda13")])
def test_without_the_compiler_one_sentence_says_what_installs_it(name, extra):
    if targets.installed(targets.parse(name)[0]):
        pytest.skip("it is installed")
    command = [sys.executable, "-m", "experiments.estimate", "--compile"]
    done = subprocess.run(
        [*command, f"--device={name}", *TINY],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f'pip install -r requirements.txt "jax[{extra}]"' in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_a_refusal_for_size_is_read_and_another_is_told():
    message = "RESOURCE_EXHAUSTED: Used 20.5G of 15.75G hbm. Exceeded by 4.75G."
    assert dry.refusal("x", message) == {"needs": 20.5 * 2**30, "has": 15.75 * 2**30}
    message = (
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
        "HLO temporaries (16.45G) exceeds available HBM (15.75G)."
    )
    assert dry.refusal("x", message) == {"needs": 16.45 * 2**30, "has": 15.75 * 2**30}
    with pytest.raises(ValueError, match="does not compile x: INTERNAL: no"):
        dry.refusal("x", "INTERNAL: no\nmore")


@pytest.mark.slow
def test_changes_that_make_a_step_fit_are_found_and_named():
    kinds = (AxisType.Auto,) * 3
    mesh = AbstractMesh((4, 1, 1), AXES, axis_types=kinds)
    made = config((4, 1, 1), scan_layers=True)
    own = fit.peak(estimate.make(made, mesh), "tpu")
    found = fit.helps(made, mesh, "tpu", needs=2 * own, has=1.6 * own)
    assert found and all(size <= 1.6 * own for _, size in found)
    assert {"model.remat": "full"} in [change for change, _ in found]
    told = table.of_help(found)
    assert "--config.model.remat=full" in told
    assert fit.helps(made, mesh, "tpu", needs=2 * own, has=1) == []
    assert "take more devices" in table.of_help([])


# ---------------------------------------------------------------- surveys


def line(row="small-fsdp", **fields):
    return {
        **{"row": row, "model": "GPT-2 small", "device": "h100-8", "batch": 64},
        **{"mesh": {"data": 1, "fsdp": 8, "tensor": 1}, "jax": "0.10.2"},
        **{"program": dry.TRAIN, "tokens": 65_536, "flops_per_token": 1e9},
        **{"memory": {"peak": 5e9}, "collectives": {"all-gather": {"bytes": 3e8}}},
        **{"time": {"kernels": 0.02, "collectives": 0.02, "traffic": 1e9}},
        **fields,
    }


def test_a_survey_keeps_the_newest_line_and_writes_its_page(tmp_path):
    path, page = tmp_path / "lines.jsonl", tmp_path / "page.md"
    lines = [line(batch=77), line(), line("small-data", needs=2e10, has=1e10)]
    path.write_text("".join(json.dumps(one) + "\n" for one in lines))
    page.write_text(f"before\n{survey.BEGIN}\nold\n{survey.END}\nafter\n")
    survey.rewrite(page, survey.read(path))
    told = page.read_text()
    assert told.startswith("before") and told.endswith("after\n") and "old" not in told
    # 65,536 tokens of 1 GFLOP over 8 x 989.5 TFLOP/s are 8.28 ms.
    assert "20.0 to 40.0 ms" in told and "21% to 41%" in told
    assert "does not fit: 20 GB" in told and "| 77 " not in told
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has no place for tables"):
        survey.rewrite(page, lines)


def test_rows_of_a_survey_are_those_of_as_many_devices():
    assert survey.find([], 256) == ["7b-fsdp"]
    assert survey.find(["xl-fsdp"], 8) == ["xl-fsdp"]
    with pytest.raises(ValueError, match="mesh of 8 devices, and --device names 4"):
        survey.find(["xl-fsdp"], 4)
    with pytest.raises(ValueError, match="no row for 3 devices, but for 1, 8, 256"):
        survey.find([], 3)
    with pytest.raises(ValueError, match="did you mean xl-fsdp"):
        survey.find(["xl-fsd"], 8)
