"""Globs: what Python's own finds, but each file once and no folder for ever."""

import glob
import os
from pathlib import Path

import pytest

from gpt_jax import paths

NAMES = (
    *("a.txt", "b.md", ".hidden.txt", "one/c.txt", "one/two/d.txt", "[x]/e.txt"),
    *(".git/f.txt", "one/.two/g.txt", "one/h", "empty/.keep"),
)


@pytest.fixture
def tree(tmp_path):
    for name in NAMES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    return tmp_path


@pytest.mark.parametrize(
    "pattern",
    [
        *("*.txt", "**/*.txt", "**", "**/*", "one/**", "**/**/*.txt", "*/*.txt"),
        *(".*", "**/.*", "[ab].*", "[[]x]/*", "?.md", "one/two/d.txt", "absent/*"),
        *("a.txt/*", "one/../*.md", "**/two/*", "a.txt"),
    ],
)
def test_without_links_a_glob_finds_what_pythons_own_finds(tree, monkeypatch, pattern):
    monkeypatch.chdir(tree)
    for prefix in ("", f"{tree}/"):
        theirs = glob.glob(f"{prefix}{pattern}", recursive=True)
        files = sorted({path for path in theirs if os.path.isfile(path)})
        found = paths.matching(Path(f"{prefix}{pattern}"))
        assert [str(path) for path in found.files] == files
        assert (found.again, found.unread) == (0, [])


@pytest.mark.fault(34)
def test_links_round_and_round_end(tree):
    """Two links upwards in one folder are 2^40 ways for Python's own."""
    for name in ("one/up", "one/round", "one/two/top"):
        (tree / name).symlink_to(tree)
    (tree / "itself").symlink_to("itself")
    found = paths.matching(tree / "**" / "*.txt")
    names = [str(path.relative_to(tree)) for path in found.files]
    assert names == ["[x]/e.txt", "a.txt", "one/c.txt", "one/two/d.txt"]
    assert found.again == 3 and found.unread == []
    (why,) = paths.matching(tree / "**").unread
    assert why.startswith(f"{tree}/itself cannot be read: Too many levels")


def test_a_file_is_known_by_its_own_name_not_by_that_of_a_link(tree):
    (tree / "0.txt").symlink_to("one/c.txt")
    (tree / "1").symlink_to("one")
    found = paths.matching(tree / "**" / "*.txt")
    assert tree / "one/c.txt" in found.files and tree / "0.txt" not in found.files
    assert found.again == 2
    assert paths.matching(tree / "0.txt").files == [tree / "0.txt"]
