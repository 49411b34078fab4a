"""Facts about tools: what a template is told, what must be called, what was called.

Models are untrained; where one must call a tool a mask makes it. Templates are small
ones of the three usual forms: a call between marks (Hermes, Qwen), several between two
(Mistral) and JSON alone (Llama).
"""

import json
import random

import openai
import pytest
from jsonschema_rs import is_valid

from gpt_jax import chat
from gpt_jax.chat import Call, Message, ToolForm
from gpt_jax.serve import fields, tools, wire
from gpt_jax.serve.flow import Spent
from gpt_jax.serve.responses import Response
from tests import serving
from tests.serving import TOKENIZER, running

CONTEXT = 1024
FORMS = fields.forms(serving.LIMITS)
MARKED = """{% if tools %}Tools:
{% for tool in tools %}{{ tool | tojson }}
{% endfor %}Call one as <tool_call>{"name": ..., "arguments": ...}</tool_call>
{% endif %}{% for m in messages %}{{ m.role }}: {{ m.content }}
{%- for c in m.tool_calls or [] %}{{ '\\n' if m.content }}<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
LISTED = """{% for tool in tools or [] %}{{ tool | tojson }}
{% endfor %}{% for m in messages %}{{ m.role }}: {% if m.tool_calls %}[TOOL_CALLS] [
{%- for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments":{{ ' ' }}
{{- c.function.arguments | tojson }}{{ '}, ' if not loop.last else '}]' }}{% endfor %}
{%- else %}{{ m.content }}{% endif %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
ALONE = """{% for tool in tools or [] %}{{ tool.function | tojson }}
{% endfor %}{% for m in messages %}{% if m.role == 'tool' %}{{ raise_exception('no') }}
{% endif %}{{ m.role }}: {% if m.tool_calls %}{% set call = m.tool_calls[0].function %}
{"name": "{{ call.name }}", "parameters": {{ call.arguments | tojson }}}{% else -%}
{{ m.content }}{% endif %}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
NO_TOOLS = """{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}assistant: {% endif %}"""
SUM = {
    "type": "object",
    "properties": {
        "left": {"type": "integer", "minimum": 0, "maximum": 99},
        "sign": {"$ref": "#/$defs/sign"},
    },
    "required": ["left", "sign"],
    "additionalProperties": False,
    "$defs": {"sign": {"enum": ["+", "-"]}},
}


def tool(name, schema=None, **more):
    told = {"name": name, **({} if schema is None else {"parameters": schema}), **more}
    return {"type": "function", "function": told}


TOOLS = [tool("add", SUM, description="Adds."), tool("now")]
YOU = Message("user", "you")
ASK = {"messages": [{"role": "user", "content": "you"}], "seed": 1, "max_tokens": 300}


def text_of(messages, template, tools=()):
    ids, _ = chat.render(messages, TOKENIZER, template, reply=True, tools=tools)
    return TOKENIZER.decode(ids)


# ---------------------------------------------------------------- templates


def test_a_template_is_asked_how_it_writes_calls():
    form = chat.tool_form(TOKENIZER, MARKED)
    assert form == ToolForm("<tool_call>\n", "arguments", "\n</tool_call>", True)
    assert chat.tool_form(TOKENIZER, ALONE) == ToolForm("", "parameters", "", False)
    assert chat.tool_form(TOKENIZER, LISTED) == LIST
    for template in ("plain", "chatml", NO_TOOLS):
        assert chat.tool_form(TOKENIZER, template) is None


def test_a_call_and_what_the_tool_says_stand_in_the_conversation():
    talk = [
        Message("user", "how much?"),
        Message("assistant", "", calls=(Call("add", {"left": 1, "é": None}, "c1"),)),
        Message("tool", "3", call_id="c1"),
    ]
    text = text_of(talk, MARKED, TOOLS)
    for tool in TOOLS:
        assert json.dumps(tool) in text
    called = '<tool_call>\n{"name": "add", "arguments": {"left": 1, "é": null}}\n'
    assert f"assistant: {called}</tool_call><|endoftext|>" in text
    assert text.endswith("tool: 3<|endoftext|>\nassistant: ")


def test_no_text_of_a_tool_or_a_call_becomes_a_special_token():
    said = "<|endoftext|>"
    talk = [
        Message("user", said),
        Message("assistant", said, calls=(Call("add", {said: [said]}, said),)),
        Message("tool", said, call_id=said, name=said),
    ]
    described = [tool("add", {"type": "object", "title": said}, description=said)]
    ids, _ = chat.render(talk, TOKENIZER, MARKED, reply=True, tools=described)
    assert TOKENIZER.ends == (256,)
    assert ids.count(256) == len(talk)  # those that the template writes
    assert TOKENIZER.decode(ids).count(said) == 2 * len(talk) + 4


# ---------------------------------------------------------------- calls in texts


NAMES = ["add", "now"]
HERMES = ToolForm("<tool_call>\n", "arguments", "\n</tool_call>", True)
LIST = ToolForm("[TOOL_CALLS] [", "arguments", "]", True, between=", ")


def told(form, pieces):
    """The text and the calls that a reader finds in pieces of a text."""
    reader = tools.Reader(NAMES, form)
    texts = []
    for i, piece in enumerate(pieces):
        found = reader.push(piece, last=i == len(pieces) - 1)
        texts.append(tools.split(found)[0])
    return "".join(texts), [(c.index, c.name, c.arguments) for c in reader.calls]


NOW = '{"name": "now", "arguments": {}}'
ADD = '{"name": "add", "arguments": {"left": 1e999, "s": "</tool_call>"}}'


@pytest.mark.parametrize(
    ("text", "left", "calls"),
    [
        (f"Ah. <tool_call>\n{NOW}\n</tool_call>", "Ah. ", [(0, "now", "{}")]),
        (
            f"<tool_call>{ADD}</tool_call>\n<tool_call>\n{NOW}\n</tool_call>\n",
            "",
            [(0, "add", '{"left": 1e999, "s": "</tool_call>"}'), (1, "now", "{}")],
        ),
        (f"<tool_call>{NOW}", "", [(0, "now", "{}")]),  # cut off by a stop string
        ("<tool_call>{bad}</tool_call>", None, []),
        (f"<tool_call>{NOW[:-1]}", None, []),
        (f"<tool_call>{NOW} and</tool_call>", None, []),
        ('<tool_call>{"name": "other", "arguments": {}}</tool_call>', None, []),
        ('<tool_call>{"name": "now", "arguments": [1]}</tool_call>', None, []),
        ('<tool_call>{"name": ["now"], "arguments": {}}</tool_call>', None, []),
        ("<tool_call>[1]</tool_call>", None, []),
        (NOW, None, []),
        ("<tool_ca", None, []),
    ],
)
def test_a_call_between_marks_is_found_and_all_else_is_text(text, left, calls):
    assert told(HERMES, [text]) == (text if left is None else left, calls)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (f" {NOW}\n", [(0, "now", "{}")]),
        (f"{NOW} and", []),
        (f"I {NOW}", []),
        ("{", []),
        (" ", []),
        ("", []),
    ],
)
def test_json_alone_is_a_call_where_there_is_nothing_else(text, calls):
    assert told(tools.PLAIN, [text]) == ("" if calls else text, calls)


@pytest.mark.parametrize(
    ("text", "left", "calls"),
    [
        (f"[TOOL_CALLS] [{NOW}]", "", 1),
        (f"Ah. [TOOL_CALLS] [{NOW}, {ADD},{NOW}] so", "Ah. so", 3),
        (f"[TOOL_CALLS] [{NOW}, {ADD}", "", 2),  # cut off
        (f"[TOOL_CALLS] [{NOW}, {{bad}}]", ", {bad}]", 1),
        (f"[TOOL_CALLS] [{NOW}] {ADD}", ADD, 1),
        (f"[TOOL_CALLS] {NOW}", None, 0),
        (f"{NOW}, {NOW}", None, 0),
    ],
)
def test_several_calls_between_two_marks_are_found(text, left, calls):
    found, called = told(LIST, [text])
    assert (found, len(called)) == (text if left is None else left, calls)
    assert [name for _, name, _ in called] == ["now", "add", "now"][:calls]


def test_a_stream_finds_what_is_found_in_the_whole_text():
    rng, found = random.Random(0), 0
    parts = ["hi ", "<tool_call>", "</tool_call>", "\n", NOW, ADD, "{bad", "<too", '"']
    parts += ["[TOOL_CALLS] [", ", ", "]"]
    for _ in range(2000):
        text = "".join(rng.choice(parts) for _ in range(rng.randint(1, 7)))
        ends = sorted(rng.choices(range(len(text) + 1), k=rng.randint(1, 20)))
        pieces = [text[a:b] for a, b in zip([0, *ends], [*ends, len(text)])]
        for form in (HERMES, LIST, tools.PLAIN):
            whole = told(form, [text])
            assert told(form, pieces) == whole
            found += len(whole[1])
    assert found > 50


# ---------------------------------------------------------------- over HTTP


@pytest.fixture(scope="module")
def live():
    engine = serving.make_engine(CONTEXT, [4], 64)
    with running(engine, templates=(MARKED, NO_TOOLS)) as found:
        yield found


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0)


@pytest.fixture
def guided():
    pytest.importorskip("llguidance", reason="needs llguidance: the extra `structured`")


@pytest.mark.parametrize("model", ["tiny", "chatty"])
@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", {"add", "now"}),
        ({"type": "function", "function": {"name": "add"}}, {"add"}),
    ],
)
def test_a_tool_that_must_be_called_is(client, guided, model, choice, names):
    done = client.chat.completions.create(
        **ASK, model=model, tools=TOOLS, tool_choice=choice
    )
    (call,) = done.choices[0].message.tool_calls
    assert done.choices[0].finish_reason == "tool_calls"
    assert done.choices[0].message.content is None
    assert call.type == "function" and call.function.name in names
    arguments = json.loads(call.function.arguments)
    assert is_valid(SUM, arguments) if call.function.name == "add" else arguments == {}


def test_a_stream_carries_the_calls_of_the_whole_answer(client, guided):
    asked = {**ASK, "model": "tiny", "tools": TOOLS[:1], "tool_choice": "required"}
    whole = client.chat.completions.create(**asked).choices[0]
    with client.chat.completions.stream(**asked) as stream:
        streamed = stream.get_final_completion().choices[0]
    (one,), (other,) = whole.message.tool_calls, streamed.message.tool_calls
    assert one.function.arguments == other.function.arguments
    assert one.function.name == other.function.name == "add"
    assert streamed.finish_reason == "tool_calls" and other.id


def test_a_call_without_room_is_cut_off_and_told_as_text(client, guided):
    asked = {**ASK, "model": "tiny", "tools": TOOLS, "tool_choice": "required"}
    done = client.chat.completions.create(**asked | {"max_tokens": 20}).choices[0]
    assert done.finish_reason == "length" and done.message.tool_calls is None
    assert done.message.content.startswith("<tool_call>")


def test_a_call_and_its_answer_are_a_part_of_the_conversation(client, guided, live):
    asked = {**ASK, "model": "tiny", "tools": TOOLS, "temperature": 0}
    first = client.chat.completions.create(**asked, tool_choice="required")
    message = first.choices[0].message
    (call,) = message.tool_calls
    heard = {"role": "tool", "tool_call_id": call.id, "content": "42"}
    asked["messages"] = [*ASK["messages"], message, heard]
    asked["max_tokens"] = 5
    again = client.chat.completions.create(**asked, tool_choice="none")
    talk = [
        YOU,
        Message(
            "assistant",
            "",
            calls=(Call(call.function.name, json.loads(call.function.arguments)),),
        ),
        Message("tool", "42"),
    ]
    wanted = serving.alone(text_ids(talk), CONTEXT, max_new=5)
    assert again.choices[0].message.content == wanted.text


def text_ids(talk):
    return chat.render(talk, TOKENIZER, MARKED, reply=True)[0]


def test_where_the_template_writes_no_tools_auto_answers_in_text(client):
    asked = {**ASK, "model": "chatty", "max_tokens": 20}
    plain = client.chat.completions.create(**asked)
    for more in ({}, {"tool_choice": "auto"}, {"tool_choice": "none"}):
        done = client.chat.completions.create(**asked, tools=TOOLS, **more)
        assert done.choices[0].message.content == plain.choices[0].message.content
        assert done.choices[0].message.tool_calls is None
        assert done.usage.prompt_tokens == plain.usage.prompt_tokens


def test_with_none_a_model_is_told_of_no_tools_and_with_auto_it_is(client):
    asked = {**ASK, "model": "tiny", "max_tokens": 20}
    plain = client.chat.completions.create(**asked)
    none = client.chat.completions.create(**asked, tools=TOOLS, tool_choice="none")
    auto = client.chat.completions.create(**asked, tools=TOOLS)
    assert none.choices[0].message.content == plain.choices[0].message.content
    assert none.usage.prompt_tokens == plain.usage.prompt_tokens
    told = chat.render([YOU], TOKENIZER, MARKED, reply=True, tools=TOOLS)[0]
    assert auto.usage.prompt_tokens == len(told) > plain.usage.prompt_tokens


def test_a_strict_tool_may_be_called_but_not_otherwise_than_its_schema_says(guided):
    offered = tools.read([tool("add", SUM, strict=True)], "auto", None)
    free = "a < b, <tool and {}"
    assert taken(free, offered) == (free, True)
    good = '{"name": "add", "arguments": {"left": 7,"sign": "-"}}'
    call = f"<tool_call>\n{good}\n</tool_call>"
    called = f"So {call}\nand {call}"
    assert taken(called, offered) == (called, True)
    name = '<tool_call>\n{"name": "'
    assert taken(name + "x", offered) == (name, False)
    assert taken(call.replace("7", "-1"), offered)[0].endswith('"left": ')
    listed = f"So [TOOL_CALLS] [{good}, {good}]"
    assert taken(listed, offered, LIST) == (listed, True)
    one = tools.read([tool("add", SUM, strict=True)], "auto", False)
    assert taken(listed, one, LIST)[0].endswith("}")
    loose = tools.read([tool("add", SUM), tool("now")], "auto", None)
    assert not loose.strict  # what a model calls then is its own


def test_a_call_that_must_be_has_its_name_and_an_object_and_nothing_around(guided):
    offered = tools.read([tool("any", {}), tool("now")], NAMED, None)
    name = '<tool_call>\n{"name": "'
    assert taken("x", offered) == ("", False)
    assert taken(name + "now", offered) == (name, False)
    arguments = name + 'any", "arguments": '
    assert taken(arguments + "[1]", offered) == (arguments, False)
    call = arguments + '{"x": [1]}}\n</tool_call>'
    assert taken(call, offered) == (call, True)


NAMED = {"type": "function", "function": {"name": "any"}}


def taken(text, offered, form=HERMES):
    """What of a text the grammar of tools takes, and whether it may end there."""
    from gpt_jax.serve import grammars

    grammar = tools.grammar(offered, form, {})
    guide = grammars.begin(grammar, TOKENIZER, 257, [256])
    for i, byte in enumerate(text.encode()):
        if not guide.mask_W[byte // 32] >> (byte % 32) & 1:
            return text[:i], guide.complete
        guide.push(byte)
    return text, guide.complete


def test_marks_that_are_special_tokens_are_called_by_their_ids(guided):
    from gpt_jax.serve import grammars

    special = TOKENIZER.add_special(["<tool_call>", "</tool_call>"])
    for choice in ("required", "auto"):
        offered = tools.read([tool("now", strict=True)], choice, None)
        grammar = tools.grammar(offered, HERMES, special.specials)
        guide = grammars.begin(grammar, special, special.vocab_size, [256])
        ids = [
            special.special_id("<tool_call>"),
            *special.encode(f"\n{NOW}\n"),
            special.special_id("</tool_call>"),
        ]
        reasons = [guide.push(token) for token in ids]
        assert reasons[:-1] == [""] * (len(ids) - 1)
        assert guide.complete and reasons[-1] == ("stop" if choice != "auto" else "")


# ---------------------------------------------------------------- responses


def flat(found):
    """A tool, or the choice of one, as a response has it."""
    return {"type": "function", **found["function"]}


FLAT = [flat(one) for one in TOOLS]
RESPOND = {"model": "tiny", "input": "you", "max_output_tokens": 300}
RESPOND |= {"extra_body": {"seed": 1}}


@pytest.mark.parametrize("model", ["tiny", "chatty"])
def test_a_response_calls_as_a_chat_does_whole_and_streamed(client, guided, model):
    choice = {"type": "function", "function": {"name": "add"}}
    asked = {**RESPOND, "model": model, "tools": FLAT, "tool_choice": flat(choice)}
    (call,) = (whole := client.responses.create(**asked)).output
    chat = client.chat.completions.create(
        **ASK, model=model, tools=TOOLS, tool_choice=choice
    )
    (wanted,) = chat.choices[0].message.tool_calls
    assert (call.name, call.arguments) == ("add", wanted.function.arguments)
    assert call.type == "function_call" and call.status == whole.status == "completed"
    assert whole.usage.input_tokens == chat.usage.prompt_tokens
    assert whole.tool_choice.name == "add" and whole.tools[0].parameters == SUM
    with client.responses.stream(**asked) as stream:
        events = list(stream)
    (streamed,) = stream.get_final_response().output
    assert (streamed.name, streamed.arguments) == (call.name, call.arguments)
    assert [event.sequence_number for event in events] == list(range(len(events)))
    added, delta, done = events[2:5]
    assert added.item.arguments == "" and added.item.call_id == streamed.call_id
    assert delta.delta == delta.snapshot == done.arguments == call.arguments
    assert added.item.id == delta.item_id == done.item_id == streamed.id
    assert [event.type.removeprefix("response.") for event in events] == [
        *("created", "in_progress", "output_item.added"),
        *("function_call_arguments.delta", "function_call_arguments.done"),
        *("output_item.done", "completed"),
    ]


def test_a_response_goes_on_from_calls_and_from_what_tools_said(client, guided):
    asked = {**RESPOND, "tools": FLAT, "temperature": 0}
    first = client.responses.create(**asked, tool_choice="required")
    (call,) = first.output
    before = {"role": "assistant", "content": "Hm."}
    heard = {"type": "function_call_output", "call_id": call.call_id, "output": "42"}
    asked["input"] = [{"role": "user", "content": "you"}, before, *first.output, heard]
    asked["max_output_tokens"] = 5
    again = client.responses.create(**asked, tool_choice="none")
    talk = [
        YOU,
        Message(
            "assistant", "Hm.", calls=(Call(call.name, json.loads(call.arguments)),)
        ),
        Message("tool", "42"),
    ]
    assert again.output_text == serving.alone(text_ids(talk), CONTEXT, max_new=5).text


def items(live, pieces):
    """The output of a response whose text comes in these pieces, and its events."""
    asked = {"input": "you", "tools": FLAT}
    ask = wire.response(FORMS["response"], asked, serving.LIMITS)
    made = Response(ask, "tiny", live.models["tiny"], [[1]])
    events = made.opening()
    for i, piece in enumerate(pieces):
        events += made.pieces(0, piece, [], 0, "stop" * (i == len(pieces) - 1))
    (end,) = made.closing(Spent(3, [0]))
    return end["response"]["output"], [*events, end]


def test_texts_and_calls_of_a_response_stand_in_the_order_of_their_writing(live):
    call = f"<tool_call>\n{NOW}\n</tool_call>"
    text = f"Ah. {call}\n{call} So."
    found, _ = items(live, [text])
    wanted = [("message", "Ah. "), ("function_call", "{}"), ("function_call", "{}")]
    wanted += [("message", "So.")]

    def shown(output):
        texts = [
            one["content"][0]["text"] if one["type"] == "message" else one["arguments"]
            for one in output
        ]
        return [*zip([one["type"] for one in output], texts, strict=True)]

    assert shown(found) == wanted
    streamed, events = items(live, [*text])
    assert shown(streamed) == wanted
    assert [one["status"] for one in streamed] == ["completed"] * 4
    done = [e["item"] for e in events if e["type"] == "response.output_item.done"]
    assert done == streamed
    places = [event["output_index"] for event in events if "output_index" in event]
    assert places == sorted(places) and {*places} == {0, 1, 2, 3}
    assert shown(items(live, [""])[0]) == [("message", "")]


@pytest.mark.parametrize(
    ("model", "changes", "param", "words"),
    [
        ("tiny", {"tools": [FLAT[0]] * 2}, "tools[1].name", "earlier tool"),
        ("tiny", {"tools": [TOOLS[0]]}, "tools[0].function", "not a key"),
        ("tiny", {"tools": [{"type": "web_search"}]}, "tools[0].type", "function"),
        (
            "tiny",
            {"tools": [flat(tool("a", {"type": "array"}))]},
            "tools[0].parameters.type",
            'must be "object", not "array"',
        ),
        ("tiny", {"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            "tiny",
            {"tools": FLAT, "tool_choice": {"type": "function", "name": "sub"}},
            "tool_choice.name",
            "add, now",
        ),
        (
            "tiny",
            {"tools": FLAT, "text": {"format": {"type": "json_object"}}},
            "text.format",
            "tool_choice to none",
        ),
        (
            "tiny",
            {"tools": FLAT, "include": ["message.output_text.logprobs"]},
            "include",
            "beside tools",
        ),
        (
            "tiny",
            {
                "input": [
                    {"type": "function_call_output", "call_id": "7", "output": "x"}
                ]
            },
            "input[0].call_id",
            "no function_call before it",
        ),
        (
            "chatty",
            {
                "input": [
                    {
                        "type": "function_call",
                        "call_id": "7",
                        "name": "add",
                        "arguments": "{}",
                    }
                ]
            },
            "input",
            "chat template",
        ),
        ("tiny", {"input": [{"type": "reasoning"}]}, "input[0].type", "function_call"),
    ],
)
def test_a_response_refuses_by_name_what_cannot_be(live, model, changes, param, words):
    body = {"model": model, "input": "you", **changes}
    status, answer, _ = live.ask("/v1/responses", body)
    assert status == 400 and answer["error"]["param"] == param
    assert words in answer["error"]["message"]


CALLED = {"id": "1", "type": "function"}
CALLED |= {"function": {"name": "add", "arguments": '{"left": 1}'}}


@pytest.mark.parametrize(
    ("model", "changes", "param", "words"),
    [
        ("tiny", {"tools": [TOOLS[0]] * 2}, "tools[1].function.name", "earlier tool"),
        (
            "tiny",
            {"tools": [tool("a b")]},
            "tools[0].function.name",
            "letters, digits",
        ),
        (
            "tiny",
            {"tools": [tool("a", {"type": "array"})]},
            "tools[0].function.parameters.type",
            'must be "object", not "array"',
        ),
        (
            "tiny",
            {"tools": [tool("a", strict=True)], "ignore_eos": True},
            "ignore_eos",
            "a strict tool",
        ),
        ("tiny", {"tools": [{"type": "web"}]}, "tools[0].type", "function"),
        ("tiny", {"tool_choice": "required"}, "tool_choice", "no tools"),
        (
            "tiny",
            {
                "tools": TOOLS,
                "tool_choice": {"type": "function", "function": {"name": "sub"}},
            },
            "tool_choice.function.name",
            "add, now",
        ),
        (
            "tiny",
            {"tools": TOOLS, "response_format": {"type": "json_object"}},
            "response_format",
            "tool_choice to none",
        ),
        (
            "tiny",
            {"tools": TOOLS, "tool_choice": "required", "min_tokens": 1},
            "min_tokens",
            "tool_choice",
        ),
        (
            "chatty",
            {"messages": [{"role": "assistant", "tool_calls": [CALLED]}]},
            "messages[0].tool_calls",
            "chat template",
        ),
        (
            "chatty",
            {"messages": [{"role": "tool", "content": "x"}]},
            "messages[0].role",
            "chat template",
        ),
        (
            "tiny",
            {
                "messages": [
                    {
                        "role": "assistant",
                        "tool_calls": [
                            {"function": {"name": "add", "arguments": "[1]"}}
                        ],
                    }
                ]
            },
            "messages[0].tool_calls[0].function.arguments",
            "JSON object",
        ),
        ("tiny", {"functions": [{}]}, "functions", "not supported"),
    ],
)
def test_what_cannot_be_is_refused_by_name(live, model, changes, param, words):
    body = {"model": model, **ASK, **changes}
    status, answer, _ = live.ask("/v1/chat/completions", body)
    assert status == 400 and answer["error"]["param"] == param
    assert words in answer["error"]["message"]
