"""The paired table against statistics computed another way."""

import json
from pathlib import Path

import pytest

from minitron_train.evaluation.compare import compare, compare_table, mcnemar, paired
from minitron_train.evaluation.task_names import mmlu_subjects
from minitron_train.runtime.errors import UserError


def write_items(folder: Path, label: str, rows: list[tuple[str, dict]]) -> None:
    lines = [
        {"task": task, "filter": "none", "doc_id": k, "prompt_hash": f"p{k}", "metrics": metrics}
        for k, (task, metrics) in enumerate(rows)
    ]
    (folder / f"{label}.items.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_mcnemar_equals_scipys_binomial_test() -> None:
    from scipy.stats import binomtest

    for gained, lost in ((0, 0), (1, 0), (3, 9), (10, 10), (40, 22)):
        wanted = binomtest(gained, gained + lost, 0.5).pvalue if gained + lost else 1.0
        assert mcnemar(gained, lost) == pytest.approx(wanted)


def test_paired_error_is_that_of_the_differences() -> None:
    import numpy as np

    source = np.random.default_rng(0)
    first, second = source.random(50), source.random(50)
    row = paired("task", "rougeL", list(zip(first.tolist(), second.tolist(), strict=True)))
    assert row.difference == pytest.approx((second - first).mean())
    assert row.stderr == pytest.approx((second - first).std(ddof=1) / np.sqrt(50))
    assert 0 < row.p_value < 1


def test_rows_are_matched_by_prompt_and_subjects_are_joined(tmp_path: Path) -> None:
    subjects = ("mmlu_anatomy", "mmlu_virology")
    write_items(tmp_path, "a", [(subjects[0], {"acc": 0.0}), (subjects[1], {"acc": 1.0}), ("hellaswag", {"acc": 1.0})])
    write_items(tmp_path, "b", [(subjects[0], {"acc": 1.0}), (subjects[1], {"acc": 1.0}), ("winogrande", {"acc": 1.0})])
    (row,) = compare(tmp_path, "a", "b")
    assert (row.task, row.metric, row.rows, row.first, row.second) == ("mmlu", "acc", 2, 0.5, 1.0)
    assert "mmlu" in compare_table(tmp_path, ["a", "b"])


def test_only_the_subjects_of_mmlu_are_joined(tmp_path: Path) -> None:
    names = ("mmlu_anatomy", "mmlu_pro_biology", "mmlu_redux_anatomy_generative")
    for label in ("a", "b"):
        write_items(tmp_path, label, [(name, {"acc": 1.0}) for name in names])
    assert [row.task for row in compare(tmp_path, "a", "b")] == ["mmlu", *names[1:]]
    assert len(mmlu_subjects()) == 57


@pytest.mark.parametrize(
    ("values", "p_value"),
    [
        ([(0.25, 0.5), (0.5, 0.75), (0.0, 0.25)], 0.0),  # the same difference in every row
        ([(0.25, 0.25), (0.5, 0.5)], 1.0),
        ([(0.25, 0.5)], 1.0),  # one row shows no spread
    ],
)
def test_differences_without_spread(values: list[tuple[float, float]], p_value: float) -> None:
    row = paired("task", "rougeL", values)
    assert (row.stderr, row.p_value) == (0.0, p_value)


def test_missing_label_and_disjoint_rows_are_refused(tmp_path: Path) -> None:
    write_items(tmp_path, "a", [("hellaswag", {"acc": 1.0})])
    with pytest.raises(UserError, match=r"eval.compare: .*b.items.jsonl does not exist \(evaluated labels: a\)"):
        compare(tmp_path, "a", "b")
    write_items(tmp_path, "b", [("winogrande", {"acc": 1.0})])
    with pytest.raises(UserError, match="share no evaluated row"):
        compare(tmp_path, "a", "b")


@pytest.mark.parametrize("damage", [b'{"task": "hellas', b'{"task": "hellaswag"}', b"[]", b"\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: bytes) -> None:
    for label in ("a", "b"):
        write_items(tmp_path, label, [("hellaswag", {"acc": 1.0})])
    with (tmp_path / "b.items.jsonl").open("ab") as file:
        file.write(damage + b"\n")
    with pytest.raises(UserError, match=r"b.items.jsonl: line 2 is not an evaluated row \(.*\); evaluate b again"):
        compare(tmp_path, "a", "b")


def test_shared_rows_without_a_number_each_are_no_missing_rows(tmp_path: Path) -> None:
    """lm-eval keeps [log-likelihood, words] of each page of WikiText; the perplexity is of all pages together."""
    for label in ("a", "b"):
        write_items(tmp_path, label, [("wikitext", {"word_perplexity": [-100.0, 20]})])
    with pytest.raises(UserError, match=r"share only rows of wikitext, which have no numeric metric per row"):
        compare(tmp_path, "a", "b")
