"""The pages of the guide as notebooks: python -m docs.tools.notebooks FOLDER [ADDRESS]

Programs become cells, with what the page shows below them as their output, and so do
commands. What a page marks as not run stays text; what needs a terminal, a comment.
ADDRESS is where Colab and Kaggle clone the project from.
"""

import base64
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import nbformat
from nbformat import v4

from docs.tools import pages
from docs.tools.pages import GUIDE, ROOT, SHELL

PAGES = sorted(GUIDE.glob("*.md"))
TERMINAL = re.compile(r"python -m experiments\.(?:serve|chat)\b")
PICTURE = re.compile(r'savefig\("([^"]+)"\)')
WRITES = re.compile(r"experiments\.(look|report) --run=(\S+)")
SHOW = """\
import html
from pathlib import Path

from IPython.display import HTML, display

for page in [{pages}]:
    text = html.escape(Path(page).read_text(encoding="utf-8"))
    frame = f'<iframe srcdoc="{{text}}" width="100%" height="600"></iframe>'
    display(HTML(f"<div>{{frame}}</div>"))
"""
SETUP = """\
# The project and what it needs, on Colab and Kaggle; elsewhere this finds its folder.
import os
import shutil
import sys
from pathlib import Path

ADDRESS = "{address}"  # of a repository that holds the project

above = [Path.cwd(), *Path.cwd().parents]
root = next((p for p in above if (p / "gpt_jax/__init__.py").is_file()), None)
if root is None:
    if not ADDRESS:
        raise ValueError("set ADDRESS to what `git clone` takes, and run this again")
    !git clone --quiet --depth 1 {{ADDRESS}} gpt_jax
    root = Path("gpt_jax").resolve()
os.chdir(root)
sys.path.insert(0, str(root))
if "google.colab" in sys.modules or "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
    accelerator = "jax[cuda12]" if shutil.which("nvidia-smi") else ""
    %pip install --quiet -r requirements.in {{accelerator}}
# Commands are run by the Python of this notebook.
here = str(Path(sys.executable).parent)
os.environ["PATH"] = os.pathsep.join([here, os.environ["PATH"]])
"""


def notebook(page: Path, address: str) -> nbformat.NotebookNode:
    """Returns a page as a notebook.

    Args:
      page: a Markdown file of the guide.
      address: of the repository; "" = not known, its first cell asks for it.
    """
    cells = [v4.new_code_cell(SETUP.format(address=address)), *_cells(page, address)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"  # random ones would differ at each run
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def write(folder: Path, address: str) -> list[Path]:
    """Writes a notebook for every page of the guide; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    made = []
    for page in PAGES:
        made.append(folder / f"{page.stem}.ipynb")
        nbformat.write(notebook(page, address), made[-1])
    return made


def _cells(page: Path, address: str) -> Iterator[nbformat.NotebookNode]:
    text, found = "", list(pages.blocks(page.read_text(encoding="utf-8")))
    program = None  # the cell whose output may follow
    for block in found:
        cell = _cell(block)
        if cell is not None:
            yield from _prose(text, page, address)
            text, program = "", cell if block.language == "python" else None
            yield cell
            if written := WRITES.findall(cell.source):
                files = ", ".join(f'"{run}/{name}.html"' for name, run in written)
                yield v4.new_code_cell(SHOW.format(pages=files).rstrip())
        elif block.language is None:
            text += block.body
            program = program if not block.body.strip() else None
        elif block.language == "text" and program is not None:
            program["outputs"] = [v4.new_output("stream", text=block.body)]
            program = None
        else:
            text += f"```{block.language}\n{block.body}```"
            program = None
    yield from _prose(text, page, address)


def _cell(block: pages.Block) -> nbformat.NotebookNode | None:
    """Returns the cell of a block that is to be run, else None."""
    if block.mark == "not run":
        return None
    if block.language in SHELL:
        cell = commands(block.body)
        return v4.new_code_cell(cell) if re.search("^[!%]", cell, re.M) else None
    if block.language == "python" and not pages.quoted(block.body):
        code = block.body.rstrip()
        if picture := PICTURE.search(code):
            show = f'from IPython.display import Image\n\nImage("{picture[1]}")'
            code = f"{code}\n\n{show}"
        return v4.new_code_cell(code)
    return None


def commands(code: str) -> str:
    """Returns the commands of a shell as a cell has them: !python -m ..., %pip ..."""
    lines = []
    for line in code.rstrip().replace("\\\n", "\\\0").split("\n"):
        if TERMINAL.match(line):
            line = f"# in a terminal: {line}"
        elif line.startswith("pip "):
            line = f"%{line}"
        elif line and not line.startswith("#"):
            line = f"!{line}"
        lines.append(line.replace("\0", "\n"))
    return "\n".join(lines)


def _prose(text: str, page: Path, address: str) -> Iterator[nbformat.NotebookNode]:
    def to(words: str, file: Path, anchor: str) -> str:
        if words.startswith("!"):  # a notebook travels without its neighbours
            data = base64.b64encode(file.read_bytes()).decode()
            return f"{words}(data:image/png;base64,{data})"
        if file.parent == GUIDE and file.suffix == ".md":
            return f"{words}({file.stem}.ipynb{anchor})"
        name = file.relative_to(ROOT)
        if address:
            return f"{words}({address.removesuffix('.git')}/blob/main/{name}{anchor})"
        return f"{words}(../{name}{anchor})"

    if text.strip():
        yield v4.new_markdown_cell(pages.relinked(text, page, to).strip())


if __name__ == "__main__":
    folder, address = (*sys.argv[1:], "")[:2]
    files = write(Path(folder), address)
    print(f"wrote {len(files)} notebooks to {folder}")
