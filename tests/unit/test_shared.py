"""Material that test files share is made once, in one process and in two workers."""

import pytest

pytest_plugins = ["pytester"]

TEST = """
from tests.support.shared import make_once

def make(folder):
    folder.mkdir()
    with (folder / "makers").open("a") as makers:
        makers.write("made ")

def test_material(tmp_path_factory):
    assert (make_once(tmp_path_factory, "material", make) / "makers").read_text() == "made "
"""


@pytest.mark.parametrize("workers", ["0", "2"])
def test_the_files_of_a_run_share_one_folder(
    workers: str, pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)  # the run that contains this test may have workers too
    pytester.makepyfile(test_one=TEST, test_other=TEST)
    base = pytester.path / "base"
    done = pytester.runpytest_inprocess("--numprocesses", workers, "--dist", "loadfile", "--basetemp", base)
    done.assert_outcomes(passed=2)
    assert [path.parent for path in base.rglob("makers")] == [base / "material"]
