"""What every door does: parse flags, force the config, map errors to exit codes.

Exit codes: 0 done or `--help`; 2 a mistake of the user, told in one sentence;
130 and 143 stopped by Ctrl-C and SIGTERM after saving; 1 a run that could not go on
(updates that are not finite, data that does not come), and anything else, with a
traceback, because that is a bug of ours.
"""

import gc
import os
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from gpt_jax import commands, configs

MISTAKES = (
    *(ValueError, FileNotFoundError, FileExistsError),
    *(IsADirectoryError, NotADirectoryError, PermissionError),
)

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake too.")


def define_config(default: str | None = None):
    """Defines `--config=FILE.py:options` with typed `--config.key=value` overrides.

    The file may be one of ours by its name, as `configs.load` finds it.
    """
    told = "Config file or name, e.g. configs/quickstart.py:size=tiny."
    holder = config_flags.DEFINE_config_file("config", None, told)
    parser: Any = flags.FLAGS["config"].parser
    parser.parse = _locked  # its own knows no names, and no colon of a drive
    if default:
        flags.FLAGS.set_default("config", default)
    return holder


def _locked(file_and_options: str):
    return load_config(file_and_options).lock()


def config_file() -> str:
    """Returns what `--config` was given: the file and its options."""
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            return value if equals else following
    return ""


def config_name() -> str:
    """Returns a name made of the config: gpt2_size=xl for configs/gpt2.py:size=xl."""
    file, arg = commands.split(config_file())
    return "_".join(filter(None, [Path(file).stem, arg.replace(",", "_")]))


def command(without: tuple[str, ...]) -> str:
    """Returns the running command, less the flags that begin with one of `without`."""
    kept = [word for word in sys.argv[1:] if not word.startswith(without)]
    return f"{commands.typed(Path(sys.argv[0]).stem)} {shlex.join(kept)}".strip()


def step(text: str) -> str | int | None:
    """Returns what `runs.open` calls the checkpoint that --step names."""
    if text.isdecimal():
        return int(text)
    names = {"": None, "best": "best", "newest": "latest", "latest": "latest"}
    if text not in names:
        raise ValueError(f"--step={text} is not best, newest or a step number")
    return names[text]


def run(main: Callable[[list[str]], object], doc: str | None) -> None:
    """Runs a door and leaves the process with its exit code.

    Args:
      main: takes the arguments that are not flags; its return value, when it is an
        int, is the exit code.
      doc: the door's docstring, which is its help text.
    """
    try:
        if {"--help", "-help", "-h", "--helpfull"} & set(sys.argv[1:]):
            text = commands.here((doc or "").strip())
            print(f"{text}\n\nFlags:\n{_flags_help()}", flush=True)
            sys.exit(0)
        _parse()
        code = main([])
        sys.exit(code if isinstance(code, int) else 0)
    except BrokenPipeError:  # the reader, `head` say, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except MISTAKES as error:
        _tell(error, 2)
    except (FloatingPointError, OSError) as error:  # also a full disk, data that stalls
        _tell(error, 1)
    except KeyboardInterrupt:
        sys.exit(130)
    finally:
        # Else Python walks all that JAX made once more before it leaves: 0.3 s.
        gc.freeze()


def given(config, example: str = "configs/quickstart.py"):
    """Returns the config of --config; raises ValueError where there is none."""
    if config is None:
        raise ValueError(f"--config is missing, e.g. --config={example}")
    return config


def _tell(error: BaseException, code: int) -> NoReturn:
    """Prints an error as a sentence and leaves; with --debug raises it instead."""
    if "--debug" in sys.argv:
        raise error
    print(f"error: {_sentence(error)}", file=sys.stderr)
    # One of several processes does not wait for the others.
    if "gpt_jax.processes" in sys.modules:
        sys.modules["gpt_jax.processes"].leave(code)
    sys.exit(code)


def load_config(file_and_options: str):
    """Returns the config of configs/gpt2.py:size=medium, say; see `configs.load`."""
    try:
        return configs.load(file_and_options)
    except ValueError as error:
        raise ValueError(f"--config: {error}") from error


def _parse() -> None:
    """Parses sys.argv and forces the config, so that mistakes show before any work."""
    try:
        if config_file():  # run by itself: ml_collections hides its errors in text
            load_config(config_file())
        rest = flags.FLAGS(sys.argv)[1:]
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            _ = flags.FLAGS["config"].value
    except Exception as error:  # absl and config files raise whatever they like
        if "--debug" in sys.argv:
            raise
        words = " ".join(_sentence(error).split())
        raise ValueError(f"{words} (see --help)") from error
    if rest:
        raise ValueError(
            f"{rest[0]!r} is not a flag: flags are written --name=value (see --help)"
        )


def _sentence(error: BaseException) -> str:
    """Returns an error's message; a file error names its file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.strerror}: {error.filename}"
    inner = error.args[0] if error.args else ""
    if isinstance(inner, Exception):  # ml_collections wraps one in another
        return _sentence(inner)
    # The text of a KeyError is the repr of what it says.
    return str(inner if isinstance(error, KeyError) else error) or type(error).__name__


def _flags_help() -> str:
    """Returns the flags of the running door, not those of the libraries it uses."""
    own = flags.FLAGS.flags_by_module_dict()
    lines = []
    for module in (sys.argv[0], __name__):
        for flag in own.get(module, []):
            default = flag.default_unparsed  # of a config its file, not all its keys
            told = "" if default in ("", None, []) else f" (default: {default})"
            lines.append(f"  --{flag.name}: {flag.help}{told}")
    return "\n".join(lines)
