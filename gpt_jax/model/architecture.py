"""What a model is: `GPTConfig`, checked, and the kinds of its layers."""

from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from gpt_jax import attention, names, settings
from gpt_jax.rope import RopeScaling


@dataclass(frozen=True)
class LayerKind:
    """What may differ between layers: attention window and rotary positions.

    A rope_base of 0 is no rotation at all (NoPE, Kazemnejad et al. 2023).
    """

    window: int
    rope_base: float
    rope_scaling: RopeScaling | None

    def __post_init__(self):
        settings.fit("", vars(self), settings.declared(LayerKind))
        if self.window < 0:
            raise ValueError(f"window {self.window} is below 0; 0 means all tokens")
        if self.rope_base < 0:
            raise ValueError(
                f"rope_base {self.rope_base} is below 0; 0 means no rotation"
            )
        scaling = self.rope_scaling
        if scaling and scaling.kind == "yarn" and 0 < self.rope_base <= 1:
            raise ValueError(f"rope_base {self.rope_base} must be above 1 for yarn")


def _layer_kind(kind) -> LayerKind:
    if isinstance(kind, LayerKind):
        return kind
    kind, keys = dict(kind), ("window", "rope_base", "rope_scaling")
    if set(kind) != set(keys):
        raise ValueError(
            f"a layer kind of pattern has the keys {', '.join(keys)}, "
            f"not {', '.join(map(str, kind)) or 'none'}"
        )
    scaling = kind["rope_scaling"]
    if scaling is not None and not isinstance(scaling, RopeScaling):
        if not {"kind", "factor"} <= set(scaling):
            raise ValueError(f"rope_scaling {scaling} needs a kind and a factor")
        kind["rope_scaling"] = RopeScaling(**dict(scaling))
    return LayerKind(**kind)


@dataclass(frozen=True, kw_only=True)
class GPTConfig:
    """`config.model` (configs/common.py says what each key means), checked, hashable.

    Zeros that mean "choose for me" are resolved here, but for vocab_size: a model can
    be made when a tokenizer has told it. A field with a default is newer than some
    runs; the default means what such a run did.

    Raises:
      ValueError: a value, or two together, make no model.
    """

    vocab_size: int
    vocab_multiple: int
    context_length: int
    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    position: str
    pattern: tuple[LayerKind, ...]
    rotary_dim: int = 0
    parallel: str = "no"
    norm: str
    norm_eps: float
    norm_scale: bool
    norm_bias: bool
    norm_offset: float
    norm_placement: str
    embed_norm: bool
    activation: str
    gated: bool
    qkv_bias: bool
    attn_bias: bool
    mlp_bias: bool
    head_bias: bool
    tie_embeddings: bool
    qk_norm: bool
    qk_norm_over: str = "head"
    qkv_clip: float = 0.0
    query_scale: float
    attn_softcap: float
    logit_softcap: float
    embed_scale: float
    residual_scale: float = 1.0
    logit_divisor: float = 1.0
    init: str
    zero_init: bool
    scan_layers: bool
    remat: str
    dtype: str
    param_dtype: str
    attention: str
    cache_dtype: str = ""
    n_classes: int = 0
    param: str = "standard"
    base_width: int = 64

    def __post_init__(self):
        settle = partial(object.__setattr__, self)
        settings.fit("model", vars(self), settings.declared(GPTConfig))
        settle("pattern", tuple(_layer_kind(kind) for kind in self.pattern))
        for name in _POSITIVE:
            self._at_least(name, 1)
        for name in _NOT_NEGATIVE:
            self._at_least(name, 0)
        if not self.head_dim and self.d_model % self.n_heads:
            raise ValueError(
                f"d_model {self.d_model} is not a multiple of n_heads {self.n_heads}; "
                "change one of them or set head_dim"
            )
        settle("n_kv_heads", self.n_kv_heads or self.n_heads)
        settle("head_dim", self.head_dim or self.d_model // self.n_heads)
        settle("rotary_dim", self.rotary_dim or self.head_dim)
        settle("d_ff", self.d_ff or 4 * self.d_model)
        usual = self.head_dim**-0.5
        if self.param == "mup":  # 1 / K, as large as usual at the usual K
            usual = USUAL_HEAD**0.5 / self.head_dim
        settle("query_scale", self.query_scale or usual)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(
                f"n_heads {self.n_heads} is not a multiple of n_kv_heads "
                f"{self.n_kv_heads}; each key/value head serves equally many queries"
            )
        if self.position == "rope" and self.rotary_dim % 2:
            whole = self.rotary_dim == self.head_dim
            raise ValueError(
                f"{'head_dim' if whole else 'rotary_dim'} {self.rotary_dim} is odd; "
                "rope rotates features in pairs"
            )
        if self.rotary_dim > self.head_dim:
            raise ValueError(
                f"rotary_dim {self.rotary_dim} is more than the {self.head_dim} "
                "features of a head"
            )
        if self.parallel != "no" and self.norm_placement == "post":
            raise ValueError(
                f"parallel {self.parallel} needs a norm before attention and MLP: "
                "norm_placement pre or both"
            )
        if self.logit_divisor != 1.0 and self.head_bias:
            raise ValueError("logit_divisor needs a head without a bias")
        for name in ("residual_scale", "logit_divisor"):
            if getattr(self, name) <= 0:
                raise ValueError(f"{name} {getattr(self, name)} must be above 0")
        if not self.pattern:
            raise ValueError("pattern is empty; it needs at least one layer kind")
        for kind in self.pattern if self.position == "rope" else ():
            self._check_longrope(kind.rope_scaling)
        if self.n_classes == 1:
            raise ValueError(
                "n_classes is 1: a classifier needs at least two, 0 is a language model"
            )
        if self.tie_embeddings and self.head_bias:
            raise ValueError("head_bias needs a head: set tie_embeddings=False")
        for name, choices in _CHOICES.items():
            names.choose(f"model.{name}", getattr(self, name), choices)

    def _check_longrope(self, scaling: RopeScaling | None):
        if scaling is None or scaling.kind != "longrope":
            return
        if self.context_length > scaling.original_context:
            raise ValueError(
                f"context_length {self.context_length:,} is more than the "
                f"{scaling.original_context:,} within which longrope turns all texts "
                "alike: longer ones would need other keys for their first tokens too; "
                f"give it at most that (--context={scaling.original_context} where a "
                "model is imported)"
            )
        if len(scaling.short_factors) != self.rotary_dim // 2:
            raise ValueError(
                f"rope_scaling has {len(scaling.short_factors)} short_factors; a head "
                f"turns {self.rotary_dim // 2} pairs of features"
            )

    def _at_least(self, name: str, least: int):
        if getattr(self, name) < least:
            raise ValueError(
                f"{name} is {getattr(self, name)}; it must be at least {least}"
            )

    @classmethod
    def added(cls) -> dict[str, Any]:
        """Returns the fields that older runs lack, with what such a run did."""
        return {f.name: f.default for f in fields(cls) if f.default is not MISSING}

    @property
    def lengths(self) -> dict[str, int]:
        """How long each axis of a weight is, by the names of weights.AXES."""
        return {
            "embed": self.d_model,
            "vocab": self.vocab_rows,
            "heads": self.n_heads,
            "kv_heads": self.n_kv_heads,
            "head": self.head_dim,
            "mlp": self.d_ff,
            "position": self.context_length,
            "classes": self.n_classes,
        }

    @property
    def width_ratio(self) -> float:
        """How many times the base width a model of param mup is wide; else 1."""
        return self.d_model / self.base_width if self.param == "mup" else 1.0

    @property
    def logits_over(self) -> float:
        """What the logits are divided by."""
        return self.logit_divisor * self.width_ratio

    @property
    def vocab_rows(self) -> int:
        """Rows of the embedding table: vocab_size padded to vocab_multiple."""
        if not self.vocab_size:
            raise ValueError(
                "vocab_size is 0; it must be at least 1; take it from the tokenizer"
            )
        return -(-self.vocab_size // self.vocab_multiple) * self.vocab_multiple

    @property
    def n_periods(self) -> int:
        """How often the whole pattern fits into the depth."""
        return self.n_layers // len(self.pattern)

    @property
    def n_scanned(self) -> int:
        """How many layers those whole patterns are."""
        return self.n_periods * len(self.pattern)

    def kind(self, layer: int) -> LayerKind:
        """Returns what layer number `layer` is."""
        return self.pattern[layer % len(self.pattern)]


def _relu2(x):
    return jnp.square(jax.nn.relu(x))


ACTIVATIONS: dict[str, Callable] = {
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "gelu": partial(jax.nn.gelu, approximate=False),
    "relu2": _relu2,
    "silu": jax.nn.silu,
    "relu": jax.nn.relu,
}

# What the backward pass finds ready of a layer, besides its input; the rest is computed
# again. All matrix products; the output of attention, the costliest part; nothing.
REMAT: dict[str, Callable | None] = {
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
    "save_attn_out": jax.checkpoint_policies.save_only_these_names("attn_out"),
    "full": None,
}

_POSITIVE = ("vocab_multiple", "context_length", "n_layers")
_POSITIVE += ("d_model", "n_heads", "base_width")
_NOT_NEGATIVE = ("vocab_size", "n_kv_heads", "head_dim", "d_ff", "query_scale")
_NOT_NEGATIVE += ("rotary_dim", "qkv_clip")
_NOT_NEGATIVE += ("attn_softcap", "logit_softcap", "norm_eps", "n_classes")
USUAL_HEAD = 64  # features of a head in most models
_CHOICES = {
    "param": ("standard", "mup"),
    "position": ("learned", "rope", "none"),
    "norm": ("layernorm", "rmsnorm"),
    "norm_placement": ("pre", "post", "both"),
    "parallel": ("no", "shared", "own"),
    "qk_norm_over": ("head", "heads"),
    "activation": tuple(ACTIVATIONS),
    "init": ("gpt2", "torch_default", "modern"),
    "remat": ("none", *REMAT),
    "dtype": ("float32", "bfloat16"),
    "param_dtype": ("float32", "bfloat16"),
    "attention": ("auto", attention.NATIVE, *attention.IMPLEMENTATIONS),
    "cache_dtype": ("", "bfloat16", "int8"),
}
