"""How a run's texts are written where nobody says otherwise.

A published model brings generation_config.json along, in which its makers say how it is
drawn from. A run that was trained here has `sampling.DEFAULTS`. vLLM does the same
(`--generation-config auto`).
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, sampling

FILE = "generation_config.json"

# Keys that change no token of one text: which tokens end it (special.py reads them),
# how long it may be, how many there are, how they are computed and told, what beams do.
HARMLESS = re.compile(
    r"_.*|(bos|eos|pad|unk|decoder_start)_token_id|transformers_version"
    r"|max_(new_tokens|length|time)|num_return_sequences"
    r"|use_cache|cache_.*|.*compile.*|low_memory|prefill_.*|.*assistant.*"
    r"|prompt_lookup.*|max_matching_ngram_size|output_.*|return_.*"
    r"|renormalize_logits|remove_invalid_values"
    r"|early_stopping|length_penalty|diversity_penalty|num_beam_groups"
)
OFF = (None, False, 0, "", [], {})
OFF_AT_ONE = re.compile(r"num_beams|typical_p|encoder_.*penalty|guidance_scale|top_h")


class Generation(NamedTuple):
    """How texts are written where nobody says otherwise.

    Attributes:
      settings: all of `sampling.SETTINGS`.
      published: whether the model's makers say so; else it is the project's habit.
      told: in a sentence what they say besides and nothing here does; "" for nothing.
    """

    settings: Mapping[str, float]
    published: bool = False
    told: str = ""


OWN = Generation(sampling.DEFAULTS)


def of(folder: str | Path) -> Generation:
    """Returns what the generation_config.json of a folder says.

    `do_sample` false is a temperature of 0. What the file leaves out is off, also the
    top_k of 50 that transformers then has. A file that says nothing of how tokens are
    chosen, or none, leaves it to `OWN`.

    Raises:
      ValueError: the file is not JSON, or has a setting outside its range.
    """
    path = Path(folder) / FILE
    if not path.is_file():
        return OWN
    found = files.read_json(path)
    drawn = found.pop("do_sample", None)
    if drawn not in (None, True, False):
        raise ValueError(f"{path}: do_sample is {drawn!r} but must be true or false")
    chosen: dict[str, float] = {}
    for name, setting in sampling.SETTINGS.items():
        if (value := found.pop(name, None)) is not None:
            kinds = (int,) if setting.kind is int else (int, float)
            if type(value) not in kinds or not setting.holds(value):
                raise ValueError(
                    f"{path}: {name} is {value!r} but must be {setting.wanted}"
                )
            chosen[name] = setting.kind(value)
    told = _told({key: x for key, x in found.items() if not _changes_nothing(key, x)})
    if drawn is None and not chosen:
        return OWN._replace(told=told)
    if drawn is False:
        chosen["temperature"] = 0.0
    return Generation({**sampling.OFF, **chosen}, published=True, told=told)


def _changes_nothing(key: str, value: Any) -> bool:
    one = OFF_AT_ONE.fullmatch(key) and value == 1
    return bool(HARMLESS.fullmatch(key) or value in OFF or one)


def _told(strange: Mapping[str, Any]) -> str:
    if not strange:
        return ""
    named = ", ".join(
        f"{key} {json.dumps(value)[:40]}" for key, value in strange.items()
    )
    return f"{FILE} says {named}, which nothing here does: texts are written without"
