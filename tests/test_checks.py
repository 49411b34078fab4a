"""What no run can have is refused by name, before any text and any device."""

import math
import re
from collections.abc import Mapping
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from gpt_jax import checks, losses, model, optimizer, settings, tasks
from gpt_jax.optimizer import Hyper
from gpt_jax.options import Data
from tests import tiny


def config_of(task="lm", adapter="full", **options) -> dict[str, Any]:
    """Returns a config as a plain mapping, of weights that begin at random."""
    made = _config_of(task, adapter, tuple(options.items()))
    return {k: dict(v) if isinstance(v, dict) else v for k, v in made.items()}


@cache
def _config_of(task, adapter, options):
    config = common.tiny(common.base())
    config.task, config.adapter = common.TASKS[task](), common.ADAPTERS[adapter]()
    if task == "dpo":
        config.task.template = "plain"
    config.task.update(dict(options))
    config.init_from = "" if task == "lm" else "random"
    return config.to_dict()


def put(config: dict, key: str, value) -> dict:
    group, _, name = key.rpartition(".")
    (config[group] if group else config)[name] = value
    return config


def flat(tree: Mapping, prefix: str = "") -> dict[str, Any]:
    found = {}
    for key, value in tree.items():
        inner = isinstance(value, Mapping)
        found |= flat(value, f"{prefix}{key}.") if inner else {f"{prefix}{key}": value}
    return found


# --- types ----------------------------------------------------------------------------

VARIANTS = [("lm", "full"), ("sft", "lora"), ("dpo", "only")]
VARIANTS += [(name, "full") for name in ("classify", "answers", "grpo")]
ODD = [True, 3, 0.5, math.nan, math.inf, -math.inf, 10**400, "a", None, {}, ("a", 1)]
ODD += [(math.nan,), ({"window": 16.5, "rope_base": 1e4, "rope_scaling": None},)]


def is_right(value, default) -> bool:
    """Whether a value is as its key's default, said once more and shortly."""
    if isinstance(default, bool) or isinstance(value, bool):
        return isinstance(value, bool) and isinstance(default, bool)
    if isinstance(default, float):
        number = isinstance(value, int | float)
        return number and abs(value) < 10**300 and math.isfinite(value)
    return isinstance(value, type(default)) and not isinstance(default, tuple)


def wrong():
    """Yields (task, adapter, key, value) for every key and value of another type."""
    seen = set()
    for task, adapter in VARIANTS:
        for key, default in flat(config_of(task, adapter)).items():
            if key in seen or key.endswith(".name"):
                continue
            seen |= {key} if not key.startswith(("task.", "adapter.")) else set()
            for value in ODD:
                numbers = key == "task.labels" and value == ("a", 1)  # names as well
                if not is_right(value, default) and not numbers:
                    yield task, adapter, key, value


@pytest.mark.fault(36, injections=1500)
def test_every_key_refuses_every_value_of_another_type_by_name():
    """NaN and infinities with them, for all groups, tasks and adapters."""
    cases = list(wrong())
    assert len(cases) > 1400
    for task, adapter, key, value in cases:
        config = put(config_of(task, adapter), key, value)
        with pytest.raises(ValueError, match=re.escape(key.rpartition(".")[2])):
            checks.check(config)
            print("accepted:", key, value)  # shown by pytest when none was raised


@pytest.mark.parametrize("group", ["hyper", "mesh", "data", "task", "adapter", "model"])
@pytest.mark.parametrize("value", [3, "lora", {"lr": 0.1}, None], ids=repr)
def test_a_group_is_refused_as_a_whole(group, value):
    with pytest.raises(ValueError, match=group):
        checks.check(put(config_of(), group, value))


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("adapter.name", "lora", r"no rank, .*--config=configs/sft.py:adapter=lora"),
        ("task.name", "sft", r"no template, .*begin with --config=configs/sft.py"),
        ("task.name", "grpo", r"begin with --config=configs/grpo.py"),
        ("task.name", "sfd", r"not one of: lm, .*did you mean sft\?"),
        ("adapter.name", "lorra", r"did you mean lora\?"),
    ],
)
def test_a_variants_name_without_its_keys_names_the_configs_option(key, value, told):
    with pytest.raises(ValueError, match=told):
        checks.check(put(config_of(), key, value))


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("optimizer.rates", (("head", -0.5),), "factor must be at least 0"),
        ("optimizer.decay", ((".*", -1),), "factor must be at least 0"),
        ("model.norm_eps", -1.0, "norm_eps is -1.0"),
        ("sample.count", 0, "sample.count is 0: it must be at least 1"),
        ("sample.temperature", -1.0, "temperature is -1.0"),
        ("data.seq_len", 99, "data.seq_len 99 is more than model.context_length 32"),
        ("grace_s", -1.0, "grace_s is -1.0: it must be at least 0 seconds"),
        ("on_save_error", "go_on", "on_save_error 'go_on' is not one of: stop, cont"),
        ("model.rope", 1, "there is no setting model.rope"),
    ],
)
def test_numbers_out_of_their_range_are_refused(key, value, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        checks.check(put(config_of(), key, value))


# --- what nothing reads ---------------------------------------------------------------


@pytest.mark.parametrize(
    "task, options, key, value, who",
    [
        ("lm", {}, "model.n_classes", 5, "task lm"),
        ("lm", {}, "hyper.dropout_adapter", 0.1, "adapter full"),
        ("lm", {}, "patience", 3, "a run without eval_every"),
        ("sft", {}, "data.stride", 8, "task sft"),
        ("dpo", {}, "hyper.z_loss", 0.1, "task dpo"),
        ("dpo", {}, "data.stride", 8, "task dpo"),
        ("dpo", {"variant": "ipo"}, "hyper.label_smoothing", 0.1, "task dpo (ipo)"),
        (
            *("dpo", {"variant": "orpo", "logp": "mean"}),
            *("hyper.label_smoothing", 0.1, "task dpo (orpo)"),
        ),
        ("grpo", {}, "hyper.label_smoothing", 0.1, "task grpo"),
        ("grpo", {}, "hyper.z_loss", 0.1, "task grpo"),
        ("grpo", {}, "hyper.dropout_attn", 0.1, "task grpo"),
        ("classify", {}, "data.stride", 8, "task classify"),
        ("classify", {}, "data.skip_bad_docs", True, "task classify"),
    ],
)
def test_what_is_on_and_not_read_is_refused_by_name(task, options, key, value, who):
    config = put(
        config_of(task, **options), "eval_every", 0 if key == "patience" else 3
    )
    checks.check(config)
    told = f"{key} is {value!r}, but {who} does not read it: leave it at"
    with pytest.raises(ValueError, match=re.escape(told)):
        checks.check(put(config, key, value))


@pytest.mark.parametrize(
    "key, value, told",
    [
        ("hyper.matrix_lr", 0.03, "optimizer adamw does not read it: leave it at 0.02"),
        ("hyper.momentum", 0.8, "optimizer adamw"),
        ("hyper.decay_fraction", 0.5, "schedule cosine"),
        ("hyper.ema_decay", 0.9, "a run without optimizer.ema"),
        ("hyper.spike_sigma", 3.0, "a run without spike_window"),
        ("optimizer.muon", ("up",), "optimizer adamw"),
        ("sample.prompt", "Once", "a run without sample_every"),
        ("data.field", "body", ""),
        ("data.folder", "elsewhere", ""),
        ("hyper.beta2", 0.9, ""),
    ],
)
def test_what_a_user_sets_and_nothing_reads_is_refused(key, value, told):
    recipe = config_of()
    checks.check(recipe, recipe)
    changed = put(config_of(), key, value)
    if not told:
        return checks.check(changed, recipe)
    with pytest.raises(ValueError, match=f"{re.escape(key)} is .*{told}"):
        checks.check(changed, recipe)


def test_what_a_recipe_sets_for_another_optimizer_may_stay():
    recipe = common.tiny(common.modern(common.base())).to_dict()
    changed = put(common.tiny(common.modern(common.base())).to_dict(), *ADAMW)
    checks.check(changed, recipe)


ADAMW = ("optimizer.name", "adamw")


@pytest.mark.parametrize("task", ["sft", "dpo", "grpo"])
def test_tuning_wants_weights_or_random_ones_on_purpose(task):
    config = put(config_of(task), "init_from", "")
    with pytest.raises(ValueError, match=f"task {task} goes on from .*run=none begins"):
        checks.check(config)
    checks.check(put(config, "init_from", "runs/a"))
    checks.check(put(config, "init_from", "random"))


def test_attention_that_knows_no_softcap_and_no_dropout_is_not_taken_for_another():
    for name in ("xla", "cudnn"):
        for key in ("model.attn_softcap", "hyper.dropout_attn"):
            config = put(put(config_of(), "model.attention", name), key, 0.5)
            with pytest.raises(ValueError, match=f"{name} does not know {key}"):
                checks.check(config)


# --- who reads what, asked of the code that reads -------------------------------------


def used(function, *arguments) -> set[str]:
    """Returns the fields of Hyper that a function of (*arguments, hyper) reads."""
    hyper = Hyper(*map(jnp.float32, range(1, len(Hyper._fields) + 1)))
    jaxpr = jax.make_jaxpr(function)(*arguments, hyper).jaxpr
    inputs = dict(zip(jaxpr.invars[-len(hyper) :], Hyper._fields, strict=True))
    read = {id(var) for equation in jaxpr.eqns for var in equation.invars}
    read |= {id(var) for var in jaxpr.outvars}
    return {name for var, name in inputs.items() if id(var) in read}


@pytest.mark.parametrize("name", optimizer.OPTIMIZERS)
def test_an_optimizer_reads_what_is_said_of_it(name):
    rule = config_of()["optimizer"] | {"name": name, "schedule": "constant"}
    del rule["ema"]
    cfg = tiny.cfg(n_layers=1)
    tx = optimizer.make(model.declared(cfg), **rule)
    params = model.init(cfg, jax.random.key(0))
    state = tx.init(params)

    def update(hyper):
        return tx.update(params, state, params, jnp.int32(3), hyper)[:2]

    wanted = {*optimizer.READS[name], *optimizer.WARM_UP, "clip"}
    assert used(update) == wanted


@pytest.mark.parametrize("name", optimizer.SCHEDULES)
def test_a_schedule_reads_what_is_said_of_it(name):
    factor = partial(optimizer.SCHEDULES[name], jnp.int32(3))
    assert used(factor) == {*optimizer.SCHEDULE_READS[name]}


ASKED = set()


class Spied(Data):
    """Settings of data that tell which of them were asked for."""

    def __getattribute__(self, key):
        ASKED.add(key)
        return super().__getattribute__(key)


ROWS = '{"instruction": "%s", "output": "b", "rejected": "c"}\n'
TABLE = "text,label\n" + "aa,x\nab,x\nba,y\nbb,y\n" * 10


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    (folder / "lm").write_text("some text of a few words. " * 40)
    rows = "".join(ROWS % (f"a{n}",) for n in range(40))
    (folder / "rows.jsonl").write_text(rows)
    (folder / "table.csv").write_text(TABLE)
    return folder


CASES = [("lm", {}), ("sft", {"template": "plain"}), ("answers", {}), ("grpo", {})]
CASES += [("dpo", {"variant": "dpo"}), ("dpo", {"variant": "ipo"}), ("classify", {})]
CASES += [("dpo", {"variant": "orpo", "logp": "mean"})]


@pytest.mark.parametrize(
    "name, options", CASES, ids=lambda x: x if isinstance(x, str) else x.get("variant")
)
def test_a_task_reads_what_is_said_of_it(name, options, files, tmp_path):
    """Its hyper is asked of the traced loss, its data of what it looks up."""
    config = config_of(name, **options)
    chosen = tasks.chosen(config["task"])
    source = {"lm": "lm", "classify": "table.csv"}.get(name, "rows.jsonl")
    text = config["data"] | {"source": str(files / source), "folder": str(tmp_path)}
    text |= {"tokenizer": "byte", "val_fraction": 0.2}
    cfg = tiny.cfg(context_length=32, vocab_size=0)
    on = ("dropout_embed", "dropout_attn", "dropout_residual")
    read = {*chosen.kind.reads(chosen.options)}
    dropout = on if f"hyper.{on[0]}" in read else ()
    ASKED.clear()
    task = tasks.make(
        chosen, model=cfg, text=Spied(**text), dropout=dropout, progress=False
    )
    places = {"folder", "cache", "workers"}
    if name != "lm":  # which hands all of them on
        asked = ASKED & settings.declared(Data).keys()
        assert {f"data.{key}" for key in asked - places} == {
            key for key in read if key.startswith("data.")
        }
    weights = model.init(task.model.cfg, jax.random.key(0))
    rows = [task.train[i] for i in range(2)]
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0]}
    if name == "grpo":
        batch = jax.tree.map(lambda x: x[None], batch)
        assert task.rollout is not None
        batch = jax.eval_shape(task.rollout, weights, batch, jax.random.key(0))
        batch = jax.tree.map(lambda x: np.zeros(x.shape[1:], x.dtype), batch)
    frozen = {"reference": weights}

    def loss(hyper):
        return task.loss(weights, frozen, batch, jax.random.key(1), hyper)["loss"]

    assert used(loss) == {key[6:] for key in read if key.startswith("hyper.")}


def test_one_step_to_a_rollout_never_clips():
    """So the clip of such a run is a key that nothing reads."""

    def idle(updates):
        found = tasks.chosen({**common.task_grpo(), "updates": updates})
        return found.kind.idle(found.options)

    assert idle(1) == ("clip",) and not idle(2)

    @partial(jax.jit, static_argnames="clip")
    def slope(logp_BT, clip):
        def loss(x_BT):
            fixed = (logp_BT, None, jnp.array([0.7]), jnp.ones((1, 2)))
            return losses.policy(x_BT, *fixed, clip=clip, kl=0.0)["loss"]

        return jax.grad(loss)(logp_BT)

    logp_BT = jnp.array([[-1.0, -2.0]])
    np.testing.assert_array_equal(slope(logp_BT, clip=0.1), slope(logp_BT, clip=0.0))


OTHER = {"vocab_multiple": 8, "context_length": 8, "n_layers": 2, "d_model": 16}
OTHER |= {"n_heads": 2, "n_kv_heads": 2, "head_dim": 6, "d_ff": 48, "norm_eps": 1e-3}
OTHER |= {"position": "rope", "norm": "rmsnorm", "norm_placement": "both"}
OTHER |= {"activation": "silu", "query_scale": 0.3, "attn_softcap": 3.0}
OTHER |= {"logit_softcap": 3.0, "embed_scale": 2.0, "dtype": "bfloat16"}
OTHER |= {"param_dtype": "bfloat16", "norm_offset": 0.5, "init": "modern"}
OTHER |= {"pattern": ({"window": 4, "rope_base": 1e4, "rope_scaling": None},)}
OTHER |= {"vocab_size": 64, "n_classes": 3, "rotary_dim": 4, "parallel": "own"}
OTHER |= {"qk_norm_over": "heads", "residual_scale": 0.5, "logit_divisor": 2.0}
OTHER |= {"qkv_clip": 0.01, "param": "mup", "base_width": 16}
# What a key needs beside it to be read.
NEEDS = {"rotary_dim": {"position": "rope"}, "qk_norm_over": {"qk_norm": True}}
NEEDS |= {"base_width": {"param": "mup"}}
FAST = ("attention", "remat", "scan_layers")  # the same numbers, in another way
START: dict[str, Any] = {"tie_embeddings": False, "n_layers": 1}
NO_SCALE = {"norm_scale": False}


def program(**fields) -> str:
    """Returns what a model computes, as text: its first weights and its logits."""
    cfg = tiny.cfg(**{**START, **fields})
    draw = jax.make_jaxpr(partial(model.init, cfg), return_shape=True)
    first, weights = draw(jax.random.key(0))
    tokens_BT = jax.ShapeDtypeStruct((1, 8), jnp.int32)
    apply = jax.make_jaxpr(lambda w, x: model.GPT(cfg).apply({"params": w}, x))
    return f"{first} {apply(weights, tokens_BT)}"


def unread_of(**fields) -> set[str]:
    config = config_of()
    config["model"] |= START | fields
    return {k[6:] for k in checks.unread(config) if k.startswith("model.")}


@pytest.mark.parametrize(
    "key, beside",
    [
        *(("norm_bias", {"norm": "rmsnorm"}), ("norm_offset", NO_SCALE)),
        *(("rotary_dim", {"position": "none"}), ("qk_norm_over", {})),
    ],
)
def test_a_key_of_the_model_that_is_said_to_be_unread_changes_nothing(key, beside):
    default = vars(tiny.cfg(**beside))[key]
    other = not default if isinstance(default, bool) else OTHER[key]
    assert key in unread_of(**beside) - unread_of(**NEEDS.get(key, {}))
    assert program(**beside) == program(**{**beside, key: other})


@pytest.mark.slow
def test_every_other_key_of_the_model_changes_what_it_computes():
    for key, default in common.base().model.items():
        if key in FAST:
            continue
        default = START.get(key, default)
        other = OTHER.get(key, not default if isinstance(default, bool) else None)
        assert other is not None, key
        beside = NEEDS.get(key, {})
        assert program(**beside, **{key: other}) != program(**beside), key
