"""Adapters of PEFT in and out, against the formula in NumPy: W + scale * B A."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from gpt_jax import adapters, model, runs, tokenizers
from gpt_jax.pretrained import files, peft, weights
from tests.test_pretrained import GOLDEN, logits, opened

ROOT = Path(__file__).parents[1]
# The linear layers of families, by the ends of their names; and who lays them out so.
LAYERS = {
    "gpt2": ("attn.c_attn", "attn.c_proj", "mlp.c_fc"),  # fused, [in, out]
    "llama": ("q_proj", "o_proj", "down_proj"),
    "nanochat": ("q_proj", "v_proj", "fc1"),  # the halves of heads exchanged
    "phi3": ("qkv_proj", "gate_up_proj"),  # fused, of unequal parts
    "gpt_neox": ("query_key_value", "dense"),  # fused head by head
    "falcon_new": ("query_key_value", "dense_h_to_4h"),  # and several queries to a key
}
families = pytest.mark.parametrize("name", LAYERS)
RANK, ALPHA = 2, 6.0


@cache
def stored(name: str) -> dict[str, np.ndarray]:
    return load_file(GOLDEN / name / "model.safetensors")


def sides(name: str, weight: np.ndarray) -> tuple[int, int]:
    """Returns (outputs, inputs)."""
    out, into = weight.shape[::-1] if name == "gpt2" else weight.shape
    return out, into


def write(folder: Path, name: str, *, ranks=None, **about) -> dict[str, np.ndarray]:
    """Writes an adapter with PEFT's names; returns its tensors."""
    rng, tensors = np.random.default_rng(0), {}
    for key, weight in stored(name).items():
        module = key.removesuffix(".weight")
        if not module.endswith(LAYERS[name]) or key.endswith("bias"):
            continue
        out, into = sides(name, weight)
        rank = (ranks or {}).get(module.split(".")[-1], RANK)
        for leaf, shape in (("A", (rank, into)), ("B", (out, rank))):
            value = rng.normal(size=shape).astype(np.float32) / 4
            tensors[f"base_model.model.{module}.lora_{leaf}.weight"] = value
    folder.mkdir()
    save_file(tensors, folder / peft.TENSORS)
    known = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "bias": "none"}
    known["target_modules"] = [*LAYERS[name]]
    (folder / peft.CONFIG).write_text(json.dumps({**known, **about}))
    return tensors


def changed(name: str, tensors, scale) -> dict:
    """Returns our weights of the published ones with the products added, by NumPy."""
    merged = dict(stored(name))
    for key, a in tensors.items():
        if ".lora_A." not in key:
            continue
        module = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        product = tensors[key.replace("lora_A", "lora_B")] @ a * scale(module)
        product = product.T if name == "gpt2" else product
        merged[f"{module}.weight"] = merged[f"{module}.weight"] + product
    gpt, _, _ = opened(name)
    config = files.read_json(GOLDEN / name / "config.json")
    return weights.load(config, {k: Stored(v) for k, v in merged.items()}, gpt.cfg,
                        folder=GOLDEN / name)  # fmt: skip


class Stored:
    """A tensor as `weights.load` reads one."""

    def __init__(self, value: np.ndarray):
        self.kind, self.shape, self.path = "F32", value.shape, Path("memory")
        self.value = value

    def __getitem__(self, cut):
        return (self.path, self.kind, self.shape)[cut]

    def read(self) -> np.ndarray:
        return self.value


def joined(name: str, found: peft.Adapter) -> dict:
    """Returns the golden weights with an adapter beside them."""
    gpt, params, _ = opened(name)
    keys = {"rank": found.rank, "alpha": found.alpha, "targets": found.targets}
    how = adapters.lora(model.declared(gpt.cfg), **keys, base_dtype="")
    split = how.split(params, jax.random.key(0))[0]  # what these targets would train
    assert jax.tree.map(np.shape, split) == jax.tree.map(np.shape, found.params)
    return how.join(found.params, {"base": params})


def same_logits(name: str, found, wanted) -> None:
    gpt, params, answers = opened(name)
    ids = answers["ids"][:1]
    ours, theirs = logits(gpt, found, ids), logits(gpt, wanted, ids)
    np.testing.assert_allclose(ours, theirs, atol=2e-4)
    assert np.abs(ours - logits(gpt, params, ids)).max() > 0.1


# --- in -------------------------------------------------------------------------------


@families
def test_an_adapter_that_is_read_computes_the_formula(name, tmp_path):
    tensors = write(tmp_path / "in", name)
    found = peft.load(tmp_path / "in", opened(name)[0].cfg)
    wanted = changed(name, tensors, lambda module: ALPHA / RANK)
    same_logits(name, joined(name, found), wanted)


def test_ranks_and_alphas_of_their_own_and_rslora_are_honoured(tmp_path):
    ranks, alphas = {"o_proj": 4}, {"layers.1.self_attn.q_proj": 5}
    own = {"rank_pattern": ranks, "alpha_pattern": alphas, "use_rslora": True}
    tensors = write(tmp_path / "in", "llama", ranks=ranks, **own)

    def scale(module: str) -> float:
        alpha = 5 if module.endswith("layers.1.self_attn.q_proj") else ALPHA
        return alpha / (4 if module.endswith("o_proj") else RANK) ** 0.5

    found = peft.load(tmp_path / "in", opened("llama")[0].cfg)
    assert found.rank == 4
    same_logits("llama", joined("llama", found), changed("llama", tensors, scale))


@pytest.mark.parametrize(
    "about, named",
    [
        ({"peft_type": "IA3"}, "IA3"),
        ({"use_dora": True}, "use_dora"),
        ({"bias": "all"}, "bias"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"lora_alpha": "x"}, "lora_alpha"),
        ({"trainable_token_indices": [1]}, "trainable_token_indices"),
    ],
)
def test_what_is_more_than_lora_is_refused_by_name(about, named, tmp_path):
    write(tmp_path / "in", "llama", **about)
    with pytest.raises(ValueError, match=named):
        peft.load(tmp_path / "in", opened("llama")[0].cfg)


def test_an_adapter_of_another_model_is_refused(tmp_path):
    write(tmp_path / "in", "gpt_neox")
    with pytest.raises(ValueError, match="no linear layer of this llama"):
        peft.load(tmp_path / "in", opened("llama")[0].cfg)
    tensors = write(tmp_path / "other", "llama")
    key = next(key for key in tensors if "lora_B" in key)
    path = tmp_path / "other" / peft.TENSORS
    save_file({**tensors, key: tensors[key][:-1]}, path)
    with pytest.raises(ValueError, match="should be"):
        peft.load(tmp_path / "other", opened("llama")[0].cfg)
    save_file({**tensors, key: tensors[key] * np.nan}, path)
    with pytest.raises(ValueError, match="NaN"):
        peft.load(tmp_path / "other", opened("llama")[0].cfg)
    path.unlink()
    with pytest.raises(ValueError, match=peft.TENSORS):
        peft.load(tmp_path / "other", opened("llama")[0].cfg)


# --- out ------------------------------------------------------------------------------


@families
def test_an_adapter_goes_out_as_it_came_bit_for_bit(name, tmp_path):
    tensors = write(tmp_path / "in", name)
    cfg = opened(name)[0].cfg
    found = joined(name, peft.load(tmp_path / "in", cfg))
    (tmp_path / "out").mkdir()
    peft.save(tmp_path / "out", found, cfg, base="somewhere")
    again = load_file(tmp_path / "out" / peft.TENSORS)
    assert again.keys() == tensors.keys()
    for key, value in tensors.items():
        np.testing.assert_array_equal(again[key], value, err_msg=key)
    about = json.loads((tmp_path / "out" / peft.CONFIG).read_text())
    assert (about["r"], about["lora_alpha"]) == (RANK, ALPHA)
    assert about["base_model_name_or_path"] == "somewhere"
    ends = tuple(f".{end}" for end in about["target_modules"])
    modules = {key.removesuffix(".weight") for key in stored(name)}
    chosen = {m for m in modules if m.endswith(ends)}
    assert chosen == {m for m in modules if m.endswith(LAYERS[name])}


@families
def test_an_adapter_made_here_computes_the_formula_there(name, tmp_path):
    gpt, params, _ = opened(name)
    targets = (r"block_0/.*(query|value)/kernel$", r"up/kernel$")
    keys = {"rank": 3, "alpha": ALPHA, "targets": targets, "base_dtype": ""}
    how = adapters.lora(model.declared(gpt.cfg), **keys)
    first = how.split(params, jax.random.key(0))[0]
    rng = np.random.default_rng(1)
    trained = jax.tree.map(lambda x: x + rng.normal(size=x.shape) / 4, first)
    trained = jax.tree.map(lambda x: np.asarray(x, np.float32), trained)
    found = how.join(trained, {"base": params})
    peft.save(tmp_path, found, gpt.cfg, base="")
    about = json.loads((tmp_path / peft.CONFIG).read_text())
    tensors = load_file(tmp_path / peft.TENSORS)

    def scale(module: str) -> float:
        rank = about["rank_pattern"].get(module, about["r"])
        alpha = about["alpha_pattern"].get(module, about["lora_alpha"])
        assert len(tensors[f"base_model.model.{module}.lora_A.weight"]) == rank
        return alpha / rank

    wanted = changed(name, tensors, scale)
    same_logits(name, adapters.merge(found, "float32"), wanted)


def test_a_run_without_an_adapter_is_refused(tmp_path):
    gpt, params, _ = opened("llama")
    with pytest.raises(ValueError, match="no LoRA adapter"):
        peft.save(tmp_path, params, gpt.cfg, base="")
    assert not [*tmp_path.iterdir()]


# --- the door -------------------------------------------------------------------------


def convert(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "experiments.convert", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
def test_the_door_makes_a_run_of_an_adapter_and_writes_it_again(tmp_path):
    tensors = write(tmp_path / "in", "llama")
    base = tmp_path / "base"
    base.mkdir()
    for path in (GOLDEN / "llama").iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    tokenizers.train("char", ["".join(map(chr, range(32, 127)))]).save(
        base / "tokenizer.json"
    )
    run, out = tmp_path / "run", tmp_path / "out"
    done = convert(f"--from_peft={tmp_path / 'in'}", f"--run={run}")
    assert done.returncode == 2 and "--base" in done.stderr
    done = convert(f"--from_peft={tmp_path / 'in'}", f"--base={base}", f"--run={run}")
    assert done.returncode == 0, done.stderr
    found = runs.open(run)
    same_logits(
        "llama", found.params, changed("llama", tensors, lambda _: ALPHA / RANK)
    )
    done = convert(f"--run={run}", f"--to_peft={out}")
    assert done.returncode == 0, done.stderr
    again = load_file(out / peft.TENSORS)
    assert all(np.array_equal(again[key], value) for key, value in tensors.items())
    second = tmp_path / "second"  # of a run as the base
    made = convert(f"--from_hf={base}", f"--run={tmp_path / 'first'}")
    assert made.returncode == 0, made.stderr
    done = convert(
        f"--from_peft={out}", f"--base={tmp_path / 'first'}", f"--run={second}"
    )
    assert done.returncode == 0, done.stderr
    np.testing.assert_array_equal(
        runs.open(second).params["block_0"]["attn"]["query"]["kernel"],
        found.params["block_0"]["attn"]["query"]["kernel"],
    )
