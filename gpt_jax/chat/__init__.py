"""Conversations and instructions to token ids: the one home of templates.

A template is a name of TEMPLATES or the text of a Jinja chat template, such as
published models ship. Three rules hold for every template:

* What a person wrote never becomes a special token, whatever it spells.
* A marker of the template (`<|user|>`, say) is one token where the tokenizer has it as
  a special token. Where it does not, the marker is spelled as plain text: so no
  vocabulary grows, and any model can learn any template.
* An answer always ends with one special token, which is learnt with it: the template's
  own where the tokenizer has it, else the tokenizer's end-of-text token.

Nothing here knows tokenizers or JAX; what is handed in is a `tokenizers.Tokenizer`.
"""

import json
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, names
from gpt_jax.chat.encoding import (
    broken,
    encode_parts,
    encode_whole,
    names_of,
    texts,
    unused,
)
from gpt_jax.chat.jinja import compiled, fill
from gpt_jax.chat.messages import ROLES, Call, Message, messages_of
from gpt_jax.chat.templates import TEMPLATES, Template

__all__ = [
    "ROLES",
    "TEMPLATES",
    "Call",
    "Message",
    "Template",
    "ToolForm",
    "as_jinja",
    "check",
    "fit",
    "messages_of",
    "render",
    "stop_ids",
    "template_of",
    "tool_form",
]

MARK = "\uf8ff"  # for private use: put where a template writes a text, to find it again


class ToolForm(NamedTuple):
    """How a template writes the call of a tool, in JSON with a key `name`.

    Attributes:
      begin: what stands before the JSON.
      arguments: the key of the arguments.
      end: what stands behind it.
      answers: whether the template writes what tools say.
      between: what stands between calls that share these marks, as in Mistral's lists;
        "" where each has its own, or there is one alone.
    """

    begin: str
    arguments: str
    end: str
    answers: bool
    between: str = ""


def check(template: str) -> None:
    """Raises ValueError unless `template` is a name of TEMPLATES or Jinja text."""
    if template in TEMPLATES:
        return
    if "{{" not in template and "{%" not in template:
        raise ValueError(
            f"template {template!r} is not one of: {', '.join(TEMPLATES)}, nor the "
            f"text of a Jinja template{names.did_you_mean(template, TEMPLATES)}"
        )
    compiled(template)


def render(
    messages: Sequence[Message],
    tokenizer,
    template: str,
    *,
    reply: bool,
    tools: Sequence[Mapping[str, Any]] = (),
) -> tuple[list[int], list[int]]:
    """Returns the ids of a conversation and which of them are answers.

    Args:
      messages: at least one.
      tokenizer: a `tokenizers.Tokenizer`.
      template: a name of TEMPLATES, or Jinja text.
      reply: ends with the opening of an answer, which a model then writes: the prompt
        for generation. Without it the ids end with the last message.
      tools: that a model may call, described as in OpenAI's API; see `tool_form`.

    Returns:
      (ids, answer): answer[i] is 1 where ids[i] belongs to an answer, its end token
      included, and 0 elsewhere.

    Raises:
      ValueError: a role is unknown, the template fails, or the tokenizer has no token
        that could end an answer.
    """
    for message in messages:
        names.choose("role", message.role, (*ROLES, "tool"))
    if not messages:
        raise ValueError("a conversation needs at least one message")
    guard = unused("".join(texts([*messages, *tools])))
    safe = [
        broken(message, tokenizer, guard)._replace(role=message.role)
        for message in messages
    ]
    if template in TEMPLATES:
        if tools or any(m.calls or m.role == "tool" for m in messages):
            raise ValueError(f"the template {template} writes nothing of tools")
        text, spans = _by_name(safe, tokenizer, template, reply)
    else:
        tools = broken([*tools], tokenizer, guard)
        text, spans = _by_jinja(safe, tokenizer, template, reply, tools)
    opening = list(tokenizer.opening) if template in TEMPLATES else []
    whole = tokenizer.kind not in ("char", "word") and tokenizer.JOINT not in text
    encode = encode_whole if whole else encode_parts
    ids, answer = encode(text, spans, opening, tokenizer, guard)
    return ids, [weight * (not reply) for weight in answer]


def stop_ids(tokenizer, template: str) -> list[int]:
    """Returns the ids that end an answer: the template's, and the tokenizer's."""
    end, _ = _end(tokenizer, template)
    return list(dict.fromkeys([tokenizer.specials[end], *tokenizer.ends]))


def as_jinja(template: str, tokenizer) -> str:
    """Returns a template as the text of a Jinja template, as other software reads it.

    It writes what `render` does, special tokens by their names.

    Args:
      template: a name of TEMPLATES, or Jinja text, which is returned as it is.
      tokenizer: a `tokenizers.Tokenizer`.
    """
    if template not in TEMPLATES:
        return template
    form, (end, _) = TEMPLATES[template], _end(tokenizer, template)
    by_id = {i: name for name, i in tokenizer.specials.items()}
    opening = "".join(by_id[i] for i in tokenizer.opening)
    preamble = form.system + form.preamble + form.close + form.between
    pieces = [
        _literal(opening),
        "{% if messages[0]['role'] != 'system' %}" + _literal(preamble) + "{% endif %}"
        if form.preamble
        else "",
        "{% for message in messages %}",
        "{% if not loop.first %}" + _literal(form.between) + "{% endif %}",
        "{% if message['role'] == 'assistant' %}" + _literal(form.assistant),
        "{{ message['content'] }}" + _literal(end),
        "{% elif message['role'] == 'system' %}" + _literal(form.system),
        "{{ message['content'] }}" + _literal(form.close),
        "{% else %}" + _literal(form.user),
        "{{ message['content'] }}" + _literal(form.close),
        "{% endif %}{% endfor %}",
        "{% if add_generation_prompt %}",
        _literal(form.between + form.assistant) + "{% endif %}",
    ]
    return "".join(pieces)


def fit(
    messages: Sequence[Message], tokenizer, template: str, *, limit: int
) -> tuple[list[Message], int]:
    """Drops whole oldest turns until the prompt for an answer has at most `limit` ids.

    A turn is a user's message and what follows it; system messages before the first
    one stay.

    Returns:
      (the messages that stay, how many turns were dropped).

    Raises:
      ValueError: the last turn alone is too long.
    """
    kept, dropped = list(messages), 0
    while True:
        ids, _ = render(kept, tokenizer, template, reply=True)
        if len(ids) <= limit:
            return kept, dropped
        turns = [i for i, message in enumerate(kept) if message.role == "user"]
        if len(turns) < 2:
            raise ValueError(
                f"the message takes {len(ids)} tokens with its template but there is "
                f"room for {limit}; shorten it"
            )
        before = [message for message in kept[: turns[0]] if message.role == "system"]
        kept, dropped = before + kept[turns[1] :], dropped + 1


def template_of(folder: str | Path) -> str | None:
    """Returns the template of a run folder: its task's, or one beside its tokenizer.

    The second is chat_template.jinja (or, older, the chat_template of
    chat_template.json or tokenizer_config.json) beside tokenizer.json. None where there
    is none: the model only continues texts.

    Raises:
      ValueError: one of these files cannot be read.
    """
    folder = files.expand(folder)
    task = _json(folder / "config.json").get("task")
    if isinstance(task, dict) and task.get("template"):
        return task["template"]
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        found = _json(folder / name).get("chat_template")
        if isinstance(found, list):  # several, by name
            found = {entry["name"]: entry["template"] for entry in found}.get("default")
        if found:
            return found
    return None


def _by_name(messages, tokenizer, name: str, reply: bool):
    """Returns the text of a conversation and its answers: (begin, end, weight)."""
    template, (end, _) = TEMPLATES[name], _end(tokenizer, name)
    if template.preamble and messages[0].role != "system":
        messages = [Message("system", template.preamble), *messages]
    text, spans = "", []
    for number, (role, content, weight, *_) in enumerate(messages):
        text += (template.between if number else "") + getattr(template, role)
        start = len(text)
        text += content + (end if role == "assistant" else template.close)
        if role == "assistant":
            spans.append((start, len(text), weight))
    return text + (template.between + template.assistant) * reply, spans


def _by_jinja(messages, tokenizer, template: str, reply: bool, tools=()):
    """Returns the text of a conversation and its answers: (begin, end, weight).

    An answer begins where the prompt for it ends, which is found by rendering what
    precedes it, and ends behind the template's end token. Nothing precedes one that
    comes first: it begins where its text does.
    """
    text = fill(template, tokenizer, messages, reply, tools)
    if tools or any(message.calls for message in messages):  # learnt by no task here
        return text, []
    end, own = _end(tokenizer, template)
    written, taken, spans = "", 0, []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if number:
            before = fill(template, tokenizer, messages[:number], True)
        else:
            marked = [message._replace(content=MARK), *messages[1:]]
            before = fill(template, tokenizer, marked, reply).partition(MARK)[0]
        stop = _behind(message.content.strip(), text, len(before), end if own else "")
        if stop is None or not text.startswith(before):
            if reply:  # no such conversation was ever learnt
                return text, []
            raise ValueError(
                f"message {number + 1}, an answer, cannot be found in what the chat "
                "template makes of the conversation, so it cannot be learnt; use "
                "another template, or conversations of one answer"
            )
        written += text[taken : len(before)]
        answer = text[len(before) : stop] + ("" if own else end)
        spans.append((len(written), len(written) + len(answer), message.weight))
        written, taken = written + answer, stop
    return written + text[taken:], spans


def _behind(content: str, text: str, start: int, end: str) -> int | None:
    """Returns where `content` and then `end` end in text[start:]."""
    behind = rf"\s*{re.escape(end)}" if end else ""
    found = re.compile(re.escape(content) + behind).search(text, start)
    return found.end() if found else None


@lru_cache(maxsize=64)
def _end(tokenizer, template: str) -> tuple[str, bool]:
    """Returns the special token behind an answer and whether the template writes it."""
    by_id = {i: name for name, i in tokenizer.specials.items()}
    if template in TEMPLATES:
        end = TEMPLATES[template].end
        if end in tokenizer.specials:
            return end, True
    else:
        probe = [Message("user", "question"), Message("assistant", "answer")]
        text = fill(template, tokenizer, probe, False)
        names = "|".join(map(re.escape, names_of(tokenizer))) or "(?!)"
        if found := re.search(rf"answer\s*({names})", text):
            return found[1], True
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, so nothing could end an answer; "
            "use a model with a byte, bpe or word tokenizer"
        )
    return by_id[tokenizer.eos_id], template in TEMPLATES


PROBE = "probe_of_tools"


@lru_cache(maxsize=64)
def tool_form(tokenizer, template: str) -> ToolForm | None:
    """Returns how a template writes tools, or None where it writes none, or not so.

    Found by letting it write a call and what the tool says: published templates know
    tools in many ways, and say nothing of them.
    """
    if template in TEMPLATES:
        return None
    shown = {"type": "object", "properties": {"key": {"type": "string"}}}
    described = {"name": PROBE, "description": "A tool.", "parameters": shown}
    tools = [{"type": "function", "function": described}]
    call = Call(PROBE, {"key": "value"}, "probe0001")  # Mistral's want nine characters
    asked = [Message("user", "question")]
    called = [*asked, Message("assistant", "", calls=(call,))]
    heard = Message("tool", MARK, call_id=call.id, name=PROBE)
    try:
        before = fill(template, tokenizer, asked, True, tools)
        text = fill(template, tokenizer, called, False, tools)
    except ValueError:
        return None
    if PROBE not in before:
        return None
    try:
        answers = MARK in fill(template, tokenizer, [*called, heard], True, tools)
    except ValueError:
        answers = False
    # Where an answer begins with thoughts that a call is written without.
    before = re.sub(r"<think>\s*(</think>\s*)?$", "", before)
    if not text.startswith(before):
        return None
    calls = _calls(text, len(before), call)
    if not calls:
        return None
    opened, closed, key = calls[0]
    behind, own = _end(tokenizer, template)
    end = text[closed:].partition(behind)[0] if own else text[closed:]
    begin = text[len(before) : opened].rpartition("</think>")[2].lstrip()
    between, two = "", (call, call._replace(id="probe0002"))
    try:
        twice = [*asked, Message("assistant", "", calls=two)]
        text = fill(template, tokenizer, twice, False, tools)
        (_, closed, _), (opened, _, _) = _calls(text, len(before), call)
        between = text[closed:opened]
    except ValueError:
        pass  # it writes one alone
    if not begin.strip() or begin.strip() in between:
        between = ""
    return ToolForm(begin, key, end.rstrip(), answers, between)


def _calls(text: str, start: int, call: Call) -> list[tuple[int, int, str]]:
    """Returns where JSON writes a call, from and to, and its key of the arguments."""
    decode, found, closed = json.JSONDecoder().raw_decode, [], start
    for brace in re.finditer(r"\{", text):
        if (opened := brace.start()) < closed:
            continue  # before the answer, or within a call
        try:
            written, end = decode(text, opened)
        except ValueError:
            continue
        key = next((k for k, x in written.items() if x == call.arguments), None)
        if written.get("name") == call.name and key:
            closed = end
            found.append((opened, closed, key))
    return found


def _literal(text: str) -> str:
    """Returns the Jinja that writes a text."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{ '" + quoted + "' }}" if text else ""


def _json(path: Path) -> dict:
    """Returns the object in a JSON file; an absent file is an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}
