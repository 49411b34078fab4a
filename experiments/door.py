"""What every door does: parse flags, force the config, map errors to exit codes.

Exit codes: 0 done or `--help`; 2 a mistake of the user, told in one sentence;
130, 143 and 129 stopped by Ctrl-C, SIGTERM and a hang-up, after saving where there is
something to save; 1 a run that could not go on (updates that are not finite, data that
does not come), and anything else, with a traceback, because that is a bug of ours. A
screen that fails changes none of them; see gpt_jax/screen/.
"""

import ast
import gc
import glob
import re
import shlex
import sys
import tempfile
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from absl import flags
from ml_collections import config_flags

from gpt_jax import commands, configs, files, names, sampling, screen, signals

MISTAKES = (
    *(ValueError, FileNotFoundError, FileExistsError),
    *(IsADirectoryError, NotADirectoryError, PermissionError),
)

KINDS = {  # of flags, by absl's words: what their values must be
    "int": "a whole number",
    "float": "a number",
    "bool": "True or False",
    "tuple": "a tuple, as in \"('a', 'b')\"",
}

DEBUG = flags.DEFINE_bool("debug", False, "Show the traceback of a mistake too.")
flags.disclaim_key_flags()  # what the functions below define is the calling door's


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
    name = "_".join(filter(None, [Path(file).stem, arg.replace(",", "_")]))
    return files.shortened(name.replace("/", "_"))


def command(without: tuple[str, ...]) -> str:
    """Returns the running command, less the flags that begin with one of `without`."""
    kept, behind = [], False  # a flag that is left out, without its value
    for word in sys.argv[1:]:
        out = word.startswith(without) or (behind and not word.startswith("-"))
        kept += [] if out else [word]
        behind = out and word.startswith("-") and "=" not in word
    return f"{commands.typed(Path(sys.argv[0]).stem)} {shlex.join(kept)}".strip()


def step(text: str) -> str | int | None:
    """Returns what `runs.open` calls the checkpoint that --step names."""
    if text.isdecimal():
        return int(text)
    known = {"": None, "best": "best", "newest": "latest", "latest": "latest"}
    if text not in known:
        near = names.did_you_mean(text, known)
        raise ValueError(f"--step={text} is not best, newest or a step number{near}")
    return known[text]


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


def run(
    main: Callable[[list[str]], object],
    doc: str | None,
    *,
    product: bool = False,
    words: bool = False,
) -> None:
    """Runs a door and leaves the process with its exit code.

    Args:
      main: takes the arguments that are not flags; its return value, when it is an
        int, is the exit code.
      doc: the door's docstring, which is its help text.
      product: what is printed is what was asked for, and not how a run goes: it ends
        when nobody takes it.
      words: whether arguments that are not flags mean something here.
    """
    signals.begin()  # before JAX is imported, which loses an exception of Ctrl-C
    asked = {"--help", "-help", "-h", "--helpfull"} & set(sys.argv[1:])
    screen.take_over(product=product or bool(asked))
    try:
        if asked:
            text = commands.here((doc or "").strip())
            print(f"{text}\n\nFlags:\n{_flags_help()}", flush=True)
            sys.exit(0)
        rest = _parse()
        if rest and not words:
            raise ValueError(
                f"{rest[0]!r} is not a flag: flags are written --name=value (see "
                "--help)"
            )
        code = main(rest)
        if "gpt_jax.stores" in sys.modules:  # it changed what lies in a store, maybe
            sys.modules["gpt_jax.stores"].put_back()
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except screen.ReaderGone:  # `head`, say, has seen enough
        sys.exit(0)
    except MISTAKES as error:
        _tell(error, 2)
    except (FloatingPointError, OSError) as error:  # also a full disk, data that stalls
        _tell(error, 2 if getattr(error, "errno", 0) in files.OF_A_PATH else 1)
    except KeyboardInterrupt:  # where `signals.raised` lets it be
        sys.exit(130)
    finally:
        # Else Python walks all that JAX made once more before it leaves: 0.3 s.
        gc.freeze()


def define_path(name: str, default: str, told: str):
    """Defines a flag that names a file or folder.

    A `~` becomes the home folder, an address (gs://bucket/runs/a) the local folder that
    stands for it.
    """
    return flags.DEFINE(_Path(), name, default, told)


def define_paths(name: str, told: str):
    """Defines a flag that names several, separated by commas."""
    return flags.DEFINE(
        _Paths(), name, [], told, serializer=flags.CsvListSerializer(",")
    )


def define_multi_path(name: str, told: str):
    """Defines a flag that names one each time that it is given."""
    return flags.DEFINE_multi(_Path(), flags.ArgumentSerializer(), name, [], told)


class _Path(flags.ArgumentParser):
    def parse(self, argument: str) -> str:
        return str(files.expand(argument)) if argument.startswith("~") else argument


class _Paths(flags.ListParser):
    def parse(self, argument: str | list[str]) -> list[str]:
        return [_Path().parse(word) for word in super().parse(argument)]


def define_bits():
    """Defines `--bits`, whose value is that of `runs.open`."""
    return flags.DEFINE(
        _Bits(),
        "bits",
        0,
        "Read weights rounded to so many bits, 8 or 4: on a CPU texts come sooner and "
        "take less memory, and fit a little worse (evaluate --text says "
        "how much); 0 = as they are.",
        serializer=flags.ArgumentSerializer(),
    )


def define_cache_dtype():
    """Defines `--cache_dtype`, whose value is that of `runs.open`."""
    return flags.DEFINE_enum(
        "cache_dtype",
        "",
        ["", "bfloat16", "int8"],
        "Keep keys and values of earlier tokens in half the memory of float32 or in a "
        "quarter; empty = as the config says.",
    )


class _Bits(flags.ArgumentParser):
    def parse(self, argument: str | int) -> int:
        if str(argument) not in ("0", "8", "4"):
            raise ValueError(f"{argument} bits: 8, 4, or 0 for the weights as they are")
        return int(argument)


def define_sampling() -> dict[str, Any]:
    """Defines a flag for each way to choose tokens, which is None where not given."""
    define = {float: flags.DEFINE_float, int: flags.DEFINE_integer}
    return {
        name: define[each.kind](
            name,
            None,
            f"{each.told} (default: what the model's generation_config.json says, else "
            f"{sampling.DEFAULTS[name]:g})",
        )
        for name, each in sampling.SETTINGS.items()
    }


def given_sampling(holders: Mapping[str, Any], max_new: int) -> dict[str, Any]:
    """Returns the flags of `define_sampling` that were given.

    Raises:
      ValueError: one is outside its range, or `max_new` is.
    """
    given = {name: x.value for name, x in holders.items() if x.value is not None}
    sampling.check(max_new, **given)
    return given


def only_with(chosen: str, reads: Mapping[str, Collection[str]]) -> None:
    """Refuses flags that were given and that what was chosen does not read.

    Args:
      chosen: the flag that says what is done.
      reads: for each flag that could have been chosen, the flags that go with it.

    Raises:
      ValueError: names the flag, and those that it goes with.
    """
    others = {flag for flags_of in reads.values() for flag in flags_of}
    for name in sorted(others - {chosen, *reads[chosen]}):
        if flags.FLAGS[name].present:
            goes = " or ".join(f"--{flag}" for flag in reads if name in reads[flag])
            raise ValueError(f"--{name} goes with {goes}, not with --{chosen}")


def check_writable(flag: str, path: str, *, folder: bool = False) -> None:
    """Refuses a file, or a folder, that could not be written; makes neither.

    Raises:
      ValueError: names the flag and what stands in the way.
    """
    target = Path(path)
    try:
        places = (target, *target.absolute().parents)
        there = next(place for place in places if place.exists())
        if there.is_dir() != (folder or there != target):
            what = "folder" if there.is_dir() else "file"
            raise ValueError(f"--{flag}={path}: {there} is a {what}; name another")
        if there.is_dir():
            tempfile.TemporaryFile(dir=there).close()
        else:
            there.open("ab").close()
    except OSError as error:
        raise ValueError(
            f"--{flag}={path} cannot be written: {error.strerror}"
        ) from error


def recipe():
    """Returns the config of --config as its file has it, without --config.KEY=VALUE."""
    return load_config(config_file())


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


def _parse() -> list[str]:
    """Parses sys.argv and forces the config, so that mistakes show before any work.

    Returns:
      The arguments that are not flags.
    """
    try:
        if config_file():  # run by itself: ml_collections hides its errors in text
            _check_overrides(load_config(config_file()))
        elif "config" in flags.FLAGS and flags.FLAGS["config"].default is None:
            _check_none()
        sys.argv[1:] = _config_first(sys.argv[1:])  # or its overrides are none
        rest = flags.FLAGS(sys.argv)[1:]
        if "config" in flags.FLAGS and flags.FLAGS["config"].present:
            _ = flags.FLAGS["config"].value
    except flags.UnrecognizedFlagError as error:
        near = names.nearest(error.flagname, _own_flags())
        meant = f"; did you mean --{near[0]}?" if near else ""
        told = f"there is no flag --{error.flagname}{meant} (see --help)"
        raise ValueError(told) from error
    except Exception as error:  # absl and config files raise whatever they like
        if "--debug" in sys.argv:
            raise
        words = _of_a_kind(error) or " ".join(_sentence(error).split())
        raise ValueError(f"{words} (see --help)") from error
    _fetch()
    return rest


def _fetch() -> None:
    """Puts local paths in the place of addresses that flags name; see stores.py."""
    for flag in _own_flags().values():
        given = flag.value if isinstance(flag.value, list) else [flag.value or ""]
        paths = isinstance(flag.parser, _Path | _Paths)
        if not (flag.present and paths and any(map(files.is_address, given))):
            continue
        from gpt_jax import stores

        found = [place for one in given for place in stores.matching(one)]
        local = [str(stores.fetched(one)) for one in found]
        flag.value = local if isinstance(flag.value, list) else local[0]


def _overrides() -> Iterator[tuple[str, str | None]]:
    """Yields (key, text) of every --config.KEY=TEXT; None where no = follows."""
    for word in sys.argv[1:]:
        if found := re.fullmatch(r"--?(?:no)?config\.([^=]*)(?:=(.*))?", word, re.S):
            yield found[1], found[2]


def _check_overrides(config) -> None:
    """Refuses overrides of keys that the config does not have, or not as one.

    Raises:
      ValueError: names the nearest key.
    """
    known = dict(_keys(config))
    for key, text in _overrides():
        plain = re.sub(r"\[\d+\].*", "", key)  # a part of a tuple
        if any(name.startswith(f"{plain}.") for name in known):
            first = next(name for name in known if name.startswith(f"{plain}."))
            raise ValueError(
                f"--config.{key} is a group of settings: set them one by one, as in "
                f"--config.{first}=..."
            )
        if plain not in known:
            near = names.did_you_mean(plain, known)
            raise ValueError(f"there is no config key {plain!r}{near}")
        if text and isinstance(known[plain], tuple) and not _is_tuple(text):
            raise ValueError(f"--config.{key}={text}: it must be {KINDS['tuple']}")


def _check_none() -> None:
    if found := next(_overrides(), None):
        raise ValueError(
            f"--config.{found[0]} is given and --config is not, e.g. "
            "--config=configs/quickstart.py"
        )


def _keys(config, prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yields (dotted key, value) of a config."""
    for key, value in config.items():
        if hasattr(value, "items"):
            yield from _keys(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _is_tuple(text: str) -> bool:
    """Whether a text is a tuple, or one part of it as it stands."""
    try:
        ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return "," not in text
    return True


def _config_first(words: list[str]) -> list[str]:
    """Returns the words of a command with --config before its overrides."""
    for at, word in enumerate(words):
        if re.match("--?config(=|$)", word):
            end = at + 1 + (word in ("--config", "-config"))
            return [*words[at:end], *words[:at], *words[end:]]
    return words


def _of_a_kind(error: Exception) -> str:
    """Returns what a flag's value must be, when it cannot be read; else ""."""
    found = re.match(r"flag --([^=]+)=(.*?): ", str(error), re.S)
    if not found or not isinstance(error, flags.IllegalFlagValueError):
        return ""
    parser = flags.FLAGS[found[1]].parser if found[1] in flags.FLAGS else None
    if choices := getattr(parser, "enum_values", None):
        shown = ", ".join(choice or "''" for choice in choices)
        near = names.did_you_mean(found[2], choices)
        return f"--{found[1]}={found[2]} is not one of: {shown}{near}"
    kind = KINDS.get(parser.flag_type()) if parser else None
    return f"--{found[1]}={found[2]}: it must be {kind}" if kind else ""


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
    """Returns the flags of the running door, with what they are for."""
    lines = []
    for flag in _own_flags().values():
        default = "" if flag.default is None else f" (default: {flag.default})"
        lines.append(f"  --{flag.name}: {flag.help}{default}")
    return "\n".join(lines)


def _own_flags() -> dict[str, flags.Flag]:
    """Returns the flags of the running door, not those of the libraries it uses."""
    own = flags.FLAGS.flags_by_module_dict()
    found = [flag for module in (sys.argv[0], __name__) for flag in own.get(module, [])]
    return {flag.name: flag for flag in found}
