"""Talk with the model of a run, in the terminal.

  python -m experiments.chat --run=runs/tuned
  python -m experiments.chat --run=runs/tuned --temperature=0 --system="Be brief."
  echo "Name three colours." | python -m experiments.chat --run=runs/tuned

A line is a message; a line that ends with \\ goes on in the next one, and a text that
is pasted into a terminal is one message. Ctrl-C stops an answer. What was typed comes
back with the arrow keys, also in later sessions. Lines that begin with / are commands:

  /reset                  forget the conversation
  /undo                   forget the last message and its answer
  /regenerate             answer the last message again, with the next seed
  /system Be brief.       how to answer from here on (/system alone: nothing of it)
  /set temperature 0.7    change a setting (/set alone shows them)
  /save talk.json         write the conversation, as a row that configs/sft.py reads
  /load talk.json         go on with a conversation that /save wrote
  /run runs/other         go on with another run
  /help                   show the commands
  /quit                   leave; so does Ctrl-D

The model sees the conversation in the template that it was tuned with, or that came
with its tokenizer. When the context is full, the oldest turns are dropped whole, which
is told. A run without a template (a base model) continues each line instead. An
imported model answers as its generation_config.json says, where no flag and no /set
says otherwise.
"""

import contextlib
import json
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import flags

from experiments import door
from gpt_jax import files, names, sampling, screen, signals

RUN = door.define_path("run", "", "Run folder.")
SYSTEM = flags.DEFINE_string("system", "", "System message: how to answer.")
TEMPLATE = flags.DEFINE_string(
    "template", "", "alpaca, phi3, chatml or plain; empty = the run's own."
)
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 200, "Longest answer.")
SAMPLING = door.define_sampling()
SEED = flags.DEFINE_integer("seed", 1337, "Another seed gives other answers.")
STEP = flags.DEFINE_string(
    "step", "", "Checkpoint: best, newest, a step number; empty = best, else newest."
)
BITS = door.define_bits()
CACHE_DTYPE = door.define_cache_dtype()

HISTORY = "~/.cache/gpt_jax/chat_history"  # what was typed, for this user alone
KEPT = 1000  # lines of it


@dataclass
class Talk:
    """A conversation and how it goes on.

    `model` and `params` are the run's, laid out once for decoding one row. `own` is how
    its answers are written where `given`, by a flag or by /set, does not say otherwise.
    """

    run: Any
    model: Any
    params: Any
    template: str | None
    own: Mapping[str, Any]
    given: dict[str, Any]
    messages: list
    new: bool = True  # nothing is compiled yet

    @property
    def settings(self) -> dict[str, Any]:
        """How answers are written: all settings, `max_new` and `seed`."""
        return {**self.own, **self.given}


def main(_: list[str]) -> None:
    """Answers line by line; raises ValueError for what the user can mend."""
    if not RUN.value:
        raise ValueError("--run is missing, e.g. --run=runs/tuned")
    step = door.step(STEP.value)
    given = door.given_sampling(SAMPLING, MAX_NEW_TOKENS.value)
    given |= {"max_new": MAX_NEW_TOKENS.value, "seed": SEED.value}
    talk = begin(RUN.value, step, given, _opening())
    for line in lines():
        if line.startswith("/"):
            if not obey(talk, line):
                return
        elif line.strip():
            with _told():
                answer(talk, line)


def begin(folder: str, step: int | str | None, given: dict, messages: list) -> Talk:
    """Opens a run and tells how it is talked to; raises ValueError where it is not."""
    from gpt_jax import chat, commands, generation, programs, runs, sample

    own = generation.of(folder)  # before the weights are read
    run = runs.open(folder, step=step, bits=BITS.value, cache_dtype=CACHE_DTYPE.value)
    if run.classes:
        raise ValueError(
            f"{folder} sorts texts into classes and writes none; use it with "
            f"{commands.typed('classify')} --run={folder}"
        )
    programs.use_cache(run.config.compile_cache)
    template = TEMPLATE.value or chat.template_of(folder)
    if template:
        chat.check(template)
        chat.stop_ids(run.tokenizer, template)  # refuses what cannot end an answer
        tell(f"a message a line; {', '.join(COMMANDS)}")
    else:
        tell(
            f"{folder} has no chat template: a base model, which continues what you "
            "write instead of answering it (configs/sft.py makes one that answers)"
        )
    if own.told:
        tell(f"[{own.told}]")
    model, params = sample.laid_out(run.model, run.params, rows=1)
    return Talk(run, model, params, template, own.settings, given, messages)


def lines() -> Iterator[str]:
    """Yields what is typed or piped in; a backslash at its end takes the next line in.

    On a terminal Ctrl-C drops what is being typed.
    """
    terminal = sys.stdin.isatty()
    with _history() if terminal else contextlib.nullcontext():
        yield from _lines(terminal)


@contextlib.contextmanager
def _history() -> Iterator[None]:
    """Lets input() be edited, take pastes whole, and remember earlier sessions.

    As far as this system has readline and a home to keep the history in.
    """
    try:
        import readline
    except ImportError:
        yield
        return
    readline.parse_and_bind("set enable-bracketed-paste on")
    readline.set_history_length(KEPT)
    try:
        path = files.expand(HISTORY)
        files.private_folder(path.parent)
        with contextlib.suppress(FileNotFoundError):
            readline.read_history_file(path)
    except (OSError, ValueError):
        yield
        return
    try:
        yield
    finally:
        with contextlib.suppress(OSError), files.draft(path, durable=False) as draft:
            draft.touch(mode=0o600)
            readline.write_history_file(draft)


def _lines(terminal: bool) -> Iterator[str]:
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

    if talk.new:
        tell("[the first answer compiles the model]")
        talk.new = False
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
    if name in ("/quit", "/exit"):
        return False
    with _told():
        names.choose("command", name, COMMANDS)(talk, argument.strip())
    return True


def show_help(talk: Talk, _: str) -> None:
    """Tells the commands."""
    tell((__doc__ or "").partition("commands:\n\n")[2].partition("\n\n")[0])


def reset(talk: Talk, _: str) -> None:
    """Forgets the conversation, and what /system said."""
    talk.messages = _opening()
    tell("[the conversation is forgotten]")


def undo(talk: Talk, _: str = "") -> str:
    """Forgets the last message and its answer; returns the message."""
    asked = [i for i, m in enumerate(talk.messages) if m.role == "user"]
    if not asked:
        raise ValueError("there is no message yet")
    text = talk.messages[asked[-1]].content
    talk.messages = talk.messages[: asked[-1]]
    tell(f"[forgotten: {text[:60]!r}]")
    return text


def regenerate(talk: Talk, _: str) -> None:
    """Answers the last message again, with the next seed."""
    text = undo(talk)
    talk.given["seed"] += 1
    answer(talk, text)


def system(talk: Talk, text: str) -> None:
    """Changes how to answer, in the conversation so far too; "" takes it out."""
    from gpt_jax import chat

    rest = [m for m in talk.messages if m.role != "system"]
    talk.messages = [*([chat.Message("system", text)] if text else []), *rest]
    tell(f"[system: {text!r}]" if text else "[no system message]")


def load(talk: Talk, path: str) -> None:
    """Goes on with the one conversation of a file that `save` wrote."""
    from gpt_jax import chat

    if not path:
        raise ValueError("write /load FILE")
    try:
        rows = json.loads(Path(path).read_text("utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(rows, list) or len(rows) != 1 or not isinstance(rows[0], dict):
        raise ValueError(
            f'{path} must hold a list of one conversation, as in [{{"messages": '
            '[{"role": "user", "content": "..."}]}], which /save writes'
        )
    try:
        messages = chat.messages_of(rows[0], talk.template or "plain")
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None
    if messages[-1].role != "assistant":
        raise ValueError(f"{path} ends without an answer: take its last message out")
    talk.messages = messages
    tell(f"[{len(messages)} messages read from {path}]")


def switch(talk: Talk, folder: str) -> None:
    """Goes on with another run and the same conversation."""
    if not folder:
        raise ValueError("write /run FOLDER")
    other = begin(folder, door.step(STEP.value), talk.given, talk.messages)
    vars(talk).update(vars(other))


def change(talk: Talk, words: str) -> None:
    """Changes a setting after checking it, or shows all of them."""
    name, *values = words.split() or [""]
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
    talk.given = {**talk.given, name: value}


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


COMMANDS: dict[str, Callable[[Talk, str], Any]] = {
    "/reset": reset,
    "/undo": undo,
    "/regenerate": regenerate,
    "/system": system,
    "/set": change,
    "/save": save,
    "/load": load,
    "/run": switch,
    "/help": show_help,
    "/quit": show_help,  # `obey` has left by then
}


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
