"""The Markdown of the chat page: what it means, that it does nothing, that it is quick.

Needs playwright and a Chromium (make test-browser); see browser.py.
"""

import functools
import http.server
import re
import threading
import time

import pytest
from markdown_it import MarkdownIt

from tests import browser
from tests.test_project import ROOT

MARKDOWN = """# Title

A *paragraph* with **strong**, `code` and a [link](https://example.org/a_(b)).
A second line. https://example.org/x_y.

## Lists

1. one
2. two
   * inner **item**
   * other

> quoted

| name | count |
|:-----|------:|
| *a*  | 12    |

```python
def f(x):  # a comment
    return "text" + str(x * 2)
```

---

the end
"""


class Files(http.server.SimpleHTTPRequestHandler):
    """Sends the page's files, since a module is not read from a disk."""

    def log_message(self, format, *args):
        """Says nothing."""


@pytest.fixture(scope="module")
def made():
    """Renders texts one after the other in one place, as the page does; its HTML."""
    files = functools.partial(Files, directory=str(ROOT / "gpt_jax/serve/page"))
    code = """async (texts) => {
      const { render } = await import("/markdown.js");
      const box = document.createElement("div");
      for (const text of texts) render(box, text);
      return box.innerHTML;
    }"""
    with (
        http.server.ThreadingHTTPServer(("127.0.0.1", 0), files) as server,
        browser.chromium() as chromium,
    ):
        threading.Thread(target=server.serve_forever, daemon=True).start()
        page = chromium.new_page()
        page.goto(f"http://127.0.0.1:{server.server_port}/page.css")
        yield lambda *texts: page.evaluate(code, list(texts))
        server.shutdown()


def skeleton(html):
    """What HTML says: tags, addresses and texts, without what a style may change."""
    html = re.sub(r'</?div[^>]*>| class="(?!left|center|right)[^"]*"', "", html)
    html = re.sub(r' style="text-align:(\w+)"', r' class="\1"', html)
    # A row that is shorter than the head is short here and padded there.
    html = re.sub(r"(<td[^>]*></td>\s*)+</tr>", "</tr>", html)
    html = re.sub(r"\s*(</?(?:table|thead|tbody|tr|th|td)( [^>]*)?>)\s*", r"\1", html)
    html = re.sub(r"<figcaption>.*?</figcaption>", "", html, flags=re.S)
    html = re.sub(r"</?(figure|span)[^>]*>", "", html)
    html = re.sub(r'<a [^>]*?href="([^"]*)"[^>]*>', r'<a href="\1">', html)
    html = re.sub(r"<(ol|pre|code|ul)(?! start)[^>]*>", r"<\1>", html)
    html = re.sub(r'<ol start="1">', "<ol>", html)
    html = re.sub(r"<(/?)h\d>", r"<\1h>", html)
    html = re.sub(r"\n</code>", "</code>", html)
    html = re.sub(r"<hr ?/?>", "<hr>", html).replace("&quot;", '"')
    return re.sub(
        r"\s*(</?(?:p|ul|ol|li|pre|blockquote|h|hr)>)\s*", r"\1", html
    ).strip()


@pytest.mark.parametrize(
    "text",
    [
        MARKDOWN,
        "plain\ntwo lines\n\nnext",
        "# one #\n## two",
        "* a\n* b\n\n  more of b\n* c",
        "- a\n  - b\n    - c\n- d",
        "3. three\n4. four",
        "1) a\n2) b",
        "text\n- item",
        "**a *b* c** and _e_ and __f__",
        "snake_case_name and 2 * 3 * 4 and a ** b",
        "`a *b*` and `` c ` d `` and \\*not\\*",
        "```\n<b>&\n```\nafter",
        "~~~js\nlet a = `x`;\n~~~",
        "> a\n> > b\n>\n> - c",
        "***\n* * *\n___",
        "[a](http://x.y) ![b](https://x.y/z.png) <https://q.r>",
        "<b>bold?</b> & <script>alert(1)</script>",
        "unclosed **strong and `code",
        "| a | b |\n| - | - |\n| 1 | 2 |\n| 3 | 4 |",
        "a | b | c | d\n:-- | --: | :-: | ---\n1 | 2 | 3 | 4\n\nafter",
        "| a |\n|---|",
        "| *a* | `b` |\n|---|---|\n| x \\| y | `p \\| q` |\n| **s** | <https://x.y> |",
        "|a|b|\n|-|-|\n|1|\n|1|2|3|\n||2|\nno pipe\n> quoted",
        "text\n| a | b |\n|---|---|\n| 1 | 2 |\n- item",
        "- | a | b |\n  |---|---|\n  | 1 | 2 |\n- next",
        "> | a |\n> |:-:|\n> | 1 |",
        "| a | b |\n|---|\n| 1 | 2 |",
        "| a | b |\n|---|--x|",
        "a | b\n- | -",
        "a\n:-:",
        "| a |\n    | - |",
        "1. a\n\n   ```py\n   x = 1\n   ```\n2. b",
    ],
)
def test_markdown_means_what_it_means_elsewhere(made, text):
    """Oracle: markdown-it without HTML. Lists are tight here; pictures are links."""
    wanted = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    wanted = re.sub(
        r'<img src="(.*?)" alt="(.*?)" ?/?>', r'<a href="\1">\2</a>', wanted
    )
    wanted = re.sub(r"<li>\s*<p>(.*?)</p>", r"<li>\1", wanted, flags=re.S)
    wanted = re.sub(
        r"(?<![\">])https://example.org/x_y",
        '<a href="https://example.org/x_y">https://example.org/x_y</a>',
        wanted,
    )
    assert skeleton(made(text)) == skeleton(wanted)


def test_a_text_that_grows_ends_as_one_that_was_there_at_once(made):
    grown = [MARKDOWN[:end] for end in range(0, len(MARKDOWN) + 1, 3)] + [MARKDOWN]
    assert made(*grown) == made(MARKDOWN)


@pytest.mark.parametrize(
    "text",
    [
        "[a](javascript:alert(1))",
        "[a](data:text/html,x) <javascript:alert(1)>",
        '[a](https://x.y"onclick="alert(1))',
        "![x](https://x.y/a.png)<img src=x onerror=alert(1)>",
        '```"><script>alert(1)</script>\nx\n```',
        "<iframe srcdoc=x></iframe>",
        '|<img src=x onerror=alert(1)>|[a](javascript:x)|\n|-|:-:|\n|"onclick="x|<b>|',
    ],
)
def test_nothing_that_a_model_writes_does_anything(made, text):
    html = made(text)
    tags = set(re.findall(r"<(\w+)", html))
    known = {"p", "a", "code", "pre", "figure", "figcaption", "span", "button"}
    assert tags <= known | {"div", "table", "thead", "tbody", "tr", "th", "td"}
    assert all(a.startswith("https://") for a in re.findall(r'href="(.*?)"', html))
    names = set(re.findall(r'[\s"]([\w-]+)="', " ".join(re.findall(r"<[^>]*>", html))))
    assert names <= {"href", "target", "rel", "title", "class", "type", "tabindex"}
    assert html.count("<a ") == html.count('rel="noopener noreferrer"')


@pytest.mark.parametrize(
    "text",
    [
        *("*", "**a ", "> ", "`", "#  x", "[", "- ", "1. ", "_a_", "\\"),
        *("|", "|-", "|a\n", "|-|\n"),
    ],
)
def test_no_text_takes_long(made, text):
    """A tenth of a second does; without a bound some take minutes."""
    began = time.monotonic()
    assert made(text * 40_000)
    assert time.monotonic() - began < 5


def test_code_is_coloured_and_still_the_code(made):
    code = 'def f(x):  # why\n    return "a\\"b" + 12.5\n'
    html = made(f"```python\n{code}```")
    for kind, text in [("keyword", "def"), ("comment", "# why"), ("number", "12.5")]:
        assert f'<span class="{kind}">{text}</span>' in html
    assert re.search(r'<span class="string">"a\\"b"</span>', html)
    inside = re.search(r"<code>(.*)</code>", html, re.S)
    assert inside and re.sub(r"<[^>]*>", "", inside[1]) == code.rstrip("\n")
