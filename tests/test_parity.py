"""The same numbers as transformers, computed side by side: `make test-parity`.

The golden files hold what transformers computed once; these tests ask it again, with
other random weights, and let it load what is exported here.
"""

import json
import shutil
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest

from configs import common
from gpt_jax import model, pretrained, tokenizers
from gpt_jax.model import GPT, GPTConfig, architecture
from gpt_jax.pretrained import options
from tests.golden import make

torch = pytest.importorskip("torch", reason="needs torch: make test-parity")
transformers = pytest.importorskip(
    "transformers", reason="needs transformers: make test-parity"
)

torch.set_num_threads(1)  # tiny tensors: threads that wait for each other cost more

WORDS = tokenizers.train("bpe:300", ["the cat sat on the mat, and so on. " * 20])
models = pytest.mark.parametrize("name", make.MODELS)


def ours(folder: Path) -> tuple[GPT, dict]:
    cfg = GPTConfig(**{**common.base().model.to_dict(), **pretrained.fields(folder)})
    return GPT(cfg), pretrained.load(folder, cfg)


def logits(gpt: GPT, params, ids) -> np.ndarray:
    return np.asarray(jax.jit(lambda p, x: gpt.apply({"params": p}, x)[0])(params, ids))


def theirs(folder: Path):
    """Returns the model of a folder, which must hold all of its weights and no more."""
    found, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    assert not any(info.values()), info
    return found.eval()


def export(folder: Path, cfg: GPTConfig, params, tokenizer=WORDS) -> Path:
    options = {"run": folder.parent, "shard_bytes": 10**9}
    pretrained.save(folder, params, cfg, tokenizer, **options)
    return folder


@models
def test_logits_and_greedy_text_are_theirs(name, tmp_path):
    found = make.build(name, seed=7)
    found.save_pretrained(tmp_path)
    answers = make.answers(found, seed=8)
    gpt, params = ours(tmp_path)
    assert np.abs(logits(gpt, params, answers["ids"]) - answers["logits"]).max() <= 1e-4
    for number, length in enumerate(make.PROMPTS):
        text = [*answers[f"prompt_{number}"], *answers[f"greedy_{number}"]]
        best = logits(gpt, params, np.array([text]))[0].argmax(-1)
        assert best[length - 1 : -1].tolist() == answers[f"greedy_{number}"].tolist()


@models
def test_they_load_what_is_exported_with_the_same_numbers(name, tmp_path):
    found = make.build(name, seed=9)
    found.save_pretrained(tmp_path / "first")
    gpt, params = ours(tmp_path / "first")
    small = tokenizers.train("char", ["abc"])
    again = theirs(export(tmp_path / "second", gpt.cfg, params, small))
    ids = torch.randint(0, make.VOCAB, (1, make.CONTEXT))
    with torch.no_grad():
        assert torch.equal(found(ids).logits, again(ids).logits)


# What a key may be instead, by what it is; what is not legal there is passed over.
ROPES = (
    *({"rope_theta": 77.0}, {"rope_type": "linear", "factor": 2.0}),
    *({"partial_rotary_factor": 0.5}, {"rope_type": "dynamic", "factor": 2.0}),
    {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 32},
    {
        **{"rope_type": "yarn", "factor": 3.0, "original_max_position_embeddings": 20},
        **{"attention_factor": 0.8, "beta_slow": 0.5, "beta_fast": 7.0},
    },
    {**make.LLAMA3, "rope_theta": 50.0},
)
WORDS_OF = ("gelu", "relu", "silu", "gelu_new", "tanh")


def others(value) -> list:
    """Returns other values of a key."""
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value * 2, max(1, value // 2), value + 1]
    if isinstance(value, float):
        return [value * 2 + 0.1, value / 2]
    if isinstance(value, str):
        return [word for word in WORDS_OF if word != value]
    if isinstance(value, list):
        return [value[::-1], [value[0]] * len(value)] if value else []
    if isinstance(value, dict) and "rope_theta" in value:
        return [{**value, **rope} for rope in ROPES]
    if isinstance(value, dict):  # one for each type of layer
        return [
            {**value, key: other}
            for key, inner in value.items()
            if isinstance(inner, dict)
            for other in others(inner)
        ]
    return [True, 1, 8, 0.5]


# Keys of transformers that say nothing of a model, or of another use of it.
ELSEWHERE = (
    *("architectures", "dtype", "transformers_version", "id2label", "label2id"),
    *("model_type", "_name_or_path", "return_dict", "output_attentions"),
    *("output_hidden_states", "chunk_size_feed_forward", "problem_type"),
)


@partial(jax.jit, static_argnums=0)
def compiled(gpt: GPT, params, ids):
    return gpt.apply({"params": params}, ids)[0]


@pytest.mark.timeout(900)
@models
def test_every_key_of_a_config_is_honoured_or_refused(name, tmp_path):
    """No key of a family's config, set to another legal value, differs in silence."""
    ids = np.random.default_rng(0).integers(0, make.VOCAB // 2, (1, make.CONTEXT // 2))
    told = {"equal": 0, "refused": 0, "not legal there": 0}
    for key, value in make.build(name, seed=3).config.to_dict().items():
        if key in ELSEWHERE:
            continue
        for number, other in enumerate(others(value)):
            folder = tmp_path / f"{key}-{number}"
            try:
                found = make.build(name, seed=3, **{key: other})
                with torch.no_grad():
                    wanted = found(torch.tensor(ids)).logits.numpy()
                found.save_pretrained(folder)
            except Exception:  # whatever transformers says of it
                told["not legal there"] += 1
                continue
            try:
                gpt, params = ours(folder)
            except ValueError:
                told["refused"] += 1
                continue
            off = np.abs(np.asarray(compiled(gpt, params, ids)) - wanted)
            assert not off.max() > 1e-3, f"{key} = {other!r} instead of {value!r}"
            told["equal"] += 1
            shutil.rmtree(folder)
    assert told["equal"] > 20, told
    print(name, told)


RECIPES = {
    "gpt2": {},
    "book": {"qkv_bias": False, "tie_embeddings": False},
    "padded": {"vocab_multiple": 64},
    "llama": {
        **{"position": "rope", "norm": "rmsnorm", "gated": True, "activation": "silu"},
        **{"qkv_bias": False, "attn_bias": False, "mlp_bias": False, "n_kv_heads": 2},
    },
}


def recipe(name: str) -> GPTConfig:
    config = common.base()
    config = common.modern(config) if name == "modern" else config
    config.model.update(vocab_size=WORDS.vocab_size, context_length=64, n_layers=3)
    config.model.update(d_model=64, n_heads=4)
    return GPTConfig(**{**config.model.to_dict(), **RECIPES.get(name, {})})


@pytest.mark.parametrize("name", [*RECIPES, "modern"])
def test_a_model_made_here_computes_the_same_there(name, tmp_path):
    cfg = recipe(name)
    params = model.init(cfg, jax.random.key(0))
    keys = jax.random.split(jax.random.key(1), len(jax.tree.leaves(params)))
    noise = jax.tree.unflatten(jax.tree.structure(params), list(keys))
    params = jax.tree.map(  # past the zeros and ones of a start
        lambda x, key: x + 0.1 * jax.random.normal(key, x.shape), params, noise
    )
    found = theirs(export(tmp_path / "out", cfg, params))
    ids = np.random.default_rng(0).integers(0, cfg.vocab_size, (2, 64))
    with torch.no_grad():
        wanted = found(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(GPT(cfg), params, ids) - wanted).max() <= 1e-4


def test_the_tokenizer_gives_the_same_ids_there(tmp_path):
    cfg = recipe("gpt2")
    folder = export(tmp_path / "out", cfg, model.init(cfg, jax.random.key(0)))
    found = transformers.AutoTokenizer.from_pretrained(folder)
    text = "the cat, on été 日本"
    assert found(text)["input_ids"] == WORDS.encode(text)
    assert found.eos_token_id == WORDS.eos_id
    assert (
        transformers.GenerationConfig.from_pretrained(folder).eos_token_id
        == WORDS.eos_id
    )


def test_activations_are_theirs():
    x = np.linspace(-6, 6, 1001, dtype=np.float32)
    for mine, names in options.ACTIVATIONS.items():
        for name in names:
            wanted = transformers.activations.ACT2FN[name](torch.tensor(x)).numpy()
            found = architecture.ACTIVATIONS[mine](x)
            np.testing.assert_allclose(found, wanted, atol=2e-6, err_msg=name)


OLD = {"rope_theta": 700.0, "tie_word_embeddings": True}


@pytest.mark.parametrize(
    "scaling",
    [
        None,
        {"type": "linear", "factor": 3.0},
        {
            **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0},
            **{"high_freq_factor": 4.0, "original_max_position_embeddings": 16},
        },
        {"type": "dynamic", "factor": 3.0},
        {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
        {
            **{"rope_type": "yarn", "factor": 4.0, "mscale": 0.7, "beta_fast": 9.0},
            **{"mscale_all_dim": 0.4, "original_max_position_embeddings": 16},
        },
    ],
)
def test_the_old_spelling_of_rotary_positions_means_what_it_means_there(
    scaling, tmp_path
):
    sizes = {k: v for k, v in make.SIZES.items() if not k.endswith("_id")}
    config = transformers.LlamaConfig(**sizes, **OLD, rope_scaling=scaling)
    found = transformers.AutoModelForCausalLM.from_config(config).float().eval()
    for weight in found.parameters():
        weight.data = weight.data + 0.1 * torch.randn_like(weight)
    found.save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    new = json.loads(path.read_text())
    del new["rope_parameters"]
    path.write_text(json.dumps({**new, **OLD, "rope_scaling": scaling}))
    gpt, params = ours(tmp_path)
    ids = np.random.default_rng(0).integers(0, make.VOCAB, (1, make.CONTEXT))
    with torch.no_grad():
        wanted = found(torch.tensor(ids)).logits.numpy()
    assert np.abs(logits(gpt, params, ids) - wanted).max() <= 1e-4


def test_an_adapter_of_peft_computes_the_same_here_and_goes_back(tmp_path):
    peft = pytest.importorskip("peft", reason="needs peft: make test-real")
    from gpt_jax import adapters

    for name, targets in {
        "gpt2": ["c_attn", "mlp.c_proj"],
        "llama": ["q_proj", "v_proj", "down_proj"],
        "phi3": ["qkv_proj", "gate_up_proj"],
        "gpt_neox": ["query_key_value", "dense"],
    }.items():
        base = make.build(name, seed=5)
        folder, again = tmp_path / name, tmp_path / f"{name}-out"
        base.save_pretrained(folder)
        gpt, params = ours(folder)
        config = peft.LoraConfig(r=4, lora_alpha=7, target_modules=targets)
        tuned = peft.get_peft_model(base, config).eval()
        for path, weight in tuned.named_parameters():
            if "lora_" in path:
                weight.data = 0.2 * torch.randn_like(weight)
        tuned.save_pretrained(folder / "adapter")
        ids = np.random.default_rng(0).integers(0, make.VOCAB, (1, 32))
        with torch.no_grad():
            wanted = tuned(torch.tensor(ids)).logits.numpy()
        found = pretrained.peft.load(folder / "adapter", gpt.cfg)
        keys = {"rank": found.rank, "alpha": found.alpha, "targets": found.targets}
        how = adapters.lora(model.declared(gpt.cfg), **keys, base_dtype="")
        both = how.join(found.params, {"base": params})
        assert np.abs(logits(gpt, both, ids) - wanted).max() <= 1e-3, name
        again.mkdir()
        pretrained.peft.save(again, both, gpt.cfg, base="")
        fresh = transformers.AutoModelForCausalLM.from_pretrained(folder).eval()
        theirs_again = peft.PeftModel.from_pretrained(fresh, again).eval()
        with torch.no_grad():
            there = theirs_again(torch.tensor(ids)).logits.numpy()
            assert np.abs(there - wanted).max() < 1e-4
