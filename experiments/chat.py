"""Talk with the model of a run, in the terminal.

  python -m experiments.chat --run=runs/tuned
  python -m experiments.chat --run=runs/tuned --temperature=0 --system="Be brief."
  echo "Name three colours." | python -m experiments.chat --run=runs/tuned

A line is a message; a line that ends with \\ goes on in the next one. Ctrl-C stops an
answer. Lines that begin with / are commands:

  /reset                  forget the conversation
  /set temperature 0.7    change a setting (/set alone shows them)
  /save talk.json         write the conversation, as a row that configs/sft.py reads
  /help                   show the commands
  /quit                   leave; so does Ctrl-D

The model sees the conversation in the template that it was tuned with, or that came
with its tokenizer. When the context is full, the oldest turns are dropped whole, which
is told. A run without a template (a base model) continues each line instead.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from gpt_jax import names, sampling, screen, signals

RUN = door.define_path("run", "", "Run folder.")
SYSTEM = flags.DEFINE_string("system", "", "System message: how to answer.")
TEMPLATE = flags.DEFINE_string(
    "template", "", "alpaca, phi3, chatml or plain; empty = the run's own."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Longest answer.")
SAMPLING = door.define_sampling(temperature=0.7, top_p=0.95)
SEED = flags.DEFINE_integer("seed", 1337, "Another seed gives other answers.")
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)

COMMANDS = "/reset, /set NAME VALUE, /save FILE, /help, /quit"


@dataclass
class Talk:
    """A conversation and how it goes on.

    `model` and `params` are the run's, laid out once for decoding one row.
    """

    run: Any
    model: Any
    params: Any
    template: str | None
    settings: dict[str, Any]
    messages: list


def main(_: list[str]) -> None:
    """Answers line by line; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/tuned")
    step = door.step(STEP.value)
    settings = door.chosen_sampling(SAMPLING, MAX_NEW_TOKENS.value)

    from gpt_jax import chat, commands, programs, runs, sample

    sampling.check(**settings)  # before the weights are read
    run = runs.open(RUN.value, step=step)
    if run.classes:
        raise ValueError(
            f"{RUN.value} sorts texts into classes and writes none; use it with "
            f"{commands.typed('classify')} --run={RUN.value}"
        )
    programs.use_cache(run.config.compile_cache)
    template = TEMPLATE.value or chat.template_of(RUN.value)
    model, params = sample.laid_out(run.model, run.params, rows=1)
    settings["seed"] = SEED.value
    talk = Talk(run, model, params, template, settings, _opening())
    if template:
        chat.check(template)
        chat.stop_ids(run.tokenizer, template)  # refuses what cannot end an answer
        tell(f"a message a line; {COMMANDS}")
    else:
        tell(
            f"{RUN.value} has no chat template: a base model, which continues what you "
            "write instead of answering it (configs/sft.py makes one that answers)"
        )
    for line in lines():
        if line.startswith("/"):
            if not obey(talk, line):
                return
        elif line.strip():
            with _told():
                answer(talk, line)


def lines() -> Iterator[str]:
    """Yields what is typed or piped in; a backslash at its end takes the next line in.

    On a terminal Ctrl-C drops what is being typed.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  input() then has a history and editing
    held = ""
    while True:
        try:
            line = held + (_typed() if terminal else _piped())
        except EOFError:
            if held:
                yield held.removesuffix("\n")
            return
        except KeyboardInterrupt:
            tell("\n/quit leaves")
            held = ""
            continue
        held = line[:-1] + "\n" if line.endswith("\\") else ""
        if not held:
            yield line


def _typed() -> str:
    with signals.raised():
        return input("> ")


def _piped() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n")


def answer(talk: Talk, text: str) -> None:
    """Prints the answer to a message as it comes and remembers both."""
    from gpt_jax import chat, sample

    run, prompt, stop = talk.run, text, []
    if not talk.template and (told := sample.advice(text, run.tokenizer)):
        tell(f"[{told}]")
    messages = [*talk.messages, chat.Message("user", text)]
    if talk.template:
        context = run.model.cfg.context_length
        room = min(talk.settings["max_new"], context // 2)  # for the answer
        messages, dropped = chat.fit(
            messages, run.tokenizer, talk.template, limit=context - room
        )
        if dropped:
            tell(
                f"[the context of {context} tokens is full: dropped the oldest "
                f"{'turn' if dropped == 1 else f'{dropped} turns'}]"
            )
        prompt, _ = chat.render(messages, run.tokenizer, talk.template, reply=True)
        stop = chat.stop_ids(run.tokenizer, talk.template)
    pieces = sample.stream(
        model=talk.model,
        params=talk.params,
        tokenizer=run.tokenizer,
        prompt=prompt,
        stop=stop,
        **talk.settings,
    )
    written, why = show("" if talk.template else text, pieces)
    if why:
        tell(f"[stopped: {why}]")
    talk.messages = [*messages, chat.Message("assistant", written)]


def show(before: str, pieces) -> tuple[str, str]:
    """Prints a stream; returns its text and why it ended, "" for a natural end.

    Ctrl-C ends it, and a second one the process.
    """
    stopped, written = [], ""

    def come(number: int) -> None:
        if number != signal.SIGINT or stopped:
            signals.leave(number)
        stopped.append(True)

    with signals.told(come), contextlib.ExitStack() as stack:
        words = screen.Words()
        words.write(before)
        stack.callback(words.end)
        while not stopped:
            try:
                piece = next(pieces)
            except StopIteration as end:
                full = end.value.reason == "length"
                return written, end.value.detail if full else ""
            written += piece
            words.write(piece)
        return written, "Ctrl-C"


def obey(talk: Talk, line: str) -> bool:
    """Does what a command says; returns False when it is to leave."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name in ("/quit", "/exit"):
        return False
    if name == "/help":
        tell((__doc__ or "").partition("commands:\n\n")[2].partition("\n\n")[0])
    elif name == "/reset":
        talk.messages = _opening()
        tell("[the conversation is forgotten]")
    elif name == "/set":
        with _told():
            change(talk, *argument.split())
    elif name == "/save":
        with _told():
            save(talk, argument)
    else:
        near = names.did_you_mean(name, COMMANDS.replace(",", "").split())
        tell(f"{name} is not one of: {COMMANDS}{near}")
    return True


def change(talk: Talk, name: str = "", *values: str) -> None:
    """Changes a setting after checking it, or shows all of them."""
    if not name:
        tell(", ".join(f"{key} {value}" for key, value in talk.settings.items()))
        return
    name = "max_new" if name == "max_new_tokens" else name
    if name not in talk.settings or len(values) != 1:
        known = ", ".join(talk.settings)
        raise ValueError(f"write /set NAME VALUE; the names are: {known}")
    kind = type(talk.settings[name])
    try:
        value = kind(values[0])
    except ValueError:
        raise ValueError(f"{name} is a number, not {values[0]!r}") from None
    settings = {**talk.settings, name: value}
    sampling.check(**{key: settings[key] for key in settings if key != "seed"})
    talk.settings = settings


def save(talk: Talk, path: str) -> None:
    """Writes the conversation as JSON to a new file."""
    if not path:
        raise ValueError("write /save FILE")
    answers = [m.content.strip() for m in talk.messages if m.role == "assistant"]
    if not answers or not all(answers):
        raise ValueError(
            f"the conversation has {'an empty' if answers else 'no'} answer: nothing "
            "could be learnt from it"
        )
    turns = [{"role": m.role, "content": m.content} for m in talk.messages]
    row = {"messages": turns}
    text = json.dumps([row], ensure_ascii=False, indent=1) + "\n"
    content = text.encode()  # what cannot be written is refused before there is a file
    with Path(path).open("xb") as file:  # never over another file
        file.write(content)
    tell(f"[{len(talk.messages)} messages written to {path}]")


def tell(text: str) -> None:
    """Prints what is not an answer."""
    print(text, file=sys.stderr, flush=True)


@contextlib.contextmanager
def _told() -> Iterator[None]:
    """Tells of a mistake and goes on."""
    try:
        yield
    except OSError as error:
        tell(f"error: {error.strerror or error}: {error.filename}")
    except ValueError as error:
        tell(f"error: {error}")


def _opening() -> list:
    from gpt_jax import chat

    return [chat.Message("system", SYSTEM.value)] if SYSTEM.value else []


if __name__ == "__main__":
    door.run(main, __doc__, product=True)
