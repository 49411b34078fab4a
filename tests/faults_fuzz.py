"""Requests that schemathesis makes from our own OpenAPI description, right and wrong.

And bodies that no description would think of. Run by `make test-faults`; its name keeps
it out of `make test`.
"""

import json
import urllib.error
import urllib.request

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jsonschema_rs import is_valid
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from tests import serving
from tests.serving import running

pytestmark = [pytest.mark.timeout(900)]
EXAMPLES = 300
HEADERS = {"Content-Type": "application/json"}
PATHS = ("/v1/completions", "/v1/chat/completions")
CHECKS = [
    not_a_server_error,
    checks.status_code_conformance,
    checks.content_type_conformance,
    checks.response_schema_conformance,
]
fuzz = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[
        *(HealthCheck.too_slow, HealthCheck.filter_too_much),
        *(HealthCheck.data_too_large, HealthCheck.large_base_example),
    ],
)


@pytest.fixture(scope="module")
def live():
    with running(serving.make_engine(32, [8], 64)) as found:
        yield found


@pytest.fixture(scope="module")
def described(live):
    return schemathesis.openapi.from_url(f"{live.url}/openapi.json")


@pytest.mark.fault(26, injections=EXAMPLES)
@pytest.mark.parametrize("path", PATHS)
def test_requests_that_break_the_description_are_refused_as_it_says(described, path):
    strategy = described[path]["POST"].as_strategy(GenerationMode.NEGATIVE)

    @fuzz
    @given(case=strategy)
    def refused(case):
        case.call_and_validate(checks=[*CHECKS, checks.negative_data_rejection])

    refused()


@pytest.mark.fault(26, injections=0)  # right requests
@pytest.mark.parametrize("path", PATHS)
def test_requests_that_fit_the_description_are_answered_as_it_says(described, path):
    seen = set()

    @fuzz
    @given(case=described[path]["POST"].as_strategy(GenerationMode.POSITIVE))
    def answered(case):
        body = dict(case.body) if isinstance(case.body, dict) else {}
        for name in ("max_tokens", "max_completion_tokens"):
            if isinstance(body.get(name), int):  # more than the context is refused
                body[name] %= 33
        body["model"] = "chatty" if "chat" in path else "tiny"  # one that can
        case.body = body
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    answered()
    assert 200 in seen


VALUES = [
    *(None, True, False, 0, 1, -1, 1.5, 2**70, "", "x", "x" * 300),
    *([], ["x"], [1], [""], [[1]], [[]], [-1], [{}], {}, {"a": 1}),
]
VALID = {
    "Completion": {"model": "tiny", "prompt": "x", "max_tokens": 1},
    "Chat": {
        "model": "chatty",
        "messages": [{"role": "user", "content": "x"}],
        "max_tokens": 1,
    },
}


@pytest.mark.fault(26)
@pytest.mark.parametrize("form", VALID)
def test_a_field_is_refused_just_when_the_description_refuses_it(
    live, described, form, record_property
):
    path = PATHS[0] if form == "Completion" else PATHS[1]
    fields = described.raw_schema["components"]["schemas"][form]["properties"]
    cases = []
    for name, rule in fields.items():
        for value in VALUES:
            if (name, value) in (("model", None), ("prompt", "x" * 300)):
                continue  # two are served here, and with short contexts
            # null is the same as leaving a field out: of those that must be there too
            fits = value is not None and is_valid(rule, value)
            fits |= value is None and name != "messages"
            cases.append((name, value, fits))
    record_property("injections", sum(not fits for _, _, fits in cases))
    for name, value, fits in cases:
        body = json.dumps({**VALID[form], name: value}).encode()
        status, answer = post(live, path, body)
        assert (status == 200) == fits, (name, value, status, answer)


@pytest.mark.fault(26, injections=0)  # right requests
@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/{name}", "/metrics"])
def test_other_paths_answer_as_the_description_says(described, path):
    @fuzz
    @given(case=described[path]["GET"].as_strategy())
    def answered(case):
        case.call_and_validate(checks=CHECKS)

    answered()


def post(live, path, body):
    request = urllib.request.Request(live.url + path, body, HEADERS)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)
NAMES = st.sampled_from(["prompt", "messages", "stop", "n", "stream", "logprobs", "x"])


@pytest.mark.fault(26, injections=EXAMPLES)
@pytest.mark.parametrize("path", PATHS)
def test_any_bytes_get_an_answer_that_is_documented(live, described, path):
    known = {int(s) for s in described.raw_schema["paths"][path]["post"]["responses"]}
    values = JSON.map(lambda x: json.dumps(x).encode())
    objects = st.dictionaries(NAMES, JSON).map(lambda x: json.dumps(x).encode())

    @fuzz
    @given(st.binary(max_size=200) | values | objects)
    def answered(body):
        status, answer = post(live, path, body)
        assert status in known and status < 500
        if status != 200:
            assert json.loads(answer)["error"]["message"]

    answered()
    assert post(live, PATHS[0], b'{"model": "tiny", "max_tokens": 1}')[0] == 200
