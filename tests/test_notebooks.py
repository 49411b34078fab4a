"""The pages of the guide as notebooks: what becomes a cell, and that all cells run.

`make test-notebooks` executes them headless, in one folder and in their order, since
later pages use the runs of earlier ones. What their commands train is small.
"""

import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs_walk import OF_TESTS, ROOT, Reader, small

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

from docs.tools import notebooks, pages  # noqa: E402  it needs nbformat

GUIDE = pages.GUIDE
NUMBERED = sorted(GUIDE.glob("[0-9]*.md"), key=lambda p: int(p.name.partition("-")[0]))
NAMED = [page for page in notebooks.PAGES if page not in NUMBERED]
PAGES = [GUIDE / "README.md", *NUMBERED]
PAGES += [page for page in NAMED if page not in PAGES]

PAGE = """# A page

See [the loss](../../gpt_jax/losses.py) and [attention](2-attention.md#many-heads).

```python
print("one")
```

```text
one
```

```python
# gpt_jax/losses.py
quoted = 1
```

<!-- not run: it needs eight accelerators -->
```bash
python -m experiments.train --config=configs/gpt2.py
```

```bash
pip install tensorboard
# then
python -m experiments.train --config=configs/quickstart.py \\
  --workdir=runs/a
python -m experiments.chat --run=runs/a
```

```bash
python -m experiments.serve --runs=runs/a
```

```bash
python -m experiments.look --run=runs/a --prompt="def"
```

```python
figure.savefig("a.png")
```
"""


@pytest.fixture
def cells(tmp_path):
    page = tmp_path / "docs/guide/page.md"
    page.parent.mkdir(parents=True)
    page.write_text(PAGE.replace("../../", f"{ROOT}/").replace("(2", f"({GUIDE}/2"))
    made = notebooks.notebook(page, "https://example.com/gpt_jax.git")
    nbformat.validate(made)
    return made.cells[1:]


def test_what_is_to_be_run_is_a_cell_and_the_rest_is_text(cells):
    assert [cell.source for cell in cells if cell.cell_type == "code"] == [
        'print("one")',
        "%pip install tensorboard\n# then\n"
        "!python -m experiments.train --config=configs/quickstart.py \\\n"
        "  --workdir=runs/a\n"
        "# in a terminal: python -m experiments.chat --run=runs/a",
        '!python -m experiments.look --run=runs/a --prompt="def"',
        notebooks.SHOW.format(pages='"runs/a/look.html"').rstrip(),
        'figure.savefig("a.png")\n\n'
        'from IPython.display import Image\n\nImage("a.png")',
    ]
    text = "\n".join(cell.source for cell in cells if cell.cell_type == "markdown")
    for word in ("quoted = 1", "configs/gpt2.py", "experiments.serve"):
        assert word in text
    assert "not run" not in text and "one\n" not in text


def test_what_a_page_shows_below_a_program_is_the_output_of_its_cell(cells):
    (shown,) = [cell.outputs for cell in cells if cell.get("outputs")]
    assert [output.text for output in shown] == ["one\n"]


def test_links_lead_to_notebooks_and_to_the_repository(cells):
    assert (
        "(https://example.com/gpt_jax/blob/main/gpt_jax/losses.py)" in cells[0].source
    )
    assert "(2-attention.ipynb#many-heads)" in cells[0].source


def test_the_same_pages_make_the_same_bytes_and_stand_alone(tmp_path):
    for name in ("a", "b"):
        notebooks.write(tmp_path / name, "")
    assert len(notebooks.PAGES) >= 20
    for page in notebooks.PAGES:
        one, two = (tmp_path / f"{name}/{page.stem}.ipynb" for name in ("a", "b"))
        assert one.read_bytes() == two.read_bytes()
        nbformat.validate(nbformat.read(one, 4))
        assert "](../images" not in one.read_text()


# --- executed -------------------------------------------------------------------------


def shrunk(source: str) -> str:
    """Returns a cell whose commands take seconds, and end it where they fail."""
    lines = []
    for line in source.replace("\\\n", " ").split("\n"):
        if line.startswith("!python"):
            line = f"!{_small(line[1:])}"
        elif line.startswith("!echo"):
            before, _, command = line.partition("| ")
            line = f"{before}| {_small(command)}"
        elif line.startswith("!"):
            raise AssertionError(f"not run and not marked: {line}")
        if line.startswith("%pip"):
            continue  # all of it is here
        lines.append(line)
        if line.startswith("!"):
            lines.append(f"assert not _exit_code, {line!r}")
    return "\n".join(lines)


def _small(command: str) -> str:
    words = shlex.split(command, comments=True)
    door, rest = words[2].removeprefix("experiments."), words[3:]
    return shlex.join([*words[:3], *small(door, rest)])


def execute(notebook, folder) -> None:
    """Runs every cell; the first that fails is the test's failure."""
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources=resources
    ).execute()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A clone with what a reader has, in a home of its own."""
    folder = tmp_path_factory.mktemp("clone")
    Reader(folder, None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))  # caches are kept there
        patch.setenv("JUPYTER_PLATFORM_DIRS", "1")
        for flag in OF_TESTS:
            patch.delenv(flag, raising=False)
        yield folder


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_cell_of_the_notebook_runs(page, folder):
    made = notebooks.notebook(page, "")
    for cell in made.cells[1:]:
        if cell.cell_type == "code":
            cell.source = shrunk(cell.source)
            cell.outputs = []
    execute(made, folder)


@pytest.mark.slow
def test_a_command_that_fails_ends_the_notebook(folder):
    wrong = "!python -m experiments.sample --run=runs/nowhere"
    made = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(shrunk(wrong))])
    with pytest.raises(nbclient.exceptions.CellExecutionError, match="runs/nowhere"):
        execute(made, folder)


@pytest.mark.slow
def test_the_first_cell_clones_the_project_and_installs_what_is_missing(
    tmp_path, monkeypatch
):
    origin = tmp_path / "origin"
    (origin / "gpt_jax").mkdir(parents=True)
    (origin / "gpt_jax/__init__.py").write_text('__version__ = "of the clone"\n')
    (origin / "requirements.in").write_text("numpy\n")  # here already: no network
    for words in (["init", "-q"], ["add", "."], ["commit", "-q", "-m", "all"]):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        subprocess.run(["git", *who, *words], cwd=origin, check=True)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    place = tmp_path / "notebooks"
    place.mkdir()
    made = notebooks.notebook(GUIDE / "1-text.md", f"file://{origin}")
    ask = "import gpt_jax\nprint(gpt_jax.__version__, Path.cwd().name)\n!which python"
    made.cells = [made.cells[0], nbformat.v4.new_code_cell(ask)]
    execute(made, place)
    execute(made, place)  # the same again finds the clone
    said = "".join(output.text for output in made.cells[1].outputs)
    assert said.split("\n")[0] == "of the clone gpt_jax"
    assert Path(said.split("\n")[1].strip()).parent == Path(sys.executable).parent
