"""Facts about texts that must have a form: JSON of a schema, a regex, one of a list.

The models are untrained, so nothing but the mask makes them write it. Which JSON is
valid is judged by another library. make test-slow asks for 200 schemas.
"""

import json
import random
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import openai
import pytest
from jsonschema_rs import is_valid

from gpt_jax import sampling, tokenizers
from gpt_jax.serve import grammars
from gpt_jax.serve.errors import Refused
from gpt_jax.serve.flow import ENDS
from gpt_jax.serve.texts import Request
from tests import serving
from tests.serving import TOKENIZER, alone, running
from tests.test_serve import Answer

pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")
CONTEXT, VOCABULARY = 512, 257
POINT = {
    "type": "object",
    "properties": {
        "x": {"type": "integer", "minimum": 0, "maximum": 999},
        "kind": {"enum": ["near", "far"]},
    },
    "required": ["x", "kind"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def live():
    with running(serving.make_engine(CONTEXT, [4], 400)) as found:
        yield found


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


def begin(grammar, tokenizer=TOKENIZER):
    size = tokenizer.vocab_size
    return grammars.begin(grammar, tokenizer, size, tokenizer.ends)


def may_come(guide):
    """The ids that a guide allows next."""
    bits = np.unpackbits(guide.mask_W.view(np.uint8), bitorder="little")
    return set(np.flatnonzero(bits).tolist())


def of_bytes(guide):
    return {chr(i) if i < 256 else "end" for i in may_come(guide)}


# ---------------------------------------------------------------- schemas at random


def schema(rng, depth=0):
    """A schema at random, of what JSON can be; a text of it always ends."""
    plain = ["integer", "number", "string", "boolean", "null", "enum", "const"]
    kinds = [*plain, "pattern"] if depth else ["object", "ref"]
    kinds += ["object", "array", "tuple", "any"] if depth < 3 else []
    kind = rng.choice(kinds)
    if kind == "integer":
        low = rng.randint(-500, 500)
        return {"type": kind, "minimum": low, "maximum": low + rng.randint(0, 500)}
    if kind == "number":
        return {"type": kind, "multipleOf": 0.25, "minimum": 0, "maximum": 9}
    if kind == "string":
        return {"type": kind, "minLength": rng.randint(0, 2), "maxLength": 5}
    if kind in ("boolean", "null"):
        return {"type": kind}
    if kind == "enum":
        values = [1, "a", None, True, 'é"\n', [1, 2], {"k": 0}, -1.5]
        return {"enum": rng.sample(values, rng.randint(1, 4))}
    if kind == "const":
        return {"const": rng.choice(["x", 3, [], {"deep": [True]}])}
    if kind == "pattern":
        return {"type": "string", "pattern": rng.choice(["^[a-f]{2,4}$", "^(on|off)$"])}
    if kind == "array":
        most = rng.randint(0, 3)
        ends = {"minItems": rng.randint(0, most), "maxItems": most}
        return {"type": kind, "items": schema(rng, depth + 1), **ends}
    if kind == "tuple":
        items = [schema(rng, depth + 1) for _ in range(rng.randint(1, 3))]
        return {"type": "array", "prefixItems": items, "items": False}
    if kind == "any":
        return {"anyOf": [schema(rng, depth + 1) for _ in range(rng.randint(2, 3))]}
    names = rng.sample(["a", "b", "long name", "é", "type"], rng.randint(0, 4))
    inner = {name: schema(rng, depth + 1) for name in names}
    required = [name for name in names if rng.random() < 0.6]
    found = {"type": "object", "properties": inner, "required": required}
    found |= {"additionalProperties": False}
    if kind == "ref":
        found |= {"$defs": {"one": schema(rng, 3)}}
        found["properties"] = inner | {"ref": {"$ref": "#/$defs/one"}}
    return found


def valid_answers(live, count, seed):
    """Asks an untrained model for JSON of so many schemas; returns those that fail."""
    rng = random.Random(seed)
    schemas = [schema(rng) for _ in range(count)]
    answers = [Answer() for _ in schemas]
    jobs = []
    for i, (one, answer) in enumerate(zip(schemas, answers, strict=True)):
        request = Request(
            ids=list(b"Once"),
            settings=sampling.settings(CONTEXT - 4),
            seed=i,
            number=0,
            stop=(256,),
            top=None,
            score=False,
            deadline=time.monotonic() + 600,
            grammar=begin(grammars.schema(one, "schema")),
        )
        jobs.append((request, answer))
    live.engine.submit(jobs)
    wrong = []
    for one, answer in zip(schemas, answers, strict=True):
        answer.wait()
        try:
            fits = answer.reason == "stop" and is_valid(one, json.loads(answer.text))
        except ValueError:
            fits = False
        if not fits:
            wrong.append((one, answer.text, answer.reason))
    return wrong


def test_an_untrained_model_writes_json_of_any_schema(live):
    assert valid_answers(live, 12, seed=1) == []


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_an_untrained_model_writes_json_of_200_schemas(live):
    assert valid_answers(live, 200, seed=2) == []


# ---------------------------------------------------------------- over HTTP


def test_the_client_gets_json_of_its_schema(client):
    form = {"type": "json_schema", "json_schema": {"name": "p", "schema": POINT}}
    asked = {"model": "chatty", "max_tokens": 200, "seed": 3, "response_format": form}
    asked["messages"] = [{"role": "user", "content": "you"}]
    done = client.chat.completions.create(**asked).choices[0]
    assert is_valid(POINT, json.loads(done.message.content))
    assert done.finish_reason == "stop"
    stream = client.chat.completions.create(**asked, stream=True)
    events = [event.choices[0] for event in stream]
    text = "".join(event.delta.content or "" for event in events)
    assert (text, events[-1].finish_reason) == (done.message.content, "stop")


def test_a_json_object_is_one_and_what_has_no_room_is_cut_off(client):
    asked = {
        "model": "tiny",
        "prompt": "Once",
        "extra_body": {"response_format": {"type": "json_object"}},
    }
    close = {str(ord("}")): 100}
    done = client.completions.create(**asked, max_tokens=9, logit_bias=close)
    assert (done.choices[0].text, done.choices[0].finish_reason) == ("{}", "stop")
    done = client.completions.create(**asked, max_tokens=9, seed=1)
    assert done.choices[0].text.startswith("{")
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == 9


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_text_is_one_of_a_list_or_matches_a_regular_expression(client, temperature):
    asked = {"model": "tiny", "prompt": "x", "max_tokens": 50, "n": 3}
    asked["temperature"] = temperature
    texts = ["left", "right", 'né\n"😀']
    extra = {"structured_outputs": {"choice": texts}}
    done = client.completions.create(**asked, extra_body=extra)
    assert all(choice.text in texts for choice in done.choices)
    pattern = r"[a-c]{2}-[0-9]{3}(;|!)"
    extra = {"structured_outputs": {"regex": pattern}}
    done = client.completions.create(**asked, extra_body=extra)
    for choice in done.choices:
        assert re.fullmatch(pattern, choice.text) and choice.finish_reason == "stop"


def test_a_response_has_the_form_of_its_text(client):
    form = {"type": "json_schema", "name": "p", "schema": POINT, "strict": True}
    found = client.responses.create(
        model="chatty", input="you", text={"format": form}, max_output_tokens=200
    )
    assert found.status == "completed" and found.text.format.name == "p"
    assert is_valid(POINT, json.loads(found.output_text))


def test_who_asks_for_no_form_gets_the_same_text_beside_those_who_do(live, client):
    plain = {"model": "tiny", "prompt": "Once", "max_tokens": 60, "temperature": 0}
    programs = live.engine._slots.programs()
    held = {"extra_body": {"structured_outputs": {"json": POINT}}, "temperature": 1}
    with ThreadPoolExecutor() as pool:
        asked = [{}, held, held, held]
        tasks = [pool.submit(client.completions.create, **plain | x) for x in asked]
        texts = [task.result().choices[0].text for task in tasks]
    assert texts[0] == alone("Once", CONTEXT, max_new=60).text
    assert all(is_valid(POINT, json.loads(text)) for text in texts[1:])
    again = client.completions.create(**plain)  # in a slot where somebody had a form
    assert again.choices[0].text == texts[0]
    assert live.engine._slots.programs() == programs  # nobody waits for a compiler


def test_a_text_of_a_seed_is_the_same_whole_and_streamed_and_told(client):
    asked = {"model": "tiny", "prompt": "x", "seed": 4, "max_tokens": 100}
    asked["extra_body"] = {"structured_outputs": {"json": POINT}}
    whole = client.completions.create(**asked, logprobs=2)
    stream = client.completions.create(**asked, stream=True)
    text = "".join(event.choices[0].text for event in stream)
    assert whole.choices[0].text == text
    assert "".join(whole.choices[0].logprobs.tokens) == text


JSON = {"type": "json_object"}


@pytest.mark.parametrize(
    ("changes", "param", "words"),
    [
        (
            {"structured_outputs": {"regex": "("}},
            "structured_outputs.regex",
            "unclosed group",
        ),
        (
            {"structured_outputs": {"json": {"type": "objekt"}}},
            "structured_outputs.json",
            "objekt",
        ),
        (
            {"structured_outputs": {"json": {"uniqueItems": True}}},
            "structured_outputs.json",
            "uniqueItems",
        ),
        (
            {"structured_outputs": {"json": {"x-guidance": {"lenient": True}}}},
            "structured_outputs.json",
            "x-guidance",
        ),
        (
            {"structured_outputs": {"json": {}, "regex": "x"}},
            "structured_outputs",
            "one of the keys",
        ),
        ({"structured_outputs": {"choice": []}}, "structured_outputs.choice", "list"),
        (
            {"structured_outputs": {"grammar": "x"}},
            "structured_outputs.grammar",
            "not a key",
        ),
        ({"guided_json": {}}, "guided_json", "not a key"),
        (
            {"response_format": JSON, "structured_outputs": {"regex": "x"}},
            "structured_outputs.regex",
            "two forms",
        ),
        ({"response_format": JSON, "min_tokens": 3}, "min_tokens", "ends the text"),
        ({"response_format": JSON, "ignore_eos": True}, "ignore_eos", "ends the text"),
        ({"response_format": {"type": "xml"}}, "response_format.type", "json_schema"),
        (
            {"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}},
            "response_format.json_schema.schema",
            "lacks schema",
        ),
    ],
)
def test_a_form_that_cannot_be_is_refused_by_name(live, changes, param, words):
    body = {"model": "tiny", "prompt": "x", **changes}
    status, answer, _ = live.ask("/v1/completions", body)
    assert status == 400 and answer["error"]["param"] == param
    assert words in answer["error"]["message"]


def test_a_schema_that_is_nested_too_deeply_is_refused(live):
    deep = {"type": "string"}
    for _ in range(100):
        deep = {"type": "array", "items": deep}
    body = {"model": "tiny", "structured_outputs": {"json": deep}}
    status, answer, _ = live.ask("/v1/completions", body)
    assert status == 400 and "nested" in answer["error"]["message"]


def test_without_the_package_a_form_is_refused_with_how_to_get_it(live, monkeypatch):
    monkeypatch.setitem(sys.modules, "llguidance", None)
    body = {"model": "tiny", "prompt": "x", "response_format": JSON}
    status, answer, _ = live.ask("/v1/completions", body)
    assert status == 400 and answer["error"]["param"] == "response_format"
    assert "pip install" in answer["error"]["message"]
    assert "llguidance" in answer["error"]["message"]


# ---------------------------------------------------------------- the mask itself


def test_the_end_may_come_just_where_the_text_may_end():
    guide = begin(grammars.regex("ab*", "regex"))
    assert of_bytes(guide) == {"a"} and not guide.complete
    assert guide.push(ord("a")) == "" and of_bytes(guide) == {"b", "end"}
    assert guide.complete and guide.push(256) == "stop"
    guide = begin(grammars.choice(["ab", "ac"], "choice")).copy()
    assert guide.push(ord("a")) == "" and of_bytes(guide) == {"b", "c"}
    assert guide.push(ord("c")) == "stop"  # nothing can follow: it need not be asked


def test_a_copy_goes_on_alone():
    first = begin(grammars.regex("ab", "regex"))
    second = first.copy()
    assert second.push(ord("a")) == "" and of_bytes(second) == {"b"}
    assert of_bytes(first) == {"a"}
    assert first.push(ord("a")) == "" and second.push(ord("b")) == "stop"


def test_json_is_on_one_line():
    """Where any white space may stand, a model may write nothing else for ever."""
    guide = begin(grammars.schema({"type": "array"}, "response_format"))
    wanted = {ord("["): "", ord("1"): "", ord(","): "", ord(" "): ""}
    assert {byte: guide.push(byte) for byte in wanted} == wanted
    assert of_bytes(guide).isdisjoint(" \n\t")


def test_a_vocabulary_that_cannot_write_the_form_is_told():
    letters = tokenizers.train("char", ["ab"])
    with pytest.raises(Refused, match="no token of its vocabulary"):
        begin(grammars.schema({"type": "object"}, "response_format"), letters)
    guide = begin(grammars.choice(["ax", "bx"], "choice"), letters)
    assert guide.push(letters.encode("a")[0]) == "lost"
    assert ENDS["lost"][0] == 400


def test_special_tokens_are_no_text_of_a_form():
    special = TOKENIZER.add_special(["<|x|>"])
    guide = begin(grammars.regex(r"<\|x\|>|y", "regex"), special)
    assert may_come(guide) == {ord("<"), ord("y")}


def test_a_vocabulary_may_be_larger_than_the_tokenizer():
    guide = grammars.begin(grammars.regex(".", "regex"), TOKENIZER, 300, [256])
    assert max(may_come(guide)) < 256 and len(guide.mask_W) == 10


def test_tokens_of_several_characters_are_spelled_as_they_are():
    bpe = tokenizers.train("bpe:280", ["the cat and the hat " * 50])
    assert len(bpe.encode("the hat")) < 5
    guide = begin(grammars.choice(["the hat"], "choice"), bpe)
    for token in bpe.encode("the hat"):
        assert token in may_come(guide)
        ended = guide.push(token)
    assert ended == "stop"
