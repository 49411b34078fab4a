"""Jinja chat templates, such as published models ship: filled in, in a sandbox."""

import json
import re
from datetime import date
from functools import lru_cache
from typing import Any

from gpt_jax.chat.messages import Message

# What a template that asks for the date is told, always: what is learnt today must be
# learnt tomorrow, or a run could not be resumed. The date that Llama 3's falls back to.
DATE = date(2024, 7, 26)


def fill(template: str, tokenizer, messages, reply: bool, tools=()) -> str:
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
        return compiled(template).render(
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


@lru_cache(maxsize=8)
def compiled(template: str):
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
