"""A config as types: every key once, with its value; nothing of it can be changed."""

from dataclasses import FrozenInstanceError, fields

import pytest

from configs import common
from gpt_jax import checks
from gpt_jax.options import Data, Mesh, Run, Sample

GROUPS = {"data": Data, "sample": Sample, "mesh": Mesh}


def names(kind) -> set[str]:
    return {field.name for field in fields(kind)}


def test_every_key_of_a_group_is_a_field_of_its_type():
    config = common.base()
    for group, kind in GROUPS.items():
        assert names(kind) == set(config[group]), group
    alone = {key for key, value in config.items() if not hasattr(value, "items")}
    assert names(Run) == alone


@pytest.mark.parametrize("task", common.TASKS)
@pytest.mark.parametrize("adapter", common.ADAPTERS)
def test_an_unpacked_config_has_every_value_of_the_config(task, adapter):
    config = common.base()
    config.task, config.adapter = common.TASKS[task](), common.ADAPTERS[adapter]()
    found = checks.unpack(config.to_dict())
    for key in names(Run):
        assert getattr(found, key) == config[key]
    for group in GROUPS:
        assert vars(getattr(found, group)) == config[group].to_dict()
    assert {
        "name": found.task.name,
        **vars(found.task.options),
    } == config.task.to_dict()
    assert found.hyper._asdict() == config.hyper.to_dict()
    assert found.model.d_model == config.model.d_model
    assert found.dropout == []


def test_an_unpacked_config_cannot_be_changed():
    found = checks.unpack(common.base().to_dict())
    with pytest.raises(FrozenInstanceError):
        found.steps = 1  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        found.data.source = "x"  # type: ignore[misc]


def test_a_key_that_there_is_not_is_refused_by_name():
    tree = common.base().to_dict()
    tree["data"]["sauce"] = 1
    with pytest.raises(ValueError, match=r"no setting data\.sauce"):
        checks.unpack(tree)
