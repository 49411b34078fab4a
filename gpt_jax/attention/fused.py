"""Attention by the kernels of others: JAX's own, cuDNN's flash, Pallas' splash.

All take (q_BTHK, k_BSGK, v_BSGK, sight) and return [B, T, H, K].

Shapes: B batch  T query time  S key time  H query heads  G key/value heads
R query heads per key/value head (H = G R)  K head dim
"""

import functools
import logging
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gpt_jax import mesh
from gpt_jax.attention.sight import Sight, filled

log = logging.getLogger(__name__)

TILE = 128  # tokens in a block of splash's, or a multiple of it


def xla(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """JAX's own attention."""
    assert not softcap and dropout is None and sight.query_BT is None
    return _fused(q_BTHK, k_BSGK, v_BSGK, sight, scale=scale, implementation="xla")


def cudnn(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout):
    """Flash attention by cuDNN; NVIDIA GPUs and 16-bit floats only.

    Its backward pass refuses an odd number of tokens: one more is put behind the last,
    which no other sees.
    """
    assert not softcap and dropout is None and sight.query_BT is None
    T = q_BTHK.shape[1]
    rows, sight = filled((q_BTHK, k_BSGK, v_BSGK), sight, to=2)
    q_BTHK, k_BSGK, v_BSGK = _split_heads(*rows)
    how = {"scale": scale, "implementation": "cudnn"}
    return _fused(q_BTHK, k_BSGK, v_BSGK, sight, **how)[:, :T]


def _fused(q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, implementation):
    window = None
    if sight.window:
        window = (sight.window - 1, 0 if sight.causal else sight.window - 1)
    mask_B1TS = None
    if sight.segment_BT is not None:
        segment_BT = sight.segment_BT
        mask_B1TS = (segment_BT[:, :, None] == segment_BT[:, None, :])[:, None]
    # JAX asks the rules of promotion for the type of its scores.
    with jax.numpy_dtype_promotion("standard"):
        return jax.nn.dot_product_attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            mask=mask_B1TS,
            scale=scale,
            is_causal=sight.causal,
            local_window_size=window,
            implementation=implementation,
        )


def splash(
    q_BTHK, k_BSGK, v_BSGK, sight: Sight, *, scale, softcap, dropout, interpret=False
):
    """Flash attention by JAX's kernel for TPUs (Pallas); no scores in memory.

    Args: as of all; interpret runs the kernel's steps one by one, on any device.
    """
    assert dropout is None and sight.query_BT is None
    # Imported late: it takes a second, and only a TPU needs it.
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_kernel as kernels,
    )
    from jax.experimental.pallas.ops.tpu.splash_attention import (
        splash_attention_mask as masks,
    )

    T = q_BTHK.shape[1]
    rows, sight = filled((q_BTHK, k_BSGK, v_BSGK), sight, to=TILE)
    rows = _split_heads(rows[0] * jnp.asarray(scale, q_BTHK.dtype), *rows[1:])
    length = rows[0].shape[1]
    size = next(n for n in (512, 384, 256, TILE) if length % n == 0)
    near = sight.window - 1 if sight.window else None
    mask = masks.LocalMask(
        (length, length), (near, 0 if sight.causal else near), offset=0
    )

    def local(q_BTHK, k_BSGK, v_BSGK, *segments):
        kernel = kernels.make_splash_mha(
            mask=masks.MultiHeadMask([mask] * q_BTHK.shape[2]),
            head_shards=1,
            q_seq_shards=1,
            block_sizes=kernels.BlockSizes(
                **dict.fromkeys(("block_q", "block_kv", "block_kv_compute"), size),
                **dict.fromkeys(("block_q_dkv", "block_kv_dkv"), size),
                **dict.fromkeys(("block_kv_dkv_compute",), size),
                **dict.fromkeys(("block_q_dq", "block_kv_dq"), size),
            ),
            attn_logits_soft_cap=softcap or None,
            residual_checkpoint_name="attn_out",
            interpret=interpret,
        )
        rows = [x.transpose(0, 2, 1, 3) for x in (q_BTHK, k_BSGK, v_BSGK)]
        ids = [kernels.SegmentIds(segment_BT, segment_BT) for segment_BT in segments]
        y_BHTK: Any = jax.vmap(kernel)(*rows, *ids)
        return y_BHTK.transpose(0, 2, 1, 3)

    documents = () if sight.segment_BT is None else (sight.segment_BT,)
    return mesh.by_heads(local, heads=3, rows=len(documents))(*rows, *documents)[:, :T]


def _split_heads(q_BTHK, k_BSGK, v_BSGK):
    """Returns the same with all heads split alike over the mesh in sight.

    Where there are fewer key and value heads than devices to split them over, each
    stands as often as it is needed.
    """
    tensor = mesh.length("tensor")
    times = tensor // math.gcd(k_BSGK.shape[2], tensor)
    if times > 1:
        k_BSGK, v_BSGK = (jnp.repeat(x, times, axis=2) for x in (k_BSGK, v_BSGK))
    rows = (q_BTHK, k_BSGK, v_BSGK)
    return tuple(mesh.constrained(x, mesh.EXAMPLES, None, "tensor") for x in rows)


@functools.cache
def cudnn_works(
    dtype: str,
    queries: tuple[int, int, int],
    kv_heads: int,
    causal: bool,
    window: int,
    packed: bool,
) -> bool:
    """Tries cuDNN's attention on this GPU, forward and backward; a warning if not.

    Which shapes it takes depends on the GPU and on the versions of cuDNN and JAX, so
    it is asked for what the model needs, once for each. Of a GPU that is not there
    (see `mesh.platform`) JAX's own rules alone are asked.

    Args:
      dtype: of queries, keys and values.
      queries: tokens, heads, features of a head.
      kv_heads: key and value heads.
      causal, window: see Sight.
      packed: rows hold several documents.
    """
    if window and not causal:
        return False
    T, H, K = queries
    documents: Any = np.zeros((1, T), np.int32) if packed else None
    sight = Sight(causal, window, None, documents)
    q_BTHK, k_BSGK = np.ones((1, T, H, K), dtype), np.ones((1, T, kv_heads, K), dtype)

    def total(q_BTHK, k_BSGK):
        how = {"scale": 1.0, "softcap": 0.0, "dropout": None}
        y_BTHK = cudnn(q_BTHK, k_BSGK, k_BSGK, sight, **how)
        return y_BTHK.astype(jnp.float32).sum()

    try:  # compiled by hand, since the caller is being traced; on one device
        with jax.sharding.use_abstract_mesh(mesh.NONE):
            traced = jax.jit(jax.grad(total)).trace(q_BTHK, k_BSGK)
        if jax.default_backend() == "gpu":
            run = traced.lower().compile()
            jax.block_until_ready(run(q_BTHK, k_BSGK))
    except Exception as error:  # XLA raises whatever cuDNN tells it
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        log.warning(
            "cuDNN attention does not run here (%s, tokens x heads x head_dim %s: %s); "
            "JAX's own is used, which model.attention=xla asks for",
            *(dtype, "x".join(map(str, queries)), reason),
        )
        return False
    return True
