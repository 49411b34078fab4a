"""What clients send and expect besides plain texts, mostly through OpenAI's own."""

import base64
import functools
import itertools
import json
import urllib.request

import jax
import numpy as np
import openai
import pytest

from gpt_jax import model as models
from gpt_jax import sample, sampling
from gpt_jax.generation import OWN, Generation
from tests import serving
from tests.serving import TOKENIZER, alone, running

CONTEXT = 32
ASK = {"model": "tiny", "prompt": "Once", "max_tokens": 12, "temperature": 0}
CHAT = {"model": "chatty", "messages": [{"role": "user", "content": "you"}]}
# As the makers of `chatty` say; `tiny` is a run of our own.
DRAWN = Generation({**sampling.OFF, "temperature": 0.0, "top_k": 3}, published=True)


@pytest.fixture(scope="module")
def live():
    with running(
        serving.make_engine(CONTEXT, [4], 8),
        key="sesame",
        hosts=["chat.example.org"],
        origins=["https://a.example"],
        access_log=True,
        drawn=DRAWN,
    ) as found:
        yield found


@pytest.fixture(scope="module")
def client(live):
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="sesame", max_retries=0)


def ask(live, path, body=None):
    return live.ask(path, body, key="sesame")


@functools.cache
def plain():
    """The plain model, of one shape: what comes behind is not seen."""
    model, params = serving.build(CONTEXT)
    return jax.jit(lambda ids: model.apply({"params": params}, ids)[0])


def logits_of(ids):
    """The logits after ids, by the plain model."""
    padded = np.zeros((1, CONTEXT), np.int32)
    padded[0, : len(ids)] = ids
    return np.array(plain()(padded)[0, len(ids) - 1])


def greedy(prompt, steps, change):
    """Greedy ids, by recomputing: `change(logits, written)` returns other logits."""
    written = []
    for _ in range(steps):
        logits = change(logits_of([*prompt.encode(), *written]), written)
        written.append(int(logits.argmax()))
    return written


def text(ids):
    return TOKENIZER.decode(ids)


@pytest.mark.parametrize(
    "name, formula",
    [
        ("frequency_penalty", lambda count: 2.0 * count),
        ("presence_penalty", lambda count: 2.0 * (count > 0)),
    ],
)
def test_penalties_follow_the_formula_of_openai(client, name, formula):
    def change(logits, written):
        return logits - formula(np.bincount(written, minlength=len(logits)))

    prompts = ["Once", "a", "xyz", "hello"]
    asked = {**ASK, "prompt": prompts, "max_tokens": 24}
    found = [one.text for one in client.completions.create(**asked).choices]
    fined = client.completions.create(**asked, **{name: 2.0})
    told = [one.text for one in fined.choices]
    assert told == [text(greedy(prompt, 24, change)) for prompt in prompts]
    assert told != found


def test_a_bias_bans_a_token_and_forces_another_and_ends_with_its_row(client):
    first = greedy("Once", 1, lambda logits, _: logits)[0]
    banned = client.completions.create(**ASK, logit_bias={str(first): -100})

    def change(logits, _):
        logits[first] -= 100
        return logits

    assert banned.choices[0].text == text(greedy("Once", 12, change))
    forced = client.completions.create(**ASK, logit_bias={str(ord("q")): 100})
    assert forced.choices[0].text == "q" * 12
    plain = client.completions.create(**ASK)  # in the same slot
    assert plain.choices[0].text == alone("Once", CONTEXT, max_new=12).text


def test_told_probabilities_are_those_before_any_bias(client):
    done = client.completions.create(**ASK, logit_bias={"113": 100}, logprobs=1)
    logp = jax.nn.log_softmax(logits_of(list(b"Once")))
    assert done.choices[0].logprobs.token_logprobs[0] == pytest.approx(
        float(logp[ord("q")]), abs=1e-4
    )


def test_stop_tokens_end_a_text_and_min_tokens_hold_them_off(client):
    ids = greedy("Once", 12, lambda logits, _: logits)
    stop = ids[3]
    at = ids.index(stop)
    extra = {"stop_token_ids": [stop]}
    done = client.completions.create(**ASK, extra_body=extra)
    assert done.choices[0].text == text(ids[:at])
    assert done.choices[0].finish_reason == "stop"

    def change(logits, written):
        if len(written) < 8:
            logits[stop] = -np.inf
        return logits

    held = client.completions.create(**ASK, extra_body={**extra, "min_tokens": 8})
    wanted = greedy("Once", 12, change)
    ends = [i for i, token in enumerate(wanted) if token == stop]
    assert held.choices[0].text == text(wanted[: min(ends, default=12)])
    assert held.usage.completion_tokens >= 8


def test_min_tokens_hold_off_stop_strings_too(client):
    free = alone("Once", CONTEXT, max_new=12).text
    asked = {**ASK, "stop": [free[1]]}
    soon = client.completions.create(**asked)
    assert len(soon.choices[0].text) <= 1
    held = client.completions.create(**asked, extra_body={"min_tokens": 6})
    assert held.usage.completion_tokens >= 6 > soon.usage.completion_tokens
    assert free.startswith(held.choices[0].text) and len(held.choices[0].text) > 1


def test_best_of_answers_with_the_likeliest_of_what_it_draws(client):
    asked = {**ASK, "temperature": 1, "seed": 3, "max_tokens": 6}
    drawn = client.completions.create(**asked, n=4, logprobs=0)
    every = drawn.choices
    mean = [np.mean(choice.logprobs.token_logprobs) for choice in every]
    order = np.argsort(-np.array(mean))
    best = client.completions.create(**asked, n=2, best_of=4)
    found = [choice.text for choice in best.choices]
    assert found == [every[i].text for i in order[:2]]
    assert best.choices[0].logprobs is None
    assert best.usage.completion_tokens == drawn.usage.completion_tokens


@pytest.mark.parametrize(
    ("form", "changes", "param", "words"),
    [
        ("", {"logit_bias": {"400": 1}}, "logit_bias", "vocabulary of 257"),
        ("", {"stop_token_ids": [257]}, "stop_token_ids", "vocabulary of 257"),
        ("", {"min_tokens": 13}, "min_tokens", "max_tokens 12"),
        ("", {"min_tokens": 30, "max_tokens": 31}, "min_tokens", "context of 32"),
        ("", {"max_tokens": 33}, "max_tokens", "context of 32"),
        ("chat/", {"max_completion_tokens": 33}, "max_completion_tokens", "context"),
        ("", {"model": "gpt-9"}, "model", "there is no model"),
        ("", {"prompt": "x" * 33}, "prompt", "context"),
    ],
)
def test_an_error_names_the_field_that_is_to_blame(live, form, changes, param, words):
    body = {**(CHAT if form else ASK), **changes}
    _, answer, _ = ask(live, f"/v1/{form}completions", body)
    assert answer["error"]["param"] == param
    assert words in answer["error"]["message"]


def test_an_answer_without_a_wanted_length_leaves_room_for_another_turn(client):
    done = client.chat.completions.create(**CHAT, temperature=0)
    assert done.choices[0].finish_reason == "length"
    assert done.usage.completion_tokens == CONTEXT // 2


def test_what_is_left_out_is_as_the_models_makers_say_else_off(client, live):
    """The default of OpenAI's API is 1; vLLM has that of generation_config.json."""
    chosen = {**CHAT, "max_tokens": 12, "seed": 5}
    said = client.chat.completions.create(**chosen).choices[0].message.content
    assert said == alone("you\n", CONTEXT, max_new=12).text
    hot = client.chat.completions.create(**chosen, temperature=3)
    how = {"seed": 5, "max_new": 12}
    wanted = alone("you\n", CONTEXT, temperature=3.0, top_k=3, **how).text
    assert hot.choices[0].message.content == wanted
    assert wanted not in (said, alone("you\n", CONTEXT, temperature=3.0, **how).text)
    own = client.completions.create(model="tiny", prompt="Once", max_tokens=12, seed=5)
    assert own.choices[0].text == alone("Once", CONTEXT, temperature=1.0, **how).text
    answer = client.responses.create(model="chatty", input="you", max_output_tokens=2)
    assert (answer.temperature, answer.top_p) == (0, 1)
    suggested = {
        name: ask(live, f"/v1/models/{name}")[1]["suggested"]
        for name in ("tiny", "chatty")
    }
    assert suggested == {"tiny": OWN.settings, "chatty": DRAWN.settings}


# ---------------------------------------------------------------- other paths


def test_embeddings_are_pooled_last_hidden_states_of_length_one(client, live):
    texts = ["Once upon", "x" * 20]
    found = client.embeddings.create(model="tiny", input=texts)
    model, params = serving.build(CONTEXT)
    for pooling, answer in (("mean", found), ("last", None)):
        extra = {"pooling": pooling}
        answer = answer or client.embeddings.create(
            model="tiny", input=texts, extra_body=extra
        )
        for one, words in zip(answer.data, texts, strict=True):
            ids = np.array([list(words.encode())])
            x_TD = np.asarray(models.hidden(model, params, ids).x_BTD[0])
            wanted = x_TD.mean(0) if pooling == "mean" else x_TD[-1]
            wanted = wanted / np.linalg.norm(wanted)
            np.testing.assert_allclose(one.embedding, wanted, atol=1e-4)
    assert found.usage.prompt_tokens == 29
    body = {"model": "tiny", "input": "Once upon", "encoding_format": "base64"}
    _, coded, _ = ask(live, "/v1/embeddings", body)
    numbers = np.frombuffer(base64.b64decode(coded["data"][0]["embedding"]), "<f4")
    np.testing.assert_allclose(numbers, found.data[0].embedding, atol=1e-6)


def test_texts_and_conversations_become_ids_and_texts_again(live):
    _, found, _ = ask(
        live,
        "/tokenize",
        {"model": "tiny", "prompt": "Once", "return_token_strs": True},
    )
    assert found["tokens"] == list(b"Once") and found["count"] == 4
    assert found["token_strs"] == list("Once") and found["max_model_len"] == CONTEXT
    messages = CHAT["messages"]
    _, found, _ = ask(live, "/tokenize", {"model": "chatty", "messages": messages})
    assert text(found["tokens"]) == "you\n"
    long = [{"role": "user", "content": "x" * CONTEXT}]  # whoever shortens it counts
    _, found, _ = ask(live, "/tokenize", {"model": "chatty", "messages": long})
    assert found["count"] == CONTEXT + 1
    _, again, _ = ask(live, "/detokenize", {"model": "tiny", "tokens": [79, 110]})
    assert again == {"prompt": "On"}
    status, wrong, _ = ask(live, "/detokenize", {"model": "tiny", "tokens": [400]})
    assert status == 400 and wrong["error"]["param"] == "tokens"


def test_a_response_is_the_answer_of_a_chat_whole_and_streamed(client):
    asked = {"model": "chatty", "temperature": 0, "max_output_tokens": 10}
    chat = client.chat.completions.create(**CHAT, temperature=0, max_tokens=10)
    whole = client.responses.create(**asked, input="you")
    assert whole.output_text == chat.choices[0].message.content
    assert whole.status == "incomplete" and whole.usage.output_tokens == 10
    assert whole.incomplete_details.reason == "max_output_tokens"
    with client.responses.stream(**asked, input="you") as stream:
        events = list(stream)
    assert events[-1].response.output_text == whole.output_text
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = [e.delta for e in events if e.type == "response.output_text.delta"]
    assert "".join(deltas) == whole.output_text and len(deltas) > 4
    kinds = [kind for kind, _ in itertools.groupby(event.type for event in events)]
    assert kinds == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
        "response.output_text.delta",
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.incomplete",
    ]


def test_a_response_has_instructions_and_the_conversation_so_far(client):
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "you"}]},
        {"role": "assistant", "content": "me"},
        {"role": "user", "content": "so"},
    ]
    found = client.responses.create(
        model="chatty",
        instructions="hi",
        input=items,
        temperature=0,
        max_output_tokens=5,
        include=["message.output_text.logprobs"],
        top_logprobs=2,
    )
    messages = [{"role": "system", "content": "hi"}, *items]
    chat = client.chat.completions.create(
        model="chatty", messages=messages, temperature=0, max_tokens=5
    )
    assert found.output_text == chat.choices[0].message.content
    told = found.output[0].content[0].logprobs
    assert "".join(token.token for token in told) == found.output_text
    assert all(len(token.top_logprobs) == 2 for token in told)


# ---------------------------------------------------------------- heads


def headers_of(live, path, method="GET", **headers):
    request = urllib.request.Request(live.url + path, headers=headers, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_every_answer_has_an_id_of_its_own_or_the_clients(live, client):
    ids = {headers_of(live, "/healthz")[1]["X-Request-Id"] for _ in range(2)}
    assert len(ids) == 2 and all(one.startswith("req_") for one in ids)
    mine = {"X-Request-Id": "mine-7"}
    assert headers_of(live, "/healthz", **mine)[1]["X-Request-Id"] == "mine-7"
    strange = {"X-Request-Id": "x" * 200}
    assert headers_of(live, "/nowhere", **strange)[1]["X-Request-Id"] != "x" * 200
    assert client.completions.create(**ASK)._request_id.startswith("req_")


def test_a_fingerprint_is_that_of_the_model_and_the_same_each_time(client):
    first, again = (client.completions.create(**ASK) for _ in range(2))
    chat = client.chat.completions.create(**CHAT, max_tokens=1)
    assert first.system_fingerprint == again.system_fingerprint
    assert first.system_fingerprint.startswith("fp_")
    assert chat.system_fingerprint != first.system_fingerprint  # another template


def test_a_key_is_asked_for_as_http_does(live):
    status, headers, _ = headers_of(live, "/v1/models")
    assert status == 401 and headers["WWW-Authenticate"] == "Bearer"
    for shown in ("bearer sesame", "BEARER sesame", "Bearer  sesame"):
        assert headers_of(live, "/v1/models", Authorization=shown)[0] == 200
    for shown in ("Basic sesame", "sesame", "Bearer sesame2", "Bearer"):
        assert headers_of(live, "/v1/models", Authorization=shown)[0] == 401


def test_the_server_is_asked_by_the_names_that_it_was_given(live):
    for host in ("chat.example.org", "CHAT.example.org:80", "localhost", "[::1]:9"):
        assert headers_of(live, "/healthz", Host=host)[0] == 200
    for host in ("evil.example", "a.chat.example.org", ""):
        assert headers_of(live, "/healthz", Host=host)[0] == 403


def test_pages_of_other_sites_may_ask_where_they_were_allowed(live):
    asks = {"Access-Control-Request-Method": "POST"}
    asks["Access-Control-Request-Headers"] = "authorization,content-type"
    path, told = "/v1/completions", "Access-Control-Allow-Origin"
    good = headers_of(live, path, "OPTIONS", Origin="https://a.example", **asks)
    assert good[0] == 200 and good[1][told] == "https://a.example"
    bad = headers_of(live, path, "OPTIONS", Origin="https://b.example", **asks)
    assert bad[0] == 400 and told not in bad[1]
    plain = headers_of(live, "/healthz", Origin="https://a.example")
    assert plain[1][told] == "https://a.example"
    assert told not in headers_of(live, "/healthz", Origin="https://b.example")[1]


def test_every_answer_is_noted_in_a_line_without_what_was_sent(live):
    number = {"X-Request-Id": "noted-1", "Authorization": "Bearer sesame"}
    headers_of(live, "/nowhere%0Aelse?secret=1", **number)
    ask(live, "/v1/completions", {**ASK, "prompt": "hush"})
    serving.wait_until(lambda: any("noted-1" in line for line in live.lines), 10)
    (line,) = [line for line in live.lines if "noted-1" in line]
    assert line.startswith('127.0.0.1 "GET /nowhere\\nelse" 404 0.')
    serving.wait_until(lambda: "/v1/completions" in live.lines[-1], 10)
    assert not any("hush" in line or "secret" in line for line in live.lines)
    assert not any("sesame" in line for line in live.lines)


def test_no_answer_is_taken_for_another_type_or_framed(live):
    assert headers_of(live, "/healthz")[1]["X-Content-Type-Options"] == "nosniff"
    page = headers_of(live, "/")[1]
    assert "frame-ancestors 'none'" in page["Content-Security-Policy"]


@pytest.mark.parametrize("path", ["/", "/healthz", "/health", "/readyz", "/version"])
def test_what_can_be_got_has_a_head(live, path):
    got, head = headers_of(live, path), headers_of(live, path, "HEAD")
    assert got[0] == head[0] == 200 and head[2] == b"" != got[2]
    assert head[1]["Content-Length"] == str(len(got[2]))


def test_another_method_is_told_which_there_is(live):
    status, headers, body = headers_of(
        live, "/v1/completions", Authorization="Bearer sesame"
    )
    assert status == 405 and headers["Allow"] == "POST"
    assert json.loads(body)["error"]["code"] == "wrong_method"


def test_the_sampler_and_the_server_share_their_penalties():
    """What `sample.texts` writes with a penalty is what the formula says."""
    model, params = serving.build(CONTEXT)
    (done,) = sample.texts(
        model=model,
        params=params,
        tokenizer=TOKENIZER,
        prompts=["Once"],
        count=1,
        seed=0,
        stop=(),
        **sampling.settings(12, temperature=0.0, frequency_penalty=2.0),
    )

    def change(logits, written):
        return logits - 2.0 * np.bincount(written, minlength=len(logits))

    assert done.ids == greedy("Once", 12, change)
