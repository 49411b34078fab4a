import contextlib
import dataclasses
import json
import os
import shutil
import struct
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from configs import common
from gpt_jax import chat, model, pretrained, sample, sampling, tokenizers
from gpt_jax.model import GPT, GPTConfig, RopeScaling, architecture
from gpt_jax.pretrained import (
    config_json,
    families,
    files,
    gguf,
    layouts,
    options,
    texts,
    weights,
)
from gpt_jax.special import Special
from tests.cases import few
from tests.tiny import weight as declared_so

GOLDEN = Path(__file__).parent / "golden"
FOLDERS = [path.parent for path in GOLDEN.glob("*/answers.npz")]
MODELS = sorted(path.name for path in FOLDERS if not path.name.startswith("run-"))
NEW = 32
PRINTABLE = "".join(map(chr, range(32, 127))) + "\n"

models = pytest.mark.parametrize("name", MODELS)
# The others' logits are compared all the same.
greedy = pytest.mark.parametrize("name", few(MODELS, "gpt2", "llama"))


def config_of(folder: Path) -> GPTConfig:
    return GPTConfig(**{**common.base().model.to_dict(), **pretrained.fields(folder)})


@cache
def opened(name: str) -> tuple[GPT, dict, dict]:
    """Returns a golden model, its weights, and what transformers computed with it."""
    folder = GOLDEN / name
    cfg = config_of(folder)
    answers = dict(np.load(folder / "answers.npz"))
    return GPT(cfg), pretrained.load(folder, cfg), answers


@partial(jax.jit, static_argnums=0)
def apply(gpt: GPT, params, ids):
    return gpt.apply({"params": params}, ids)[0]


def logits(gpt: GPT, params, ids) -> np.ndarray:
    return np.asarray(apply(gpt, params, ids))


def same(a, b) -> bool:
    """Whether two trees are equal, bit for bit."""
    if jax.tree.structure(a) != jax.tree.structure(b):
        return False
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(
        x.dtype == y.dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in pairs
    )


def prompts(answers) -> tuple[np.ndarray, np.ndarray]:
    """Returns the golden prompts as one right-padded batch, and their lengths."""
    rows = [answers[f"prompt_{n}"] for n in range(3)]
    length_B = np.array([len(row) for row in rows], np.int32)
    tokens_BT = np.zeros((len(rows), length_B.max()), np.int32)
    for tokens_T, row in zip(tokens_BT, rows, strict=True):
        tokens_T[: len(row)] = row
    return tokens_BT, length_B


# --- the same numbers as transformers ------------------------------------------------


def test_every_family_has_a_golden_model():
    found = {
        json.loads((GOLDEN / name / "config.json").read_text())["model_type"]
        for name in MODELS
    }
    assert found == set(families.TABLE)


@models
def test_logits_over_a_full_context_are_those_of_transformers(name):
    gpt, params, answers = opened(name)
    assert answers["ids"].shape[1] == gpt.cfg.context_length
    found = logits(gpt, params, answers["ids"])
    assert np.abs(found - answers["logits"]).max() <= 1e-4


@greedy
def test_greedy_text_of_a_ragged_batch_is_that_of_transformers(name):
    gpt, params, answers = opened(name)
    tokens_BT, length_B = prompts(answers)
    generate = jax.jit(sample.generate, static_argnames=("model", "max_length"))
    settings = [sampling.settings(NEW, temperature=0.0)] * 3
    key_B = sample.row_keys(0, length_B, length_B)
    fixed = {"model": gpt, "max_length": 64, "stop_id": None}
    batched = generate(
        params, tokens_BT, length_B, sample.rows_of(settings), key_B, **fixed
    )[0]
    for n, length in enumerate(length_B):
        wanted = answers[f"greedy_{n}"]
        assert batched[n, length : length + NEW].tolist() == wanted.tolist()
    one = slice(0, 1)
    alone = generate(
        params,
        tokens_BT[one, : length_B[0]],
        length_B[one],
        sample.rows_of(settings[one]),
        key_B[one],
        **fixed,
    )[0]
    assert alone[0].tolist() == batched[0].tolist()


@greedy
def test_greedy_text_without_a_cache_is_that_of_transformers(name):
    gpt, params, answers = opened(name)
    tokens_BT, length_B = prompts(answers)
    text_BT = np.zeros((3, gpt.cfg.context_length), np.int32)
    text_BT[:, : tokens_BT.shape[1]] = tokens_BT
    rows = np.arange(3)
    for _ in range(NEW):
        text_BT[rows, length_B] = logits(gpt, params, text_BT)[
            rows, length_B - 1
        ].argmax(-1)
        length_B += 1
    for n, length in enumerate(length_B):
        assert (
            text_BT[n, length - NEW : length].tolist()
            == answers[f"greedy_{n}"].tolist()
        )


# --- config.json ----------------------------------------------------------------------


def read(name: str) -> dict:
    return json.loads((GOLDEN / name / "config.json").read_text())


def test_a_family_decides_every_field_that_is_not_technical():
    names = {field.name for field in dataclasses.fields(GPTConfig)}
    for name in MODELS:
        found = set(config_json.fields(read(name)))
        assert found == names - set(config_json.TECHNICAL), name


def test_every_activation_of_ours_has_a_name_elsewhere():
    assert options.ACTIVATIONS.keys() == architecture.ACTIVATIONS.keys()


@pytest.mark.parametrize(
    "name, ours",
    [
        *[("gelu_new", "gelu_tanh"), ("gelu_pytorch_tanh", "gelu_tanh")],
        *[("gelu_fast", "gelu_tanh"), ("gelu", "gelu"), ("relu", "relu")],
        *[("silu", "silu"), ("swish", "silu"), ("relu2", "relu2")],
    ],
)
def test_activations_go_by_their_names(name, ours):
    gpt2 = {**read("gpt2"), "activation_function": name}
    llama = {**read("llama"), "hidden_act": name}
    gemma = {**read("gemma3"), "hidden_activation": name}
    for config in (gpt2, llama, gemma):
        assert config_json.fields(config)["activation"] == ours


OLD = {  # how transformers 4 wrote the rotary positions of the golden models
    "llama": {
        "rope_theta": 1000.0,
        "rope_scaling": {
            **{"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 32},
        },
    },
    "llama_biases": {
        "rope_theta": 500.0,
        "rope_scaling": {"type": "linear", "factor": 2.0},
    },
    "mistral": {"rope_theta": 10000.0},
    "gemma3": {
        **{"rope_theta": 5000.0, "rope_local_base_freq": 300.0},
        "rope_scaling": {"rope_type": "linear", "factor": 8.0},
    },
}


@pytest.mark.parametrize("name", OLD)
def test_old_and_new_spellings_of_rotary_positions_mean_the_same(name):
    new = read(name)
    old = {key: value for key, value in new.items() if key != "rope_parameters"}
    assert config_json.fields({**old, **OLD[name]}) == config_json.fields(new)
    assert config_json.fields(old) != config_json.fields(new) or name == "mistral"


def test_windows_follow_layer_types_or_the_pattern_of_old():
    config = read("gemma3")
    windows = [kind["window"] for kind in config_json.fields(config)["pattern"]]
    assert windows == [8, 8, 0]
    types = config.pop("layer_types")
    assert types[:3] == ["sliding_attention"] * 2 + ["full_attention"]
    config["sliding_window_pattern"] = 3
    assert config_json.fields(config) == config_json.fields(read("gemma3"))
    config["sliding_window_pattern"] = 2
    windows = [kind["window"] for kind in config_json.fields(config)["pattern"]]
    assert windows == [8, 0]


def test_a_config_without_optional_keys_has_their_published_defaults():
    config = {
        **{"model_type": "llama", "vocab_size": 9, "max_position_embeddings": 8},
        **{"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        "intermediate_size": 16,
    }
    found = config_json.fields(config)
    assert found["n_kv_heads"] == 2 and found["head_dim"] == 4
    assert found["norm_eps"] == 1e-6 and not found["tie_embeddings"]
    assert found["activation"] == "silu"
    mistral = config_json.fields({**config, "model_type": "mistral"})
    assert mistral["pattern"][0]["window"] == 4096
    assert config_json.fields({**config, "model_type": "qwen3"})["head_dim"] == 128
    gemma = config_json.fields({**config, "model_type": "gemma3_text"})
    assert gemma["head_dim"] == 256 and gemma["query_scale"] == 256**-0.5
    assert gemma["tie_embeddings"] and gemma["activation"] == "gelu_tanh"
    cohere = config_json.fields({**config, "model_type": "cohere"})
    assert cohere["logit_divisor"] == 16 and cohere["tie_embeddings"]
    assert cohere["pattern"][0]["rope_base"] == 500_000
    olmo3 = config_json.fields({**config, "model_type": "olmo3"})
    assert olmo3["pattern"][0]["window"] == 4096
    for name, turned in (("phi", 2), ("stablelm", 1), ("gpt_neox", 1), ("phi3", 4)):
        assert (
            config_json.fields({**config, "model_type": name})["rotary_dim"] == turned
        )


@pytest.mark.parametrize(
    "change, named",
    [
        ({"model_type": "mamba"}, "mamba"),
        ({"model_type": "gemma3"}, "gemma3"),
        ({"hidden_act": "xielu"}, "xielu"),
        ({"rope_parameters": {"rope_type": "proportional"}}, "proportional"),
        (
            {"rope_parameters": {"rope_type": "yarn", "factor": 2, "truncate": False}},
            "truncate",
        ),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_scaling": {"type": "linear", "factor": 2.0}}, "different things"),
        ({"is_causal": False}, "is_causal"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers"),
        ({"rms_norm_eps": "small"}, "rms_norm_eps"),
        ({"num_key_value_heads": 0}, "num_key_value_heads"),
        ({"model_type": ["llama"]}, "llama"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"rope_interleaved": True}, "rope_interleaved"),
        ({"final_logit_softcapping": 30.0}, "final_logit_softcapping"),
        ({"hidden_size": None}, "hidden_size"),
        ({"hidden_size": "8"}, "hidden_size"),
        ({"num_attention_heads": 3}, "n_heads 3"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(change, named):
    config = {**read("llama"), "head_dim": None, **change}
    with pytest.raises(ValueError, match=named):
        cfg = {**common.base().model.to_dict(), **config_json.fields(config)}
        GPTConfig(**cfg)


@pytest.mark.parametrize(
    "name, change, named",
    [
        ("opt", {"do_layer_norm_before": False}, "do_layer_norm_before"),
        ("opt", {"word_embed_proj_dim": 16}, "word_embed_proj_dim 16"),
        ("opt", {"_remove_final_layer_norm": True}, "_remove_final_layer_norm"),
        ("opt", {"activation_function": "gelu"}, "'gelu' beside biases"),
        ("falcon", {"alibi": True}, "alibi"),
        ("falcon", {"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn 2"),
        ("falcon", {"multi_query": False, "num_kv_heads": 2}, "num_kv_heads 2"),
        ("falcon_new", {"parallel_attn": False}, "parallel_attn False"),
        ("cohere", {"use_qk_norm": True}, "use_qk_norm"),
        ("cohere2", {"sliding_window": None}, "no sliding_window"),
        ("exaone4", {"sliding_window": None}, "no sliding_window"),
        (
            "exaone4",
            {"layer_types": None, "sliding_window_pattern": "LG"},
            "'LG' needs",
        ),
        ("olmo3", {"rope_parameters": {"rope_theta": 5.0}}, "each type of layer"),
        ("phi3_long", {"original_max_position_embeddings": 1}, "original_context 1"),
    ],
)
def test_what_a_family_may_be_elsewhere_alone_is_refused_by_name(name, change, named):
    with pytest.raises(ValueError, match=named):
        config_json.fields({**read(name), **change})


def test_layer_types_decide_where_letters_stand_beside_them():
    config = read("exaone4")  # as EXAONE 4 is published
    letters = {**config, "sliding_window_pattern": "LG"}
    assert config_json.fields(letters) == config_json.fields(config)


@pytest.mark.parametrize("name", ["exaone4", "cohere2"])
def test_layers_without_a_window_know_no_positions_beside_those_that_have_one(name):
    kinds = config_json.fields(read(name))["pattern"]
    assert {kind["window"] for kind in kinds} == {0, 8}
    assert all((kind["rope_base"] > 0) == (kind["window"] > 0) for kind in kinds)
    plain = {**read(name), "sliding_window": 8, "layer_types": ["full_attention"] * 3}
    plain["num_hidden_layers"] = 3
    assert config_json.fields(plain)["pattern"][0]["rope_base"] == 0


def test_a_gpt2_with_relu_or_without_biases_is_an_opt():
    off = dict.fromkeys(("qkv_bias", "attn_bias", "mlp_bias"), False)
    for wanted, change in {
        "gpt2": [{}, {"qkv_bias": False}, {"activation": "relu", "norm_eps": 1e-6}],
        "opt": [{"activation": "relu"}, off, {**off, "activation": "relu"}],
    }.items():
        for one in change:
            assert config_json.config_of(tiny(**one))["model_type"] == wanted, one


def test_dynamic_scaling_is_read_as_none_within_the_context():
    config = {**read("llama"), "rope_parameters": None}
    dynamic = {**config, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
    assert config_json.fields(dynamic) == config_json.fields(config)


def test_longrope_needs_a_context_within_which_all_texts_are_turned_alike():
    config = {**read("phi3_long"), "max_position_embeddings": 256}
    fields = {**common.base().model.to_dict(), **config_json.fields(config)}
    with pytest.raises(ValueError, match="--context=64"):
        GPTConfig(**fields)
    cfg = GPTConfig(**{**fields, "context_length": 64})
    assert cfg == config_of(GOLDEN / "phi3_long")


def test_gpt2_with_another_scale_of_scores_is_refused():
    for key, value in (
        ("scale_attn_weights", False),
        ("scale_attn_by_inverse_layer_idx", True),
        ("add_cross_attention", True),
        ("activation_function", "quick_gelu"),
    ):
        with pytest.raises(ValueError, match=f"{key}|quick_gelu"):
            config_json.fields({**read("gpt2"), key: value})


ODD = (None, False, True, 0, -1, 3, 0.5, 10**12, "", "8", [], [1], {}, {"a": 1})
NESTED = ({"rope_type": 5}, {"rope_type": "linear", "factor": "x"}, float("nan"))


@models
def test_no_value_of_any_key_is_more_than_refused(name):
    config, base = read(name), common.base().model.to_dict()
    more = ("rope_scaling", "rope_theta", "sliding_window", "head_dim", "layer_types")
    more += ("n_inner", "sliding_window_pattern", "is_causal", "partial_rotary_factor")
    for key in {*config, *more}:
        for value in (*ODD, *NESTED):
            with contextlib.suppress(ValueError):
                fields = config_json.fields({**config, key: value})
                GPTConfig(**{**base, **fields})


PUBLISHED = {  # keys of published configs beside those of the golden models
    "gpt2": {  # GPT-2 medium's, and large's
        **{"n_ctx": 64, "num_labels": 1, "predict_special_tokens": True},
        **{"summary_type": "cls_index", "n_special": 0, "summary_use_proj": True},
    },
    "llama": {  # LLaMA 1's, vicuna's and InternLM's
        **{"max_sequence_length": 64, "pad_token_id": -1, "_flash_attn_2_enabled": 1},
        **{"model_max_length": 64, "use_flash_attn": True, "neftune_noise_alpha": 5},
        **{"tensor_parallel_size": 4, "partial_rotary_factor": 1.0, "is_causal": True},
        **{"layer_types": ["full_attention"] * 2, "pretraining_tp": 2},
    },
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_keys_of_published_configs_that_change_nothing_do_not_block(name):
    found = config_json.fields({**read(name), **PUBLISHED[name]})
    assert found == config_json.fields(read(name))


def test_a_private_copy_of_gemmas_pattern_is_not_read_as_transformers_does_not():
    config = read("gemma3")
    del config["layer_types"], config["sliding_window_pattern"]
    config["_sliding_window_pattern"] = 2
    windows = [kind["window"] for kind in config_json.fields(config)["pattern"]]
    assert windows == [8]  # the fifth and fourth of six layers are beyond the last


def test_keys_that_do_not_change_the_numbers_are_passed_over():
    published = {
        **{"attn_pdrop": 0.1, "n_ctx": 64, "summary_type": "cls_index"},
        **{"task_specific_params": {"text-generation": {"do_sample": True}}},
        **{
            "_name_or_path": "gpt2",
            "torch_dtype": "float32",
            "initializer_range": 0.02,
        },
    }
    assert config_json.fields({**read("gpt2"), **published}) == config_json.fields(
        read("gpt2")
    )


# --- there and back -------------------------------------------------------------------


def export(name: str, folder: Path, **options) -> Path:
    gpt, params, _ = opened(name)
    folder.mkdir()
    options = {"tokens": {}, "shard_bytes": 10**9, **options}
    weights.save(folder, params, gpt.cfg, **options)
    return folder


@models
def test_there_and_back_is_equal_bit_for_bit(name, tmp_path):
    _, params, _ = opened(name)
    folder = export(name, tmp_path / "out")
    assert (
        read(name)["model_type"]
        == files.read_json(folder / "config.json")["model_type"]
    )
    assert same(pretrained.load(folder, config_of(folder)), params)


@models
def test_an_export_has_the_tensors_that_transformers_saved(name, tmp_path):
    found = load_file(export(name, tmp_path / "out") / "model.safetensors")
    wanted = {}
    for path in (GOLDEN / name).glob("*.safetensors"):
        with safe_open(path, framework="flax") as file:
            wanted |= {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_an_export_in_shards_reads_back_the_same(tmp_path):
    _, params, _ = opened("llama")
    folder = export("llama", tmp_path / "out", shard_bytes=40_000)
    shards = sorted(folder.glob("model-*-of-00003.safetensors"))
    assert len(shards) == 3
    assert all(path.stat().st_size < 45_000 for path in shards)
    assert same(pretrained.load(folder, config_of(folder)), params)


def tiny(**changes) -> GPTConfig:
    config = common.base()
    config.model.update(vocab_size=61, context_length=16, n_layers=2, d_model=32)
    config.model.update(n_heads=4)
    return GPTConfig(**{**config.model.to_dict(), **changes})


def test_the_modern_recipe_is_an_architecture_of_transformers():
    config = common.modern(common.base())
    config.model.vocab_size = 50
    cfg = GPTConfig(**config.model.to_dict())
    assert config_json.config_of(cfg)["model_type"] == "nanochat"


def test_a_gpt2_without_some_biases_is_written_with_zeros(tmp_path):
    cfg = tiny(qkv_bias=False, tie_embeddings=False)  # the book's
    params = model.init(cfg, jax.random.key(0))
    weights.save(tmp_path, params, cfg, tokens={}, shard_bytes=10**9)
    bias = load_file(tmp_path / "model.safetensors")["transformer.h.0.attn.c_attn.bias"]
    assert bias.shape == (96,) and not bias.any()
    read_back = config_of(tmp_path)
    ids = np.arange(16)[None]
    ours = logits(GPT(cfg), params, ids)
    theirs = logits(GPT(read_back), pretrained.load(tmp_path, read_back), ids)
    np.testing.assert_array_equal(ours, theirs)


def test_padding_of_the_vocabulary_stays_here(tmp_path):
    cfg = tiny(vocab_multiple=64, tie_embeddings=False)
    params = model.init(cfg, jax.random.key(0))
    weights.save(tmp_path, params, cfg, tokens={}, shard_bytes=10**9)
    found = load_file(tmp_path / "model.safetensors")
    assert found["transformer.wte.weight"].shape == (61, 32)
    assert found["lm_head.weight"].shape == (61, 32)
    assert same(pretrained.load(tmp_path, cfg), params)


@pytest.mark.parametrize(
    "change, named",
    [
        ({"embed_scale": 2.0}, "embed_scale"),
        ({"tie_embeddings": False, "head_bias": True}, "head_bias"),
        ({"position": "none"}, "position"),
        ({"attn_softcap": 5.0}, "attn_softcap"),
        ({"query_scale": 0.3}, "query_scale"),
        (
            {"pattern": [{"window": 4, "rope_base": 1.0, "rope_scaling": None}]},
            "pattern",
        ),
    ],
)
def test_a_model_that_transformers_lacks_is_refused_with_the_reason(change, named):
    with pytest.raises(ValueError, match=f"gpt2, would need {named}"):
        config_json.config_of(tiny(**change))


def test_weights_with_an_adapter_beside_them_are_refused(tmp_path):
    gpt, params, _ = opened("llama")
    block = params["block_0"]
    query = {**block["attn"]["query"], "lora_a": np.ones((32, 2), np.float32)}
    attn = {**block["attn"], "query": query}
    params = {**params, "block_0": {**block, "attn": attn}}
    with pytest.raises(ValueError, match=r"attn/query/lora_a.*must be merged"):
        weights.save(tmp_path, params, gpt.cfg, tokens={}, shard_bytes=10**9)


def test_weights_of_another_architecture_are_refused():
    cfg = config_of(GOLDEN / "llama")
    with pytest.raises(ValueError, match="n_layers 2 instead of 3"):
        pretrained.load(GOLDEN / "llama", dataclasses.replace(cfg, n_layers=3))


LAYOUTS = {
    **{"table": layouts.EMBEDDING, "linear": layouts.LINEAR, "conv": layouts.CONV},
    **{"swapped": layouts.SWAPPED, "pairs": layouts.interleaved(layouts.LINEAR)},
    "some pairs": layouts.interleaved(layouts.LINEAR, 2),
    "behind two": layouts.behind(2, layouts.LINEAR),
}


@given(
    st.sampled_from([*LAYOUTS]),
    st.tuples(*[st.integers(1, 4)] * 3),
    st.sampled_from([1, 2]),
)
def test_every_layout_is_undone_by_its_inverse(name, sides, inputs):
    layout = LAYOUTS[name]
    shape = (*sides[:2], 2 * sides[2])
    weight = declared_so(shape, ("embed", "heads", "head"), inputs=inputs)
    ours = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    theirs = layout.write(ours, weight)
    assert theirs.shape == layout.shape(weight)
    np.testing.assert_array_equal(layout.read(theirs, weight), ours)


# --- damaged files --------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path) -> Path:
    return Path(shutil.copytree(GOLDEN / "llama", tmp_path / "llama"))


def refused(folder: Path, *names: str) -> None:
    """Checks that a folder is refused, with every name in the sentence."""
    with pytest.raises(ValueError) as caught:
        pretrained.load(folder, config_of(folder))
    assert all(name in str(caught.value) for name in names), caught.value


def rewrite(path: Path, change) -> None:
    """Rewrites a file's header, not its data."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    change(table)
    text = json.dumps(table).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


Q = "model.layers.0.self_attn.q_proj.weight"


def test_weights_that_are_not_finite_are_refused_by_name(folder):
    path = folder / "model.safetensors"
    weights = load_file(path)
    weights[Q][0, 0] = np.nan
    save_file(weights, path)
    refused(folder, str(folder), "block_0/attn/query/kernel hold NaN or Inf")


@pytest.mark.fault(30)
def test_a_truncated_file_is_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        refused(folder, str(path))
    path.write_bytes(whole + b"x")
    refused(folder, str(path), "1 bytes behind")


def test_a_tensor_of_another_shape_is_refused(folder):
    path = folder / "model.safetensors"
    rewrite(path, lambda table: table[Q].update(shape=[16, 64]))
    refused(folder, Q, "(16, 64)", "(32, 32)")
    rewrite(path, lambda table: table[Q].update(shape=[16, 16]))
    refused(folder, Q, str(path))


def test_a_missing_or_unknown_tensor_is_refused(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    moved = tensors.pop(Q)
    save_file(tensors, path)
    refused(folder, Q)
    save_file({**tensors, Q: moved, "model.layers.0.extra.weight": moved}, path)
    refused(folder, "model.layers.0.extra.weight")


@pytest.mark.fault(30)
def test_overlaps_gaps_and_twins_in_a_header_are_refused(folder):
    path = folder / "model.safetensors"
    whole = path.read_bytes()

    def shift(by):
        def change(table):
            start, end = table[Q]["data_offsets"]
            table[Q]["data_offsets"] = [start + by, end + by]

        return change

    for by in (-4, 4):
        path.write_bytes(whole)
        rewrite(path, shift(by))
        refused(folder, str(path), "tensor model.layers")
    path.write_bytes(whole.replace(b'"model.norm.weight"', f'"{Q}"'.encode(), 1))
    refused(folder, str(path))


@pytest.mark.fault(30)
def test_a_header_that_is_no_header_is_refused(folder):
    path = folder / "model.safetensors"
    for text in (b"[]", b"{", b'{"a": 1}', b'{"a": {"dtype": "F32", "shape": [-1]}}'):
        path.write_bytes(struct.pack("<Q", len(text)) + text)
        refused(folder, str(path))
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    refused(folder, str(path))
    path.write_bytes(struct.pack("<Q", 2) + b'{"')
    refused(folder, str(path))


class Trap:
    def __reduce__(self):
        return (Path.touch, (Path("trapped"),))


@pytest.mark.fault(30)
def test_a_pickle_by_that_name_is_refused_and_not_run(folder, monkeypatch):
    import pickle

    monkeypatch.chdir(folder)
    path = folder / "model.safetensors"
    path.write_bytes(pickle.dumps(Trap()))
    refused(folder, str(path), "not a safetensors file")
    path.rename(folder / "pytorch_model.bin")
    refused(folder, "pytorch_model.bin", "can run code")
    assert not (folder / "trapped").exists()


@pytest.mark.fault(30)
def test_shards_must_be_there_and_stay_in_the_folder(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "gemma3", tmp_path / "gemma3"))
    index = folder / files.INDEX
    text = index.read_text()
    index.write_text(text.replace("model-00001-of", "../model-00001-of"))
    refused(folder, "../model-00001-of")
    index.write_text(text.replace("00002-of-00002", "00001-of-00002", 1))
    refused(folder, files.INDEX)
    index.write_text(text)
    (folder / "model-00002-of-00002.safetensors").unlink()
    refused(folder, "model-00002-of-00002.safetensors")


def test_integers_are_no_weights(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, Q: tensors[Q].astype(np.int32)}, path)
    refused(folder, Q, "I32")


def test_old_buffers_and_a_copy_of_a_tied_head_are_passed_over(folder):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    table = tensors["model.embed_tokens.weight"]
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    save_file({**tensors, "lm_head.weight": table}, path)
    _, params, _ = opened("llama")
    assert same(pretrained.load(folder, config_of(folder)), params)
    save_file({**tensors, "lm_head.weight": table + 1}, path)
    refused(folder, "lm_head.weight", "tie_word_embeddings")


def test_names_without_the_prefix_are_read_too(tmp_path):
    folder = Path(shutil.copytree(GOLDEN / "gpt2", tmp_path / "gpt2"))
    path = folder / "model.safetensors"  # as OpenAI's weights are published
    bare = {k.removeprefix("transformer."): v for k, v in load_file(path).items()}
    mask = np.tril(np.ones((1, 1, 64, 64), np.float32))
    save_file({**bare, "h.0.attn.bias": mask}, path)
    _, params, _ = opened("gpt2")
    assert same(pretrained.load(folder, config_of(folder)), params)


@pytest.mark.parametrize("kind", [np.float16, np.float32])
def test_numbers_of_16_bits_become_float32_exactly(folder, kind):
    path = folder / "model.safetensors"
    tensors = {k: v.astype(kind) for k, v in load_file(path).items()}
    save_file(tensors, path)
    params = pretrained.load(folder, config_of(folder))
    found = params["embed"]["embedding"]
    assert found.dtype == jnp.float32
    wanted = tensors["model.embed_tokens.weight"].astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


def test_weights_may_stay_in_bfloat16(tmp_path):
    cfg = dataclasses.replace(config_of(GOLDEN / "gemma3"), param_dtype="bfloat16")
    params = pretrained.load(GOLDEN / "gemma3", cfg)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    weights.save(tmp_path, params, cfg, tokens={}, shard_bytes=10**9)
    assert files.header(tmp_path / "model.safetensors")[Q].kind == "BF16"
    assert same(pretrained.load(tmp_path, cfg), params)


def test_every_weight_is_placed_once_the_largest_first():
    placed = []

    def place(path, array):
        placed.append((path, array.size))
        return jnp.array(array)

    gpt, params, _ = opened("llama")
    assert same(pretrained.load(GOLDEN / "llama", gpt.cfg, place=place), params)
    sizes = [size for _, size in placed]
    assert sizes == sorted(sizes, reverse=True)
    assert len({path for path, _ in placed}) == len(placed)


# --- tokenizers -----------------------------------------------------------------------


def printable() -> tokenizers.Tokenizer:
    return tokenizers.train("char", [PRINTABLE])


def test_gpt2s_tokenizer_may_be_two_files(tmp_path):
    byte = tokenizers.train("bpe:300", ["abc abc abd " * 50])
    table = json.loads(byte.json)["model"]
    (tmp_path / "vocab.json").write_text(json.dumps(table["vocab"]))
    merges = "\n".join(" ".join(pair) for pair in table["merges"])
    (tmp_path / "merges.txt").write_text(f"#version: 0.2\n{merges}\n")
    found = texts.load(tmp_path, 300)
    assert found.encode("abc abd") == byte.encode("abc abd")
    assert found.eos_id == byte.eos_id


def test_special_tokens_that_the_model_has_no_row_for_are_left_out(tmp_path):
    base = printable().add_special(["<eos>", "<image>"])
    base.save(tmp_path / "tokenizer.json")
    found = texts.load(tmp_path, base.vocab_size)
    assert found.specials.keys() == {"<eos>", "<image>"}
    bpe = tokenizers.train("bpe:260", ["abc " * 50]).add_special(["<image>"])
    bpe.save(tmp_path / "tokenizer.json")
    found = texts.load(tmp_path, bpe.vocab_size - 1)
    assert found.specials.keys() == {tokenizers.EOS}
    assert found.encode("abc") == bpe.encode("abc")
    with pytest.raises(ValueError, match="do not belong together"):
        texts.load(tmp_path, 100)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"neither tokenizer\.json nor"):
        texts.load(tmp_path, 100)


# --- folders and runs -----------------------------------------------------------------


def test_a_name_that_is_neither_folder_nor_id_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no Hugging Face id"):
        pretrained.find(str(tmp_path / "absent"))
    with pytest.raises(ValueError, match=r"no config\.json"):
        pretrained.find(str(tmp_path))


@pytest.mark.parametrize(
    "file, told",
    [
        ("adapter_config.json", "an adapter"),
        ("consolidated.00.pth", "Meta or Mistral"),
        ("consolidated.safetensors", "Meta or Mistral"),
        ("model.gguf", "--from_gguf=FILE"),
        ("pytorch_model.bin", "can run code"),
        ("model.safetensors", "weights alone"),
    ],
)
def test_what_is_in_another_form_is_said_in_one_sentence(file, told, tmp_path):
    (tmp_path / file).write_text("")
    with pytest.raises(ValueError, match=told):
        pretrained.find(str(tmp_path))
    if not file.endswith(".gguf"):
        with pytest.raises(ValueError, match=told):
            pretrained.find(str(tmp_path / file))


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod."])
def test_names_from_inside_a_wrapper_are_explained(wrapper, folder):
    path = folder / "model.safetensors"
    save_file({wrapper + name: value for name, value in load_file(path).items()}, path)
    refused(folder, wrapper, "wrapper")


@greedy
def test_weights_in_bfloat16_compute_what_the_same_numbers_in_float32_do(name):
    cfg = dataclasses.replace(config_of(GOLDEN / name), param_dtype="bfloat16")
    narrow = pretrained.load(GOLDEN / name, cfg)
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), narrow)
    ids = np.arange(16)[None]
    gpt = GPT(cfg)
    found, wanted = logits(gpt, narrow, ids), logits(gpt, wide, ids)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_a_model_with_rope_may_see_less_than_it_could():
    cfg = dataclasses.replace(config_of(GOLDEN / "llama"), context_length=16)
    ids = np.arange(16)[None]
    full, params, _ = opened("llama")
    short = logits(GPT(cfg), pretrained.load(GOLDEN / "llama", cfg), ids)
    np.testing.assert_array_equal(short, logits(full, params, ids))
    cfg = dataclasses.replace(config_of(GOLDEN / "gpt2"), context_length=16)
    with pytest.raises(ValueError, match="context_length 64 instead of 16"):
        pretrained.load(GOLDEN / "gpt2", cfg)


def test_what_yarn_multiplies_is_taken_back_by_nanochats_norms():
    """It turns before it normalises, and we after: nothing may be multiplied."""
    config = dict(read("nanochat"))
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32}
    config.pop("rope_scaling", None)
    config["rope_parameters"] = {**config["rope_parameters"], **yarn}
    (kind,) = config_json.fields(config)["pattern"]
    found = RopeScaling(**kind["rope_scaling"])
    assert (found.kind, found.factor, found.size) == ("yarn", 2.0, 1.0)


def test_an_export_ends_where_the_run_does_and_has_its_template(tmp_path):
    words = tokenizers.train("byte", []).add_special(["<a>", "<b>"])
    a, b = words.specials["<a>"], words.specials["<b>"]
    said = words.with_special(Special(b, a, None, (a,)))
    run, target = tmp_path / "run", tmp_path / "out"
    run.mkdir(), target.mkdir()
    (run / "config.json").write_text('{"task": {"template": "phi3"}}')
    (run / "generation_config.json").write_text('{"eos_token_id": 0, "top_k": 5}')
    texts.save(target, said, run=run, context=16)
    settings = json.loads((target / "generation_config.json").read_text())
    assert settings == {"eos_token_id": a, "top_k": 5}
    config = json.loads((target / "tokenizer_config.json").read_text())
    assert (config["eos_token"], config["bos_token"]) == ("<a>", "<b>")
    ids = {"bos_token_id": b, "eos_token_id": a, "pad_token_id": None}
    assert texts.ids_of(said, run) == ids  # absent is what a family's first model had
    talk = [chat.Message("user", "Hi <a>"), chat.Message("assistant", "Ho")]
    template = chat.template_of(target)
    assert template
    for reply in (True, False):
        wanted = chat.render(talk, said, "phi3", reply=reply)
        assert chat.render(talk, said, template, reply=reply) == wanted


def test_a_failed_export_leaves_nothing(tmp_path):
    with pytest.raises(ZeroDivisionError), pretrained.whole(tmp_path / "a") as draft:
        (draft / "file").write_text("half")
        raise ZeroDivisionError
    assert not list(tmp_path.iterdir())
    (tmp_path / "a").mkdir()
    with pytest.raises(FileExistsError), pretrained.whole(tmp_path / "a"):
        pass


# --- memory, and published weights ----------------------------------------------------

PEAK = """
import sys
from pathlib import Path
import jax, jax.numpy as jnp
from configs import common
from gpt_jax import pretrained
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.model import GPTConfig
from gpt_jax.pretrained import gguf_file

def peak():  # not ru_maxrss, which begins with that of the process that started this
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(x.split()[1]) for x in lines if x.startswith("VmHWM"))

folder = Path(sys.argv[1])
cfg = GPTConfig(**{**common.base().model.to_dict(), **pretrained.fields(folder)})
with Checkpoints(Path(sys.argv[2]) / "warm", keep=1) as store:
    store.save(0, {"params": {"x": jnp.zeros(3) + 1}}, metric=None, meta={})
gguf_file.package()
before = peak()
params = pretrained.load(folder, cfg, place=lambda path, array: array)
with Checkpoints(Path(sys.argv[2]) / "checkpoints", keep=1) as store:
    store.save(0, {"params": params}, metric=None, meta={})
size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
print((peak() - before) / size)
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux's /proc"
)
@pytest.mark.parametrize("form", ["one file", "shards", "Q8_0"])
def test_the_peak_memory_of_an_import_is_little_more_than_the_weights(form, tmp_path):
    """Read, and written as a run's; 1.1 of the weights and what the largest takes."""
    source = tmp_path / "source"
    source.mkdir()
    config = {"model_type": "llama", "vocab_size": 257, "hidden_size": 512}
    config |= {"num_hidden_layers": 16, "num_attention_heads": 8, "rms_norm_eps": 1e-5}
    config |= {"intermediate_size": 1376, "max_position_embeddings": 64}
    (source / "config.json").write_text(json.dumps(config))
    cfg = config_of(source)
    tree = jax.eval_shape(partial(model.init, cfg), jax.random.key(0))
    params = jax.tree.map(lambda x: np.ones(x.shape, np.float32), tree)
    if form == "Q8_0":
        source /= "model.gguf"
        words = tokenizers.train("byte", [])
        gguf.save(source, params, cfg, words, kind=form)
    else:
        shard = 10**9 if form == "one file" else 10**7
        weights.save(source, params, cfg, tokens={}, shard_bytes=shard)
    command = [sys.executable, "-c", PEAK, str(source), str(tmp_path / "run")]
    own = ("XLA_FLAGS", "NPROC")  # the tests' eight devices have memory of their own
    env = {key: value for key, value in os.environ.items() if key not in own}
    done = subprocess.run(
        command, cwd=GOLDEN.parents[1], env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    held = sum(x.nbytes for x in jax.tree.leaves(params))
    mapped = source.stat().st_size / held if source.is_file() else 0.0
    assert 0.9 < float(done.stdout) < 1.2 + mapped  # a file's pages count, once read


@pytest.mark.timeout(1200)  # 20 windows through 124 million weights
def test_gpt2_has_the_books_losses_on_the_verdict():
    """Raschka 2024, chapter 5: windows of 256 tokens, the last tenth for validation."""
    folder, texts_ = (
        os.environ.get(f"GPT_JAX_{name}") for name in ("GPT2", "TEST_DATA")
    )
    if not folder or not texts_:
        pytest.skip(
            "needs GPT-2's weights, which are not in this repository: set GPT_JAX_GPT2 "
            "to a Hugging Face folder of gpt2 and GPT_JAX_TEST_DATA to the texts"
        )
    cfg = config_of(Path(folder))
    params, words = (
        pretrained.load(Path(folder), cfg),
        pretrained.tokenizer(Path(folder)),
    )
    text = (Path(texts_) / "the-verdict.txt").read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    for part, wanted in ((text[:cut], 3.7547), (text[cut:], 3.5596)):
        ids = np.array(words.encode(part))
        starts = range(0, len(ids) - 256, 256)
        total = 0.0
        for start in starts:
            window = ids[start : start + 257]
            logp = jax.nn.log_softmax(logits(GPT(cfg), params, window[None, :-1])[0])
            total -= float(np.asarray(logp)[np.arange(256), window[1:]].mean())
        assert total / len(starts) == pytest.approx(wanted, abs=2e-4)
