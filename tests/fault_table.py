"""A pytest plugin for `make test-faults`: what was injected, and what survived it.

A test that injects a fault says which: `@pytest.mark.fault(row)`, or with a number,
`@pytest.mark.fault(row, injections=20)`, when it injects several. A test that finds out
as it runs says so itself: `record_property("injections", 20)`. A parametrized test
counts each of its cases. `injections=0` runs a test with the others of its row that
injects nothing, such as the same load without the fault.

`pytest -p tests.fault_table -m fault` ends with the table, and fails when a row has no
test that ran, unless -k, -x or the like made it leave some out. `--table=FILE` puts the
table between the two comments that FILE has for it.
"""

import re
from collections import Counter
from pathlib import Path

import pytest

ROWS = {
    1: "SIGKILL while a checkpoint is written",
    2: "SIGKILL in a step, an evaluation, a wait for data",
    3: "SIGTERM and Ctrl-C while compiling, training, evaluating, sampling",
    4: "disk full, over its quota, or not writable at a save",
    5: "newest checkpoint damaged",
    6: "background save fails; the process ends right after the last save",
    7: "leftovers of a killed save; steps newer than the resume point",
    8: "checkpoint of another model",
    9: "another number of devices, another mesh",
    10: "resumed twice; resumed and saved at once; other prefetch depths",
    11: "training data changed under the run",
    12: "another tokenizer, another vocabulary",
    13: "two processes, one run folder",
    14: "one batch whose loss or gradient is not finite",
    15: "losses that stay NaN",
    16: "a spike of the loss",
    17: "other hash seed, working directory, number of workers",
    18: "the same update computed in another way",
    19: "leaks between packed documents",
    20: "key-value cache against none, up to the context limit",
    21: "bad configuration",
    22: "old checkpoint, new code",
    23: "damaged data",
    24: "data loader that raises or stalls",
    25: "a sweep's trial out of memory, crashed or killed",
    26: "hostile request fields",
    27: "long or pathological prompt",
    28: "client that leaves, reads slowly, or times out",
    29: "overload, then shutdown",
    30: "untrusted files and paths",
    31: "the screen fails: reader gone, disk full, closed, not UTF-8, hang-up",
    32: "a measure that changes its meaning",
    33: "Ctrl-C at any time",
    34: "text that is no text",
    35: "poor surroundings: no home, few files, long names, read-only folders",
    36: "settings of another task or shape",
    37: "more clients than connections",
    38: "a plan larger than memory",
    39: "a compiled program that is cut, flipped or of another CPU",
    40: "a run in a store: killed as it copies, moved, claimed by two, refused",
}
BEGIN, END = "<!-- faults: made by make test-faults -->", "<!-- /faults -->"
HEAD = "| # | fault | injections | survived |\n|--:|---|--:|--:|"


def pytest_addoption(parser):
    """Adds `--table=FILE`."""
    parser.addoption("--table", default="", help="file to put the table of faults into")


def pytest_configure(config):
    """Counts where the tests report to: not in a worker of pytest-xdist."""
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Table(config), "fault-table")


def pytest_collection_modifyitems(items):
    """Gives each test's faults to its report."""
    for item in items:
        for mark in item.iter_markers("fault"):
            fault = [mark.args[0], mark.kwargs.get("injections", 1)]
            item.user_properties.append(("fault", fault))


class Table:
    """Counts of injections by row, of all that ran and of those that passed."""

    def __init__(self, config):
        self.config = config
        self.injected, self.survived = Counter(), Counter()

    @property
    def absent(self) -> list[int]:
        return [row for row in ROWS if not self.injected[row]]

    def pytest_runtest_logreport(self, report):
        """Counts a test, once: when it was called, or could not be."""
        if report.skipped or not (report.when == "call" or report.failed):
            return
        said = dict(report.user_properties)
        for name, fault in report.user_properties:
            if name == "fault":
                row, count = fault
                count = said.get("injections", count)
                self.injected[row] += count
                self.survived[row] += count * report.passed

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        """Fails a whole run in which some row was never tested."""
        option = self.config.option
        whole = not (option.keyword or option.collectonly or option.maxfail)
        if whole and self.absent and not session.exitstatus:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter):
        """Prints the table, and writes it where `--table` says."""
        terminalreporter.section("faults injected and survived")
        terminalreporter.write_line(self.markdown())
        for row in self.absent:
            terminalreporter.write_line(f"row {row} has no test that ran: {ROWS[row]}")
        if self.config.option.table:
            put(Path(self.config.option.table), self.markdown())

    def markdown(self) -> str:
        """Returns the table in Markdown."""
        lines = [
            f"| {row} | {text} | {self.injected[row]} | {self.survived[row]} |"
            for row, text in ROWS.items()
        ]
        total = f"{self.injected.total()} | {self.survived.total()}"
        return "\n".join([HEAD, *lines, f"| | all | {total} |"])


def put(path: Path, table: str) -> None:
    """Replaces what stands between the two comments of a page."""
    old = path.read_text(encoding="utf-8")
    new, found = re.subn(
        f"(?s)(?<={re.escape(BEGIN)}\n).*(?={re.escape(END)})", f"{table}\n", old
    )
    if found != 1:
        raise ValueError(f"{path} has no lines {BEGIN} and {END} for the table")
    path.write_text(new, encoding="utf-8")
