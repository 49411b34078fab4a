"""Streams that fail, progress in logs and on terminals, tables."""

import io
import os
import pty
import subprocess
import sys
import types
from pathlib import Path

import pytest

from gpt_jax import screen
from gpt_jax.screen import progress, streams

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def nothing_told(monkeypatch):
    monkeypatch.setattr(streams, "_told", set())


@pytest.fixture
def clock(monkeypatch):
    now = types.SimpleNamespace(value=100.0)
    monkeypatch.setattr(progress.time, "monotonic", lambda: now.value)
    return now


def python(code, *args, shell="", **options):
    """Runs code, through a shell where its streams are to be closed."""
    command = [sys.executable, "-c", code, *args]
    if shell:
        command = ["sh", "-c", f'exec "$@" {shell}', "sh", *command]
    options = {"capture_output": True, "text": True, "timeout": 60, **options}
    return subprocess.run(command, cwd=ROOT, **options)


class Broken(io.StringIO):
    """A stream that refuses with an error of a number."""

    def __init__(self, number):
        super().__init__()
        self.number, self.tries = number, 0

    def write(self, text):
        self.tries += 1
        if self.number:
            raise OSError(self.number, os.strerror(self.number))
        return super().write(text)


# --- streams --------------------------------------------------------------------------


@pytest.mark.fault(31)
def test_a_stream_that_is_gone_is_told_of_once_and_left_alone(capsys):
    broken = Broken(32)
    stream = screen.Steady(broken, "stdout")
    for _ in range(3):
        print("line", file=stream, flush=True)
    assert broken.tries == 1
    told = "stdout cannot be written (Broken pipe): going on without\n"
    assert capsys.readouterr().err == told


@pytest.mark.fault(31)
def test_a_log_on_a_full_disk_goes_on_when_there_is_room_again(capsys):
    full = Broken(28)
    stream = screen.Steady(full, "stdout")
    stream.write("lost\n")
    full.number = 0
    stream.write("kept\n")
    assert full.getvalue() == "kept\n"
    assert "No space left on device" in capsys.readouterr().err


@pytest.mark.fault(31)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "gbk"])
def test_letters_that_a_stream_lacks_become_question_marks(capsys, encoding):
    raw = io.BytesIO()
    stream = screen.Steady(io.TextIOWrapper(raw, encoding), "stdout")
    print("aé你\udc80z", file=stream, flush=True)
    text = raw.getvalue().decode(encoding)
    assert text.startswith("a") and text.endswith("?z\n") and len(text) == 6
    assert f"stdout is in {encoding}" in capsys.readouterr().err


@pytest.mark.fault(31)
def test_a_stream_that_was_closed_and_one_that_never_was_take_everything(capsys):
    closed = io.StringIO()
    closed.close()
    for stream in (closed, None):
        stream = screen.Steady(stream, "stdout")
        print("x", file=stream, flush=True)
        stream.writelines(["y"])
    assert not stream.isatty()


def test_a_product_that_nobody_takes_is_an_error():
    with pytest.raises(screen.ReaderGone):
        screen.Product(Broken(32), "stdout").write("x")
    with pytest.raises(OSError, match="No space left"):
        screen.Product(Broken(28), "stdout").write("x")


def test_the_story_is_on_stdout_and_beside_a_product_on_stderr(monkeypatch, capsys):
    screen.say("on stdout")
    monkeypatch.setattr(sys, "stdout", screen.Product(sys.stdout, "stdout"))
    screen.say("on stderr")
    assert capsys.readouterr() == ("on stdout\n", "on stderr\n")


TAKE_OVER = """
import os, sys
from gpt_jax import screen
screen.take_over(product=False)
for _ in range(3):
    print("out")
    print("err", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    file.write("whole")
    file.flush()
    for number in (1, 2):  # as a compiler that is not written in Python does
        try:
            os.write(number, b"not in a file")
        except OSError:
            pass
sys.stdin.read()
"""


@pytest.mark.fault(31)
@pytest.mark.parametrize(
    "shell", [">&-", "2>&-", "<&- >&- 2>&-", ">/dev/full", "2>/dev/full"]
)
def test_streams_that_are_closed_or_full_change_no_exit_code_and_no_file(
    tmp_path, shell
):
    if "full" in shell and not os.path.exists("/dev/full"):
        pytest.skip("needs /dev/full")
    done = python(TAKE_OVER, str(tmp_path / "a"), shell=shell, input="")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "a").read_text() == "whole"


@pytest.mark.fault(31)
def test_the_exit_code_is_kept_when_the_reader_goes_away():
    reader, writer = os.pipe()
    os.close(reader)
    code = TAKE_OVER + "\nsys.exit(7)"
    done = subprocess.run(
        [sys.executable, "-c", code, os.devnull],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
    )
    os.close(writer)
    assert done.returncode == 7
    assert done.stderr.count("stdout cannot be written (Broken pipe)") == 1


# --- progress -------------------------------------------------------------------------


def test_plain_lines_come_at_intervals_and_at_the_end(clock, capsys):
    bar = screen.Progress("step", total=100)
    for step in range(1, 101):
        clock.value += 1
        bar.update(step, train_loss=2.0, tokens_per_second=12345.6, lr=0.1)
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 1/100  loss 2.0000  12,346 tok/s"
    assert lines[1] == "step 6/100  loss 2.0000  12,346 tok/s  0:01:34 left"
    assert lines[-1] == "step 100/100  loss 2.0000  12,346 tok/s"
    assert len(lines) == 21


def test_time_left_counts_from_where_a_run_resumed(clock, capsys):
    bar = screen.Progress("step", total=1000, start=900)
    for step in (910, 920):
        clock.value += 10
        bar.update(step)
    assert capsys.readouterr().out.splitlines() == [
        "step 910/1,000",
        "step 920/1,000  0:01:20 left",
    ]


def test_a_run_that_learns_from_rewards_shows_these(clock, capsys):
    bar = screen.Progress("step", total=5)
    bar.update(5, train_loss=-0.0, train_reward=0.25)
    assert capsys.readouterr().out == "step 5/5  reward 0.250\n"


def test_short_work_leaves_no_line_in_a_log_and_long_work_some(clock, capsys):
    with screen.counted("windows", 100) as done:
        for _ in range(4):
            clock.value += 1
            done(1)
        assert capsys.readouterr().out == ""
        clock.value += 1
        done(46)
    assert capsys.readouterr().out == "windows 50/100  0:00:05 left\n"


def test_bytes_have_a_speed_and_need_no_total(clock, capsys):
    with screen.counted("reading", None, unit=screen.size) as done:
        done(1)
        clock.value += 10
        done(50_000_000)
    assert capsys.readouterr().out == "reading 50 MB  5 MB/s\n"


def test_nothing_is_shown_where_nobody_wants_it(clock, capsys):
    show = screen.Show(False)
    show.say("line")
    with show.bar("x", 3) as done:
        clock.value += 60
        done(1)
    assert capsys.readouterr() == ("", "")


def test_printed_text_is_not_markup(capsys):
    bar = screen.Progress("step", total=1)
    bar.print("[bold]x[/bold] [/] [red")
    assert capsys.readouterr().out == "[bold]x[/bold] [/] [red\n"


@pytest.fixture
def terminal(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    return lambda columns: monkeypatch.setenv("COLUMNS", str(columns))


def test_a_terminal_gets_a_bar(terminal, capsys):
    bar = screen.Progress("step", total=100, start=10)
    bar.print("[bold]hello[/bold]")
    bar.update(50, train_loss=1.25, tokens_per_second=1000.0)
    bar.close()
    bar.close()
    out = capsys.readouterr().out
    for text in ("[bold]hello[/bold]", "step 50/100", "loss 1.2500", "1,000 tok/s"):
        assert text in out
    assert "━" in out


def test_a_narrow_terminal_keeps_the_numbers_on_one_line(terminal, capsys):
    terminal(40)
    bar = screen.Progress("step", total=100_000)
    bar.update(50_000, train_loss=1.25, tokens_per_second=1000.0)
    bar.close()
    assert "step 50,000/100,000  loss 1.2500  1,000…" in capsys.readouterr().out


def test_words_are_not_broken_on_a_terminal(terminal, capsys):
    terminal(20)
    bar = screen.Progress("step", total=1)
    bar.print("    a text with indeed rather long words")
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert {"a", "text", "indeed", "rather", "words"} <= {
        word for line in lines for word in line.split()
    }
    assert "    a text with" in lines[0]


def test_what_a_model_writes_does_not_command_the_terminal(terminal, capsys):
    bar = screen.Progress("step", total=1)
    bar.print("a\x1b[2J\x0e\x9b\tb")
    bar.close()
    assert "a␛[2J␎\ufffd" in capsys.readouterr().out
    assert screen.visible("über\tall\n") == "über\tall\n"


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.mark.parametrize("size", [1, 3, 1000])
def test_a_text_that_comes_in_pieces_breaks_between_words(monkeypatch, size):
    monkeypatch.setenv("COLUMNS", "20")
    monkeypatch.setattr(sys, "stdout", Terminal())
    text = "    a text with indeed rather long words\n\tand\x1b tabs " + "x" * 45
    words = screen.Words()
    for start in range(0, len(text), size):
        words.write(text[start : start + size])
    words.end()
    shown = sys.stdout.getvalue()
    assert shown.startswith("    a text with \nindeed rather long \nwords\n\tand␛ tabs")
    assert shown.split() == text.replace("\x1b", "␛").split()


def test_a_text_that_goes_to_a_file_is_as_it_is(capsys):
    words = screen.Words()
    words.write("a" * 200 + "\x1b ")
    words.write("b")
    words.end()
    assert capsys.readouterr().out == "a" * 200 + "\x1b b\n"


HUNG_UP = """
import sys
from gpt_jax import screen
screen.take_over(product=False)
bar = screen.Progress("step", total=3)
bar.update(1)
print("drawn", file=sys.stderr)
input()
bar.print("a sample")
bar.update(3)
bar.close()
open(sys.argv[1], "w").write("whole")
"""


@pytest.mark.fault(31)
def test_a_terminal_that_is_gone_ends_nothing(tmp_path):
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", HUNG_UP, str(tmp_path / "a")],
        cwd=ROOT,
        env={**os.environ, "TERM": "xterm"},
        stdin=subprocess.PIPE,
        stdout=theirs,
        stderr=subprocess.PIPE,
        text=True,
    )
    os.close(theirs)
    assert process.stderr.readline() == "drawn\n"
    os.close(ours)
    _, told = process.communicate("\n", timeout=60)
    assert process.returncode == 0 and "stdout cannot be written" in told
    assert (tmp_path / "a").read_text() == "whole"


# --- notebooks ------------------------------------------------------------------------


def test_a_notebook_has_one_output_that_changes_and_no_leftovers(
    clock, monkeypatch, capsys
):
    shown = []

    def display(data, *, raw, display_id):
        shown.append(data["text/plain"])
        return types.SimpleNamespace(update=change)

    def change(data, *, raw):
        shown[-1] = data["text/plain"]

    shell = types.SimpleNamespace(kernel=object())
    notebook = types.SimpleNamespace(get_ipython=lambda: shell)
    monkeypatch.setitem(sys.modules, "IPython", notebook)
    monkeypatch.setitem(
        sys.modules, "IPython.display", types.SimpleNamespace(display=display)
    )
    bar = screen.Progress("step", total=1000)
    for step in range(1, 1001):
        clock.value += 0.1
        bar.update(step, train_loss=1.0)
    bar.print("val_bpb 7.6")
    bar.close()
    assert shown == ["step 1,000/1,000  loss 1.0000"]
    assert capsys.readouterr().out == "val_bpb 7.6\n"
    with screen.counted("windows", 9) as done:
        clock.value += 60
        done(1)
        assert shown[1:] == ["windows 1/9  0:08:00 left"]
    assert shown[1:] == [""]


# --- words ----------------------------------------------------------------------------


def test_tables_are_aligned_numbers_to_the_right():
    lines = [("a|b", 3.563859224319458, None), ("你好", 12.0, 7)]
    assert screen.table(("name", "loss", "n"), lines).splitlines() == [
        "| name |    loss |   n |",
        "| ---- | ------: | --: |",
        "| a\\|b |  3.5639 |     |",
        "| 你好 | 12.0000 |   7 |",
    ]
    assert screen.table(("a", "b"), []).splitlines()[1] == "| --- | --- |"


def test_one_thing_is_not_many():
    assert screen.count(1, "program") == "1 program"
    assert screen.count(0, "program") == "0 programs"
    assert screen.count(1000, "class", "classes") == "1,000 classes"


def test_sizes_and_times_are_written_as_people_read_them():
    written = [screen.size(n) for n in (404, 1.5e4, 1e6, 3.09e9, 2e13)]
    assert written == ["404 B", "15 kB", "1 MB", "3.09 GB", "20 TB"]
    times = [screen.duration(s) for s in (0.0345, 3.25, 300, 10_000, 864_000)]
    assert times == ["34.5 ms", "3.25 s", "5.0 minutes", "2.8 hours", "10.0 days"]
    assert screen.clock(3723.9) == "1:02:03"
