"""README.md and docs/: code compiles; commands and links name what exists."""

import ast
import functools
import importlib
import json
import math
import re
import shlex
import textwrap
from pathlib import Path

import pytest

from docs.tools.pages import FENCE, MARK, quoted
from gpt_jax import learn
from gpt_jax.__main__ import FIRST
from gpt_jax.sampling import SETTINGS
from tests import runs_to_evaluate

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md"] if path.exists()]
PAGES += sorted((ROOT / "docs").rglob("*.md"))
pages = pytest.mark.parametrize(
    "page", PAGES, ids=lambda page: str(page.relative_to(ROOT))
)


def blocks(page: Path, *languages: str) -> list[str]:
    return [code for name, code in FENCE.findall(page.read_text()) if name in languages]


# --- Python ---------------------------------------------------------------------------


@pages
def test_every_python_block_compiles(page):
    for code in blocks(page, "python"):
        code = textwrap.dedent(code)
        if quoted(code):
            ast.parse(code)  # may be a part of a function, with its `return`
        else:
            compile(code, str(page), "exec")


@pages
def test_every_quoted_block_stands_in_its_file(page):
    for code in blocks(page, "python"):
        name = quoted(code)
        if name is None:
            continue
        quote = code.partition("\n")[2]
        source = (ROOT / name).read_text()
        indents = {len(line) - len(line.lstrip()) for line in source.splitlines()}
        found = any(textwrap.indent(quote, " " * n) in source for n in indents)
        assert found, f"{name} no longer holds:\n{quote}"


@pages
def test_every_import_in_a_python_block_is_there(page):
    for code in blocks(page, "python"):
        if quoted(code):
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module:
                module = importlib.import_module(node.module)
                for alias in node.names:
                    if not hasattr(module, alias.name):
                        importlib.import_module(f"{node.module}.{alias.name}")


NUMBER = re.compile(r"-?\d[\d,]*\.\d+(?:e-?\d+)?")


def programs(page: Path) -> list[tuple[str, str, str]]:
    """Returns (code, mark, the text shown below) of the blocks that are programs."""
    text = page.read_text()
    found = list(FENCE.finditer(text))
    shown = {block.start(): block[2] for block in found if block[1] == "text"}
    made = []
    for block in found:
        if block[1] == "python" and not quoted(block[2]):
            below = re.match(r"\s*", text[block.end() :])
            mark = MARK.search(text[: block.start()])
            output = shown.get(block.end() + len(below[0]), "")
            made.append((block[2], mark[1] if mark else "", output))
    return made


def same(line: str, wanted: str) -> bool:
    """Whether a printed line is the one shown, but for a hundredth of a fraction."""
    if NUMBER.sub("#", line.rstrip()) != NUMBER.sub("#", wanted.rstrip()):
        return False
    pairs = zip(NUMBER.findall(line), NUMBER.findall(wanted))
    return all(
        math.isclose(*(float(x.replace(",", "")) for x in pair), rel_tol=0.01)
        for pair in pairs
    )


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """A folder as that of somebody who has trained what the pages train."""
    for name in ("quickstart", "shakespeare"):
        folder = runs_to_evaluate.make(tmp_path / "runs" / name)
        lines = [{"step": n, "val_loss": 4.1 - n, "val_bpb": 6.0 - n} for n in (0, 1)]
        (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.chdir(tmp_path)
    return tmp_path


# Of these pages every operation of some models is compiled by itself: half a minute.
LONG = ("2-attention", "3-model", "5-sampling")


@pytest.mark.usefixtures("promotion")
@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, marks=[pytest.mark.slow] * (page.stem in LONG), id=page.name)
        for page in PAGES
        if any(mark != "not run" for _, mark, _ in programs(page))
    ],
)
def test_every_program_runs_and_prints_what_is_shown(page, reader, capsys):
    for code, mark, shown in programs(page):
        if mark == "not run":
            continue
        exec(compile(code, str(page), "exec"), {"__name__": "__main__"})
        printed = capsys.readouterr().out
        if mark == "varies":
            assert printed.strip()
            continue
        lines, wanted = printed.strip().splitlines(), shown.strip().splitlines()
        wrong = [pair for pair in zip(lines, wanted) if not same(*pair)]
        assert not wrong and len(lines) == len(wanted), f"{code}\n{printed}"


def test_the_verdict_is_cut_as_the_page_shows(corpus_file, capsys):
    page = ROOT / "docs/guide/bpe-by-hand.md"
    ((code, mark, shown),) = [p for p in programs(page) if "the_verdict" in p[0]]
    assert mark == "not run"
    folder = corpus_file("the-verdict.txt").parent
    exec(code.replace("~/.cache/gpt_jax", str(folder)), {"__name__": "__main__"})
    assert capsys.readouterr().out == shown


@pytest.mark.parametrize(
    "line, wanted, alike",
    [
        ("loss 4.21, 12 tokens", "loss 4.22, 12 tokens ", True),
        ("loss 4.21, 12 tokens", "loss 4.31, 12 tokens", False),
        ("loss 4.21, 12 tokens", "loss 4.21, 13 tokens", False),
        ("loss 4.21", "losses 4.21", False),
    ],
)
def test_a_printed_line_is_compared_with_the_one_shown(line, wanted, alike):
    assert same(line, wanted) == alike


# --- exercises and pictures -----------------------------------------------------------

GUIDE = ROOT / "docs/guide"
BOOK = [*GUIDE.glob("[1-9]-*.md"), *GUIDE.glob("1[0-7]-*.md"), *GUIDE.glob("[a-z]*.md")]
# What draws a file or a page, beside a program's own savefig.
DRAWS = re.compile(
    r"savefig|--image=|experiments\.(?:look|report|sweep)\b|`?(?:loss|margins|reward)\.png"
)


@pytest.mark.parametrize("page", BOOK, ids=lambda page: page.stem)
def test_a_page_of_the_guide_ends_with_three_holes_and_has_a_picture(page):
    text = page.read_text()
    end = text.partition("\n## Exercises\n")[2]
    begun = re.findall(r"^python -m experiments.learn --start=(\w+)$", end, re.M)
    assert len(begun) == 3 and {*begun} <= {*learn.HOLES}
    told = re.findall(r"^\d\. `(\w+)`: ", end, re.M)
    assert told == begun and "\n## " not in end
    assert "![" in text or DRAWS.search(text)


# --- commands -------------------------------------------------------------------------

COMMAND = re.compile(r"python3? -m (experiments\.[\w.]+)([^\n`]*)")
BY_NAME = re.compile(r"\bgpt-jax (\w+)([^\n`]*)")


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Returns (door, arguments) of every command, in blocks and in the text."""
    text = re.sub(r"^```diff\n.*?^```$", "", page.read_text(), flags=re.M | re.S)
    text = text.replace("\\\n", " ")
    found = []
    for door, rest in COMMAND.findall(text):
        words = shlex.split(rest, comments=True)
        ends = [i for i, word in enumerate(words) if word in ("|", ">", "&&", ";", "&")]
        found.append((door, words[: min(ends, default=len(words))]))
    for name, rest in BY_NAME.findall(text):
        words = shlex.split(rest.partition(" #")[0])
        if words and not words[0].startswith("-") and name in FIRST:
            file = f"configs/{words[0]}.py" if FIRST[name] == "config" else words[0]
            words[0] = f"--{FIRST[name]}={file}"
        if name not in ("NAME", "list"):
            found.append((f"experiments.{name}", words))
    return found


@functools.cache
def flags_of(file: Path) -> tuple[frozenset[str], str]:
    """Returns a door's flags and its default config file, read from its source."""
    names, default = set(), ""
    for node in ast.walk(ast.parse(file.read_text())):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func).rpartition(".")[2]
        first = node.args[0].value if _is_constant(node.args) else None
        ours = ("define_path", "define_paths", "define_multi_path")  # those of door.py
        if called.startswith(("DEFINE_", *ours)) and isinstance(first, str):
            names.add(first)
        elif called == "define_sampling":
            names |= SETTINGS.keys()
        elif called == "define_bits":
            names.add("bits")
        elif called == "define_config":
            names.add("config")
            default = first or ""
    return frozenset(names), default


def _is_constant(args: list) -> bool:
    return bool(args) and isinstance(args[0], ast.Constant)


@functools.cache
def config_of(file_and_options: str):
    file, _, options = file_and_options.partition(":")
    # A reader's own run is not here.
    options = ",".join(o for o in options.split(",") if not o.startswith("run="))
    # Nor is this machine to be measured for a budget of minutes.
    options = re.sub(r"\bminutes=[^,]+", "tokens=1e8", options)
    path = (ROOT / file).relative_to(ROOT).with_suffix("")
    return importlib.import_module(".".join(path.parts)).get_config(options or None)


def wrong_key(config, key: str, value: str) -> str:
    """Returns what is wrong with `--config.key=value`, or ""."""
    found = config
    for name in key.split("."):
        if name not in found:
            return f"the config has no key {key}"
        found = found[name]
    kind = type(found)
    if kind in (int, float):
        try:
            kind(value)
        except ValueError:
            return f"{key} is of type {kind.__name__}, not {value!r}"
    if kind is bool and value.lower() not in ("true", "false"):
        return f"{key} is True or False, not {value!r}"
    return ""


def wrong(door: str, words: list[str]) -> list[str]:
    """Returns what of a command does not exist."""
    file = (ROOT / Path(*door.split("."))).with_suffix(".py")
    if not file.exists():
        return [f"there is no {door}"]
    if "--" in words:  # of experiments.launch: what follows are those of train
        at = words.index("--")
        return [*wrong(door, words[:at]), *wrong("experiments.train", words[at + 1 :])]
    own, default = flags_of(file)
    shared, _ = flags_of(ROOT / "experiments" / "door.py")
    known = own | shared | {"help"}
    given = [word.lstrip("-").partition("=") for word in words if word.startswith("-")]
    found = [
        f"{door} takes no {word}"
        for word in words
        if not word.startswith("-") and word != "..."
        if "words=True" not in file.read_text()  # which takes other words than flags
    ]
    chosen = [value for name, _, value in given if name == "config"]
    chosen = chosen[0] if chosen else default
    if chosen and not (ROOT / chosen.partition(":")[0]).exists():
        return [*found, f"there is no {chosen}"]
    for name, _, value in given:
        if name.startswith("config.") and chosen:
            problem = wrong_key(config_of(chosen), name.removeprefix("config."), value)
            found += [problem] if problem else []
        elif name not in known and name.removeprefix("no") not in known:
            found.append(f"{door} has no flag --{name}")
    if chosen:
        config_of(chosen)  # refuses options that it does not know
    return found


LAUNCH = sorted((ROOT / "docs" / "launch").iterdir())


@pytest.mark.parametrize("page", [*PAGES, *LAUNCH], ids=lambda page: page.name)
def test_every_command_names_doors_flags_configs_and_keys_that_exist(page):
    problems = [
        f"{problem}: python -m {door} {shlex.join(words)}"
        for door, words in commands(page)
        for problem in wrong(door, words)
    ]
    assert not problems, "\n".join(["", *problems])


@pytest.mark.parametrize(
    "command, problem",
    [
        ("experiments.trian", "there is no experiments.trian"),
        ("experiments.train --confg=configs/gpt2.py", "no flag --confg"),
        ("experiments.train --config=configs/gpt3.py", "there is no configs/gpt3.py"),
        (
            "experiments.train --config=configs/gpt2.py --config.hyper.lrr=1",
            "hyper.lrr",
        ),
        ("experiments.train --config=configs/gpt2.py --config.steps=1e3", "type int"),
        ("experiments.prepare --config.data.sauce=x", "data.sauce"),
        ("experiments.sample runs/a", "takes no runs/a"),
        ("experiments.launch -- --conf=configs/gpt2.py", "train has no flag --conf"),
    ],
)
def test_a_wrong_command_is_found(command, problem):
    door, *words = command.split()
    (found,) = wrong(door, words)
    assert problem in found


# --- links ----------------------------------------------------------------------------

LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|(?:src|href)=\"([^\"]+)\"")


def anchors(page: Path) -> set[str]:
    """Returns the names that GitHub gives to the headings of a page."""
    text = FENCE.sub("", page.read_text())
    heads = [head.lower() for head in re.findall(r"^#+ (.+)$", text, re.M)]
    return {re.sub(r"[^\w\- ]", "", head).replace(" ", "-") for head in heads}


@pages
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    missing = []
    for pair in LINK.findall(FENCE.sub("", page.read_text())):
        link = "".join(pair)
        name, _, anchor = link.partition("#")
        if re.match(r"[a-z]+:", link):
            continue
        target = (page.parent / name).resolve() if name else page
        there = target.exists()
        if there and anchor and target.suffix == ".md":
            there = anchor in anchors(target)
        missing += [] if there else [link]
    assert missing == []
