"""Facts about the one table of HTTP fields: parser, description, guide and errors."""

import ast
import json
from pathlib import Path

import pytest
from jsonschema_rs import is_valid

from gpt_jax.serve import fields, openapi, wire
from gpt_jax.serve.errors import Refused
from tests.serving import LIMITS

ROOT = Path(__file__).parents[1]
FORMS = fields.forms(LIMITS)
VALID = {  # the least that each form takes
    "completion": {},
    "chat": {"messages": [{"role": "user", "content": "x"}]},
    "response": {"input": "x"},
    "embedding": {"input": "x"},
    "tokenize": {"prompt": "x"},
    "detokenize": {"tokens": [1]},
    "look": {"prompt": "x"},
}
CALL = {"id": "1", "type": "function"}
CALL |= {"function": {"name": "f", "arguments": "{}"}}
CALLS = {"role": "assistant", "tool_calls": [CALL]}
FLAT = {"type": "function", "name": "f"}
ITEM = {"type": "function_call", "call_id": "1", "name": "f", "arguments": "{}"}
HEARD = {"type": "function_call_output", "call_id": "1", "output": "x"}
VALUES = [
    *(None, True, False, 0, 1, -1, 1.5, 200, -200, 2**70, 1e31, "", "x", "x" * 300),
    *([], ["x"], [1], [""], [[1]], [[]], [-1], [{}], {}, {"a": 1}, {"1": 1}),
    *({"1": 200}, {"include_usage": True}, {"include_usage": 1}, {"type": "text"}),
    *("none", "auto", "required", "mean", "float", ["text"], [200] * 20),
    *([{"role": "user", "content": [{"type": "text", "text": "x"}]}],),
    *([{"role": "user", "content": "x", "name": "me"}],),
    *([{"role": "user", "content": [{"type": "image_url", "text": "x"}]}],),
    *({"format": {"type": "text"}}, {"format": {"type": "json_object"}}),
    *({"type": "json_object"}, {"type": "json_object", "schema": {}}, {"type": 1}),
    *({"type": "json_schema", "json_schema": {"name": "x", "schema": {}}},),
    *({"type": "json_schema", "json_schema": {"schema": None}}, {"type": "xml"}),
    *({"format": {"type": "json_schema", "schema": {}}}, {"json": {}}, {"regex": ""}),
    *({"regex": "x"}, {"regex": "x", "choice": ["a"]}, {"regex": None, "json": {}}),
    *({"choice": ["a", "b"]}, {"choice": []}, {"json": None}),
    *({"type": "function", "function": {"name": "f"}}, {"type": "function"}),
    *([{"type": "function", "function": {"name": "f", "parameters": {}}}],),
    *([{"type": "function", "function": {"name": "f g"}}], [{"type": "web_search"}]),
    *([{**FLAT, "strict": None}], [{**FLAT, "parameters": 1}]),
    *([FLAT], FLAT, {**FLAT, "name": "a b"}, [{**FLAT, "function": {}}]),
    *(
        [ITEM],
        [{**ITEM, "arguments": {}}],
        [{**ITEM, "call_id": None}],
        [ITEM, HEARD],
    ),
    *([{**ITEM, "caller": {"type": "program"}}], [{**ITEM, "type": "mcp_call"}]),
    *([HEARD], [{**HEARD, "output": [{"type": "input_text", "text": "x"}]}]),
    *([{**HEARD, "output": 1}], [{**HEARD, "output": None}], [{**HEARD, "role": "x"}]),
    *([{"role": "tool", "content": "x", "tool_call_id": "1"}],),
    *([{"role": "tool", "tool_call_id": "1"}], [{"role": "robot", "content": "x"}]),
    *([CALLS], [{**CALLS, "content": None}], [{**CALLS, "role": "user"}]),
    *([{**CALLS, "tool_calls": []}], [{**CALLS, "tool_calls": [{"id": "1"}]}]),
]


@pytest.mark.parametrize("form", FORMS)
def test_a_value_is_refused_just_when_its_description_refuses_it(form):
    for name, field in FORMS[form].items():
        for value in VALUES:
            body = {**VALID[form], name: value}
            if value is None and field.required:
                fits = False
            else:
                fits = value is None or is_valid(field.schema(), value)
            try:
                fields.read(FORMS[form], body)
                taken = True
            except Refused as refused:
                taken = False
                assert refused.status == 400
                assert (refused.param or "").startswith(name), (name, value)
                assert name in str(refused) and len(str(refused)) < 400
            assert taken == fits, (name, value)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_left_out_has_the_default_that_the_description_tells(form):
    read = fields.read(FORMS[form], VALID[form])
    assert list(read) == list(FORMS[form])
    schema = openapi.description(LIMITS, ["tiny"])["components"]["schemas"]
    told = schema[openapi.POSTS[form][1]]["properties"]
    for name, field in FORMS[form].items():
        if name not in VALID[form]:
            assert read[name] == field.default
        assert told[name].get("default", read[name]) == (field.default or read[name])
    wire.READERS[form](FORMS[form], VALID[form], LIMITS)  # and is something to ask for


def test_the_guide_has_the_table_as_it_is():
    text = (ROOT / "docs/guide/13-serving.md").read_text()
    begin, end = "<!-- fields -->", "<!-- end of fields -->"
    told = text[text.index(begin) + len(begin) : text.index(end)]
    assert told.strip() == fields.table(defaults())


def defaults():
    """The limits of the door, whose help the guide describes."""
    from gpt_jax.serve.limits import Limits

    return Limits(1 << 20, 1 << 17, 32, 1 << 18, 120.0, 10.0, 512)


@pytest.mark.parametrize(
    ("form", "changes", "param", "words"),
    [
        ("completion", {"tools": [{}], "tool_choice": "auto"}, "tools", "not support"),
        ("chat", {"top_logprobs": 2}, "top_logprobs", "without logprobs"),
        ("chat", {"stream_options": {"x": 1}}, "stream_options.x", "knows"),
        ("chat", {"n": 33}, "n", "from 1 to 8, not 33"),
        (
            "chat",
            {"messages": [{"role": "user", "content": "x", "name": "me"}]},
            "messages[0].name",
            "messages[0].name is not supported",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": "x", "colour": "red"}]},
            "messages[0].colour",
            "not a key",
        ),
        (
            "chat",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "messages[0].content[0].type",
            "image_url",
        ),
        (
            "chat",
            {"max_tokens": 3, "max_completion_tokens": 4},
            "max_tokens",
            "the same thing",
        ),
        ("completion", {"best_of": 2, "n": 3}, "best_of", "less than n"),
        ("completion", {"best_of": 2, "stream": True}, "best_of", "streamed"),
        ("completion", {"prompt": ["a"] * 5, "n": 2}, "n", "from 1 to 1"),
        ("completion", {"logit_bias": {"x": 1}}, "logit_bias", "no token id"),
        ("completion", {"logit_bias": {"1": 101}}, "logit_bias.1", "at most 100"),
        ("completion", {"reasoning_effort": "low"}, "reasoning_effort", "supported"),
        ("response", {"previous_response_id": "x"}, "previous_response_id", "support"),
        ("response", {"input": [{"type": "reasoning"}]}, "input[0].type", "reasoning"),
        ("response", {"top_logprobs": 1}, "top_logprobs", "include"),
        ("embedding", {"dimensions": 8}, "dimensions", "not supported"),
        ("tokenize", {"messages": VALID["chat"]["messages"]}, "prompt", "both"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_its_own_name(
    form, changes, param, words
):
    with pytest.raises(Refused) as refused:
        wire.READERS[form](FORMS[form], {**VALID[form], **changes}, LIMITS)
    assert refused.value.status == 400 and refused.value.param == param
    assert words in str(refused.value)


PUBLIC = {  # documented parts of the HTTP library and what lies under it
    "uvicorn": {"uvicorn"},
    "fastapi": {"fastapi", "fastapi.responses"},
    "starlette": {"starlette.exceptions", "starlette.middleware.cors"},
    "h11": set(),
}
PRIVATE = {"capture_signals", "server_state", "conn", "cycle", "lifespan"}


@pytest.mark.parametrize(
    "path", [*(ROOT / "gpt_jax/serve").glob("*.py")], ids=lambda path: path.stem
)
def test_the_server_uses_no_private_parts_of_its_http_library(path):
    for node in ast.walk(ast.parse(path.read_text())):
        modules = []
        if isinstance(node, ast.Import):
            modules = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            modules = [node.module or ""]
            if modules[0].partition(".")[0] in PUBLIC:
                assert not any(alias.name.startswith("_") for alias in node.names)
        for module in modules:
            assert module in PUBLIC.get(module.partition(".")[0], {module})
        if isinstance(node, ast.Attribute):
            assert node.attr not in PRIVATE


def test_nulls_are_the_same_as_leaving_fields_out():
    empty = {name: None for name, field in FORMS["chat"].items() if not field.required}
    body = json.loads(json.dumps({**VALID["chat"], **empty}))
    assert fields.read(FORMS["chat"], body) == fields.read(FORMS["chat"], VALID["chat"])
