"""docs/architecture.md names what is there."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/architecture.md").read_text()
QUESTIONS = re.findall(r"^\| (.+\?) \| (.+) \|$", PAGE, re.M)
FILE = re.compile(r"`([\w/]+\.py)` \(([^)]+)\)")


def defined(path: Path) -> set[str]:
    """Returns the names that the top level of a file gives something to."""
    names = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names.update(x.id for x in node.targets if isinstance(x, ast.Name))
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            names.add(node.target.id)
    return names


def test_there_are_fifteen_questions():
    assert len(QUESTIONS) == 15


@pytest.mark.parametrize("question, answer", QUESTIONS)
def test_a_question_is_answered_in_two_files_at_most_that_are_there(question, answer):
    files = FILE.findall(answer)
    assert 1 <= len(files) <= 2
    assert FILE.sub("", answer).strip(" ,") == ""
    for path, names in files:
        wanted = set(re.findall(r"`(\w+)`", names))
        assert wanted and wanted <= defined(ROOT / path), path


# --- where a config ends --------------------------------------------------------------

ROOMS = re.search(r"these rooms only: ([^.]+)\. As a plain", PAGE.replace("\n", " "))
TAKE = re.search(r"in these only: (.+?)\n\n|in these only: ([^\n]+)", PAGE)
GROUPS = {"config", "options", "text", "task", "model", "hyper", "optimizer", "adapter"}
GROUPS |= {"mesh", "sample", "record", "recipe"}
MAPPINGS = re.compile(r"(Mapping|dict|Tree)(\[.*\])?")


def named(match) -> set[str]:
    return set(re.findall(r"`([\w.]+)`", match[0]))


def room(path: Path) -> str:
    return path.relative_to(ROOT / "gpt_jax").parts[0].removesuffix(".py")


def test_no_module_but_those_named_knows_a_config_dict():
    found = {
        room(path)
        for path in (ROOT / "gpt_jax").rglob("*.py")
        if re.search(r"^from ml_collections|^import ml_coll", path.read_text(), re.M)
    }
    assert found == named(ROOMS) and len(found) <= 6


def test_no_function_but_those_named_takes_a_config_as_a_mapping():
    known, found = named(ROOMS) | named(TAKE), []
    for path in (ROOT / "gpt_jax").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.FunctionDef):
                continue
            if {room(path), f"{room(path)}.{node.name}"} & known:
                continue
            found += [
                f"{path.relative_to(ROOT)}: {node.name}({each.arg})"
                for each in [*node.args.args, *node.args.kwonlyargs]
                if each.arg in GROUPS and each.annotation
                if MAPPINGS.fullmatch(ast.unparse(each.annotation))
            ]
    assert found == []


# --- the tree -------------------------------------------------------------------------


def tree() -> list[str]:
    """Returns the files and folders that the tree names, from the root."""
    block = PAGE.partition("## The tree\n\n```\n")[2].partition("```")[0]
    found, folders = [], {-1: ""}
    for line in block.splitlines():
        depth = len(line) - len(line.lstrip())
        words = re.match(r"((?:[\w.]+(?:\.py|/|\.html) ?)+)(?:\s|$)", line.strip())
        if not words or depth > 6:  # the text goes on
            continue
        parent = folders[max(d for d in folders if d < depth)]
        for word in words[1].split():
            found.append(parent + word)
        if word.endswith("/"):
            folders = {d: p for d, p in folders.items() if d < depth}
            folders[depth] = parent + word
    return found


def test_the_tree_names_files_and_folders_that_are_there():
    named = tree()
    assert len(named) > 100
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_the_tree_names_every_module_of_the_library():
    """Parts of a folder that is told as a whole need no line of their own."""
    named = set(tree())
    top = {
        f"gpt_jax/{path.name}{'/' * path.is_dir()}"
        for path in (ROOT / "gpt_jax").iterdir()
        if path.suffix == ".py" or (path.is_dir() and [*path.glob("*.py")])
    }
    top -= {"gpt_jax/__init__.py", "gpt_jax/_root/"}  # that of an installed package
    assert sorted(top - named) == []
