"""The microscope: what it shows is what the model computes."""

import base64
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gpt_jax import microscope, model, runs
from gpt_jax.checkpoint import Checkpoints
from gpt_jax.microscope import attribution, page, taps
from tests import runs_to_evaluate
from tests.cases import few
from tests.test_model import FAMILIES, shake
from tests.tiny import cfg, jit

IDS = np.random.default_rng(0).integers(0, 61, 14).tolist()
FOUR = pytest.mark.parametrize("name", [*FAMILIES])
FEW = pytest.mark.parametrize("name", few(FAMILIES, "gemma"))


@functools.cache
def family(name):
    """Returns (config, model, weights, row, what was seen)."""
    c = cfg(**FAMILIES[name])
    gpt = model.GPT(c)
    params = shake(model.init(c, jax.random.key(3)))
    row = taps.row([IDS[:9], IDS[9:]] if name == "gemma" else [IDS])
    seen = jit(lambda params: taps.see(gpt, params, row))(params)
    return c, gpt, params, row, jax.tree.map(np.asarray, seen)


def plain_logits(gpt, params, row):
    documents = row.segments_T[None] if row.packed else None

    def run(params):
        how = (row.tokens_T[None], row.positions_T[None], documents)
        return model.logits(gpt, params, model.hidden(gpt, params, *how).x_BTD)[0]

    return jit(run)(params)


@FEW
def test_taps_change_nothing(name):
    _, gpt, params, row, seen = family(name)
    wanted = plain_logits(gpt, params, row)
    np.testing.assert_allclose(seen.logits_TV, wanted, atol=1e-5)


@FOUR
def test_the_lens_of_the_last_layer_is_the_logits_to_the_bit(name):
    """Operation by operation: a whole program may round in another order."""
    _, gpt, params, row, _ = family(name)
    seen = taps.see(gpt, params, row)
    last = taps.lens(gpt, params, seen.stream_LTD[-1])
    np.testing.assert_array_equal(last, seen.logits_TV)


@FOUR
def test_the_parts_of_the_stream_add_up_to_it(name):
    *_, seen = family(name)
    grown = seen.stream_LTD[:-1] + seen.attn_LTD + seen.mlp_LTD
    np.testing.assert_allclose(grown, seen.stream_LTD[1:], atol=1e-5)


@FOUR
def test_the_parts_of_a_logit_add_up_to_it(name):
    _, gpt, params, row, seen = family(name)
    wanted = np.roll(row.tokens_T, -1)
    found = jit(lambda p: attribution.attribute(gpt, p, seen, wanted))(params)
    total = found.embedding_T + found.head_TLH.sum((1, 2)) + found.shift_TL.sum(1)
    total += found.mlp_TL.sum(1) + found.constant_T + found.softcap_T
    np.testing.assert_allclose(total, found.logit_T, atol=1e-4)
    places = np.arange(len(wanted))
    np.testing.assert_array_equal(found.logit_T, seen.logits_TV[places, wanted])
    assert jnp.abs(found.head_TLH).min(0).max() > 0


def by_numpy(c, params, seen, layer, row):
    """Attention weights [H, T, S] from the weights of the layer, in NumPy."""
    block = jax.tree.map(np.asarray, params[f"block_{layer}"])
    kind = c.kind(layer)

    def norm(x, group):
        x = x - (x.mean(-1, keepdims=True) if c.norm == "layernorm" else 0)
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        scale = c.norm_offset + group["scale"] if c.norm_scale else 1
        return x * scale + group.get("bias", 0)

    def head_norm(x, group):
        over = -1 if c.qk_norm_over == "head" else (1, 2)
        x = x / np.sqrt((x**2).mean(over, keepdims=True) + c.norm_eps)
        return x * (c.norm_offset + group["scale"] if c.norm_scale else 1)

    def rotated(x_THK):
        half = c.rotary_dim // 2
        speed = kind.rope_base ** (-np.arange(half) / half)
        speed = speed / (kind.rope_scaling.factor if kind.rope_scaling else 1)
        angle = (row.positions_T[:, None] * speed)[:, None]
        a, b, rest = np.split(x_THK, (half, 2 * half), -1)
        return np.concatenate(
            [
                a * np.cos(angle) - b * np.sin(angle),
                b * np.cos(angle) + a * np.sin(angle),
                rest,
            ],
            -1,
        )

    x_TD = seen.stream_LTD[layer]
    if c.norm_placement != "post":
        x_TD = norm(x_TD, block.get("norm1", {}))
    q, k = (
        np.einsum("TD,DHK->THK", x_TD, block["attn"][name]["kernel"])
        + block["attn"][name].get("bias", 0)
        for name in ("query", "key")
    )
    if c.qkv_clip:
        q, k = (np.clip(x, -c.qkv_clip, c.qkv_clip) for x in (q, k))
    if c.qk_norm:
        q = head_norm(q, block["attn"].get("query_norm", {}))
        k = head_norm(k, block["attn"].get("key_norm", {}))
    if c.position == "rope" and kind.rope_base:
        q, k = rotated(q), rotated(k)
    k = np.repeat(k, c.n_heads // c.n_kv_heads, axis=1)
    score = c.query_scale * np.einsum("THK,SHK->HTS", q, k)
    if c.attn_softcap:
        score = c.attn_softcap * np.tanh(score / c.attn_softcap)
    place = np.arange(len(x_TD))
    seen_TS = place[None] <= place[:, None]
    seen_TS &= row.segments_T[None] == row.segments_T[:, None]
    if kind.window:
        seen_TS &= place[None] > place[:, None] - kind.window
    score = np.where(seen_TS, score, -np.inf)
    weight = np.exp(score - score.max(-1, keepdims=True))
    return weight / weight.sum(-1, keepdims=True), seen_TS


@FOUR
def test_attention_weights_are_those_of_numpy(name):
    c, _, params, row, seen = family(name)
    np.testing.assert_allclose(seen.weight_LHTS.sum(-1), 1, atol=1e-5)
    for layer in range(c.n_layers):
        weight_HTS, seen_TS = by_numpy(c, params, seen, layer, row)
        np.testing.assert_allclose(seen.weight_LHTS[layer], weight_HTS, atol=1e-5)
        assert not seen.weight_LHTS[layer][:, ~seen_TS].any()


@FEW
def test_patching_with_the_same_prompt_changes_nothing(name):
    _, gpt, params, *_ = family(name)
    row = taps.row([IDS[:6]])
    swap = microscope.swapped(gpt, params, row, row)
    assert np.abs(swap.effect_LT).max() < 1e-5


@FEW
def test_patching_the_last_token_behind_the_last_layer_is_the_other_prompt(name):
    """And before it nothing that both have in common has an effect."""
    _, gpt, params, *_ = family(name)
    row, other = taps.row([IDS[:6]]), taps.row([[*IDS[:3], 7, *IDS[4:6]]])
    swap = microscope.swapped(gpt, params, row, other)
    moved = swap.whole - swap.before
    assert abs(moved) > 1e-3
    np.testing.assert_allclose(swap.effect_LT[-1, -1], moved, atol=1e-4)
    np.testing.assert_allclose(swap.effect_LT[0, 3], moved, atol=1e-4)
    assert not swap.effect_LT[:, :3].any() and not swap.effect_LT[-1, :-1].any()


def test_prompts_of_unequal_length_are_not_patched():
    _, gpt, params, *_ = family("gpt2")
    rows = (taps.row([IDS[:6]]), taps.row([IDS[:5]]))
    with pytest.raises(ValueError, match="6 tokens and --against 5"):
        microscope.swapped(gpt, params, *rows)


def test_scanned_layers_are_refused():
    with pytest.raises(ValueError, match="unstack the weights first"):
        taps.see(model.GPT(cfg(scan_layers=True)), {}, taps.row([IDS]))


# --- a run ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with two checkpoints."""
    folder = runs_to_evaluate.make(tmp_path_factory.mktemp("look") / "run")
    params = runs.open(folder).params
    with Checkpoints(folder / "checkpoints", keep=2) as store:
        turned = jax.tree.map(lambda x: -x, params)
        store.save(3, {"params": turned}, metric=None, meta={})
    return folder


@pytest.fixture(scope="module")
def looked(run):
    with_script = 'a </script> b\nab a <!-- "b'
    return microscope.look(run, [with_script], against=with_script[:-1] + "c", step=0)


def numbers(text):
    """Returns the data and the frames of a page, read as a browser does."""
    found = re.findall(
        r'<script type="application/json" id="\w+">(.*?)</script>', text, re.S
    )
    return [json.loads(part) for part in found]


def test_a_page_is_whole_and_asks_nobody_for_anything(looked, tmp_path):
    steps = microscope.write(tmp_path / "look.html", looked)
    text = (tmp_path / "look.html").read_text()
    assert steps == [0, 3] and len(text) < 5e6
    assert re.sub(r"http://www\.w3\.org/2000/svg", "", text).count("://") == 0
    assert not re.search(r"<link|src=|@import|fetch\(|url\(", text)
    data, frames = numbers(text)
    assert [data["texts"][str(i)] for i in data["tokens"]] == list(
        'a </script> b\nab a <!-- "b'
    )
    assert [frame["step"] for frame in frames] == [0, 3] and data["opened"] == 0


def test_the_numbers_of_a_page_are_those_of_the_run(looked, run):
    """Oracle: `likelihood` of the run, a program of its own."""
    text, _ = page.make(looked)
    data, (frame, later) = numbers(text)

    def unpacked(packed):
        kind = {"f4": "<f4", "u1": "u1", "i4": "<i4"}[packed["kind"]]
        return np.frombuffer(base64.b64decode(packed["data"]), kind).reshape(
            packed["shape"]
        )

    opened = runs.open(run, step=0)
    x = jnp.array([data["tokens"]])
    found = model.hidden(opened.model, opened.params, x).x_BTD
    logp = jax.nn.log_softmax(model.logits(opened.model, opened.params, found))[0]
    logp = np.asarray(logp)[np.arange(len(x[0]) - 1), x[0, 1:]]
    chance = unpacked(frame["chance"])[-1][:-1]
    np.testing.assert_allclose(np.log(chance), logp, atol=1e-4)
    rank = unpacked(frame["rank"])[-1]
    likeliest = unpacked(frame["likeliest"])[-1][:, 0]
    np.testing.assert_array_equal(rank[:-1] == 0, likeliest[:-1] == data["tokens"][1:])
    parts = [unpacked(frame[name]) for name in ("heads", "shifts", "mlps", "whole")]
    heads, shifts, mlps, whole = parts
    total = heads.sum((2, 3)) + shifts.sum(2) + mlps.sum(2) + whole[..., :3].sum(-1)
    np.testing.assert_allclose(total, whole[..., 3], atol=1e-4)
    weights = unpacked(frame["weights"])
    row = weights[:, :, 3:6].astype(float) / 255  # of token 2: three it may see
    np.testing.assert_allclose(row.sum(-1), 1, atol=0.01)
    assert not np.array_equal(weights, unpacked(later["weights"]))


def test_checkpoints_that_do_not_fit_are_left_out_but_the_one_asked_for(
    looked, monkeypatch
):
    sizes = {0: 10, 3: 10, 5: 10, 8: 10}
    like = looked._replace(opened=3)
    assert page._fitting(sizes, like, 100) == [0, 3, 5, 8]
    assert page._fitting(sizes, like, 23) == [3, 8]
    assert page._fitting(sizes, like, 11) == [3]
    monkeypatch.setattr(page, "MOST_BYTES", 40_000)
    with pytest.raises(ValueError, match=r"26 tokens takes .* shorten the prompt"):
        page.make(looked)


@pytest.mark.parametrize(
    "prompts, against, told",
    [
        (["a" * 40, "b" * 40], "", "80 tokens together"),
        (["a" * 65], "", "the prompt has 65 tokens"),
        (["ab", "cd"], "ab", "goes with one --prompt"),
    ],
)
def test_what_cannot_be_looked_at_is_refused(run, prompts, against, told):
    with pytest.raises(ValueError, match=told):
        microscope.look(run, prompts, against=against)
