"""The retry of tests marked `races`: once, from fresh fixtures, named in the summary; no other test is retried."""

import pytest

pytest_plugins = ["pytester"]

TESTS = """
import pytest

calls = []

def fails_at_first(name, times=1):
    calls.append(name)
    assert calls.count(name) > times, f"{name} failed\\nat length"

@pytest.fixture(scope="module")
def shared():
    fails_at_first("fixture")
    return len(calls)

@pytest.mark.races
def test_once():
    fails_at_first("once")

@pytest.mark.races
def test_always():
    fails_at_first("always", times=9)

@pytest.mark.races
def test_fixture_of_the_module(shared):
    pass

@pytest.mark.races
def test_passes():
    fails_at_first("passes", times=0)

def test_unmarked():
    fails_at_first("unmarked")

def test_counts():
    assert {name: calls.count(name) for name in calls} == {
        "once": 2, "always": 2, "fixture": 2, "passes": 1, "unmarked": 1
    }
"""


@pytest.fixture(params=[(), ("-n", "1")], ids=["one process", "a worker"])
def summary(request: pytest.FixtureRequest, pytester: pytest.Pytester) -> pytest.RunResult:
    pytester.makeini("[pytest]\nmarkers = races")
    pytester.makepyfile(TESTS)
    return pytester.runpytest_inprocess("-p", "tests.support.retry", *request.param)


def test_marked_tests_are_tried_twice(summary: pytest.RunResult) -> None:
    summary.assert_outcomes(passed=4, failed=2)
    assert sorted(failed.rsplit("::")[-1] for failed in failures(summary)) == ["test_always", "test_unmarked"]


def test_the_summary_names_what_was_retried(summary: pytest.RunResult) -> None:
    summary.stdout.fnmatch_lines(
        [
            "*failed once and retried: *::test_once*",
            "E * AssertionError: once failed",
            "*failed once and retried: *::test_always*",
            "*failed once and retried: *::test_fixture_of_the_module*",
            "E * AssertionError: fixture failed",
        ]
    )
    summary.stdout.no_fnmatch_line("*retried: *::test_passes*")


def failures(summary: pytest.RunResult) -> list[str]:
    return [line.split()[1] for line in summary.outlines if line.startswith("FAILED ")]
