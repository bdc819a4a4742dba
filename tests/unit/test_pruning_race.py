"""benchmarks/quality/pruning_race.py: the report's arithmetic, the plan, the file of rows, and a tiny race."""

import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

from minitron_train.runtime.errors import UserError
from tests.support.training import make_material

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "benchmarks" / "quality"))
import pruning_race  # noqa: E402 # pyright: ignore[reportMissingImports]
from pruning_race import progress_line, read_start, run_left  # noqa: E402 # pyright: ignore[reportMissingImports]
from pruning_race_models import MODELS  # noqa: E402 # pyright: ignore[reportMissingImports]
from pruning_race_plan import (  # noqa: E402 # pyright: ignore[reportMissingImports]
    LRS,
    MODELOPT,
    OURS,
    WARMUPS,
    Grid,
    Start,
    minutes,
    plan_lines,
)
from pruning_race_report import Results, as_json, markdown, svg  # noqa: E402 # pyright: ignore[reportMissingImports]
from pruning_race_rows import (  # noqa: E402 # pyright: ignore[reportMissingImports]
    FIRST_SEED,
    SECOND_SEED,
    TEXTS,
    Rows,
    Run,
    best,
    make_row,
)
from pruning_race_training import Race, write_conversations  # noqa: E402 # pyright: ignore[reportMissingImports]

SETTINGS = {"prune": {"ridge": 0.03}, "calibration": {}, "distill": {}, "train": {"weight_decay": 0.1}}


def row(run: Run, ce: float | None, **others: float) -> dict[str, Any]:
    """A row with the same cross-entropy on every text but those in `others`."""
    losses = {text: {"ce": others.get(text, ce), "kl": 0.5} for text in TEXTS}
    facts = {"machine": "cpu", "precision": "fp32", "resumed_at_step": 0, "target": {}, "texts": {}, "batch": [4, 256]}
    return make_row(run, losses=losses, tokens=run.budget, seconds=120.0, curve=[], settings=SETTINGS, **facts)


def at(start: str, budget: int, ce: float | None, lr: float = 2e-4, seed: int = FIRST_SEED, **others: float) -> Any:
    return row(Run(start, budget, lr, 0.1, seed), ce, **others)


def ratio(rows: list[dict[str, Any]], text: str = "own") -> Any:
    return Results(rows).tokens_ratio("ours", text)


def test_the_best_rate_has_the_lowest_loss_of_the_first_seed() -> None:
    rows = [at("ours", 50_000, ce, lr) for lr, ce in zip(LRS, (3.4, 3.2, 3.3, 3.5), strict=True)]
    rows += [at("ours", 50_000, 3.3, 2e-4, SECOND_SEED), at("ours", 50_000, 1.0, 4e-4, SECOND_SEED)]
    rows += [at("ours", 50_000, None, 8e-4, seed=7), at("modelopt", 50_000, 1.0), at("ours", 100_000, 1.0)]
    found = best(rows, "ours", 50_000, "own")
    assert found and (found.lr, found.num_seeds, found.is_edge) == (2e-4, 2, False)
    assert (found.value, found.spread) == pytest.approx((3.25, 0.1))  # the second seed counts and does not select
    assert best(rows[:2], "ours", 50_000, "own").is_edge
    assert best([at("ours", 50_000, 1.0, seed=SECOND_SEED)], "ours", 50_000, "own") is None


def test_each_text_and_measure_has_its_own_best_rate() -> None:
    rows = [at("ours", 50_000, 3.0, 1e-4, wikitext2=5.0), at("ours", 50_000, 3.5, 4e-4, wikitext2=4.0)]
    rows[1]["losses"]["own"]["kl"] = 0.1
    lrs = [best(rows, "ours", 50_000, *of).lr for of in (("own",), ("wikitext2",), ("own", "kl"))]
    assert lrs == [1e-4, 4e-4, 4e-4]


def test_a_tie_goes_to_the_lower_rate_then_to_the_shorter_warmup() -> None:
    cells = [(4e-4, 0.1), (2e-4, 0.3), (2e-4, 0.1)]
    found = best([row(Run("ours", 50_000, *cell, FIRST_SEED), 3.0) for cell in cells], "ours", 50_000, "own")
    assert found and (found.lr, found.warmup) == (2e-4, 0.1)


def test_a_run_that_diverged_is_never_the_best() -> None:
    assert best([at("ours", 50_000, None), at("ours", 50_000, 9.0, 1e-4)], "ours", 50_000, "own").lr == 1e-4
    assert best([at("ours", 50_000, None)], "ours", 50_000, "own") is None


def test_tokens_are_interpolated_over_their_logarithm() -> None:
    """Half of the way in loss from 100 k to 300 k is the geometric mean of the tokens."""
    ours = [at("ours", budget, ce) for budget, ce in ((50_000, 3.8), (100_000, 3.6), (300_000, 3.2))]
    found = ratio([*ours, at("modelopt", 300_000, 3.4)])
    assert found.value == pytest.approx(300_000 / math.sqrt(100_000 * 300_000)) and not found.reason
    assert ratio([*ours, at("modelopt", 300_000, 3.6)]).value == pytest.approx(3.0)
    assert ratio([*ours, at("modelopt", 300_000, 3.2)]).value == pytest.approx(1.0)


def test_tokens_beyond_300k_count() -> None:
    ours = [at("ours", 300_000, 3.6), at("ours", 1_000_000, 3.2)]
    found = ratio([*ours, at("modelopt", 300_000, 3.4)])
    assert found.value == pytest.approx(300_000 / math.sqrt(300_000 * 1_000_000))


def test_tokens_ratio_at_its_limits() -> None:
    ours = [at("ours", 50_000, 3.4), at("ours", 100_000, 3.3)]
    bound = ratio([*ours, at("modelopt", 300_000, 3.4)])
    assert bound.value == pytest.approx(6.0) and "at least" in bound.reason
    never = ratio([*ours, at("modelopt", 300_000, 3.2)])
    assert never.value is None and "does not reach the loss within 100k" in never.reason
    assert ratio(ours).reason == "no finished run of modelopt at 300k"
    assert ratio([at("modelopt", 300_000, 3.2)]).reason == "no finished run of ours at 50k"


def test_evaluations_within_a_longer_run_are_not_budgets() -> None:
    ours = at("ours", 300_000, 3.4)
    losses = {text: {"ce": 1.0, "kl": 0.1} for text in TEXTS}
    ours["curve"] = [{"tokens": 100_000, "losses": losses}]
    assert ratio([ours, at("modelopt", 300_000, 3.4)]).value == pytest.approx(1.0)
    assert best([ours], "ours", 100_000, "own") is None


def complete() -> list[dict[str, Any]]:
    """ModelOpt's cut and ours at all budgets: ours leads by 0.2, by 0.1 on WikiText-2, and is behind there at 1 M."""
    rows = []
    for budget, ce in ((50_000, 4.0), (100_000, 3.8), (300_000, 3.6), (1_000_000, 3.4)):
        rows.append(at("modelopt", budget, ce))
        rows.append(at("ours", budget, ce - 0.2, wikitext2=ce + 0.05 if budget == 1_000_000 else ce - 0.1))
    return [*rows, row(Run("teacher"), 3.0), row(Run("ours"), 5.0)]


def test_the_headline() -> None:
    found = as_json(Results(complete()))
    assert found["lead_own"] == pytest.approx(0.2) and found["lead_wikitext2"] == pytest.approx(0.1)
    assert found["behind_at_1m"] == ["wikitext2"] and found["reasons"] == {}
    wikitext2 = 300_000 / math.sqrt(100_000 * 300_000)  # own has 3.0
    assert found["tokens_ratio"] == pytest.approx(wikitext2) and found["num_rows"] == 10
    assert found["starts"]["ours"]["tokens_ratio"] == found["tokens_ratio"]
    assert {"start": "ours", "budget": 300_000, "text": "own", "measure": "ce"}.items() <= found["best"][
        16 + 32
    ].items()


def test_a_missing_run_is_null_with_its_reason() -> None:
    rows = [
        one for one in complete() if (one["start"], one["budget"]) not in {("modelopt", 300_000), ("ours", 1_000_000)}
    ]
    found = as_json(Results(rows))
    for key in ("tokens_ratio", "lead_own", "lead_wikitext2", "behind_at_1m"):
        assert found[key] is None and found["reasons"][key].startswith("no finished run of")
    assert found["reasons"]["behind_at_1m"] == "no finished run of ours at 1M"


@pytest.mark.parametrize("rows", [[], complete()[:3], complete()], ids=["empty", "some", "all"])
def test_the_report_of_any_rows(rows: list[dict[str, Any]]) -> None:
    text, figures = markdown(Results(rows)), as_json(Results(rows))
    widths = [{line.count("|") for line in block.splitlines()} for block in text.split("\n\n") if block[0] == "|"]
    assert all(len(width) == 1 for width in widths)  # every table is rectangular
    assert ("–" in text) and json.loads(json.dumps(figures, allow_nan=False)) == figures
    assert len(ElementTree.fromstring(svg(Results(rows))).findall("{http://www.w3.org/2000/svg}svg")) == len(TEXTS)


def test_other_starts_are_compared_with_modelopt_too() -> None:
    results = Results([*complete(), at("ridge", 300_000, 3.0)])
    assert results.starts == ["modelopt", "ours", "ridge"]
    assert as_json(results)["starts"]["ridge"]["lead_own"] == pytest.approx(0.6)
    assert "| ridge | 300k | 3.000 at 0.0002*/0.1 |" in markdown(results)


def test_the_plan_grows_with_the_rows() -> None:
    grid = Grid(budgets=[300_000, 1_000_000])
    runs = grid.left([])
    assert [run.name for run in runs[:3]] == ["teacher untrained", "modelopt untrained", "ours untrained"]
    assert len(runs) == 3 + 2 * len(LRS) * len(WARMUPS) and {run.seed for run in runs[3:]} == {FIRST_SEED}
    assert sum("takes the best rates of 300k" in line for line in grid.undecided([])) == 2
    rows = [row(run, 3.0 + run.lr, wikitext2=3.0 - run.lr) for run in runs if run.start != "modelopt" and run.budget]
    grown = [run for run in grid.left(rows) if run.start == "ours" and run.budget]
    rates = [(LRS[0], WARMUPS[0]), (LRS[-1], WARMUPS[0])]  # the best ones on own text and on WikiText-2
    assert grown == [
        *(Run("ours", 300_000, *rate, SECOND_SEED) for rate in rates),
        *(Run("ours", 1_000_000, *rate, FIRST_SEED) for rate in rates),
    ]
    assert not grid.left(rows[:-1], "ours 1M") and len(grid.left(rows, "ours 1M")) == 2
    rows += [row(run, 2.0) for run in grown]
    assert grid.left(rows, "ours 1M") == [Run("ours", 1_000_000, *rates[0], SECOND_SEED)]  # the tie's winner


def test_rates_of_the_user_replace_the_grid() -> None:
    grid = Grid((OURS,), [1_000_000], lrs=[3e-4], warmups=[0.05])
    assert grid.left([], "1M") == [Run("ours", 1_000_000, 3e-4, 0.05, FIRST_SEED)]


def test_minutes_follow_the_finished_runs() -> None:
    rows = [at("ours", 100_000, 3.0), row(Run("ours"), 5.0)]
    run = Run("ours", 300_000, 2e-4, 0.1, FIRST_SEED)
    assert minutes(run, rows) == pytest.approx(6.0) and minutes(Run("modelopt"), rows) == pytest.approx(2.0)
    assert "     6.0 min  ours 300k lr 0.0002 warm-up 10% seed 1234" in plan_lines(Grid((OURS,), [300_000]), rows)


def test_a_row_is_kept_once(tmp_path: Path) -> None:
    rows, kept = Rows(tmp_path / "rows.jsonl"), [at("ours", 50_000, 3.0), at("ours", 100_000, 2.9)]
    for each in kept:
        rows.append(each)
    assert rows.read() == kept
    with pytest.raises(AssertionError, match="has a row"):
        rows.append(kept[0])
    assert rows.read() == kept and [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"texts": {"own": "other"}}, "differ in `texts`"),
        ({"settings": SETTINGS | {"prune": {"ridge": 0.01}}}, "rows of ours differ in prune.ridge"),
        ({"settings": SETTINGS | {"train": {"weight_decay": 0.0}}}, "rows of ours differ in train.weight_decay"),
    ],
)
def test_rows_that_cannot_be_compared_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    rows, first = Rows(tmp_path / "rows.jsonl"), at("ours", 50_000, 3.0)
    rows.append(first)
    with pytest.raises(UserError, match=message):
        rows.append(at("ours", 100_000, 3.0) | changes)
    assert rows.read() == [first]
    new = {"prune": {"ridge": 0.03, "later": 1}, "train": {"weight_decay": 0.1, "lr": 1.0}}
    rows.append(at("ours", 100_000, 3.0) | {"settings": SETTINGS | new})  # a setting that did not exist; a rate


def test_a_damaged_row_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(at("ours", 50_000, 3.0)) + '\n{"start": "ou\n')
    with pytest.raises(UserError, match="line 2 is not JSON"):
        Rows(tmp_path / "rows.jsonl").read()


class Fake:
    """A race whose runs take no time; the third one is killed at first."""

    def __init__(self, deadline_s: float = math.inf) -> None:
        self.deadline_s, self.done, self.killed = deadline_s, [], 2

    def run(self, run: Run) -> dict[str, Any]:
        if len(self.done) == self.killed:
            raise KeyboardInterrupt
        self.done.append(run)
        return row(run, None if run.start == "teacher" else 3.0)

    def forget(self, run: Run) -> None:
        assert run in self.done


def test_a_finished_run_is_not_run_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    grid, rows, fake = Grid(budgets=[50_000], lrs=[1e-4, 2e-4], warmups=[0.1]), Rows(tmp_path / "rows.jsonl"), Fake()
    with pytest.raises(KeyboardInterrupt):
        run_left(fake, grid, rows)
    fake.killed = -1
    run_left(fake, grid, rows)
    run_left(fake, grid, rows)
    assert len(fake.done) == len(set(fake.done)) == len(rows.read()) == 3 + 4
    lines = capsys.readouterr().out.splitlines()
    ends = [line for line in lines if line.endswith(" left")]
    assert len(ends) == 7 and ends[-1].endswith("2.0 min, 0 left") and "own –/0.500" in ends[0]


def test_no_run_begins_after_the_time_limit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fake = Fake(deadline_s=0.0)
    run_left(fake, Grid(), Rows(tmp_path / "rows.jsonl"))
    assert not fake.done and "51 runs left" in capsys.readouterr().out


def test_starts_of_the_command_line() -> None:
    start = read_start(
        ["gentle", "prune.ridge=0.01", "train.weight_decay=0", "calibration.self_generated_fraction=0.5"]
    )
    assert start.cut == {"prune.ridge": 0.01, "calibration.self_generated_fraction": 0.5}
    assert start.training == {"train.weight_decay": 0}
    with pytest.raises(UserError, match=r"train\.lr is set by the race"):
        read_start(["fast", "train.lr=1"])
    with pytest.raises(UserError, match="is not KEY=VALUE"):
        read_start(["gentle", "prune.ridge"])


def test_conversations(tmp_path: Path) -> None:
    question = {"question": "How many?", "answer": "2+2 = <<2+2=4>>4 eggs.\n#### 4"}
    (tmp_path / "test.jsonl").write_text(json.dumps(question) + "\n")
    write_conversations(tmp_path / "test.jsonl", tmp_path / "turns.jsonl", MODELS["smollm2"].turn)
    expected = "<|im_start|>user\nHow many?<|im_end|>\n<|im_start|>assistant\n2+2 = 4 eggs.<|im_end|>\n"
    assert json.loads((tmp_path / "turns.jsonl").read_text()) == {"text": expected}


def test_the_report_of_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["pruning_race.py", "--report", "--rows", str(tmp_path / "rows.jsonl")]
    monkeypatch.setattr(sys, "argv", [*words, "--json", str(tmp_path / "a.json"), "--figure", str(tmp_path / "a.svg")])
    for each in complete():
        Rows(tmp_path / "rows.jsonl").append(each)
    pruning_race.main()
    assert json.loads((tmp_path / "a.json").read_text())["lead_own"] == pytest.approx(0.2)
    assert (tmp_path / "a.svg").read_text().startswith("<svg ")


@pytest.fixture
def race(tmp_path: Path) -> Callable[..., Race]:
    """A race of a tiny Llama on a few files of the standard library."""
    material = make_material(tmp_path, "llama")
    text = str(material.corpus)
    texts = {"own": {}, "documentation": {"path": text}} | {
        name: {"validation_path": text} for name in ("wikitext2", "conversations")
    }
    settings = {
        "tracking": "off",
        "student.hidden_size": 48,
        "calibration.num_samples": 16,
        "calibration.seq_length": 32,
        "calibration.precision": "fp32",
        "data.num_workers": 0,
        "data.validation_tokens": 32,
        "data.validation_fraction": 0.2,
        "train.precision": "fp32",
        "train.seq_length": 32,
        "train.global_batch_size": 4,
        "train.micro_batch_size": 4,
    }
    common = {"folder": tmp_path / "race", "teacher": material.teacher, "text": text, "texts": texts}
    starts = {start.name: start for start in (MODELOPT, OURS)}
    return lambda **options: Race(
        **common, settings=settings, starts=starts, curve_tokens=256, text_tokens=128, **options
    )


def test_a_tiny_race(tmp_path: Path, race: Callable[..., Race]) -> None:
    """It stops inside a run at the time limit, resumes there, and ends with a row for every run."""
    grid, rows, runner = Grid(budgets=[512], lrs=[1e-3], warmups=[0.5]), Rows(tmp_path / "rows.jsonl"), race()
    run_left(runner, grid, rows, "untrained")
    run = grid.left(rows.read())[0]
    late = race(deadline_s=0.0)
    with pytest.raises(SystemExit) as ending:
        late.run(run)
    assert ending.value.code == 0
    trained, again = runner.run(run), runner.run(run)  # a kill between the last checkpoint and the row
    assert (trained["losses"], trained["curve"]) == (again["losses"], again["curve"])
    assert [one["resumed_at_step"] for one in (trained, again)] == [1, 4]
    rows.append(trained)
    run_left(runner, grid, rows)
    found = {(one["start"], one["budget"]): one for one in rows.read()}
    assert set(found) == {("teacher", 0), *product(("modelopt", "ours"), (0, 512))}
    resumed, ours = found["modelopt", 512], found["ours", 512]
    assert (resumed["resumed_at_step"], ours["resumed_at_step"], ours["steps"], ours["warmup_steps"]) == (1, 0, 4, 2)
    for text in TEXTS:
        assert found["teacher", 0]["losses"][text]["kl"] == pytest.approx(0.0, abs=1e-6)
        assert found["ours", 0]["losses"][text]["kl"] < found["modelopt", 0]["losses"][text]["kl"]
    assert [point["tokens"] for point in ours["curve"]] == [256, 512]
    assert ours["curve"][-1]["losses"] == ours["losses"] != found["ours", 0]["losses"]
    assert not list((tmp_path / "race").glob("runs/*/checkpoints"))
    assert str(tmp_path) not in rows.path.read_text()
    assert "own" in progress_line(run, resumed) and as_json(Results(rows.read()))["lead_own"] is None


def test_settings_of_a_start_reach_its_cut_or_its_training(race: Callable[..., Race], tmp_path: Path) -> None:
    """Starts that differ in training alone share a cut. A cut with other weights does not resume a training."""
    labels, gentle = Start("labels", {"distill.ce_weight": 1.0}), Start("gentle", {"prune.ridge": 0.5})
    runner = race()
    runner.starts.update(labels=labels, gentle=gentle)
    run = Run("labels", 512, 1e-3, 0.5, SECOND_SEED)
    config = runner.config(run)
    assert (config.distill.ce_weight, config.train.lr, config.train.min_lr) == (1.0, 1e-3, pytest.approx(1e-4))
    assert (config.train.num_steps, config.train.warmup_steps, config.seed) == (4, 2, SECOND_SEED)
    assert runner.config(replace(run, start="gentle")).prune.ridge == 0.5
    cuts = [runner.cut(start) for start in (OURS, labels, gentle)]
    assert cuts[0] == cuts[1] != cuts[2]
    assert runner.training_folder(run, cuts[0]) != runner.training_folder(run, cuts[2])
