"""config.json, read as fields of GPTConfig and written from a GPTConfig.

A config.json is refused, key by key, unless every key is understood or known not to
change the numbers; an export is refused unless its config.json, read back, is the
model that was exported.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from gpt_jax.model import GPTConfig, LayerKind
from gpt_jax.pretrained import options
from gpt_jax.pretrained.families import REQUIRED, TABLE, Family
from gpt_jax.pretrained.options import FULL, period

# Fields of GPTConfig that no config.json decides: how a model is computed or begun, and
# a head for classes, which stays at home.
TECHNICAL = (
    *("vocab_multiple", "init", "zero_init", "scan_layers", "remat", "n_classes"),
    *("dtype", "param_dtype", "attention", "cache_dtype", "base_width"),
)

# Keys that never change the logits: training, generation, bookkeeping. Another key is
# ignored only where it is off (null, false, 0, empty).
HARMLESS = re.compile(
    r"_.*|.*dropout.*|.*_pdrop|.*token_ids?|.*_token_index|summary_.*|architectures"
    r"|task_specific_params|(torch_)?dtype|transformers.*|unsloth.*|initializer_.*"
    r"|init_std|layerdrop"
    r"|use_cache|cache_implementation|n_ctx|auto_map|model_type|pretraining_tp"
    r"|id2label|label2id|output_.*|return_dict|reorder_and_upcast_attn|name_or_path"
    r"|is_llama_config|tokenizer_class|problem_type|gradient_checkpointing|attn_.*impl.*"
    r"|(max|min)_(new_tokens|length)|do_sample|temperature|top_[kp]|typical_p|num_.*beam.*"
    r"|length_penalty|repetition_penalty|diversity_penalty|num_return_sequences"
    r"|predict_special_tokens|num_labels|max_sequence_length|model_max_length|neftune_.*"
    r"|use_flash_attn|tensor_parallel_size|(bos|eos|pad|unk)_token|seq_length"
)
# Keys of any family, with what they may hold: those values change nothing, other do.
NEUTRAL = {
    "is_causal": lambda value: value is True,
    "partial_rotary_factor": lambda value: value == 1.0,
    "layer_types": lambda value: (
        isinstance(value, list) and {*map(str, value)} <= {FULL}
    ),
}


def of_config(config: Mapping[str, Any]) -> Family:
    """Returns the family of a config.json that `fields` reads, with all of its rows.

    Raises:
      ValueError: it has no model_type, or one that is not supported.
    """
    family = _named(config)
    return family._replace(rows=(*family.own_rows(config), *family.rows))


def _named(config: Mapping[str, Any]) -> Family:
    name = config.get("model_type")
    if not isinstance(name, str) or name not in TABLE:
        raise ValueError(
            f"model_type {name!r} is not supported; supported: {', '.join(TABLE)}"
        )
    return TABLE[name]


def fields(config: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the fields of GPTConfig, all but TECHNICAL, that a config.json means.

    Raises:
      ValueError: the model type or an option is not supported, or a size is absent.
    """
    family = _named(config)
    known = [*family.known, *(key for key, _ in family.keys.values())]
    options.check_shapes(config, known)
    # What was added to our layers after the tables were made, no family has.
    added = {k: x for k, x in GPTConfig.added().items() if k not in TECHNICAL}
    found = {**added, **family.fixed}
    for field, (key, absent) in family.keys.items():
        value = config.get(key)
        found[field] = absent if value is None else value
        if found[field] is REQUIRED:
            raise ValueError(f"config.json should say how large {key} is")
    _refuse_unknown(family, config, known)
    if "partial_rotary_factor" not in known and options.partial(config, 1.0) != 1.0:
        raise ValueError("a partial_rotary_factor other than 1 is not supported")
    return found | family.read(config)


def config_of(cfg: GPTConfig) -> dict[str, Any]:
    """Returns the config.json of a model, of the first family that it belongs to.

    Raises:
      ValueError: it belongs to none; the sentence names what the nearest one lacks.
    """
    if cfg.n_classes:
        raise ValueError(
            f"this model sorts texts into {cfg.n_classes} classes: only language "
            "models are exported"
        )
    lacking = {}
    for family in TABLE.values():
        config = _config(family, cfg)
        absent = dict.fromkeys(_zeros(family, cfg), False)
        try:
            wrong = difference(cfg, fields(config) | absent)
        except ValueError:  # what this family cannot even say
            continue
        if not wrong:
            return config
        lacking[family.model_type] = wrong
    nearest = min(lacking, key=lambda name: len(lacking[name]))
    raise ValueError(
        "no architecture of transformers computes this model; the nearest, "
        f"{nearest}, would need {'; '.join(lacking[nearest])}"
    )


def difference(cfg: GPTConfig, wanted: Mapping[str, Any]) -> list[str]:
    """Returns `field value instead of value` for all that makes two models differ."""
    ours, theirs = _canonical(cfg), _canonical(replace(cfg, **wanted))
    return [
        f"{name} {theirs[name]!r} instead of {ours[name]!r}"
        for name in ours
        if ours[name] != theirs[name]
    ]


def missing_biases(cfg: GPTConfig) -> tuple[str, ...]:
    """Returns the switches of biases that an export of `cfg` writes as zeros."""
    return _zeros(of_config(config_of(cfg)), cfg)


def with_biases(cfg: GPTConfig) -> GPTConfig:
    """Returns a model with all biases that an export of `cfg` has."""
    return replace(cfg, **dict.fromkeys(missing_biases(cfg), True))


def _zeros(family: Family, cfg: GPTConfig) -> tuple[str, ...]:
    return tuple(field for field in family.zeros if not getattr(cfg, field))


def _config(family: Family, cfg: GPTConfig) -> dict[str, Any]:
    config = {"model_type": family.model_type, "architectures": [family.architecture]}
    for field, (key, _) in family.keys.items():
        config[key] = getattr(cfg, field)
    return config | dict(family.always) | family.write(cfg)


def _canonical(cfg: GPTConfig) -> dict[str, Any]:
    """Returns what decides a model's logits, equal for equal models."""
    values = {name: getattr(cfg, name) for name in cfg.__dataclass_fields__}
    for name in TECHNICAL:
        del values[name]
    if cfg.norm == "rmsnorm":
        values["norm_bias"] = False
    if not cfg.norm_scale:
        values["norm_offset"] = 0.0
    if cfg.position != "rope":
        values["rotary_dim"] = 0
    if not cfg.qk_norm:
        values["qk_norm_over"] = ""
    kinds = [_canonical_kind(cfg, cfg.kind(i)) for i in range(cfg.n_layers)]
    return values | {"pattern": period(kinds)}


def _canonical_kind(cfg: GPTConfig, kind: LayerKind) -> LayerKind:
    window = kind.window if kind.window < cfg.context_length else 0
    if cfg.position != "rope":
        return LayerKind(window, 1.0, None)
    scaling = kind.rope_scaling if kind.rope_base else None
    return replace(kind, window=window, rope_scaling=scaling)


def _refuse_unknown(
    family: Family, config: Mapping[str, Any], known: Iterable[str]
) -> None:
    for key, value in config.items():
        if key in family.always:
            wanted = family.always[key]
            fine = value == wanted or (value is None and not wanted)
        elif key in NEUTRAL and key not in known:
            fine = value is None or NEUTRAL[key](value)
        else:
            fine = not value or key in known or HARMLESS.fullmatch(key)
        if fine:
            continue
        raise ValueError(
            f"config.json has {key} = {value!r:.80}, which is not supported for "
            f"{family.model_type}"
        )
