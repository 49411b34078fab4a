"""Weights of eight or four bits, for decoding: fewer bytes to read for every token.

A CPU writes a token about as fast as it reads the weights. 32 weights of one output
share a scale, and with four bits an offset, in float16: the numbers of ggml's Q8_0 and
Q4_1, of which files in GGUF are made, so weights that come from there lose nothing.

What multiplies them is a kernel in C++ (native/); where there is none, as on a GPU or
TPU, JAX does, with the same numbers.

Shapes: N rows  D inputs  F outputs  T tiles of 16 outputs  G groups of 32 inputs
"""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import mesh, names, native
from gpt_jax.weights import Declared

log = logging.getLogger(__name__)

BITS = (8, 4)
LEAF = "quantised"  # in the place of a kernel or of a table
LANES, GROUP, QUAD = native.LANES, 32, 4


@struct.dataclass
class Quantised:
    """A matrix [F, D] of few bits, filled up with zeros to whole tiles and groups.

    Attributes:
      codes: uint8 [T, G, 8, 16, 4] of eight bits, [T, G, 4, 16, 4] of four: for each of
        16 outputs the codes of four inputs; of four bits those of 16 inputs further on
        are the high halves.
      scales: float16 [T, G, 16].
      offsets: float16, likewise, of four bits; empty where codes of eight count from
        128.
      shape: (F, D).
    """

    codes: jax.Array
    scales: jax.Array
    offsets: jax.Array
    shape: tuple[int, int] = struct.field(pytree_node=False)

    @property
    def bits(self) -> int:
        """Of one code."""
        return self.codes.shape[2]


def weights(params: Mapping[str, Any], declared: Declared, *, bits: int) -> Any:
    """Returns unrolled weights with those matrices rounded that every token reads.

    Kernels of layers get `bits`. What makes the logits, the table of tied embeddings or
    an own head, gets eight in any case: it is the most sensitive. All else stays, as do
    a table that is only looked up in, biases, norms.

    Args:
      params: the weights.
      declared: what they are.
      bits: of BITS; 0 = the weights as they are.

    Raises:
      ValueError: there are no weights of so many bits.
    """
    if not bits:
        return params
    names.choose("bits", str(bits), tuple(map(str, BITS)))
    if mesh.platform() == "cpu" and (why := native.missing()):
        log.warning(
            "JAX itself multiplies weights of few bits here, which is slower than "
            "without --bits: %s",
            why,
        )
    leaves: dict[str, Any] = flatten_dict(params, sep="/")  # type: ignore[assignment]
    tied = not any(path.startswith("head/") for path in leaves)
    rounded = {}
    for path, leaf in leaves.items():
        layer, _, name = path.rpartition("/")
        weight = declared.get(path)
        if path == "embed/embedding" and tied:
            rounded[f"{layer}/{LEAF}"] = _rounded(leaf, 8)
        elif weight and name == "kernel" and leaf.dtype != jnp.int8:
            matrix_DF = leaf.reshape(weight.sides)
            own = bits if weight.linear else 8
            rounded[f"{layer}/{LEAF}"] = _rounded(matrix_DF.T, own)
        else:
            rounded[path] = leaf
    return unflatten_dict(rounded, sep="/")


def are(params: Any) -> bool:
    """Returns whether weights are of few bits."""
    leaves = jax.tree.leaves(params, is_leaf=lambda leaf: isinstance(leaf, Quantised))
    return any(isinstance(leaf, Quantised) for leaf in leaves)


@partial(jax.jit, static_argnames="bits")
def _rounded(matrix_FD, bits: int) -> Quantised:
    F, D = matrix_FD.shape
    T, G = -(-F // LANES), -(-D // GROUP)
    filled = jnp.pad(matrix_FD.astype(jnp.float32), ((0, -F % LANES), (0, -D % GROUP)))
    x_TGLI = jnp.swapaxes(filled.reshape(T, LANES, G, GROUP), 1, 2)
    if bits == 8:
        scales = (jnp.abs(x_TGLI).max(-1) / 127).astype(jnp.float16)
        offsets = jnp.zeros((0,), jnp.float16)
        codes = jnp.clip(_over(x_TGLI, scales), -127, 127) + 128
    else:
        least, most = x_TGLI.min(-1), x_TGLI.max(-1)
        scales = ((most - least) / 15).astype(jnp.float16)
        offsets = least.astype(jnp.float16)
        above = x_TGLI - offsets.astype(jnp.float32)[..., None]
        codes = jnp.clip(_over(above, scales), 0, 15)
    codes = codes.astype(jnp.uint8).reshape(T, G, LANES, GROUP // QUAD, QUAD)
    codes = jnp.swapaxes(codes, 2, 3)
    if bits == 4:
        codes = codes[:, :, :QUAD] | (codes[:, :, QUAD:] << 4)
    return Quantised(codes, scales, offsets, (F, D))


def _over(x, scales):
    """Returns x in steps of its scale, to the nearest; 0 where the scale is 0."""
    scale = scales.astype(jnp.float32)[..., None]
    return jnp.round(x / jnp.where(scale > 0, scale, 1))


def product(x_ND, matrix: Quantised):
    """Returns float32 x @ matrix.T [N, F].

    32 numbers of a row of x are rounded to eight bits as well, as in llama.cpp, so a
    product is a sum of whole numbers. No row depends on another one.
    """
    x_ND = x_ND.astype(jnp.float32)
    if native.ready():
        arrays = (x_ND, matrix.codes, matrix.scales, matrix.offsets)
        return native.product(*arrays, bits=matrix.bits, outputs=matrix.shape[0])
    return in_eight_bits(x_ND) @ rows(matrix, jnp.arange(matrix.shape[0])).T


def in_eight_bits(x_ND):
    """Returns what is left of x when 32 of its numbers share a step of 1/127."""
    N, D = x_ND.shape
    x_NGI = jnp.pad(x_ND, ((0, 0), (0, -D % GROUP))).reshape(N, -1, GROUP)
    step_NG1 = jnp.abs(x_NGI).max(-1, keepdims=True) / 127
    # As the kernel: times the inverse, which rounds otherwise than a division does.
    per_NG1 = jnp.where(step_NG1 > 0, 1 / jnp.where(step_NG1 > 0, step_NG1, 1), 0)
    return (jnp.round(x_NGI * per_NG1) * step_NG1).reshape(N, -1)[:, :D]


def rows(matrix: Quantised, index):
    """Returns float32 rows [..., D] of a matrix, as a look-up reads them."""
    tile, lane = index // LANES, index % LANES
    codes = matrix.codes[tile, :, :, lane]  # [..., G, 8 or 4, 4]
    scales = matrix.scales[tile, :, lane].astype(jnp.float32)[..., None]
    if matrix.bits == 8:
        codes, offsets = codes.astype(jnp.float32) - 128, 0.0
    else:
        codes = jnp.concatenate([codes & 15, codes >> 4], axis=-2).astype(jnp.float32)
        offsets = matrix.offsets[tile, :, lane].astype(jnp.float32)[..., None]
    numbers = codes.reshape(*codes.shape[:-2], GROUP) * scales + offsets
    return numbers.reshape(*index.shape, -1)[..., : matrix.shape[1]]
