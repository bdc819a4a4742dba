"""One retry for tests marked `races`: they depend on the timing of other processes, so a busy machine can fail them.

The retry is a whole run of the test, with every fixture made anew. The summary at the end names each retried test and shows its
first failure. A test without the mark is never retried.
"""

import contextlib

import pytest
from _pytest.runner import (
    runtestprotocol,  # pytest has no public way to run one test; pytest-rerunfailures does the same
)

FIRST_FAILURE = "first failure"  # a user property, since reports bring these from pytest-xdist's workers to the summary


def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> bool | None:
    """Run a marked test; if it fails, forget its reports and run it once more as pytest runs any test."""
    if item.get_closest_marker("races") is None or any(name == FIRST_FAILURE for name, _ in item.user_properties):
        return None
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    reports = runtestprotocol(item, log=False, nextitem=nextitem)
    failed = next((report for report in reports if report.failed), None)
    if failed is not None:
        item.user_properties.append((FIRST_FAILURE, failed.longreprtext))
        with contextlib.suppress(Exception):  # a module's or session's fixture may be what has failed: make them anew
            item.session._setupstate.teardown_exact(None)
        return item.ihook.pytest_runtest_protocol(item=item, nextitem=nextitem)
    for report in reports:
        item.ihook.pytest_runtest_logreport(report=report)
    item.ihook.pytest_runtest_logfinish(nodeid=item.nodeid, location=item.location)
    return True


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Name the retried tests, and show how each failed the first time."""
    reports = [report for category in terminalreporter.stats.values() for report in category]
    retried = {
        report.nodeid: failure
        for report in reports
        for name, failure in getattr(report, "user_properties", ())
        if name == FIRST_FAILURE
    }
    for nodeid, first_failure in retried.items():
        terminalreporter.section(f"failed once and retried: {nodeid}")
        terminalreporter.line(first_failure)
