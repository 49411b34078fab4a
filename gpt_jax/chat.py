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
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from gpt_jax import files, names
from gpt_jax.plaintext import kind

ROLES = ("system", "user", "assistant")
# What a template that asks for the date is told, always: what is learnt today must be
# learnt tomorrow, or a run could not be resumed. The date that Llama 3's falls back to.
DATE = date(2024, 7, 26)
MARK = "\uf8ff"  # for private use: put where a template writes a text, to find it again
# What others' conversations may ask for and no template here writes or no task learns.
ASKED = ("tool_calls", "function_call", "tool_call_id", "train")


class Call(NamedTuple):
    """The call of a tool, as an answer holds it."""

    name: str
    arguments: Mapping[str, Any]
    id: str = ""


class Message(NamedTuple):
    """One turn of a conversation; the role is one of ROLES, or "tool".

    An answer of weight 0 is a part of what is answered later, and not learnt itself.
    """

    role: str
    content: str
    weight: int = 1
    calls: tuple[Call, ...] = ()  # of an answer
    call_id: str = ""  # of what a tool says: to which call
    name: str = ""  # likewise: which tool


class ToolForm(NamedTuple):
    """How a template writes the call of a tool, in JSON with a key `name`.

    Attributes:
      begin: what stands before the JSON.
      arguments: the key of the arguments.
      end: what stands behind it.
      answers: whether the template writes what tools say.
    """

    begin: str
    arguments: str
    end: str
    answers: bool


class Template(NamedTuple):
    """How the turns of a conversation are written one after the other.

    Attributes:
      system: what stands before a system message.
      user: what stands before a user's message.
      assistant: what stands before an answer.
      close: what stands behind a system or user message.
      end: the special token behind an answer; "" = the tokenizer's end of text.
      between: what separates two turns.
      preamble: the system message of a conversation that has none; "" = nothing.
      input: what joins an instruction and its input.
    """

    system: str
    user: str
    assistant: str
    close: str
    end: str
    between: str
    preamble: str
    input: str


TEMPLATES = {
    # Stanford Alpaca's prompt (Taori et al. 2023), in Raschka's one form of it
    # (Build a Large Language Model (From Scratch), section 7.2).
    "alpaca": Template(
        system="",
        user="### Instruction:\n",
        assistant="### Response:\n",
        close="",
        end="",
        between="\n\n",
        preamble="Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.",
        input="\n\n### Input:\n",
    ),
    # Abdin et al. 2024, "Phi-3 Technical Report", section 2.
    "phi3": Template(
        system="<|system|>\n",
        user="<|user|>\n",
        assistant="<|assistant|>\n",
        close="<|end|>",
        end="<|end|>",
        between="\n",
        preamble="",
        input="\n",
    ),
    # OpenAI's Chat Markup Language, which many open models took over.
    "chatml": Template(
        system="<|im_start|>system\n",
        user="<|im_start|>user\n",
        assistant="<|im_start|>assistant\n",
        close="<|im_end|>",
        end="<|im_end|>",
        between="\n",
        preamble="",
        input="\n",
    ),
    # Nothing but the texts, one a line.
    "plain": Template(
        system="",
        user="",
        assistant="",
        close="",
        end="",
        between="\n",
        preamble="",
        input="\n",
    ),
}


def check(template: str) -> None:
    """Raises ValueError unless `template` is a name of TEMPLATES or Jinja text."""
    if template in TEMPLATES:
        return
    if "{{" not in template and "{%" not in template:
        raise ValueError(
            f"template {template!r} is not one of: {', '.join(TEMPLATES)}, nor the "
            f"text of a Jinja template{names.did_you_mean(template, TEMPLATES)}"
        )
    _compiled(template)


def messages_of(row: Mapping[str, Any], template: str) -> list[Message]:
    """Returns the conversation of a row of data.

    Args:
      row: {"messages": [{"role", "content"}, ...]}, where a "weight" of 0 keeps an
        answer from being learnt (OpenAI's form), or {"instruction", "output"} with or
        without "input" (Alpaca); without "output" there is no answer at the end.
      template: the way an instruction and its input are joined is a part of it.

    Raises:
      ValueError: a column is missing or something is not text; names it.
    """
    if row.get("messages") is not None:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            empty = "an empty list" if turns == [] else kind(turns)
            raise ValueError(
                f"its messages are {empty}, not a list of role and content"
            )
        return [_message(turn) for turn in turns]
    if "instruction" not in row:
        raise ValueError(
            f"it has the columns {', '.join(map(repr, row)) or '(none)'}, but wanted "
            "are 'messages', or 'instruction' and 'output' (and 'input')"
        )
    texts = {name: row.get(name) for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if text is not None and not isinstance(text, str):
            raise ValueError(f"its {name} is {kind(text)}, not text")
    join = TEMPLATES[template].input if template in TEMPLATES else "\n"
    request = join.join(filter(None, (texts["instruction"], texts["input"])))
    messages = [Message("user", request)]
    if texts["output"] is not None:
        messages.append(Message("assistant", texts["output"]))
    return messages


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
    guard = _unused("".join(_texts([*messages, *tools])))
    safe = [
        _broken(message, tokenizer, guard)._replace(role=message.role)
        for message in messages
    ]
    if template in TEMPLATES:
        if tools or any(m.calls or m.role == "tool" for m in messages):
            raise ValueError(f"the template {template} writes nothing of tools")
        text, spans = _by_name(safe, tokenizer, template, reply)
    else:
        tools = _broken([*tools], tokenizer, guard)
        text, spans = _by_jinja(safe, tokenizer, template, reply, tools)
    opening = list(tokenizer.opening) if template in TEMPLATES else []
    whole = tokenizer.kind not in ("char", "word") and tokenizer.JOINT not in text
    encode = _encode_whole if whole else _encode_parts
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


# ---------------------------------------------------------------- written as text


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
    text = _fill(template, tokenizer, messages, reply, tools)
    if tools or any(message.calls for message in messages):  # learnt by no task here
        return text, []
    end, own = _end(tokenizer, template)
    written, taken, spans = "", 0, []
    for number, message in enumerate(messages):
        if message.role != "assistant":
            continue
        if number:
            before = _fill(template, tokenizer, messages[:number], True)
        else:
            marked = [message._replace(content=MARK), *messages[1:]]
            before = _fill(template, tokenizer, marked, reply).partition(MARK)[0]
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
        text = _fill(template, tokenizer, probe, False)
        names = "|".join(map(re.escape, _names(tokenizer))) or "(?!)"
        if found := re.search(rf"answer\s*({names})", text):
            return found[1], True
    if tokenizer.eos_id is None:
        raise ValueError(
            "the tokenizer has no end-of-text token, so nothing could end an answer; "
            "use a model with a byte, bpe or word tokenizer"
        )
    return by_id[tokenizer.eos_id], template in TEMPLATES


# ---------------------------------------------------------------- Jinja


def _fill(template: str, tokenizer, messages, reply: bool, tools=()) -> str:
    """Returns what a Jinja template writes.

    Raises:
      ValueError: the template fails, or refuses this conversation.
    """
    names = {i: name for name, i in tokenizer.specials.items()}
    bos = names.get(tokenizer.bos_id, "")
    if tokenizer.special is None and not bos:  # nobody says it: the usual names
        usual = [
            n for n in ("<bos>", "<s>", "<|begin_of_text|>") if n in names.values()
        ]
        bos = next(iter(usual), names.get(tokenizer.eos_id, ""))
    try:
        return _compiled(template).render(
            messages=[_turn(message) for message in messages],
            add_generation_prompt=reply,
            bos_token=bos,
            eos_token=names.get(tokenizer.eos_id, ""),
            tools=[*tools] or None,
        )
    except Exception as error:  # a template can fail in every way that a program can
        raise ValueError(f"the chat template fails: {error}") from error


def _turn(message: Message) -> dict[str, Any]:
    """Returns a message as templates read it; a call's arguments are an object."""
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.calls:
        turn["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.name, "arguments": call.arguments},
            }
            for call in message.calls
        ]
    told = {"tool_call_id": message.call_id, "name": message.name}
    return turn | {key: text for key, text in told.items() if text}


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
        before = _fill(template, tokenizer, asked, True, tools)
        text = _fill(template, tokenizer, called, False, tools)
    except ValueError:
        return None
    if PROBE not in before:
        return None
    try:
        answers = MARK in _fill(template, tokenizer, [*called, heard], True, tools)
    except ValueError:
        answers = False
    # Where an answer begins with thoughts that a call is written without.
    before = re.sub(r"<think>\s*(</think>\s*)?$", "", before)
    if not text.startswith(before):
        return None
    for found in re.finditer(r"\{", text[len(before) :]):
        opened = len(before) + found.start()
        try:
            written, closed = json.JSONDecoder().raw_decode(text, opened)
        except ValueError:
            continue
        key = next((k for k, x in written.items() if x == call.arguments), None)
        if written.get("name") == PROBE and key:
            behind, own = _end(tokenizer, template)
            end = text[closed:].partition(behind)[0] if own else text[closed:]
            begin = text[len(before) : opened].rpartition("</think>")[2]
            return ToolForm(begin.lstrip(), key, end.rstrip(), answers)
    return None


@lru_cache(maxsize=8)
def _compiled(template: str):
    """Returns a Jinja template in a sandbox, with what chat templates may call."""
    try:
        from jinja2 import TemplateError, sandbox
    except ImportError:
        raise ValueError(
            "this chat template is written in Jinja, which is not installed: "
            "pip install jinja2"
        ) from None

    def refuse(message):
        raise TemplateError(message)

    def to_json(value, **options):
        return json.dumps(value, ensure_ascii=False, **options)

    box = sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    box.globals["raise_exception"] = refuse
    box.globals["strftime_now"] = DATE.strftime
    box.filters["tojson"] = to_json
    # Marks that only the training code of transformers reads.
    plain = re.sub(r"\{%(-?)\s*generation\s*(-?)%\}", r"{%\1 if true \2%}", template)
    plain = re.sub(r"\{%(-?)\s*endgeneration\s*(-?)%\}", r"{%\1 endif \2%}", plain)
    try:
        return box.from_string(plain)
    except TemplateError as error:
        raise ValueError(f"the chat template is not valid Jinja: {error}") from error


# ---------------------------------------------------------------- from text to ids


def _names(tokenizer) -> list[str]:
    """Returns the special tokens, the longest first."""
    return sorted((n for n in tokenizer.specials if len(n) > 1), key=len, reverse=True)


def _unused(text: str) -> str:
    """Returns a character for private use that a text does not hold."""
    held = set(text)
    free = (c for c in map(chr, range(0xE000, 0xF900)) if c not in held)
    if not (found := next(free, "")):
        raise ValueError(
            "the messages hold every character for private use, U+E000 to U+F8FF; one "
            "must be free to mark what is no special token: leave one out"
        )
    return found


def _texts(value: Any) -> Iterator[str]:
    """Yields every text within lists, tuples and objects."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from _texts([*value, *value.values()])
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _texts(one)


def _broken(value: Any, tokenizer, guard: str) -> Any:
    """Returns the same with the names of special tokens in texts broken by `guard`."""
    if isinstance(value, Mapping):
        pairs = value.items()
        return {
            _broken(key, tokenizer, guard): _broken(one, tokenizer, guard)
            for key, one in pairs
        }
    if isinstance(value, list | tuple):
        found = [_broken(one, tokenizer, guard) for one in value]
        named = hasattr(value, "_fields")  # a NamedTuple
        return type(value)(*found) if named else type(value)(found)
    if isinstance(value, str):
        for name in _names(tokenizer):
            value = value.replace(name, name[0] + guard + name[1:])
    return value


def _literal(text: str) -> str:
    """Returns the Jinja that writes a text."""
    quoted = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return "{{ '" + quoted + "' }}" if text else ""


def _encode_whole(text: str, spans, opening: list[int], tokenizer, guard: str):
    """Returns the ids of a text and the weight of each, by where they lie in it.

    The text is encoded as one: what stands on both sides of the beginning of an answer
    may be one token, and what follows a special token does not begin a text.
    """
    pieces = _pattern(tokenizer).split(text)
    marks = [*opening, *(tokenizer.specials[p.strip()] for p in pieces[1::2])]
    joint = tokenizer.JOINT
    joined, places, at = joint * len(opening), [], 0
    for number, piece in enumerate(pieces):
        plain = joint if number % 2 else piece.replace(guard, "")
        for edge in sorted({edge for span in spans for edge in span[:2]}):
            if at <= edge < at + len(piece) or (
                edge == at and number == len(pieces) - 1
            ):
                before = piece[: edge - at].replace(guard, "")
                # An answer that ends within a special token's own space has that too.
                inside = (len(joint) if edge > at else 0) if number % 2 else len(before)
                places.append((edge, len(joined) + inside))
        joined, at = joined + plain, at + len(piece)
    moved = dict(places) | {len(text): len(joined)}
    found, offsets = tokenizer.encode_joined(joined)
    named = iter(marks)
    ids = [next(named) if i < 0 else i for i in found]
    answer = [0] * len(ids)
    for start, stop, weight in spans:
        for n, (begin, end) in enumerate(offsets):
            if begin < moved[stop] and end > moved[start]:
                answer[n] = weight
    return ids, answer


def _encode_parts(text: str, spans, opening: list[int], tokenizer, guard: str):
    """Returns the same where each part of a text is encoded alone."""
    ids, answer = list(opening), [0] * len(opening)
    for part, weight in _parts(text, spans, tokenizer):
        found = _encode(part, tokenizer, guard)
        ids += found
        answer += [weight] * len(found)
    return ids, answer


def _parts(text: str, spans, tokenizer):
    """Yields (part of the text, its weight in a span and 0 between them).

    A span takes the whitespace behind it where the special token at its end does.
    """
    last = 0
    for start, stop, weight in spans:
        yield text[last:start], 0
        ends = [m for m in _pattern(tokenizer).finditer(text, start) if m.end() >= stop]
        last = ends[0].end() if ends and ends[0].start() < stop else stop
        yield text[start:last], weight
    yield text[last:], 0


def _encode(text: str, tokenizer, guard: str) -> list[int]:
    """Returns the ids of a text in which the names of special tokens are these."""
    ids: list[int] = []
    for number, piece in enumerate(_pattern(tokenizer).split(text)):
        if number % 2:
            ids.append(tokenizer.specials[piece.strip()])
        elif piece:
            ids += tokenizer.encode(piece.replace(guard, ""))
    return ids


@lru_cache(maxsize=8)
def _pattern(tokenizer) -> re.Pattern[str]:
    """Returns what matches the special tokens, with the whitespace that they take."""
    added = tokenizer.backend.get_added_tokens_decoder()
    parts = []
    for name in _names(tokenizer):
        token = added[tokenizer.specials[name]]
        # Whitespace is tried from its beginning alone: from each of its characters,
        # a long run of it that no token follows would take quadratic time.
        left = r"(?:(?<!\s)\s+)?" * token.lstrip
        right = r"\s*" * token.rstrip
        parts.append(f"{left}{re.escape(name)}{right}")
    return re.compile(f"({'|'.join(parts) or '(?!)'})")


def _message(turn: Any) -> Message:
    if not isinstance(turn, Mapping):
        raise ValueError(f"a message is {kind(turn)}, not an object")
    for name in ("role", "content"):
        if name not in turn:
            there = ", ".join(map(repr, turn)) or "nothing"
            raise ValueError(f"a message lacks its {name}; it has: {there}")
    for name in ASKED:
        if turn.get(name) is not None:
            raise ValueError(f"a message has {name!r}, which nothing here does")
    role, content, weight = turn["role"], turn["content"], turn.get("weight")
    names.choose("role", role, ROLES)
    if not isinstance(content, str):
        raise ValueError(f"the content of a message is {kind(content)}, not text")
    if weight is None:
        return Message(role, content)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise ValueError(
            f"the weight of a message is {weight!r}: 1 learns an answer, 0 does not"
        )
    if weight and role != "assistant":
        raise ValueError(
            f"a message of the role {role} has the weight 1, but answers alone are "
            "learnt: remove the weight"
        )
    return Message(role, content, int(weight))


def _json(path: Path) -> dict:
    """Returns the object in a JSON file; an absent file is an empty one."""
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    return found if isinstance(found, dict) else {}
