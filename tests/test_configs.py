"""Configs: all of them build, state only known keys, and train at size=tiny."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from configs import common
from gpt_jax import model, train
from tests.cases import few

FILES = sorted(path.stem for path in Path("configs").glob("[a-z]*.py"))
NAMES = [name for name in FILES if name != "common"]
ARGS = [
    *("quickstart:", "shakespeare_char:size=cpu,recipe=nanogpt", "austen_15m:"),
    *("shakespeare_char:size=cpu,recipe=modern", "the_verdict:recipe=appendix_d"),
    *("shakespeare_char:size=gpu,recipe=nanogpt", "the_verdict:recipe=chapter5"),
    *("shakespeare_char:size=gpu,recipe=modern", "austen_15m:size=small"),
    *("grpo:stage=start", "grpo:stage=rl,run=none", "grpo:stage=rl,size=tiny"),
    *("gpt2:size=small", "gpt2:size=medium", "gpt2:size=large", "gpt2:size=xl"),
    *("sft:set=alpaca,template=chatml,run=none", "sft:adapter=lora,run=none"),
    *("smollm2:run=none", "smollm2:stage=dpo,run=none", "smollm2:stage=spam,run=none"),
    *("smollm2:stage=start,run=none", "smollm2:stage=grpo,run=none"),
    *(f"{name}:size=tiny" for name in NAMES),
]


def get(name_and_arg):
    name, _, arg = name_and_arg.partition(":")
    return importlib.import_module(f"configs.{name}").get_config(arg)


def keys(config, prefix=""):
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}"


def known(config):
    """Returns the keys of `common.base` with the task and the adapter of a config."""
    base = common.base()
    base.task = common.TASKS[config.task.name]()
    base.adapter = common.ADAPTERS[config.adapter.name]()
    return sorted(keys(base))


@pytest.mark.parametrize("name", ARGS)
def test_a_config_has_the_keys_of_common_and_makes_a_model(name):
    config = get(name)
    assert sorted(keys(config)) == known(config)
    train.check(config, config)
    fields = {**config.model, "vocab_size": config.model.vocab_size or 50257}
    cfg = model.GPTConfig(**fields)
    assert cfg.d_model % cfg.n_heads == 0
    json.loads(config.to_json())


@pytest.mark.parametrize("name", NAMES)
def test_a_config_says_what_result_time_and_command(name):
    doc = importlib.import_module(f"configs.{name}").__doc__
    for word in ("What:", "Expected:", "Time:", f"--config=configs/{name}.py"):
        assert word in doc, f"configs/{name}.py does not say {word!r}"


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_option_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="is not one of"):
        get(f"{name}:colour=red")
    with pytest.raises(ValueError, match="is not one of"):
        get(f"{name}:size=gigantic")
    with pytest.raises(ValueError, match="'tiny' has no name: write size=tiny"):
        get(f"{name}:tiny")
    with pytest.raises(ValueError, match=r"did you mean size\?"):
        get(f"{name}:sise=tiny")


@pytest.mark.parametrize("name", few(NAMES, "quickstart", "sft"))
def test_a_tiny_config_trains(name, tmp_path):
    config = get(f"{name}:size=tiny")
    config.data.folder = str(tmp_path / "data")
    config.compile_cache = ""
    result = train.train(config, tmp_path / "run")
    assert (result.reason, result.step) == ("steps", config.steps)
    assert result.numbers["val_loss"] < 20


def test_importing_every_config_imports_no_jax_and_of_gpt_jax_only_names():
    code = "import sys, importlib\n"
    code += f"for name in {FILES}: importlib.import_module('configs.' + name)\n"
    code += "ours = {m for m in sys.modules if m.startswith('gpt_jax.')}\n"
    code += "sys.exit('jax' in sys.modules or ours != {'gpt_jax.names'})"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0


def test_an_options_string_is_parsed_with_defaults():
    assert common.options("a=1", a="0", b="2") == {"a": "1", "b": "2"}
    assert common.options(None, a="0") == {"a": "0"}


@pytest.fixture
def folder(tmp_path):
    """A run folder, as far as a config looks into it."""
    config = common.tiny(common.modern(common.base()))
    config.model.vocab_size = 77
    text = json.dumps(config.to_dict())
    (tmp_path / "config.json").write_text(text)
    return tmp_path


def test_a_config_from_a_run_has_its_model_and_starts_from_its_weights(folder):
    config = common.from_run(common.tiny(common.base()), str(folder))
    wanted = common.tiny(common.modern(common.base())).model
    wanted.vocab_size = 77
    assert config.model.to_dict() == wanted.to_dict()
    assert config.init_from == str(folder)
    assert config.hyper == common.tiny(common.base()).hyper
    model.GPTConfig(**config.model)


def test_a_run_from_before_a_key_was_there_gets_its_default(folder):
    found = json.loads((folder / "config.json").read_text())
    del found["model"]["qk_norm"]
    (folder / "config.json").write_text(json.dumps(found))
    config = common.from_run(common.base(), str(folder))
    assert config.model.qk_norm is False and config.model.position == "rope"


def test_no_run_leaves_a_config_as_it_is_and_none_begins_at_random():
    assert common.from_run(common.base(), "") == common.base()
    assert common.from_run(common.base(), "none").init_from == "random"


@pytest.mark.parametrize("name", ["sft", "dpo", "grpo:stage=rl"])
def test_a_recipe_for_tuning_wants_a_run_or_none_on_purpose(name):
    option = "," if ":" in name else ":"
    with pytest.raises(ValueError, match="run=none begins at random weights"):
        train.check(get(name))
    train.check(get(f"{name}{option}run=none"))
    train.check(get(f"{name}{option}size=tiny"))


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "is not a run folder: it has no config.json"),
        ("{", "is not the config of a run"),
        ("[1]", "is not the config of a run"),
        ('{"data": {}}', "is not the config of a run"),
        ('{"model": 3, "task": {}}', "is not the config of a run"),
        ('{"model": {"colour": 1}, "task": {}}', "not known here: colour"),
    ],
)
def test_what_is_no_run_is_refused_in_a_sentence(tmp_path, text, message):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=message):
        common.from_run(common.base(), str(tmp_path))
    with pytest.raises(ValueError, match="does not exist"):
        common.from_run(common.base(), str(tmp_path / "absent"))
    with pytest.raises(ValueError, match="it is a file"):
        common.from_run(common.base(), "README.md")


@pytest.mark.parametrize(
    "layers, looped", [(common.DEEP - 1, False), (common.DEEP, True)]
)
def test_layers_of_a_deep_run_are_looped_over(layers, looped, tmp_path):
    config = common.base()
    config.model.update(n_layers=layers, scan_layers=not looped)
    (tmp_path / "config.json").write_text(config.to_json())
    assert common.from_run(common.base(), str(tmp_path)).model.scan_layers == looped
