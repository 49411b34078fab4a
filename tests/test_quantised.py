"""Weights of few bits: what they hold, what multiplies them, what they write."""

import platform
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

from gpt_jax import files, model, native, quantised, runs, sample, sampling, tokenizers
from gpt_jax.model import GPT
from gpt_jax.serve import plan, server
from tests import serving, tiny

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, native.COMPILERS)), reason="needs a C++ compiler"
)
TYPES = {8: gguf.GGMLQuantizationType.Q8_0, 4: gguf.GGMLQuantizationType.Q4_1}


def matrix(F: int, D: int, seed: int = 0) -> np.ndarray:
    return np.array(tiny.draw(F, D, seed=seed))


def back(few) -> np.ndarray:
    return np.asarray(quantised.rows(few, jnp.arange(few.shape[0])))


def rounded(matrix_FD, bits: int):
    return quantised._rounded(jnp.asarray(matrix_FD), bits)


def ggml(x_FD, bits: int) -> np.ndarray:
    return gguf.dequantize(gguf.quantize(x_FD, TYPES[bits]), TYPES[bits])


@pytest.mark.parametrize("bits", quantised.BITS)
def test_weights_of_a_gguf_file_lose_nothing(bits):
    stored = ggml(matrix(48, 96), bits)
    assert np.array_equal(back(rounded(stored, bits)), stored)


@pytest.mark.parametrize("bits", quantised.BITS)
def test_others_are_rounded_as_well_as_ggml_does(bits):
    x_FD = matrix(64, 256)
    ours, theirs = back(rounded(x_FD, bits)), ggml(x_FD, bits)
    assert (
        ours == theirs
    ).mean() >= 0.95  # they take codes before the scale is rounded
    assert np.square(ours - x_FD).sum() <= np.square(theirs - x_FD).sum()


@pytest.mark.parametrize("bits", quantised.BITS)
@pytest.mark.parametrize(("F", "D"), [(1, 1), (16, 32), (33, 70), (100, 257)])
def test_any_shape_is_rounded_within_half_a_step(bits, F, D):
    x_FD = matrix(F, D)
    few = rounded(x_FD, bits)
    assert few.shape == (F, D) and few.bits == bits and back(few).shape == (F, D)
    for g in range(0, D, 32):
        part, found = x_FD[:, g : g + 32], back(few)[:, g : g + 32]
        spread = np.abs(part).max(1) / 127
        if bits == 4:  # filled up with zeros, which may be the least or the most
            full = np.pad(part, ((0, 0), (0, 32 - part.shape[1])))
            spread = (full.max(1) - full.min(1)) / 15
        # float16 holds a scale and an offset to a part in 2,048.
        slack = np.abs(part).max(1) * 2e-3
        assert (np.abs(found - part) <= (spread / 2 + slack)[:, None]).all()


def test_rows_of_zeros_stay_zeros():
    for bits in quantised.BITS:
        assert not back(rounded(np.zeros((3, 40), np.float32), bits)).any()


# --- the kernel -----------------------------------------------------------------------


def by_hand(few, x_ND) -> np.ndarray:
    x_ND = np.asarray(quantised.in_eight_bits(jnp.asarray(x_ND)), np.float64)
    return x_ND @ back(few).astype(np.float64).T


@needs_compiler
@pytest.mark.parametrize("bits", quantised.BITS)
@pytest.mark.parametrize(("F", "D"), [(1, 1), (16, 32), (33, 70), (500, 257)])
@pytest.mark.parametrize("N", [1, 2, 5, 19])
def test_the_kernel_multiplies_as_numpy_does(bits, F, D, N):
    assert native.ready()
    few, x_ND = rounded(matrix(F, D), bits), matrix(N, D, seed=1)
    found, wanted = (
        np.asarray(jax.jit(quantised.product)(x_ND, few)),
        by_hand(few, x_ND),
    )
    assert found.shape == (N, F)
    assert np.abs(found - wanted).max() <= 2e-6 * max(1.0, np.abs(wanted).max())


@needs_compiler
@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86 compilers")
@pytest.mark.parametrize("machine", ["-march=x86-64", "-march=haswell"])
def test_it_does_on_older_processors(machine, monkeypatch, tmp_path):
    if machine == "-march=haswell" and "avx2" not in files.cpu():
        pytest.skip("this processor lacks AVX2")
    monkeypatch.setattr(native, "MACHINES", (machine,))
    monkeypatch.setattr(native, "FOLDER", str(tmp_path))
    monkeypatch.setattr(native, "PREFIX", machine)
    native.missing.cache_clear()
    try:
        assert native.ready()
    finally:
        native.missing.cache_clear()
    monkeypatch.setattr(native, "missing", lambda: "")
    for bits in quantised.BITS:
        for N in (1, 5):
            few, x_ND = rounded(matrix(33, 70), bits), matrix(N, 70, seed=1)
            assert np.allclose(
                quantised.product(x_ND, few), by_hand(few, x_ND), atol=1e-4
            )


def test_a_row_is_rounded_to_the_nearest_of_255_numbers():
    x_ND = matrix(4, 70)
    found = np.asarray(quantised.in_eight_bits(jnp.asarray(x_ND)))
    for g in range(0, 70, 32):
        part = x_ND[:, g : g + 32]
        step = np.abs(part).max(1, keepdims=True) / np.float32(127)
        assert np.allclose(found[:, g : g + 32], np.rint(part / step) * step, rtol=1e-6)


@needs_compiler
@pytest.mark.parametrize("bits", quantised.BITS)
def test_no_row_depends_on_another_to_the_bit(bits):
    few, x_ND = rounded(matrix(80, 96), bits), matrix(29, 96, seed=1)
    product = jax.jit(quantised.product)
    together = np.asarray(product(x_ND, few))
    for n in (1, 2, 3, 7, 8, 13):
        alone = np.concatenate([product(x_ND[i : i + n], few) for i in range(0, 29, n)])
        assert np.array_equal(alone, together), n


@needs_compiler
def test_what_is_not_finite_stays_so_in_its_own_row():
    x_ND = matrix(3, 64)
    x_ND[1, 5] = np.nan
    few = rounded(matrix(20, 64), 8)
    found = np.asarray(quantised.product(x_ND, few))
    assert np.isnan(found[1]).all() and np.isfinite(found[[0, 2]]).all()
    x_ND[1, 5] = np.inf
    assert not np.isfinite(np.asarray(quantised.product(x_ND, few))[1]).any()


@needs_compiler
def test_many_threads_at_once_get_their_own_products():
    from concurrent.futures import ThreadPoolExecutor

    few = rounded(matrix(700, 320), 4)
    product = jax.jit(quantised.product)
    inputs = [matrix(1 + i % 3, 320, seed=i) for i in range(24)]
    wanted = [np.asarray(product(x_ND, few)) for x_ND in inputs]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda x_ND: np.asarray(product(x_ND, few)), inputs * 4))
    for i, got in enumerate(found):
        assert np.array_equal(got, wanted[i % 24])


def test_without_a_compiler_jax_multiplies_and_says_so(monkeypatch, tmp_path, caplog):
    few, x_ND = rounded(matrix(33, 70), 4), matrix(3, 70, seed=1)
    wanted = np.asarray(quantised.product(x_ND, few))
    monkeypatch.setattr(native, "FOLDER", str(tmp_path / "kernels"))
    monkeypatch.setattr(native, "COMPILERS", ("no-such-compiler",))
    native.missing.cache_clear()
    try:
        found = np.asarray(quantised.product(x_ND, few))
        made = gpt()
        few_bits(made, 0)
        assert not caplog.records
        few_bits(made, 8)
        assert "no C++ compiler was found (no-such-compiler)" in caplog.text
        assert len(caplog.records) == 1
    finally:
        native.missing.cache_clear()
    assert np.allclose(found, wanted, atol=1e-5)


@needs_compiler
def test_the_library_is_kept_for_its_user_alone(monkeypatch, tmp_path):
    monkeypatch.setattr(native, "FOLDER", str(tmp_path / "a" / "kernels"))
    path = native._built()
    assert path.parent.stat().st_mode & 0o777 == 0o700
    before = path.stat().st_mtime_ns
    assert native._built() == path and path.stat().st_mtime_ns == before
    path.write_bytes(b"damaged")
    assert native._loaded()._name == str(path) and path.stat().st_size > 10_000
    path.parent.chmod(0o777)
    with pytest.raises(ValueError, match=r"can be written to by others .*chmod 700"):
        native._built()


# --- models ---------------------------------------------------------------------------

KINDS = {
    "tied": {"tie_embeddings": True},
    "own head": {"tie_embeddings": False, "head_bias": True},
    "llama": {
        **{"position": "rope", "norm": "rmsnorm", "gated": True, "activation": "silu"},
        **{"n_kv_heads": 2, "attn_bias": False, "mlp_bias": False, "qkv_bias": False},
    },
}


def gpt(kind: str = "tied", **changes) -> tuple[GPT, dict]:
    cfg = tiny.cfg(
        **{"context_length": 32, "vocab_size": 128}, **KINDS[kind], **changes
    )
    return GPT(cfg), jax.tree.map(lambda x: 4 * x, model.init(cfg, jax.random.key(3)))


def few_bits(made: tuple[GPT, dict], bits: int) -> dict:
    return quantised.weights(made[1], model.declared(made[0].cfg), bits=bits)


def plain(params: dict) -> dict:
    """Returns weights of few bits as plain ones that hold the same numbers."""
    flat = {}
    for path, leaf in flatten_dict(params, sep="/").items():
        layer = path.rpartition("/")[0]
        if isinstance(leaf, quantised.Quantised):
            table = layer == "embed"
            leaf = jnp.asarray(back(leaf) if table else back(leaf).T)
            path = f"{layer}/{'embedding' if table else 'kernel'}"
        flat[path] = leaf
    return unflatten_dict(flat, sep="/")


def shaped(params: dict, like: dict) -> dict:
    return jax.tree.map(lambda x, y: x.reshape(y.shape), params, like)


@pytest.mark.parametrize("bits", quantised.BITS)
@pytest.mark.parametrize("kind", KINDS)
def test_a_model_of_few_bits_is_the_model_of_those_numbers(kind, bits):
    made = gpt(kind)
    few = few_bits(made, bits)
    same = shaped(plain(few), made[1])
    ids_BT = np.random.default_rng(0).integers(0, 128, (3, 20))

    def logits(params):
        x_BTD = model.hidden(made[0], params, ids_BT).x_BTD
        return np.asarray(model.logits(made[0], params, x_BTD))

    found, wanted, before = map(logits, (few, same, made[1]))
    # What is left is that activations have eight bits.
    assert np.abs(found - wanted).max() <= 0.05 * np.abs(wanted).max()
    assert np.abs(wanted - before).max() > 0
    heavy = jax.tree.leaves(few["block_0"])
    assert sum(x.nbytes for x in heavy) <= 0.4 * sum(
        x.nbytes for x in jax.tree.leaves(made[1]["block_0"])
    )


def test_the_head_keeps_eight_bits_and_norms_stay():
    for kind in KINDS:
        made = gpt(kind)
        few = few_bits(made, 4)
        head = few["embed" if kind != "own head" else "head"][quantised.LEAF]
        assert head.bits == 8
        assert few["block_0"]["mlp"]["up"][quantised.LEAF].bits == 4
        assert few["final_norm"] is not None
        assert same_bits(few["block_0"]["norm1"], made[1]["block_0"]["norm1"])
    assert "embedding" in few_bits(gpt("own head"), 8)["embed"]  # is only looked up in


def same_bits(a, b) -> bool:
    return all(
        np.array_equal(x, y)
        for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    )


def test_no_bits_are_the_weights_themselves_and_others_are_refused():
    made = gpt()
    assert few_bits(made, 0) is made[1]
    with pytest.raises(ValueError, match=r"bits.*5.*8"):
        few_bits(made, 5)


TOKENIZER = tokenizers.train("byte", ["x"])


def texts(made, params, prompts, **options):
    settings = sampling.settings(12, **{**sampling.OFF, "temperature": 0.0})
    done = sample.texts(
        **{"model": made[0], "params": params, "tokenizer": TOKENIZER, "count": 1},
        **{"prompts": prompts, "seed": 0, "stop": []},
        **{**settings, **options},
    )
    return [completion.ids for completion in done]


PROMPTS = [[1, 2, 3], [5, 6, 5, 6, 5], [9] * 9]


@pytest.mark.parametrize("bits", quantised.BITS)
def test_texts_are_the_same_alone_together_and_guessed(bits):
    made = gpt("llama", vocab_multiple=1)
    few = few_bits(made, bits)
    together = texts(made, few, PROMPTS)
    assert [texts(made, few, [prompt])[0] for prompt in PROMPTS] == together
    assert texts(made, few, PROMPTS, lookup=4) == together
    assert len({*map(tuple, together)}) == 3


def test_a_laid_out_tree_of_few_bits_stays_as_it_is():
    made = gpt()
    few = few_bits(made, 8)
    for rows in (1, 8):
        again = sample.laid_out(made[0], few, rows=rows)[1]
        assert jax.tree.structure(again) == jax.tree.structure(few)
    assert quantised.are(few) and not quantised.are(made[1])


# --- runs, doors, the server ----------------------------------------------------------


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    return serving.byte_run(tmp_path_factory.mktemp("few") / "run", context_length=64)


def test_a_run_opened_with_bits_holds_a_third_of_the_bytes(run_folder):
    whole, few = (runs.open(run_folder, bits=bits) for bits in (0, 8))
    assert quantised.are(few.params) and not quantised.are(whole.params)
    sizes = [sum(x.nbytes for x in jax.tree.leaves(r.params)) for r in (whole, few)]
    assert sizes[1] < 0.4 * sizes[0]


def door(name: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", f"experiments.{name}", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


def test_doors_take_bits_and_refuse_others(run_folder):
    ask = ("sample", f"--run={run_folder}", "--prompt=def", "--max_new_tokens=8")
    done = door(*ask, "--bits=4", "--temperature=0")
    assert done.returncode == 0 and done.stdout.startswith("def"), done.stderr
    done = door(*ask, "--bits=5")
    assert done.returncode == 2 and "5 bits: 8, 4, or 0" in done.stderr
    assert "Traceback" not in done.stderr


@needs_compiler
def test_a_server_answers_with_few_bits_as_sampling_does(run_folder):
    run = runs.open(run_folder, bits=8)
    said = []
    served = server.open_runs(
        {"few": run_folder},
        **{"step": None, "weights": "", "sizes": [1, 4], "queue": 8, "context": 32},
        bits=8,
        tell=said.append,
    )
    assert "0 B for copies of weights" in said[0]
    assert served["few"].facts["bits"] == 8  # so the fingerprint is another
    short = plan.shortened(run.model, run.params, 32)
    body = {"model": "few", "prompt": "abc", "max_tokens": 12, "temperature": 0}
    with serving.open_server(served) as it:
        status, answer, _ = it.ask("/v1/completions", body)
    assert status == 200
    (alone,) = sample.texts(
        **{"model": short[0], "params": short[1], "tokenizer": run.tokenizer},
        **{"prompts": ["abc"], "count": 1, "seed": 0, "stop": []},
        **sampling.settings(12, **{**sampling.OFF, "temperature": 0.0}),
    )
    assert answer["choices"][0]["text"] == alone.text
