"""Programs for GPUs and TPUs, lowered without either and without their packages.

CPU devices stand in for them. What the compilers of the real ones make of it is for
`make test-compilers`.
"""

import math
import re
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import adapters, attention, data, estimate, model, sharding, train
from gpt_jax import mesh as meshes
from gpt_jax.attention import Sight
from gpt_jax.estimate import dry, targets
from gpt_jax.estimate import program as programs
from gpt_jax.population import program as populations
from tests.golden import bits

LOWERED = {"gpu": "cuda", "tpu": "tpu"}
TASKS = ("gpt2 adamw", "classify", "sft", "dpo", "answers", "grpo")
# The products of float32 in programs of bfloat16: Muon's, which has no place in the
# model; the backward pass of JAX's own attention; a sum over features in that of
# splash; GRPO's head, whose logits are divided by a temperature before they are scored.
NAMED = ("", "vmap(BTNH,BSNH->BNTS)", "hsd,hsd->hs", "...D,VD->...V")
LONG, ODD = 128, 1  # tokens: a tile of splash's; what makes rows of an odd number
# Of packed rows the name has a word more.
CUDNN, ITS_GRADIENT = r"__cudnn\$fmha\w*Softmax", r"__cudnn\$fmha\w*SoftmaxBackward"
SPLASH = "tpu_custom_call"
slow = pytest.mark.slow
# JAX promotes the dtypes of a product of two where it lowers it.
pytestmark = pytest.mark.usefixtures("promotion")
everywhere = pytest.mark.parametrize(
    "platform", ["gpu", pytest.param("tpu", marks=slow)]
)


class Lowered:
    """A program as a platform gets it.

    Attributes:
      jaxpr: its trace.
      text: its StableHLO.
    """

    def __init__(self, platform: str, run: Any, *arguments: Any):
        there = mock.patch.object(meshes, "platform", lambda: platform)
        with targets.answers(), there:
            traced = run.trace(*arguments)
            lowered = traced.lower(lowering_platforms=(LOWERED[platform],))
        self.jaxpr, self.text = traced.jaxpr, lowered.as_text()

    def calls(self, name: str) -> int:
        """How often it calls something that is not XLA's."""
        return len(re.findall(rf"custom_call @{name}\(", self.text))

    @property
    def wide(self) -> set[str]:
        """Where it multiplies float32, but for what NAMED says."""
        found = programs.products(self.jaxpr)
        places = {one.where for one in found if one.dtype == "float32"}
        return {place for place in places if place.rpartition("/")[2] not in NAMED}

    def check(self, donated: Any) -> None:
        """No host is asked, no bfloat16 is widened, and all of a tree is donated."""
        assert "callback" not in self.text
        assert self.wide == set()
        given = re.findall(r"tf.aliasing_output|jax.buffer_donor", self.text)
        assert len(given) >= len(jax.tree.leaves(donated))


def mesh(axes=(1, 1, 1)):
    return sharding.arranged(axes, jax.devices()[: math.prod(axes)])


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def numbers(config, task) -> Any:
    number = jax.ShapeDtypeStruct((), jnp.float32)
    return jax.tree.map(lambda _: number, train.make_hyper(train.unpack(config), task))


KEY = jax.eval_shape(lambda: jax.random.key(0))


@cache
def made(name: str, more: int, dtype: str, folder: Path) -> Any:
    """Returns (config, task) of a golden case whose rows are longer by some tokens."""
    config = bits.CASES[name](str(folder))
    config.data.folder = str(folder / "data")
    config.model.dtype = dtype
    config.model.context_length += more
    if name in ("answers", "grpo"):
        config.task.max_new_tokens = 6 + more
    config.sample_every = 0
    train.check(config)
    return config, train.make_task(train.unpack(config), folder)


def step(platform: str, config: Any, task: Any, axes=(1, 1, 1)) -> Lowered:
    """Returns the train step of a task, checked."""
    declared = adapters.make(model.declared(task.model.cfg), **config.adapter).declared
    strategy = sharding.mesh_strategy(mesh(axes), declared)
    parts = train.make_parts(train.unpack(config), task, strategy)
    state = jax.eval_shape(parts.first, KEY)
    state = dry.placed(state, strategy.layout(state))
    batch = shapes(next(iter(data.once(task.train, batch_size=config.batch_size))))
    if parts.rollout_fn is not None:
        before = (state.params, state.frozen, batch, KEY, np.uint32(0))
        batch = jax.eval_shape(parts.rollout_fn, *before)
    moving = state._replace(frozen={})
    rest = (state.frozen, batch, KEY, numbers(config, task))
    run: Any = parts.step_fn
    found = Lowered(platform, run.run, moving, *rest)
    found.check(moving) if config.model.dtype == "bfloat16" else None
    return found


# ---------------------------------------------------------------- tasks


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("rows")


def halves(platform: str, dtype: str) -> bool:
    return platform == "gpu" and dtype == "bfloat16"


@pytest.mark.parametrize("name", TASKS)
def test_every_task_lowers_for_a_gpu_with_cudnn(name, folder):
    found = step("gpu", *made(name, ODD, "bfloat16", folder))
    frozen = name in ("dpo", "grpo")  # the reference goes forward alone
    assert found.calls(CUDNN) == 2 + 2 * frozen and found.calls(ITS_GRADIENT) == 2


@slow
@pytest.mark.parametrize("more", [0, 1])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("name", [*TASKS, "modern muon", "gpt2 lora int8"])
@everywhere
def test_every_task_lowers(platform, name, dtype, more, folder):
    found = step(platform, *made(name, more, dtype, folder))
    assert (found.calls(ITS_GRADIENT) > 0) == halves(platform, dtype)


# ---------------------------------------------------------------- attention


def attend(platform, name, tokens, dtype="bfloat16", *, groups=1, axes=(1, 1, 1)):
    """Returns attention and its gradients: 4 rows, 2 heads of 64."""
    over = mesh(axes)
    where = jax.NamedSharding(over, jax.P(meshes.EXAMPLES, None, "tensor"))
    few = where if groups % axes[2] == 0 else jax.NamedSharding(over, jax.P())

    def total(q_BTHK, k_BSGK, v_BSGK):
        sight = Sight(True, 0, None, None)
        how = {"softcap": 0.0, "dropout": None}
        chosen = attention.choose(name, q_BTHK, k_BSGK, sight, cached=False, **how)
        return chosen(q_BTHK, k_BSGK, v_BSGK, sight, scale=1.0, **how).sum()

    run = jax.jit(sharding.within(over, jax.grad(total, argnums=(0, 1, 2))))
    q = jax.ShapeDtypeStruct((4, tokens, 2, 64), dtype, sharding=where)
    k = jax.ShapeDtypeStruct((4, tokens, groups, 64), dtype, sharding=few)
    return Lowered(platform, run, q, k, k)


@pytest.mark.parametrize("name", ["plain", "blocked", "streamed", "xla"])
def test_every_attention_of_ours_lowers_for_both(name):
    for platform in LOWERED:
        found = attend(platform, name, LONG + ODD)
        assert not found.calls(CUDNN) and not found.calls(SPLASH)


@pytest.mark.parametrize("tokens", [11, 1024, 1025])
def test_a_gpu_gets_cudnn_at_any_length(tokens):
    found = attend("gpu", "auto", tokens)
    assert found.calls(CUDNN) == found.calls(ITS_GRADIENT) == 1
    q, k, *_ = operands(found, ITS_GRADIENT)  # it takes even lengths alone
    assert (q, k) == ([4, tokens + tokens % 2, 2, 64], [4, tokens + tokens % 2, 1, 64])


def test_key_heads_that_a_mesh_cannot_split_are_repeated_for_cudnn():
    found = attend("gpu", "auto", 11, axes=(2, 1, 2))
    name = "CustomSPMDPartitioning"  # cuDNN's, until the mesh is laid over it
    assert found.calls(name) == 2
    q, k, *_ = operands(found, name)
    assert q == k == [4, 12, 2, 64]


def operands(found: Lowered, name: str) -> list[list[int]]:
    """Returns the shapes of what the first call of a name takes."""
    call = re.search(rf"custom_call @{name}\(.*? : \((.*?)\) ->", found.text)
    assert call is not None
    kinds = re.findall(r"<(.*?)>", call[1])
    return [[int(n) for n in kind.split("x")[:-1]] for kind in kinds]


def test_a_gpu_gets_no_cudnn_for_float32():
    assert attend("gpu", "auto", LONG, "float32").calls(CUDNN) == 0


@pytest.mark.parametrize("tokens", [LONG, LONG + ODD])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_tpu_gets_splash_from_128_tokens_on(tokens, dtype):
    assert attend("tpu", "auto", tokens, dtype).calls(SPLASH) == 3
    assert attend("tpu", "auto", LONG - 1, dtype).calls(SPLASH) == 0


# ---------------------------------------------------------------- other programs


@everywhere
def test_evaluation_and_decoding_lower_and_read_rounded_weights(platform):
    config = bits.modern()
    config.model.update(dtype="bfloat16", n_layers=2, vocab_size=64)
    plan = estimate.make(config, mesh())
    for draft in dry.drafts(plan, ("evaluate", "decode"), 2):
        found = Lowered(platform, draft.run, *draft.arguments)
        assert "callback" not in found.text
        if draft.name != "evaluation":
            kernels = [x for x in jax.tree.leaves(draft.arguments[0]) if x.ndim > 1]
            assert {str(x.dtype) for x in kernels} == {"bfloat16"}
            assert found.wide == set()


@everywhere
def test_a_population_lowers_and_all_of_it_is_donated(platform, folder):
    config, task = made("gpt2 adamw", 0, "bfloat16", folder)
    parts = train.make_parts(
        train.unpack(config), task, populations.strategy(mesh((2, 1, 1)))
    )
    example = shapes({name: np.asarray(x)[None] for name, x in task.train[0].items()})
    lead = (populations.STEPS, 1, 1)
    batch = {
        name: jax.ShapeDtypeStruct((*lead, *x.shape), x.dtype)
        for name, x in example.items()
    }
    run, arguments = populations.steps(parts, numbers(config, task), batch, 4)
    found = Lowered(platform, run, *arguments)
    found.check(arguments[0]._replace(frozen={}))
    assert found.calls(CUDNN) == 2 * (platform == "gpu")
