"""README.md and docs/guide/, walked by somebody who types every command, in small.

All pages share a folder and are walked in their order, since later ones use the runs of
earlier ones. What a command trains is its config's `size=tiny`, for a fiftieth of the
steps. A block that cannot be run here says why in its page: <!-- not run: ... -->.
"""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from docs.tools.pages import FENCE, MARK, ROOT
from gpt_jax import commands, tokenizers
from tests import forks
from tests.test_docs import programs

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
GUIDE = ROOT / "docs/guide"
PAGES = [ROOT / "README.md", GUIDE / "README.md"]
PAGES += sorted(GUIDE.glob("[0-9]*.md"), key=lambda p: int(p.name.partition("-")[0]))
PAGES += sorted(GUIDE.glob("[a-z]*.md"))
PAGES += [ROOT / f"docs/{name}.md" for name in ("reliability", "security")]
TRAIN = ("train", "prepare", "launch", "verify_resume")
# What only tests set, and no reader has.
OF_TESTS = ("XLA_FLAGS", "JAX_NUMPY_DTYPE_PROMOTION", "JAX_NUMPY_RANK_PROMOTION")
# What a reader has: files of theirs, and what a hub would send.
FILES = {
    "my_book.txt": "It was the best of times, it was the worst of times.\n" * 60,
    "messages.txt": "You won a prize\nSee you at six\n",
    "mine.csv": "label,text\ndecoder,Read it\nencoder,Write it\n",
    "reviews.csv": "review,stars\n" + "good book,5\nbad book,1\n" * 40,
    "test.json": '[{"instruction": "Name a colour.", "input": "", "output": "Red."}]',
    "questions.jsonl": '{"context": "A sky", "choices": [" a", " b"], "answer": 0}',
    "your_file.json": "["
    + ", ".join(
        f'{{"instruction": "Add {n} and 1.", "input": "", "output": "{n + 1}"}}'
        for n in range(40)
    )
    + "]",
}
FILES["names.txt"] = "bado.\nlemi.\nku.\n" * 300
FILES["repeats.txt"] = "abcdefghabcdefgh\nvwxyzvwxyz\n" * 400
FILES["book.txt"] = FILES["my_book.txt"]


def blocks(page: Path) -> list[tuple[str, bool]]:
    """Returns (text, whether it is marked as not run) of the blocks of commands."""
    text = page.read_text()
    made = []
    for block in FENCE.finditer(text):
        if block[1] in ("bash", "sh"):
            mark = MARK.search(text[: block.start()])
            made.append((block[2], bool(mark and mark[1] == "not run")))
    return made


def lines(block: str) -> list[list[str]]:
    """Returns the words of each command."""
    joined = block.replace("\\\n", " ").splitlines()
    return [words for line in joined if (words := shlex.split(line, comments=True))]


def small(door: str, words: list[str]) -> list[str]:
    """Returns the words of a command that takes seconds, otherwise the same."""
    if door == "sweep":  # every trial in one program
        words = [word for word in words if not word.startswith("--engine")]
        return [*words, "--engine=vmap", "--set=steps=50", "--set=tensorboard=False"]
    if door == "launch":
        at = words.index("--") + 1
        return [*words[:at], *small("train", words[at:])]
    if door not in TRAIN:
        words = [re.sub(r"^--count=.*", "--count=2", word) for word in words]
        return [word.replace("=austen", "=book.txt") for word in words]
    made, tiny = [], any("size=tiny" in word for word in words)
    for word in words:
        if (name := word.removeprefix("--config=")) != word:
            file, options = commands.split(name)
            kept = [x for x in options.split(",") if x and not x.startswith("size=")]
            word = f"--config={file}:{','.join([*kept, 'size=tiny'])}"
        elif (steps := word.removeprefix("--config.steps=")) != word and not tiny:
            word = f"--config.steps={max(2, int(steps) // 50)}"
        made.append(word)
    return made


class Reader:
    """Somebody with a clone, in a folder of their own."""

    def __init__(self, folder: Path, started: forks.Forks | None):
        self.folder, self.forks = folder, started
        for name in ("configs", "experiments", "gpt_jax", "requirements.txt"):
            (folder / name).symlink_to(ROOT / name)
        shutil.copytree(ROOT / "docs", folder / "docs")
        shutil.copy(ROOT / "README.md", folder)
        for name, text in FILES.items():
            (folder / name).write_text(text)
        for name, place in (("gpt2", "gpt2"), ("llama", "weights/SmolLM2-135M")):
            shutil.copytree(ROOT / "tests/golden" / name, folder / place)
            printable = "".join(map(chr, range(32, 127)))
            tokenizer = tokenizers.train("char", [printable])
            tokenizer = tokenizer.add_special(["<|endoftext|>"])
            tokenizer.save(folder / place / "tokenizer.json")

    def types(self, words: list[str]) -> None:
        """Runs a command, which must end well."""
        given = ""
        if "|" in words:
            at = words.index("|")
            assert words[0] == "echo"
            given, words = " ".join(words[1:at]) + "\n", words[at + 1 :]
        if words[:2] == ["pip", "install"]:
            return  # all of it is here
        door, rest = self.door(words)
        if door == "serve":
            return self.serves(rest)
        rest = small(door, rest)
        if given or door in ("launch", "verify_resume"):
            code, said = self.starts(door, rest, given)
        else:
            move = f"os.chdir({str(self.folder)!r})"
            code, said = self.forks.run(door, *rest, before=move)
        assert code == 0, f"{door} {shlex.join(rest)}\n{said}"

    def door(self, words: list[str]) -> tuple[str, list[str]]:
        """Returns which door a command is, and its flags."""
        if words[0] == "gpt-jax" and words[1] == "list":
            return "train", ["--help"]
        if words[0] == "gpt-jax":
            first = "config" if words[1] == "train" else "run"
            return words[1], [f"--{first}={words[2]}", *words[3:]]
        assert words[:2] == ["python", "-m"], f"not run and not marked: {words}"
        return words[2].removeprefix("experiments."), words[3:]

    def starts(self, door: str, rest: list[str], given: str) -> tuple[int, str]:
        """Runs a door as a process of its own."""
        done = subprocess.run(
            [sys.executable, "-m", f"experiments.{door}", *rest],
            cwd=self.folder,
            input=given,
            capture_output=True,
            text=True,
        )
        return done.returncode, done.stdout + done.stderr

    def serves(self, rest: list[str], program: str = "") -> None:
        """Runs the server until it is ready, and a program that asks it."""
        command = [sys.executable, "-m", "experiments.serve", *rest]
        process = subprocess.Popen(
            [*command, "--port=0", "--batches=1"],
            cwd=self.folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        said = []
        watch = threading.Timer(300, process.kill)
        watch.start()
        for line in process.stdout or ():
            said.append(line)
            if "serving" in line:
                break
        url = re.search(r"http://[\d.:]+", "".join(said))
        if program and url:
            code = program.replace("http://127.0.0.1:8000", url[0])
            exec(compile(code, "program", "exec"), {"__name__": "__main__"})
        process.send_signal(signal.SIGTERM)
        rest_of_it, _ = process.communicate(timeout=100)
        watch.cancel()
        assert process.returncode == 0 and url, "".join(said) + rest_of_it


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    folder = tmp_path_factory.mktemp("reader")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(folder / "home"))  # caches are kept there
        for flag in OF_TESTS:
            patch.delenv(flag, raising=False)
        with forks.forks() as started:
            yield Reader(folder, started)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_of_the_page_ends_well(page, reader):
    for block, marked in blocks(page):
        if not marked:
            for words in lines(block):
                reader.types(words)
    if page.stem == "13-serving":
        asking = [code for code, mark, _ in programs(page) if mark == "not run"]
        reader.serves(["--runs=runs/quickstart,runs/tuned"], "\n".join(asking))


def test_what_is_not_run_is_said_with_a_reason():
    for page in (*PAGES, *(ROOT / "docs").glob("*.md")):
        text = page.read_text()
        for block in FENCE.finditer(text):
            mark = MARK.search(text[: block.start()])
            if mark and mark[1] == "not run":
                assert len(mark[2].split()) > 3, mark[0]
