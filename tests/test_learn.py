"""The holes: real bodies are right, usual mistakes are named, nothing is written over.

The mistakes here are written as a reader would, not as the package has them.
"""

import inspect
import textwrap

import pytest

from gpt_jax import learn
from gpt_jax.learn import hole

pytestmark = pytest.mark.usefixtures("promotion")  # of what readers write

PLANTED = [
    ("pairwise", "return ((y_MD[:, None] - x_ND) ** 2).sum(2)", "is turned"),
    (
        "dropout",
        "k = jax.random.uniform(key, x.shape) < 1 - rate\nreturn x * k",
        "mean",
    ),
    (
        "bigram",
        "c = jnp.ones((vocab_size, vocab_size))\n"
        "c = c.at[tokens_N[:-1], tokens_N[1:]].add(1)\n"
        "return (c.T / c.T.sum(1)[:, None]).T",
        "sums of the columns",
    ),
    (
        "bpe_merge",
        "out, i = [], 0\n"
        "while i + 1 < len(ids):\n"
        "    if (ids[i], ids[i + 1]) == tuple(pair):\n"
        "        out += [new]; i += 2\n"
        "    else:\n"
        "        out += [ids[i]]; i += 1\n"
        "return out",
        "last token is lost",
    ),
    (
        "windows",
        "import numpy as np\n"
        "w = [tokens_N[i:i + seq_len] for i in "
        "range(0, len(tokens_N) - seq_len, stride)]\n"
        "return np.stack(w), np.stack(w)",
        "one token further on",
    ),
    (
        "softmax",
        "e = jnp.exp(score_TS - score_TS.max())\nreturn e / e.sum(0)",
        "wrong axis",
    ),
    (
        "causal_mask",
        "i = jnp.arange(tokens)\n"
        "m = i[None] < i[:, None]\n"
        "return m & (i[None] >= i[:, None] - window) if window else m",
        "must see itself",
    ),
    (
        "attention",
        "s = q_TK @ k_SK.T\n"
        "s = s + jnp.triu(jnp.full(s.shape, -1e9), 1)\n"
        "return jax.nn.softmax(s, -1) @ v_SK",
        "no 1 / sqrt(K)",
    ),
    (
        "attention",
        "s = q_TK @ k_SK.T / q_TK.shape[-1] ** 0.5\n"
        "s = s + jnp.triu(jnp.full(s.shape, -1e9), 2)\n"
        "return jax.nn.softmax(s, -1) @ v_SK",
        "sees the next one",
    ),
    (
        "attention",
        "s = q_TK @ k_SK.T / q_TK.shape[-1] ** 0.5\n"
        "s = s + jnp.triu(jnp.full(s.shape, -1e9), 1)\n"
        "return jax.nn.softmax(s, 0) @ v_SK",
        "softmax is over the wrong axis",
    ),
    (
        "gqa",
        "out = []\n"
        "G = k_SGK.shape[1]\n"
        "for h in range(q_THK.shape[1]):\n"
        "    s = q_THK[:, h] @ k_SGK[:, h % G].T / q_THK.shape[-1] ** 0.5\n"
        "    s = jnp.where(jnp.tril(jnp.ones(s.shape)) > 0, s, -1e9)\n"
        "    out.append(jax.nn.softmax(s, -1) @ v_SGK[:, h % G])\n"
        "return jnp.stack(out, 1)",
        "yours take turns",
    ),
    (
        "kv_cache",
        "keys_SK = keys_SK.at[length].set(k_K)\n"
        "values_SK = values_SK.at[length].set(v_K)\n"
        "w = jax.nn.softmax(keys_SK @ q_K / len(q_K) ** 0.5)\n"
        "return w @ values_SK, keys_SK, values_SK",
        "mask it",
    ),
    (
        "rms_norm",
        "n = jnp.linalg.norm(x_TD, axis=-1, keepdims=True)\n"
        "return x_TD / (n + 1e-6) * scale_D",
        "not their sum",
    ),
    (
        "layer_norm",
        "d = x_TD - x_TD.mean(-1, keepdims=True)\n"
        "v = (d ** 2).sum(-1, keepdims=True) / (x_TD.shape[-1] - 1)\n"
        "return d / jnp.sqrt(v + 1e-5) * scale_D + bias_D",
        "divided by D - 1",
    ),
    (
        "rope",
        "i = jnp.arange(0, x_TK.shape[-1], 2)\n"
        "t = position_T[:, None] * base ** (-i / x_TK.shape[-1])\n"
        "a, b = x_TK[:, 0::2], x_TK[:, 1::2]\n"
        "y = jnp.zeros_like(x_TK)\n"
        "y = y.at[:, 0::2].set(a * jnp.cos(t) - b * jnp.sin(t))\n"
        "return y.at[:, 1::2].set(b * jnp.cos(t) + a * jnp.sin(t))",
        "pairs neighbours",
    ),
    (
        "cross_entropy",
        "l = jax.nn.log_softmax(logits_TV)\n"
        "return -l[jnp.arange(len(target_T)), target_T].mean()",
        "use the mask",
    ),
    (
        "cross_entropy_grad",
        "p = jax.nn.softmax(logits_TV)\n"
        "return p.at[jnp.arange(len(target_T)), target_T].add(-1.0)",
        "1 / T",
    ),
    ("perplexity", "return jnp.exp(jnp.mean(loss_N / weight_N))", "add up first"),
    (
        "adamw",
        "m = 0.9 * mean + 0.1 * grad\n"
        "v = 0.95 * square + 0.05 * grad * grad\n"
        "return weight * (1 - 0.1 * lr) - lr * m / (v ** 0.5 + 1e-8), m, v",
        "bias correction is forgotten",
    ),
    (
        "schedule",
        "up = peak * step / warmup\n"
        "half = (1 + jnp.cos(jnp.pi * jnp.minimum(step / total, 1))) / 2\n"
        "down = peak * (final_ratio + (1 - final_ratio) * half)\n"
        "return jnp.where(step < warmup, up, down)",
        "begins where the warm-up ends",
    ),
    (
        "clip",
        "n = jnp.sqrt(sum((g ** 2).sum() for g in jax.tree.leaves(grads)))\n"
        "return jax.tree.map(lambda g: g / n * limit, grads)",
        "made longer",
    ),
    (
        "top_p",
        "o = jnp.argsort(logits_V)[::-1]\n"
        "c = jnp.cumsum(jax.nn.softmax(logits_V)[o])\n"
        "return jnp.full_like(logits_V, -jnp.inf).at[o].set("
        "jnp.where(c < p, logits_V[o], -jnp.inf))",
        "reaches p must stay",
    ),
    ("answer_mask", "return jnp.ones(tokens - 1)", "loss is on the prompt"),
    (
        "packing_mask",
        "i = jnp.arange(len(segment_T))\nreturn i[:, None] >= i[None]",
        "documents leak",
    ),
    (
        "lora",
        "return x_TD @ kernel_DF + x_TD @ (a_DR @ b_RF) * alpha",
        "divided by the rank",
    ),
    (
        "dpo",
        "h = (chosen_B - ref_chosen_B) - (rejected_B - ref_rejected_B)\n"
        "return jnp.log1p(jnp.exp(-beta * h)).mean()",
        "reference is not detached",
    ),
    (
        "advantage",
        "r = reward_NG - reward_NG.mean()\nreturn r / (reward_NG.std() + 1e-4)",
        "each question's own",
    ),
    (
        "policy_loss",
        "old_T = jax.lax.stop_gradient(old_T)\n"
        "return jnp.mean(-advantage_T * jnp.exp(logp_T - old_T))",
        "advantage is not detached",
    ),
]


def written(folder, name, body):
    """Begins a hole and fills it."""
    path = learn.start(name, folder, "check")
    text = path.read_text()
    blank = f'    raise NotImplementedError("write {name}")\n'
    assert text.endswith(blank)
    path.write_text(text.replace(blank, textwrap.indent(body + "\n", "    ")))


@pytest.mark.parametrize(
    "name, body, told", PLANTED, ids=[f"{p[0]}-{p[2]}" for p in PLANTED]
)
def test_a_usual_mistake_is_named(name, body, told, tmp_path):
    written(tmp_path, name, body)
    verdict = learn.check(name, tmp_path)
    assert not verdict.right and told in verdict.lines[-1], verdict.lines
    assert verdict.lines[-1].split(": ", 1)[1] in [
        mistake.told for mistake in learn.HOLES[name].mistakes
    ]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*learn.HOLES])
def test_the_real_body_is_right_and_every_declared_mistake_is_named(name):
    found = learn.HOLES[name]
    assert found.check(found.real).right
    for told, made in found.mistakes:
        trials = (found._differs(run, made) for _, run in found._trials())
        assert next(filter(None, trials), "") == told


def test_a_body_of_another_form_is_right(tmp_path):
    body = (
        "s = jnp.einsum('tk,sk->ts', q_TK, k_SK) / jnp.sqrt(q_TK.shape[-1])\n"
        "i = jnp.arange(len(s))\n"
        "w = jnp.exp(s - s.max(-1, keepdims=True)) * (i[:, None] >= i)\n"
        "return w / w.sum(-1, keepdims=True) @ v_SK"
    )
    written(tmp_path, "attention", body)
    verdict = learn.check("attention", tmp_path)
    assert verdict.right and verdict.lines == [
        f"{what}: right" for what in ("values", "jit", "gradients", "vmap")
    ]


def test_there_is_a_hole_for_every_part_of_a_model():
    assert len(learn.HOLES) >= 21
    wanted = "bpe_merge causal_mask rope rms_norm gqa kv_cache cross_entropy adamw "
    wanted += "orthogonalise schedule clip top_k top_p lora dpo advantage packing_mask "
    wanted += "perplexity"
    assert {*wanted.split()} <= {*learn.HOLES}
    for found in learn.HOLES.values():
        assert found.mistakes and (found.real.__doc__ or "").strip()


def test_a_hole_is_begun_with_its_signature_and_docstring_alone(tmp_path):
    path = learn.start("rope", tmp_path, "experiments.learn --check=rope")
    space = {}
    exec(path.read_text(), space)
    real = learn.HOLES["rope"].real
    assert inspect.signature(space["rope"]) == inspect.signature(real)
    assert inspect.getdoc(space["rope"]) == inspect.getdoc(real)
    assert "rotate(" not in path.read_text()
    assert learn.check("rope", tmp_path).lines == ["rope is not written yet"]


def test_nothing_is_written_over_and_wrong_names_have_a_near_one(tmp_path):
    written(tmp_path, "gelu", "return mine")
    with pytest.raises(ValueError, match="is there already"):
        learn.start("gelu", tmp_path, "check")
    assert "return mine" in (tmp_path / "gelu.py").read_text()
    assert learn.start("clip", tmp_path, "c") == learn.start("clip", tmp_path, "c")
    with pytest.raises(ValueError, match="did you mean attention"):
        learn.start("atention", tmp_path, "check")
    with pytest.raises(ValueError, match="start rope first"):
        learn.check("rope", tmp_path)
    (tmp_path / "rope.py").write_text("def rope(:\n")
    with pytest.raises(ValueError, match=r"cannot be run: SyntaxError in line 1"):
        learn.check("rope", tmp_path)


@pytest.mark.parametrize(
    "body, told",
    [
        ("return x[:3]", "shape (3,); wanted is (20,)"),
        ("return x / 0", "not finite"),
        ("return x + 1", "it returns"),
        ("return nothing", "raises NameError: name 'nothing' is not defined"),
        ("return x if x.sum() > 0 else x", "it returns"),
    ],
)
def test_what_is_no_usual_mistake_is_told_as_it_is(body, told, tmp_path):
    written(tmp_path, "gelu", body)
    assert told in learn.check("gelu", tmp_path).lines[-1]


def test_what_runs_under_no_jit_is_told(tmp_path):
    body = "assert float(x.sum()) < 1e9\nreturn jax.nn.gelu(x, approximate=True)"
    written(tmp_path, "gelu", body)
    verdict = learn.check("gelu", tmp_path)
    assert not verdict.right and "Error" in verdict.lines[-1]


def test_numbers_are_alike_up_to_rounding_alone():
    one = hole.normal(0, 5)
    assert hole.alike([one], [one * (1 + 1e-6)])
    assert not hole.alike([one], [one + 0.01])
    assert not hole.alike([one], [one[:4]]) and not hole.alike([one], one)
    assert not hole.alike(one > 0, (one > 0) + 0.0)
