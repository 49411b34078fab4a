"""What the server understands and answers, as an OpenAPI description.

`/openapi.json` shows it to tools; tests/faults_fuzz.py makes requests from it, right
and wrong ones, and holds the server to it. Requests are described by fields.py.
"""

from collections.abc import Iterable
from typing import Any

from gpt_jax import __version__
from gpt_jax.serve import fields
from gpt_jax.serve.errors import STATUSES
from gpt_jax.serve.fields import Form
from gpt_jax.serve.kinds import Schema
from gpt_jax.serve.limits import Limits

POSTS = {  # of each form: what it does, what is sent, what comes back
    "completion": ("Continues or scores texts.", "Completion", "Texts"),
    "chat": ("Answers a conversation.", "Chat", "Answers"),
    "response": ("Answers a text or a conversation.", "Response", "Answered"),
    "embedding": ("Tells hidden states of texts.", "Embedding", "Embeddings"),
    "tokenize": ("Tells the tokens of a text.", "Tokenize", "Tokens"),
    "detokenize": ("Tells the text of tokens.", "Detokenize", "Prompt"),
    "look": ("Shows what a model does with a text, as HTML.", "Look", "Page"),
}
STREAMED = ("completion", "chat", "response")
EVERYWHERE = (401, 403, 408, 413, 500, 503)
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
        **{
            fields.PATHS[form]: {"post": _post(*told, streams=form in STREAMED)}
            for form, told in POSTS.items()
        },
        "/health": {"get": _open("Whether it lives.", ok=_a("boolean"))},
        "/healthz": {"get": _open("Whether it lives.", ok=_a("boolean"))},
        "/readyz": {"get": _open("Whether it is compiled.", ready=_a("boolean"))},
        "/version": {"get": _open("Which version it is.", version=_a("string"))},
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
                **{
                    POSTS[name][1]: _form(form, names)
                    for name, form in fields.forms(limits).items()
                },
                "Model": _object(id=_a("string"), object=_a("string")),
                "Texts": _texts(text=_a("string")),
                "Answers": _texts(message=_a("object")),
                "Answered": _object(
                    id=_a("string"),
                    object={"enum": ["response"]},
                    status=_a("string"),
                    output=_a("array", items=_a("object")),
                    usage=_a("object"),
                ),
                "Embeddings": _object(
                    object=_a("string"),
                    data=_a("array", items=_object(embedding={}), minItems=1),
                    usage=_a("object"),
                ),
                "Tokens": _object(
                    count=_a("integer"),
                    max_model_len=_a("integer"),
                    tokens=_a("array", items=_a("integer")),
                ),
                "Prompt": _object(prompt=_a("string")),
                "Page": _object(page=_a("string")),
                "Error": _object(
                    error=_object(
                        message=_a("string"),
                        type=_a("string"),
                        param=_or_null("string"),
                        code=_a("string"),
                    )
                ),
            },
            "securitySchemes": {"key": {"type": "http", "scheme": "bearer"}},
        },
        "security": [{"key": []}, {}],
    }


# ---------------------------------------------------------------- requests


def _form(form: Form, names: list[str]) -> Schema:
    """Returns the fields of a request as an object that has no others."""
    found = {name: field.schema() for name, field in form.items()}
    found["model"] |= {"enum": [*names, None]}
    required = [name for name, field in form.items() if field.required]
    only = {"type": "object", "properties": found, "additionalProperties": False}
    return only | ({"required": required} if required else {})


def _post(summary: str, wanted: str, given: str, *, streams: bool = False) -> Schema:
    body = {"required": True, "content": {"application/json": {"schema": _ref(wanted)}}}
    kinds = {"application/json": {"schema": _ref(given)}}
    kinds |= {"text/event-stream": {}} if streams else {}
    return {
        "summary": summary,
        "requestBody": body,
        "responses": {"200": _answer("Done.", kinds), **_errors(OF_TEXTS)},
    }


# ---------------------------------------------------------------- answers


def _get(summary: str, schema: Schema, *more: int) -> Schema:
    given = _answer("Facts.", {"application/json": {"schema": schema}})
    return {
        "summary": summary,
        "responses": {"200": given, **_errors((*EVERYWHERE, *more))},
    }


def _open(summary: str, **fields: Schema) -> Schema:
    kind = {"application/json": {"schema": _object(**fields)}}
    answers = {"200": _answer("Yes.", kind), "503": _answer("No.", kind)}
    return {
        "summary": summary,
        "security": [],
        "responses": {**_errors((403, 408, 413, 500)), **answers},
    }


def _errors(statuses: tuple[int, ...]) -> Schema:
    kind = {"application/json": {"schema": _ref("Error")}}
    return {str(status): _answer(STATUSES[status], kind) for status in statuses}


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


def _a(kind: str, **rules: Any) -> Schema:
    return {"type": kind, **rules}


def _or_null(kind: str, **rules: Any) -> Schema:
    return {"type": [kind, "null"], **rules}


def _object(**fields: Schema) -> Schema:
    """Returns an object that has these fields, and maybe others."""
    return {"type": "object", "properties": fields, "required": [*fields]}


def _ref(name: str) -> Schema:
    return {"$ref": f"#/components/schemas/{name}"}
