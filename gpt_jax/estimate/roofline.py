"""A model of a compiled program's time on devices that are not there.

It is good for comparing two programs. What it says of one is what it would take if
every kernel reached the shares of the peak below, and if nothing waited but for the
collectives, which may or may not overlap with it.

* On a TPU: the cycles that XLA's compiler expects of each instruction, loops counted;
  for kernels written by hand, which it does not count, their products at half of the
  peak, features filled up to 128.
* On a GPU: of each kernel the time of its bytes or of its products, whichever is
  longer, and its launch.
* Collectives: what each device sends, over the links that the group of devices has.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterator
from typing import NamedTuple

from gpt_jax.estimate import program as programs
from gpt_jax.estimate.program import Instruction, Program
from gpt_jax.estimate.targets import NETWORK, NODE, Kind

# Shares of the peak, as good kernels reach them.
MEMORY, PRODUCTS, ATTENTION = 0.9, 0.7, 0.5
FULL = 0.5  # the rate of float32 products (TF32 on a GPU) over that of bfloat16
LAUNCH = 3e-6  # seconds between two kernels of a GPU
LANES = 128  # features that a TPU's matrix unit takes at a time

CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
NOTHING = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("partition-id", "replica-id", "while", "conditional", "call", "opt-barrier"),
}
HALVES = ("bf16", "f16")
# Kernels of attention: how many products of [T, S, features] each makes.
KERNELS = {
    "__cudnn$fmhaSoftmax": 2,
    "__cudnn$fmhaSoftmaxBackward": 5,
    "splash_mha_fwd": 2,
    "splash_mha_dq": 3,
    "splash_mha_dkv": 4,
}


class Kernel(NamedTuple):
    """Something that a device does at a time.

    Attributes:
      name: the instruction's.
      op: where in the model it comes from.
      times: how often.
      seconds: of one.
      bound: products, memory, launches, or cycles where the compiler says no more.
    """

    name: str
    op: str
    times: int
    seconds: float
    bound: str


class Time(NamedTuple):
    """Seconds that a program takes on each device, by the model.

    Attributes:
      kernels: all but collectives.
      collectives: if nothing overlaps with them.
      by: the seconds of `kernels`, by what bounds them.
      traffic: bytes of memory read and written.
    """

    kernels: float
    collectives: float
    by: dict[str, float]
    traffic: float

    @property
    def bound(self) -> str:
        """What most of the time goes to."""
        return max(
            {**self.by, "collectives": self.collectives}.items(),
            key=lambda pair: pair[1],
        )[0]


def measure(found: Program, kind: Kind, peak: float) -> Time:
    """Returns the time of a compiled program on a kind of device.

    Args:
      found: compiled for that kind.
      kind: the devices.
      peak: FLOP/s of one of them, bfloat16.
    """
    by: dict[str, float] = defaultdict(float)
    for kernel in kernels(found, kind, peak):
        by[kernel.bound] += kernel.times * kernel.seconds
    return Time(
        kernels=sum(by.values()),
        collectives=sum(one.times * sending(one, kind) for one in found.collectives()),
        by=dict(by),
        traffic=sum(times * found.traffic(one) for times, one in working(found)),
    )


def working(found: Program) -> Iterator[tuple[int, Instruction]]:
    """Yields (times, instruction) of what reads and writes memory."""
    for times, one in found.walk():
        kind = one.kind.removesuffix("-start").removesuffix("-done")
        done = one.kind.endswith("-done") or kind in programs.COLLECTIVES
        if one.kind not in NOTHING and not done:
            yield times, one


def sending(one: programs.Collective, kind: Kind) -> float:
    """Returns the seconds of a collective, by what each device sends."""
    link = kind.link
    if kind.platform == "gpu" and len({device // NODE for device in one.group}) > 1:
        link = NETWORK
    n = len(one.group) or 2
    twice = 2 if one.kind == "all-reduce" else 1
    return twice * one.bytes * (n - 1) / n / link


def kernels(found: Program, kind: Kind, peak: float) -> Iterator[Kernel]:
    """Yields what a device does, each with its time."""
    one_of = _of_tpu if kind.platform == "tpu" else _of_gpu
    for times, one in working(found):
        seconds, bound = one_of(found, one, kind, peak)
        if seconds:
            yield Kernel(one.name, one.op, times, seconds, bound)


def _of_tpu(found: Program, one: Instruction, kind: Kind, peak: float):
    products = attention(found, one, lanes=LANES, block=512)
    if products:
        return products / (peak * ATTENTION), "products"
    cycles = CYCLES.search(one.rest)
    if cycles is None:
        return 0.0, ""
    made_of = [one, *found.fused(one)] if one.kind == "fusion" else [one]
    multiplies = any(inner.kind in ("convolution", "dot") for inner in made_of)
    return int(cycles[1]) / kind.clock, "products" if multiplies else "memory"


def _of_gpu(found: Program, one: Instruction, kind: Kind, peak: float):
    memory = found.traffic(one) / (kind.bandwidth * MEMORY)
    products = attention(found, one, lanes=1, block=128) / (peak * ATTENTION)
    for inner in [one, *found.fused(one)]:
        flops, dtype = product(found, inner)
        rate = peak * PRODUCTS * (1 if dtype in HALVES else FULL)
        products += flops / rate
    longest = max(memory, products)
    if longest < LAUNCH:
        return longest + LAUNCH, "launches"
    return longest + LAUNCH, "memory" if memory > products else "products"


def product(found: Program, one: Instruction) -> tuple[float, str]:
    """Returns (FLOPs, dtype of the left side) of a product; (0, "") of others."""
    library = one.kind == "custom-call" and "gemm" in one.target
    if one.kind != "dot" and not library:
        return 0.0, ""
    left = programs.ARRAY.search(found.shapes.get(one.operands[0], ""))
    depth = re.search(
        r'lhs_contracting_dim(?:ension)?s"?[=:][\[{]([\d",]*)[\]}]', one.rest
    )
    result = programs.ARRAY.search(one.shape)
    if left is None or depth is None or result is None:
        return 0.0, ""
    lengths = [int(n) for n in left[2].split(",") if n]
    axes = [int(n) for n in re.findall(r"\d+", depth[1])]
    elements = math.prod(int(n) for n in result[2].split(",") if n)
    return 2.0 * elements * math.prod(lengths[axis] for axis in axes), left[1]


def attention(found: Program, one: Instruction, *, lanes: int, block: int) -> float:
    """Returns the FLOPs of a kernel of fused attention, causal; 0 of anything else.

    Args:
      found: the program.
      one: an instruction.
      lanes: features are filled up to a multiple of it.
      block: tokens that are worked on together.
    """
    if one.kind != "custom-call":
        return 0.0
    word = one.target if "cudnn" in one.target else one.name
    named = [name for name in KERNELS if word.startswith(name)]
    rows = [
        [int(n) for n in dims.split(",")]
        for name in one.operands
        for _, dims, _ in programs.ARRAY.findall(found.shapes.get(name, ""))
        if dims.count(",") == 3
    ]
    if not named or not rows:
        return 0.0
    many = KERNELS[max(named, key=len)]
    features = rows[0][-1]
    # [B, H, T, K] on a TPU, [B, T, H, K] where it is cuDNN's.
    tokens = rows[0][1] if "cudnn" in one.target else rows[0][2]
    others = math.prod(rows[0]) // (tokens * features)
    wide = -(-features // lanes) * lanes
    # Of the blocks on the diagonal, half of which is hidden, all is computed.
    seen = (1 + min(block, tokens) / tokens) / 2
    return many * 2.0 * others * tokens * tokens * wide * seen


# Parts of the model, by what the place of an instruction has in it; the first fits.
PARTS = {
    "attention": ("/attn/", "attn/"),
    "MLP": ("/mlp/",),
    "norms": ("norm",),
    "embeddings": ("embed", "positions"),
    "head and loss": (
        "BCV",
        "while/body",
        "head",
        "log_softmax",
        "logsumexp",
        "choose",
    ),
}


def parts(found: Program, kind: Kind, peak: float) -> dict[str, float]:
    """Returns the seconds of kernels by part of the model; "the rest" is mostly the
    optimizer and the check that all is finite."""
    spent: dict[str, float] = defaultdict(float)
    for kernel in kernels(found, kind, peak):
        named = (
            part for part, words in PARTS.items() if any(w in kernel.op for w in words)
        )
        spent[next(named, "the rest")] += kernel.times * kernel.seconds
    return dict(sorted(spent.items(), key=lambda pair: -pair[1]))
