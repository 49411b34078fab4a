"""What the server understands and answers, as an OpenAPI description.

`/openapi.json` shows it to tools; tests/faults_fuzz.py makes requests from it, right
and wrong ones, and holds the server to it. What wire.py checks is described here.
"""

import math
from collections.abc import Iterable
from typing import Any

from gpt_jax import __version__, sampling
from gpt_jax.sampling import Setting
from gpt_jax.serve.batch import TOP
from gpt_jax.serve.wire import NOTHING, PASSED, ROLES, STOP_CHARS, STOPS, Limits

Schema = dict[str, Any]

ERRORS = {
    400: "A request that cannot be.",
    401: "The API key is missing or wrong.",
    403: "Another host's name on loopback.",
    404: "No such model or path.",
    408: "The request came too slowly.",
    413: "Too long.",
    415: "Not application/json.",
    429: "The queue is full; Retry-After says when to come back.",
    500: "A mistake of the server.",
    503: "Starting or leaving; Retry-After says when to come back.",
    504: "Not done in time.",
}
EVERYWHERE = (401, 403, 408, 413, 500)
OF_TEXTS = (400, 401, 403, 404, 408, 413, 415, 429, 500, 503, 504)


def description(limits: Limits, models: Iterable[str]) -> Schema:
    """Returns the description of a server with these limits, of these models."""
    names = sorted(models)
    named = [{"name": "name", "in": "path", "required": True, "schema": _a("string")}]
    paths = {
        "/v1/models": {"get": _get("What is served.", _list_of("Model"))},
        "/v1/models/{name}": {
            "parameters": named,
            "get": _get("What a model is.", _ref("Model"), 404),
        },
        "/v1/completions": {
            "post": _post("Continues or scores texts.", "Completion", "Texts")
        },
        "/v1/chat/completions": {
            "post": _post("Answers a conversation.", "Chat", "Answers")
        },
        "/v1/look": {"post": _look()},
        "/healthz": {"get": _open("Whether it lives.", "ok")},
        "/readyz": {"get": _open("Whether it takes requests.", "ready")},
        "/metrics": {
            "get": {
                "summary": "Numbers for Prometheus.",
                "responses": {
                    "200": _answer("Numbers.", {"text/plain": {}}),
                    **_errors(EVERYWHERE),
                },
            }
        },
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "gpt_jax", "version": __version__},
        "paths": paths,
        "components": {
            "schemas": {
                "Completion": _closed(_shared(limits, names) | _completion(limits)),
                "Chat": _closed(
                    _shared(limits, names) | _chat(), required=["messages"]
                ),
                "Look": _closed(
                    {
                        "model": {"enum": [*names, None]},
                        "prompt": _a("string", minLength=1),
                        "against": _or_null("string"),
                    },
                    required=["prompt"],
                ),
                "Page": _object(page=_a("string")),
                "Model": _object(id=_a("string"), object=_a("string")),
                "Texts": _texts(text=_a("string")),
                "Answers": _texts(message=_a("object")),
                "Error": _object(
                    error=_object(
                        message=_a("string"),
                        type=_a("string"),
                        param=_a("null"),
                        code=_a("string"),
                    )
                ),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


# ---------------------------------------------------------------- requests


def _shared(limits: Limits, names: list[str]) -> Schema:
    fields = {
        "model": {"enum": [*names, None]},
        **{name: _range(setting) for name, setting in sampling.SETTINGS.items()},
        "seed": _or_null("integer", minimum=-(2**63), maximum=2**64),
        "stop": {"anyOf": [_stop(), _a("array", items=_stop(), maxItems=STOPS), NULL]},
        "n": _or_null("integer", minimum=1, maximum=limits.choices),
        "stream": _or_null("boolean"),
        "stream_options": {
            "type": ["object", "null"],
            "properties": {"include_usage": _or_null("boolean")},
        },
        "max_tokens": _or_null("integer", minimum=0, maximum=sampling.MOST),
        "ignore_eos": _or_null("boolean"),
    }
    fields |= {name: {"enum": [*none, None]} for name, none in NOTHING.items()}
    return fields | {name: {} for name in PASSED.split()}


def _range(setting: Setting) -> Schema:
    least = "exclusiveMinimum" if setting.above else "minimum"
    found = _or_null(
        "integer" if setting.kind is int else "number",
        **{least: setting.low, "default": setting.off, "description": setting.told},
    )
    return found | ({"maximum": setting.high} if setting.high < math.inf else {})


def _completion(limits: Limits) -> Schema:
    text = _a("string", minLength=1)
    ids = _a("array", items=_a("integer", minimum=0, maximum=2**31 - 1), minItems=1)
    many = {"anyOf": [text, ids]}
    several = _a("array", items=many, minItems=1, maxItems=limits.choices)
    return {
        "prompt": {"anyOf": [text, ids, several, NULL]},
        "logprobs": _or_null("integer", minimum=0, maximum=TOP),
        "echo": _or_null("boolean"),
    }


def _chat() -> Schema:
    part = _object(text=_a("string"))
    content = {"anyOf": [_a("string"), _a("array", items=part)]}
    message = _object(role={"enum": [*ROLES]}, content=content)
    return {
        "messages": _a("array", items=message, minItems=1),
        "logprobs": _or_null("boolean"),
        "top_logprobs": _or_null("integer", minimum=0, maximum=TOP),
        "max_completion_tokens": _or_null("integer", minimum=0, maximum=2**30),
    }


def _post(summary: str, wanted: str, given: str) -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": _ref(wanted)}}}
    kinds = {"application/json": {"schema": _ref(given)}, "text/event-stream": {}}
    return {
        "summary": summary,
        "requestBody": body,
        "responses": {"200": _answer("Texts.", kinds), **_errors(OF_TEXTS)},
    }


def _look() -> Schema:
    found = _post("What a model does with a text, as HTML.", "Look", "Page")
    kind = {"application/json": {"schema": _ref("Page")}}
    found["responses"]["200"] = _answer("A page.", kind)
    return found


# ---------------------------------------------------------------- answers


def _get(summary: str, schema: Schema, *more: int) -> Schema:
    given = _answer("Facts.", {"application/json": {"schema": schema}})
    return {
        "summary": summary,
        "responses": {"200": given, **_errors((*EVERYWHERE, *more))},
    }


def _open(summary: str, name: str) -> Schema:
    kind = {"application/json": {"schema": _object(**{name: _a("boolean")})}}
    answers = {"200": _answer("Yes.", kind), "503": _answer("No.", kind)}
    return {
        "summary": summary,
        "security": [],
        "responses": {**_errors((403, 408, 413, 500)), **answers},
    }


def _errors(statuses: tuple[int, ...]) -> Schema:
    kind = {"application/json": {"schema": _ref("Error")}}
    return {str(status): _answer(ERRORS[status], kind) for status in statuses}


def _answer(what: str, content: Schema) -> Schema:
    return {"description": what, "content": content}


def _texts(**of_choice: Schema) -> Schema:
    choice = _object(index=_a("integer"), finish_reason=_or_null("string"), **of_choice)
    counts = ("prompt_tokens", "completion_tokens", "total_tokens")
    usage = _object(**{name: _a("integer", minimum=0) for name in counts})
    names = {name: _a("string") for name in ("id", "object", "model")}
    choices = _a("array", items=choice, minItems=1)
    return _object(**names, created=_a("integer"), choices=choices, usage=usage)


def _list_of(name: str) -> Schema:
    return _object(object=_a("string"), data=_a("array", items=_ref(name)))


NULL: Schema = {"type": "null"}


def _a(kind: str, **rules: Any) -> Schema:
    return {"type": kind, **rules}


def _or_null(kind: str, **rules: Any) -> Schema:
    return {"type": [kind, "null"], **rules}


def _stop() -> Schema:
    return _a("string", minLength=1, maxLength=STOP_CHARS)


def _object(**fields: Schema) -> Schema:
    """Returns an object that has these fields, and maybe others."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def _closed(fields: Schema, required: list[str] | None = None) -> Schema:
    """Returns an object that has these fields and no others."""
    only = {"type": "object", "properties": fields, "additionalProperties": False}
    return only | ({"required": required} if required else {})


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
