"""Which metric stands for a task in the report and its curves, and whether it is printed as a share."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minitron_train.evaluation.metrics import is_share
from minitron_train.reporting import summary_table
from minitron_train.reporting.curves import task_charts
from minitron_train.reporting.evaluation import evaluation_rows
from minitron_train.reporting.load import load_run

TRIVIAQA = {"exact_match_stderr,remove_whitespace": 0.01, "rows": 17944, "num_fewshot": 0, "version": 3.0}
IFEVAL = {"prompt_level_strict_acc": 0.25, "inst_level_strict_acc": 0.5, "rows": 541, "num_fewshot": 0, "version": 4.0}


def write_eval(folder: Path, label: str, report: dict[str, Any]) -> None:
    (folder / "eval").mkdir(exist_ok=True)
    (folder / "eval" / f"{label}.json").write_text(json.dumps(report))


def test_tasks_whose_metric_has_no_place_of_its_own(tmp_path: Path) -> None:
    for label, value in (("teacher", 0.5), ("student", 0.25)):
        results = {"triviaqa": {"exact_match,remove_whitespace": value, **TRIVIAQA}, "ifeval": IFEVAL}
        write_eval(tmp_path, label, {"perplexity": None, "results": results})
    rows = {row["task"]: row for row in evaluation_rows(load_run(tmp_path))}
    assert (rows["triviaqa"]["metric"], rows["triviaqa"]["share"]) == ("exact_match", "50.0 %")
    assert rows["triviaqa"]["cells"] == ["50.0 ± 1.0 %", "25.0 ± 1.0 %"]
    assert (rows["ifeval"]["metric"], rows["ifeval"]["cells"]) == ("prompt_level_strict_acc", ["25.0 %"] * 2)
    assert "17,944 rows" in summary_table(tmp_path) and "not run" not in summary_table(tmp_path)
    columns = {"tokens": np.array([8.0, 16.0]), "eval.triviaqa.exact_match,remove_whitespace": np.array([0.1, 0.25])}
    (chart,) = task_charts(columns, {})
    assert "at the end 25.0 %" in chart.caption


def test_perplexities_of_tasks_are_no_shares(tmp_path: Path) -> None:
    for label, value in (("teacher", 21.05), ("student", 42.1)):
        results = {"wikitext": {"word_perplexity": value, "rows": 62, "num_fewshot": 0}}
        write_eval(tmp_path, label, {"perplexity": value, "results": results})
    run = load_run(tmp_path)
    assert [row["share"] for row in evaluation_rows(run)] == ["× 2.00", "× 2.00"]
    columns = {"tokens": np.array([8.0, 16.0]), "eval.wikitext.word_perplexity": np.array([60.0, 42.1])}
    (chart,) = task_charts(columns, run.evals)
    assert chart.caption == "word_perplexity of the student; at the end 42.100."
    assert [note.text for note in chart.notes] == ["teacher 21.050"]
    assert [text for _, text in chart.y.ticks] == ["0", "20", "40", "60"]


@pytest.mark.parametrize(
    ("metric", "share"),
    [
        ("acc_norm", True),
        ("exact_match,custom-extract", True),
        ("word_perplexity", False),
        ("bits_per_byte", False),
        ("likelihood_diff", False),
        ("bleu,none", False),
        ("after", True),
    ],
)
def test_shares(metric: str, share: bool) -> None:
    assert is_share(metric) is share
