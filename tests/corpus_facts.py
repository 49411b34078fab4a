"""A pytest plugin for `make test-data`: only tests that read a text, and no skips.

`pytest -p tests.corpus_facts` keeps the tests that ask for the fixture `corpus_file`
and turns every skip among them into a failure: whoever asks for these facts wants to
know that each was looked at.
"""

import pytest


def pytest_collection_modifyitems(config, items):
    """Keeps the tests that use `corpus_file`, themselves or through a fixture."""
    kept = [
        item for item in items if "corpus_file" in getattr(item, "fixturenames", ())
    ]
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Reports a skip as a failure with the skip's reason."""
    report = yield
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        report.longrepr = f"{item.nodeid} was skipped: {report.longrepr[2]}"
    return report
