"""What every door does: parse flags, force the config, map errors to exit codes.

Exit codes: 0 done or `--help`; 2 a mistake of the user, told in one sentence;
130 and 143 stopped by Ctrl-C and SIGTERM after saving; 1 a run that could not go on
(updates that are not finite, data that does not come), and anything else, with a
traceback, because that is a bug of ours.
"""

import gc
import glob
import os
import runpy
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from absl import flags
from ml_collections import config_flags

MISTAKES = (
    *(ValueError, FileNotFoundError, FileExistsError),
    *(IsADirectoryError, NotADirectoryError, PermissionError),
)

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake too.")


def define_config(default: str | None = None):
    """Defines `--config=FILE.py:options` with typed `--config.key=value` overrides."""
    return config_flags.DEFINE_config_file(
        "config", default, "Config file, e.g. configs/quickstart.py", lock_config=True
    )


def config_file() -> str:
    """Returns what `--config` was given: the file and its options."""
    for argument, following in zip(sys.argv, [*sys.argv[1:], ""], strict=True):
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name == "config":
            return value if equals else following
    return ""


def config_name() -> str:
    """Returns a name made of the config: gpt2_size=xl for configs/gpt2.py:size=xl."""
    file, _, arg = config_file().partition(":")
    return "_".join(filter(None, [Path(file).stem, arg.replace(",", "_")]))


def command(without: tuple[str, ...]) -> str:
    """Returns the running command, less the flags that begin with one of `without`."""
    module = Path(sys.argv[0]).stem
    kept = [word for word in sys.argv[1:] if not word.startswith(without)]
    return shlex.join(["python", "-m", f"experiments.{module}", *kept])


def step(text: str) -> str | int | None:
    """Returns what `runs.open` calls the checkpoint that --step names."""
    if text.isdecimal():
        return int(text)
    names = {"": None, "best": "best", "newest": "latest", "latest": "latest"}
    if text not in names:
        raise ValueError(f"--step={text} is not best, newest or a step number")
    return names[text]


def folders(pieces: list[str]) -> list[str]:
    """Returns the folders and patterns of a list flag.

    The names of a sweep's trials hold commas, lr=0.1,seed=2: pieces that together name
    what is there belong together.
    """
    found = []
    while pieces:
        ends = range(len(pieces), 0, -1)
        names = {end: ",".join(pieces[:end]) for end in ends}
        there = (end for end in ends if Path(names[end]).exists())
        end = next(there, 0) or next((e for e in ends if glob.glob(names[e])), 1)
        found.append(",".join(pieces[:end]))
        pieces = pieces[end:]
    return found


def run(main: Callable[[list[str]], object], doc: str | None) -> None:
    """Runs a door and leaves the process with its exit code.

    Args:
      main: takes the arguments that are not flags; its return value, when it is an
        int, is the exit code.
      doc: the door's docstring, which is its help text.
    """
    try:
        if {"--help", "-help", "-h", "--helpfull"} & set(sys.argv[1:]):
            print(f"{(doc or '').strip()}\n\nFlags:\n{_flags_help()}", flush=True)
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
    """Returns the config of configs/gpt2.py:size=medium, say.

    Raises:
      ValueError: there is no such config file; whatever the file raises is passed on.
    """
    path, _, arg = file_and_options.partition(":")
    if not Path(path).is_file():
        raise ValueError(f"--config: there is no file {path}; see configs/ for those")
    get_config = runpy.run_path(path).get("get_config")
    if get_config is None:
        raise ValueError(f"--config: {path} has no function get_config")
    return get_config(arg or None)


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
            lines.append(f"  --{flag.name}: {flag.help} (default: {flag.default})")
    return "\n".join(lines)
