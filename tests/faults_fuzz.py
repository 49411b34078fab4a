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
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi import checks

from gpt_jax.serve import fields, server
from tests import serving
from tests.serving import running

pytestmark = [pytest.mark.timeout(900)]
EXAMPLES = 300
HEADERS = {"Content-Type": "application/json"}
PATHS = tuple(fields.PATHS.values())
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
def live(tmp_path_factory):
    """Texts are written by one model and looked at in another: a run."""
    run = serving.byte_run(tmp_path_factory.mktemp("runs") / "bytes")
    look = server.open_runs({"a": run}, step=None, weights="", sizes=[1], queue=1)["a"]
    with running(serving.make_engine(32, [8], 64), look=look.look) as found:
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
    # Every length of a text is a program of the microscope's.
    tries = settings(fuzz, max_examples=20) if path == "/v1/look" else fuzz

    @tries
    @given(case=described[path]["POST"].as_strategy(GenerationMode.POSITIVE))
    def answered(case):
        body = dict(case.body) if isinstance(case.body, dict) else {}
        for name in ("max_tokens", "max_completion_tokens", "max_output_tokens"):
            if isinstance(body.get(name), int):  # more than the context is refused
                body[name] = 1 + body[name] % 32
        for name in ("min_tokens", "logit_bias", "stop_token_ids"):  # of the context,
            body.pop(name, None)  # of the vocabulary
        talks = "chat" in path or "responses" in path or body.get("messages")
        body["model"] = "chatty" if talks else "tiny"  # one that can
        case.body = body
        seen.add(case.call_and_validate(checks=CHECKS).status_code)

    answered()
    assert 200 in seen


@pytest.mark.fault(26, injections=0)  # right requests
@pytest.mark.parametrize(
    "path", ["/v1/models", "/v1/models/{name}", "/metrics", "/version", "/health"]
)
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
