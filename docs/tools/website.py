"""A hook of MkDocs: which pages the site has, their order, where their links lead.

Beside docs/ it has README.md as its first page, a page for every module of gpt_jax, of
its docstrings, one for every other file that a page links to, and the notebooks.
"""

import posixpath
import re
from pathlib import Path

import nbformat
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

from docs.tools import notebooks, pages
from docs.tools.pages import GUIDE, ROOT

MOVED = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
MOVED["CONTRIBUTING.md"] = "contributing.md"
ABOUT = ("architecture", "performance", "results")  # first; then the rest of docs/


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the pages that do not lie in docs/, and the order of all."""
    for name, uri in MOVED.items():
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, uri, content=text))
    for file in _modules():
        name = _dotted(file)
        text = f"# {name}\n\n::: {name}\n"
        files.append(File.generated(config, _uri(file), content=text))
    for file in _linked():
        language = {".py": "python", ".yml": "yaml"}.get(file.suffix, "text")
        code = file.read_text(encoding="utf-8")
        text = f"# {file.relative_to(ROOT)}\n\n````{language}\n{code}````\n"
        files.append(File.generated(config, _uri(file), content=text))
    for page in notebooks.PAGES:
        made = nbformat.writes(notebooks.notebook(page, config.repo_url or ""))
        uri = f"notebooks/{page.stem}.ipynb"
        files.append(File.generated(config, uri, content=made))
    config.nav = _nav()
    return files


def on_page_markdown(markdown: str, page: Page, files: Files, **_) -> str:
    """Turns links to files of the repository into links to pages of the site."""
    uri = page.file.src_uri
    if uri.startswith(("api/", "source/")):
        return markdown
    back = {moved: name for name, moved in MOVED.items()}
    origin = ROOT / back[uri] if uri in back else ROOT / "docs" / uri
    here = posixpath.dirname(uri)

    def to(words: str, file: Path, anchor: str) -> str:
        return f"{words}({posixpath.relpath(_uri(file), here)}{anchor})"

    markdown = pages.relinked(markdown, origin, to)
    if origin in notebooks.PAGES:
        link = posixpath.relpath(f"notebooks/{origin.stem}.ipynb", here)
        markdown = re.sub(r"\A(# .*\n)", rf"\1\n[As a notebook]({link})\n", markdown)
    return markdown


def _uri(file: Path) -> str:
    """Returns where the site has a file of the repository."""
    name = file.relative_to(ROOT).as_posix()
    if name in MOVED:
        return MOVED[name]
    if name.startswith("docs/"):
        return name.removeprefix("docs/")
    if name.startswith("gpt_jax/") and file.suffix == ".py":
        return f"api/{_dotted(file)}.md"
    return f"source/{name.lstrip('.')}.md"


def _dotted(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def _modules() -> list[Path]:
    found = (ROOT / "gpt_jax").rglob("*.py")
    return sorted((f for f in found if f.stem != "__main__"), key=_dotted)


def _linked() -> list[Path]:
    """Returns the files beside docs/ and gpt_jax/ that a page links to."""
    found: set[Path] = set()

    def note(words: str, file: Path, anchor: str) -> str:
        if _uri(file).startswith("source/"):
            found.add(file)
        return words

    sources = [ROOT / name for name in MOVED]
    for page in [*sources, *(ROOT / "docs").rglob("*.md")]:
        pages.relinked(page.read_text(encoding="utf-8"), page, note)
    return sorted(found)


def _nav() -> list:
    """Returns the order of the pages; of the guide, that of the table on its page."""
    text = (GUIDE / "README.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\| \[[^]]+\]\(([^)/]+\.md)\)", text, re.M)
    rest = [page.name for page in notebooks.PAGES if page.name not in listed]
    rest.remove("README.md")
    about = [f"{name}.md" for name in ABOUT]
    about += sorted({page.name for page in (ROOT / "docs").glob("*.md")} - {*about})
    api: dict[str, list] = {}
    for file in _modules():
        _, *parts = _dotted(file).split(".")
        if parts:
            api.setdefault(parts[0], []).append(_uri(file))
    return [
        {"Begin": "index.md"},
        {"Guide": [f"guide/{name}" for name in ("README.md", *listed, *rest)]},
        {"About": [*about, *list(MOVED.values())[1:]]},
        {
            "Code": [
                "api/gpt_jax.md",
                *({name: uris} if uris[1:] else uris[0] for name, uris in api.items()),
            ]
        },
        {"Files": [_uri(file) for file in _linked()]},
    ]
