"""Facts about the table of sampling settings, and that nothing else says it again."""

import math
import re
from pathlib import Path

import pytest

from configs import common
from gpt_jax import sample, sampling
from gpt_jax.sampling import SETTINGS
from gpt_jax.serve import fields
from tests import serving

ROOT = Path(__file__).parents[1]


def test_every_setting_reaches_the_rows_and_nothing_else_does():
    rows = sample.rows_of([sampling.settings(3)] * 2)
    for name, setting in SETTINGS.items():
        assert getattr(rows, name).tolist() == [setting.off] * 2
        kind = "i" if setting.kind is int else "f"
        assert getattr(rows, name).dtype.kind == kind


@pytest.mark.parametrize(
    "name, good, bad",
    [
        ("temperature", (0, 1.5), (-0.1, math.nan, math.inf)),
        ("top_k", (0, 5, 2**30), (-1, 2**30 + 1)),
        ("top_p", (0.01, 1), (0.0, 1.01, math.nan)),
        ("min_p", (0.0, 1), (-0.1, 1.1)),
        ("repetition_penalty", (0.5, 2.0), (0.0, -1.0, math.inf)),
        ("frequency_penalty", (-2, 0.0, 2), (-2.1, 2.1, math.nan)),
        ("presence_penalty", (-2, 0.0, 2), (-2.1, 2.1, math.nan)),
    ],
)
def test_a_setting_is_refused_outside_its_range(name, good, bad):
    for value in good:
        sampling.check(0, **{name: value})
    for value in bad:
        with pytest.raises(ValueError, match=f"{name} is .* but must be .* is off"):
            sampling.check(0, **{name: value})


def test_a_name_that_is_no_setting_is_refused():
    with pytest.raises(TypeError, match="no setting of sampling is called top_q"):
        sampling.settings(1, top_q=3)


def test_the_page_and_the_schema_and_configs_offer_settings_of_the_table():
    page = (ROOT / "gpt_jax/serve/page/index.html").read_text()
    ranges = set(re.findall(r'type="range" id="(\w+)"', page))
    assert {"max_tokens"} < ranges <= {*SETTINGS, "max_tokens"}
    for name, setting in SETTINGS.items():
        for form in ("completion", "chat", "response"):
            schema = fields.forms(serving.LIMITS)[form][name].schema()
            assert "default" not in schema, name  # the model has it
            assert schema["description"].startswith(setting.told)
    others = {"prompt", "count", "max_new_tokens", "words"}
    assert {*common.base().sample} - others <= SETTINGS.keys()


def test_no_other_file_of_the_library_lists_the_settings():
    """A filter is added as a row of the table and as a function."""
    lists = [
        path.relative_to(ROOT).as_posix()
        for folder in ("gpt_jax", "experiments")
        for path in (ROOT / folder).rglob("*.py")
        if "repetition_penalty" in path.read_text()
    ]
    names_elsewhere = "gpt_jax/pretrained/config_json.py"  # what others call them
    known = {"gpt_jax/sample/filters.py", "gpt_jax/sampling.py", names_elsewhere}
    assert {*lists} == known
