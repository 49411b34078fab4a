"""Where a logit comes from: direct attribution per layer and head.

The residual stream is a sum: the embedding, and what every head and every MLP added.
The last norm divides that sum by one number for each token; with this number held as it
was, norm and head are linear, and a logit is a sum of one number for each part (Elhage
et al. 2021, "A mathematical framework for transformer circuits").

Shapes: T time  L layers  D width  H heads  K head dim  V vocabulary
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gpt_jax.microscope.taps import Seen, applied
from gpt_jax.model import GPT, GPTConfig


class Attribution(NamedTuple):
    """The parts of one logit of each token, float32; they add up to it.

    Attributes:
      embedding_T: of the embedding of token and position.
      head_TLH: of the heads.
      shift_TL: of what a layer's attention adds whatever its heads read: its biases.
      mlp_TL: of the MLPs.
      constant_T: of the biases of the last norm and of the head.
      softcap_T: what a soft-cap of the logits changes; 0 without one.
      logit_T: the logit.
    """

    embedding_T: jax.Array
    head_TLH: jax.Array
    shift_TL: jax.Array
    mlp_TL: jax.Array
    constant_T: jax.Array
    softcap_T: jax.Array
    logit_T: jax.Array


def attribute(gpt: GPT, params, seen: Seen, wanted_T) -> Attribution:
    """Returns where the logits of `wanted_T` come from, each at its own token.

    Args:
      gpt: a language model in float32: of bfloat16 the parts add up to 3 digits only.
      params: its weights.
      seen: of the row.
      wanted_T: int, a token of the vocabulary for each place.
    """
    cfg, T = gpt.cfg, len(wanted_T)
    seen = jax.tree.map(jnp.asarray, seen)
    end = _Held.of(
        cfg, params.get("final_norm", {}), seen.stream_LTD[-1], cfg.logits_over
    )

    def raw_T(x_TD):
        raw_TV = applied(gpt, params, _raw, x_TD.astype(cfg.dtype))
        return raw_TV[jnp.arange(T), wanted_T]

    bias_T, slope = jax.vjp(raw_T, jnp.zeros((T, cfg.d_model)))
    (direction_TD,) = slope(jnp.ones(T))

    def part(x_TD):
        return (end.scaled(x_TD) * direction_TD).sum(-1)

    heads, shifts = [], []
    for layer in range(cfg.n_layers):
        out_THD, bias_TD = _outputs(gpt, params, layer, seen.read_LTHK[layer])
        if cfg.norm_placement != "pre":
            post = params[f"block_{layer}"].get("post1", {})
            behind = _Held.of(cfg, post, out_THD.sum(1) + bias_TD)
            out_THD = jax.vmap(behind.scaled, 1, 1)(out_THD)
            bias_TD = behind.scaled(bias_TD) + behind.shift
        heads.append(jax.vmap(part, 1, 1)(out_THD))
        shifts.append(part(bias_TD))
    uncapped_T = raw_T(end.scaled(seen.stream_LTD[-1]) + end.shift)
    logit_T = seen.logits_TV[jnp.arange(T), wanted_T]
    constant_TD = jnp.broadcast_to(end.shift, (T, cfg.d_model))
    return Attribution(
        embedding_T=part(seen.stream_LTD[0]),
        head_TLH=jnp.stack(heads, 1),
        shift_TL=jnp.stack(shifts, 1),
        mlp_TL=jax.vmap(part, 0, 1)(seen.mlp_LTD),
        constant_T=(constant_TD * direction_TD).sum(-1) + bias_T,
        softcap_T=logit_T - uncapped_T if cfg.logit_softcap else jnp.zeros(T),
        logit_T=logit_T,
    )


class _Held(NamedTuple):
    """A norm whose divisor is held: linear.

    Attributes:
      centred: whether the mean goes (LayerNorm).
      scale: [T, D] or a number.
      shift: its bias, [1, D] or 0.
    """

    centred: bool
    scale: Any
    shift: Any

    @classmethod
    def of(cls, cfg: GPTConfig, params, x_TD, divisor: float = 1.0) -> "_Held":
        """Returns the norm as it is of `x_TD`, what it gives divided by `divisor`."""
        centred = cfg.norm == "layernorm"
        y_TD = x_TD - x_TD.mean(-1, keepdims=True) if centred else x_TD
        square_T1 = jnp.square(y_TD).mean(-1, keepdims=True)
        scale_TD = jax.lax.rsqrt(square_T1 + cfg.norm_eps)
        if "scale" in params:
            scale_TD = scale_TD * (cfg.norm_offset + params["scale"][None])
        shift = params["bias"][None] if "bias" in params else jnp.zeros(())
        return cls(centred, scale_TD / divisor, shift / divisor)

    def scaled(self, x_TD):
        """Returns the norm of a part, without the bias."""
        if self.centred:
            x_TD = x_TD - x_TD.mean(-1, keepdims=True)
        return x_TD * self.scale


def _raw(gpt: GPT, x):
    """The head, before a soft-cap."""
    y = gpt.table.attend(x) if gpt.cfg.tie_embeddings else gpt.head(x)
    return y[..., : gpt.cfg.vocab_size]


def _outputs(gpt: GPT, params, layer: int, read_THK) -> tuple[jax.Array, jax.Array]:
    """Returns what each head of a layer writes [T, H, D], and what all have: the bias.

    The projection is linear: a head alone, less nothing at all.
    """

    def out(gpt: GPT, y_BTHK):
        return getattr(gpt, f"block_{layer}").attn.out(y_BTHK)

    alone_HTHK = jnp.eye(gpt.cfg.n_heads)[:, None, :, None] * read_THK[None]
    rows_RTHK = jnp.concatenate([alone_HTHK, jnp.zeros_like(read_THK)[None]])
    made_RTD = applied(gpt, params, out, rows_RTHK.astype(gpt.cfg.dtype))
    return (made_RTD[:-1] - made_RTD[-1:]).swapaxes(0, 1), made_RTD[-1]
