"""The parts of a config.json that families share: each is read and written here."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.rope import RopeScaling

# What each activation is called elsewhere; the first name is the one written.
ACTIVATIONS = {
    "gelu_tanh": (
        *("gelu_new", "gelu_pytorch_tanh", "gelu_fast"),
        *("gelu_python_tanh", "gelu_accurate"),
    ),
    "gelu": ("gelu", "gelu_python"),
    "silu": ("silu", "swish"),
    "relu": ("relu",),
    "relu2": ("relu2",),
}

FULL, SLIDING = "full_attention", "sliding_attention"
BASE = ("rope_theta", 10_000.0)  # the key of old, and the base where nothing says it
WINDOWS = ("sliding_window", "layer_types")
HEADS = ("num_key_value_heads", "head_dim")


# What a key may hold: (a check, what it should be). Null says what an absent key says.
MOST_LAYERS, LARGEST = 10_000, 2**31


def _whole(least: int, most: int = LARGEST):
    def fits(value):
        return type(value) is int and least <= value <= most

    return fits, f"a whole number from {least} to {most:,}"


def _number(above: bool):
    def fits(value):
        number = type(value) in (int, float) and math.isfinite(value)
        return number and (value > 0 or (value == 0 and not above))

    return fits, f"a number {'above 0' if above else 'of 0 or more'}"


SIZE, LAYERS, COUNT = _whole(1), _whole(1, MOST_LAYERS), _whole(0)
POSITIVE, NUMBER = _number(above=True), _number(above=False)
FLAG = (lambda value: isinstance(value, bool), "true or false")
TEXT = (lambda value: isinstance(value, str), "a text")
LIST = (lambda value: isinstance(value, list), "a list")
OBJECT = (lambda value: isinstance(value, Mapping), "an object")
NUMBERS = (
    lambda value: LIST[0](value) and all(POSITIVE[0](x) for x in value),
    "a list of numbers above 0",
)
EVERY = (lambda value: TEXT[0](value) or COUNT[0](value), "a whole number or letters")
SHAPES = {
    LAYERS: "n_layer num_layers num_hidden_layers",
    SIZE: "vocab_size n_positions n_embd n_head n_inner hidden_size intermediate_size "
    "num_attention_heads num_heads num_key_value_heads head_dim sliding_window "
    "max_position_embeddings window_size no_rope_layer_interval rotary_dim "
    "ffn_dim word_embed_proj_dim ffn_hidden_size num_kv_heads num_ln_in_parallel_attn",
    COUNT: "max_window_layers",
    NUMBER: "layer_norm_epsilon layer_norm_eps norm_epsilon rms_norm_eps mscale "
    "mscale_all_dim",
    POSITIVE: "rope_theta rope_local_base_freq query_pre_attn_scalar factor beta_fast "
    "beta_slow attention_factor "
    "final_logit_softcapping attn_logit_softcapping low_freq_factor high_freq_factor "
    "original_max_position_embeddings partial_rotary_factor rotary_emb_base rotary_pct "
    "embedding_multiplier logits_scaling residual_multiplier attention_multiplier "
    "logit_scale clip_qkv",
    FLAG: "tie_word_embeddings attention_bias mlp_bias use_sliding_window use_bias "
    "use_qkv_bias use_parallel_residual enable_bias layer_norm_elementwise_affine "
    "bias multi_query parallel_attn new_decoder_architecture",
    TEXT: "hidden_act hidden_activation activation_function activation rope_type type",
    LIST: "layer_types attention_types no_rope_layers",
    OBJECT: "rope_parameters rope_scaling",
    EVERY: "sliding_window_pattern",
    NUMBERS: "short_factor long_factor",
}
SHAPE_OF = {key: shape for shape, keys in SHAPES.items() for key in keys.split()}


def check_shapes(config: Mapping, keys: Iterable[str]) -> None:
    """Raises ValueError where one of the keys holds what it cannot."""
    for key in keys:
        value = config.get(key)
        if value is None or key not in SHAPE_OF:
            continue
        fits, wanted = SHAPE_OF[key]
        if not fits(value):
            raise ValueError(f"config.json has {key} = {value!r:.80}, not {wanted}")
        if isinstance(value, Mapping):
            for inner in (
                value,
                *(v for v in value.values() if isinstance(v, Mapping)),
            ):
                check_shapes(inner, inner)


def activation(name: Any) -> str:
    """Returns our name of an activation; ValueError when we have it not."""
    for ours, names in ACTIVATIONS.items():
        if name in names:
            return ours
    known = [name for names in ACTIVATIONS.values() for name in names]
    raise ValueError(
        f"the activation {name!r} is not supported; supported: {', '.join(known)}"
    )


Rope = tuple[float, RopeScaling | None]  # base and scaling of rotary positions


def rope(config: Mapping, theta: tuple[str, float] = BASE) -> Rope:
    """Returns the rotary positions of all layers.

    Args:
      config: either spelling: rope_parameters, for all layers or the same for each type
        of layer; or rope_theta (or the key in `theta`) and rope_scaling.
      theta: the old key of the base, and the base where nothing says it.
    """
    given = config.get("rope_parameters") or {}
    if given.get(FULL) != given.get(SLIDING, given.get(FULL)):
        raise ValueError("rope_parameters that differ between layers are not supported")
    return _rope(config, FULL, theta)


def ropes(
    config: Mapping, full: tuple[str, float], sliding: tuple[str, float]
) -> tuple[Rope, Rope]:
    """As `rope`, of full and of sliding layers, which may have their own."""
    if not {FULL, SLIDING} & (config.get("rope_parameters") or {FULL: 0}).keys():
        raise ValueError("rope_parameters should have an object for each type of layer")
    return _rope(config, FULL, full), _rope(config, SLIDING, sliding)


def _rope(config: Mapping, layer_type: str, theta: tuple[str, float]) -> Rope:
    given = config.get("rope_parameters") or {}
    nested = FULL in given or SLIDING in given
    if nested and not all(isinstance(v, Mapping | None) for v in given.values()):
        raise ValueError("rope_parameters has keys of all layers beside those of some")
    if nested:
        given = given.get(layer_type) or {}
    elif layer_type == SLIDING:
        given = {}
    given = _one_spelling(given)
    old = _one_spelling(config.get("rope_scaling") or {})
    for one in (given, old):
        one.pop("partial_rotary_factor", None)  # `partial` reads it
    default = config.get(theta[0])
    default = theta[1] if default is None else default
    if layer_type == FULL and old:  # the old spelling scales these layers only
        both = [
            {"rope_type": "default", "rope_theta": default} | x for x in (given, old)
        ]
        if given and both[0] != both[1]:
            raise ValueError(
                "rope_scaling and rope_parameters say different things: leave one out"
            )
        given = old
    base = given.pop("rope_theta", default)
    return float(base), _scaling(given.pop("rope_type", "default"), given, config)


def partial(config: Mapping, absent: float) -> float:
    """Returns the share of a head's features that rotate; refuses several shares."""
    given = config.get("rope_parameters") or {}
    inner = [v for v in given.values() if isinstance(v, Mapping)] or [given]
    shares = [v.get("partial_rotary_factor") for v in inner]
    shares += [(config.get("rope_scaling") or {}).get("partial_rotary_factor")]
    shares += [config.get("partial_rotary_factor")]
    found = {float(share) for share in shares if share is not None} or {absent}
    if len(found) > 1:
        raise ValueError("config.json has several values of partial_rotary_factor")
    return found.pop()


def _one_spelling(rope: Mapping) -> dict[str, Any]:
    """Returns what is set, with rope_type for its old name `type`."""
    given = {key: value for key, value in rope.items() if value is not None}
    old = given.pop("type", None)
    given = {"rope_type": old, **given} if old else given
    if given.get("rope_type") == "su":  # Phi 3's first word for it
        given["rope_type"] = "longrope"
    return given


def _scaling(kind: str, given: dict, config: Mapping) -> RopeScaling | None:
    if kind not in ROPE_KEYS:
        raise ValueError(
            f"rope_type {kind!r} is not supported; supported: {', '.join(ROPE_KEYS)}"
        )
    if strange := sorted(given.keys() - {*ROPE_KEYS[kind], *IGNORED_BY_ROPE}):
        raise ValueError(f"the rope option {strange[0]} is not supported for {kind}")
    if kind in ("default", "dynamic"):  # see ROPE_KEYS
        return None
    most = config.get("max_position_embeddings")
    length = config.get("original_max_position_embeddings")  # as Phi 3 has it
    length = length or given.get("original_max_position_embeddings") or most
    try:
        if kind == "linear":
            return RopeScaling("linear", float(given["factor"]))
        if not length:
            raise KeyError("max_position_embeddings")
        own: dict[str, Any] = {"original_context": int(length)}
        if kind == "longrope":
            own["short_factors"] = tuple(map(float, given["short_factor"]))
            given = {"factor": (most or length) / length, **given}
        if kind == "llama3":
            own |= {k: float(given[k]) for k in ("low_freq_factor", "high_freq_factor")}
        if kind == "yarn":
            own["beta_fast"] = float(given.get("beta_fast", 32))
            own["beta_slow"] = float(given.get("beta_slow", 1))
        if kind in ("yarn", "longrope"):
            own["attention_factor"] = _attention_factor(given)
        return RopeScaling(kind, factor=float(given["factor"]), **own)
    except KeyError as error:
        raise ValueError(f"the {kind} rope of config.json has no {error}") from error


def _attention_factor(given: Mapping) -> float:
    """Returns what turned features are multiplied by; 0 = as the paper says."""
    if given.get("truncate", True) is not True:
        raise ValueError("truncate = false is not supported for yarn")
    if "attention_factor" in given:
        return float(given["attention_factor"])
    both = [given.get(key) or 0.0 for key in ("mscale", "mscale_all_dim")]
    if not all(both) or given["factor"] <= 1:
        return 0.0
    over, under = (0.1 * scale * math.log(given["factor"]) + 1 for scale in both)
    return over / under


# What each kind reads. The dynamic one, alone of all, changes nothing for texts within
# max_position_embeddings, and a model here reads no longer ones.
ROPE_KEYS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor"),
    "yarn": (
        *("factor", "beta_fast", "beta_slow", "attention_factor"),
        *("mscale", "mscale_all_dim", "truncate"),
    ),
    "longrope": ("short_factor", "long_factor", "factor", "attention_factor"),
}
IGNORED_BY_ROPE = ("original_max_position_embeddings",)
ROPE = ("rope_theta", "rope_scaling", "rope_parameters")


def rope_keys(kind: LayerKind) -> dict[str, Any]:
    """Returns the dict that rope_parameters holds for one kind of layer."""
    scaling = kind.rope_scaling
    keys: dict[str, Any] = {"rope_type": "default", "rope_theta": kind.rope_base}
    if scaling is not None:
        keys |= {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling is None or scaling.kind == "linear":
        return keys
    keys["original_max_position_embeddings"] = scaling.original_context
    for key in ("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow"):
        if value := getattr(scaling, key):
            keys[key] = value
    if scaling.attention_factor:
        keys["attention_factor"] = scaling.attention_factor
    if scaling.kind == "longrope":  # no text is long: see GPTConfig
        keys["short_factor"] = keys["long_factor"] = [*scaling.short_factors]
    return keys


def write_rope(kind: LayerKind) -> dict[str, Any]:
    """Returns rotary positions in both spellings, for old and new readers."""
    keys = rope_keys(kind)
    old = {key: value for key, value in keys.items() if key != "rope_theta"}
    return {
        "rope_theta": kind.rope_base,
        "rope_scaling": old if kind.rope_scaling else None,
        "rope_parameters": keys,
    }


def write_ropes(full: LayerKind, sliding: LayerKind) -> dict[str, Any]:
    """As `write_rope`, where sliding layers have rotary positions of their own."""
    return {
        **write_rope(full),
        "rope_parameters": {FULL: rope_keys(full), SLIDING: rope_keys(sliding)},
    }


def period(kinds: Iterable[LayerKind]) -> tuple[LayerKind, ...]:
    """Returns the shortest pattern that, repeated, gives these layers."""
    kinds = tuple(kinds)
    for size in range(1, len(kinds)):
        if all(kind == kinds[i % size] for i, kind in enumerate(kinds)):
            return kinds[:size]
    return kinds


def pattern(kinds: Iterable[LayerKind]) -> dict[str, Any]:
    """Returns the field `pattern` as a config holds it."""
    return {"pattern": tuple(asdict(kind) for kind in period(kinds))}


def layer_types(config: Mapping, default: Callable[[int], str]) -> list[str]:
    """Returns FULL or SLIDING for every layer; `default(layer)` where not listed."""
    count = config["num_hidden_layers"]
    types = config.get("layer_types") or [default(i) for i in range(count)]
    if len(types) != count:
        raise ValueError(
            f"layer_types has {len(types)} entries, num_hidden_layers is {count}"
        )
    for name in types:
        if name not in (FULL, SLIDING):
            raise ValueError(f"the layer type {name!r} is not supported")
    return types


def every(config: Mapping, absent: int) -> int:
    """Returns n where every n-th layer sees all; for a config without layer_types."""
    value = config.get("sliding_window_pattern")
    if value == 0 or isinstance(value, str):
        raise ValueError(f"sliding_window_pattern {value!r} needs layer_types too")
    return absent if value is None else value


def kinds(
    types: Iterable[str], window: int, *, full: Rope, sliding: Rope
) -> list[LayerKind]:
    """Returns the kind of every layer.

    Args:
      types: FULL or SLIDING, of each.
      window: of the sliding ones; 0 = config.json says none.
      full, sliding: the rotary positions of either.
    """
    types = list(types)
    if SLIDING in types and not window:
        raise ValueError("config.json has sliding layers but no sliding_window")
    of = {FULL: LayerKind(0, *full), SLIDING: LayerKind(window, *sliding)}
    return [of[name] for name in types]


def heads(config: Mapping, head_dim: int = 0, kv: int = 0) -> dict[str, Any]:
    """Returns the fields of heads.

    Args:
      config: a config.json.
      head_dim: where no key says it; 0 = the width's share.
      kv: key/value heads where the key is absent; 0, or null there = as many as heads.
    """
    count = config["num_attention_heads"]
    size = config.get("head_dim") or head_dim or config["hidden_size"] // count
    if size < 1:
        raise ValueError(f"config.json leaves heads of head_dim {size}")
    return {
        "n_kv_heads": config.get("num_key_value_heads", kv) or count,
        "head_dim": size,
        "rotary_dim": size,
        "query_scale": size**-0.5,
    }


def rotary(config: Mapping, absent: float) -> dict[str, Any]:
    """Returns the field rotary_dim where only a share of a head may rotate."""
    size, share = heads(config)["head_dim"], partial(config, absent)
    if int(size * share) < 1 or share > 1:
        raise ValueError(f"partial_rotary_factor {share} of {size} features is none")
    return {"rotary_dim": int(size * share)}


def write_heads(cfg: GPTConfig) -> dict[str, Any]:
    """Returns the keys of heads."""
    return {"num_key_value_heads": cfg.n_kv_heads, "head_dim": cfg.head_dim}
