"""The site: it builds without a warning, its links lead somewhere, nothing is lost.

`make test-site`. The oracle of what a page holds is another reader of Markdown.
"""

import os
import posixpath
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from markdown_it import MarkdownIt

pytest.importorskip("material")
pytest.importorskip("mkdocstrings")

from docs.tools import notebooks, website
from docs.tools.pages import GUIDE, ROOT

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]


class Read(HTMLParser):
    """What a page holds: its tags, names, links, and what it loads."""

    def __init__(self, html: str):
        super().__init__()
        self.tags: Counter[str] = Counter()
        self.names: set[str] = set()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.inside = 0
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = {name: value or "" for name, value in attrs}
        self.inside += tag == "article"
        self.tags[tag] += self.inside > 0
        self.names |= {given[key] for key in ("id", "name") if given.get(key)}
        if tag == "a" and given.get("href"):
            self.links.append(given["href"])
        if tag in ("script", "img", "iframe", "source") and given.get("src"):
            self.loads.append(given["src"])
        if tag == "link" and given.get("href") and given.get("rel") != "canonical":
            self.loads.append(given["href"])

    def handle_endtag(self, tag):
        self.inside -= tag == "article"


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Returns (what the build said, the folder)."""
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(folder)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1", "ADDRESS": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr, folder


@pytest.fixture(scope="module")
def site(built):
    """Returns the pages by their path in the site."""
    folder = built[1]
    return {
        file.relative_to(folder).as_posix(): Read(file.read_text(encoding="utf-8"))
        for file in folder.rglob("*.html")
    }


def test_the_build_says_no_warning(built):
    assert "WARNING" not in built[0] and "ERROR" not in built[0], built[0]


def test_every_link_leads_to_a_page_and_a_name_on_it(built, site):
    broken = []
    for path, page in site.items():
        for link in [*page.links, *page.loads]:
            parts = urlsplit(link)
            if parts.scheme or path == "404.html":  # that one's begin at the server
                continue
            folder = posixpath.dirname(path)
            goal = posixpath.normpath(posixpath.join(folder, unquote(parts.path)))
            goal = path if not parts.path else goal
            if not (built[1] / goal).is_file():
                goal = posixpath.normpath(f"{goal}/index.html")
            there = (built[1] / goal).is_file()
            if there and parts.fragment and goal in site:
                # "__" are of the theme: what is open, where a line is.
                name = unquote(parts.fragment)
                there = name.startswith("__") or name in site[goal].names
            if not there:
                broken.append(f"{path}: {link}")
    assert len(site) > 150 and broken == []


def test_no_page_loads_anything_from_another_server(site):
    away = {url for page in site.values() for url in page.loads if urlsplit(url).netloc}
    assert away == set()


TAGS = ("h2", "h3", "li", "table", "tr", "pre", "img")


@pytest.mark.parametrize("file", [*GUIDE.glob("*.md"), ROOT / "README.md"])
def test_a_page_holds_what_another_reader_of_markdown_sees(file, site):
    name = file.relative_to(ROOT).as_posix()
    path = website.MOVED.get(name, name).removeprefix("docs/").replace(".md", ".html")
    path = path.replace("README", "index")
    wanted = Read(f"<article>{_rendered(file)}</article>").tags
    found = site[path].tags
    assert {tag: found[tag] for tag in TAGS} == {tag: wanted[tag] for tag in TAGS}


def _rendered(file: Path) -> str:
    return MarkdownIt("commonmark").enable("table").render(file.read_text())


def test_every_module_has_a_page_and_every_public_function_a_place_on_it(site):
    for file in website._modules():
        assert website._uri(file).replace(".md", ".html") in site
    wanted = {f"gpt_jax.attention.{name}" for name in ("plain", "choose")}
    assert wanted <= site["api/gpt_jax.attention.html"].names


def test_every_page_of_the_guide_is_there_with_its_notebook(built, site):
    for page in notebooks.PAGES:
        name = "index" if page.stem == "README" else page.stem
        assert f"../notebooks/{page.stem}.ipynb" in site[f"guide/{name}.html"].links
        assert (built[1] / f"notebooks/{page.stem}.ipynb").is_file()


def test_it_can_be_searched_and_read_in_the_dark(built, site):
    index = (built[1] / "search/search_index.json").read_text()
    assert "grouped-query attention" in index
    html = (built[1] / "index.html").read_text()
    assert 'data-md-color-scheme="slate"' in html


def test_the_workflow_publishes_what_make_site_builds():
    workflow = (ROOT / ".github/workflows/site.yml").read_text()
    assert "make site" in workflow and "path: site\n" in workflow
    assert "\nsite:" in (ROOT / "Makefile").read_text()
