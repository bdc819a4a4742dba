"""A race between pruned starts: the loss after distillation, each start at its own best learning rate, for several budgets.

    python benchmarks/quality/pruning_race.py --plan
    python benchmarks/quality/pruning_race.py [--only TEXT] [--budget 50k …] [--minutes N] [--start NAME KEY=VALUE …]
    python benchmarks/quality/pruning_race.py --report [--json FILE] [--figure FILE.svg]
    python benchmarks/quality/pruning_race.py --model gemma3 …

SmolLM2-135M is cut to 504 channels, 1,024 neurons and 6 heads (88.7 M parameters), Gemma 3 270M to 560 channels, 1,376 neurons
and 3 heads (pruning_race_models.py). The starts are `modelopt` (ModelOpt's
ranking and plain slicing), `ours` (the default preset), and those that --start adds: a name, and keys of the command line.
Keys of `train` and `distill` change the training of that start, other keys change its cut. Each start is trained at 4 learning
rates and 2 warm-ups on 50 k, 100 k and 300 k tokens. The schedule of a run is fitted to its budget. 1 M tokens take the best
rates of 300 k. The best rates of 300 k and 1 M have a second seed. --lr and --warmup replace the rates.

Calibration (65,536 tokens) and training read MINITRON_DATA's corpora without their held-out documents. After a run, and every
100 k tokens of a long one, the program's validation computes cross-entropy and KL to the teacher on 8,192 tokens of each text:

    own             held-out documents of the training's corpora
    wikitext2       WikiText-2, no part of the corpora
    documentation   held-out documents of the Python, SQLite and PostgreSQL manuals alone
    conversations   GSM8K's questions and worked answers in the model's chat format, no part of the corpora

A finished run is one line of --rows, and is never run again. A line holds settings, tokens, losses, seconds, machine, precision
and commit. Runs and cuts are kept in --folder. A killed run resumes from its last checkpoint. --minutes stops cleanly, also
inside a run, and the same command resumes it.

The report compares starts at their best rates: for each budget and text, the rate with the lowest loss. The second seed selects
nothing; the figure is the mean of both. Evaluations within a longer run are not used, because its schedule is another.
Figures in the JSON: `tokens_ratio` (how many times fewer tokens ours needs for the cross-entropy that ModelOpt's cut has after
300 k; interpolated over the logarithm of tokens; the smaller of own and wikitext2), `lead_own` and `lead_wikitext2` (nats of
cross-entropy at 300 k) and `behind_at_1m` (texts on which ours is behind). A figure that runs are missing for is null, and
`reasons` says which.
"""

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

import yaml
from pruning_race_models import MODELS
from pruning_race_plan import BUDGETS, MODELOPT, OURS, Grid, Start, minutes, plan_lines
from pruning_race_report import DASH, Results, as_json, markdown, svg
from pruning_race_rows import HEADLINE, Row, Rows, Run, amount, run_of

from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_write_text, exclusive

if TYPE_CHECKING:
    from pruning_race_training import Race

ROOT = Path(__file__).parents[2]
ROWS = ROOT / "docs" / "data"
AMOUNTS = {amount(budget): budget for budget in BUDGETS}


def parse(words: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", action="store_true", help="list the runs that are left, with estimated minutes")
    parser.add_argument("--report", action="store_true", help="print the tables of the finished runs")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures of --report")
    parser.add_argument("--figure", type=Path, metavar="FILE.svg", help="file for the figure of --report")
    parser.add_argument("--model", choices=MODELS, default="smollm2", help="default: smollm2")
    parser.add_argument("--rows", type=Path, help="file of the finished runs; default: that of the model in docs/data")
    parser.add_argument("--folder", type=Path, default=Path("outputs/pruning_race"), help="cuts and unfinished runs")
    parser.add_argument("--only", default="", metavar="TEXT", help="runs whose name in --plan contains it")
    parser.add_argument("--budget", nargs="+", choices=AMOUNTS, default=[*AMOUNTS], help="default: all")
    parser.add_argument("--start", nargs="+", action="append", default=[], metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--lr", nargs="+", type=float, default=(), help="peak learning rates; default: the grid")
    parser.add_argument("--warmup", nargs="+", type=float, default=(), help="shares of the steps; default: the grid")
    parser.add_argument("--minutes", type=float, default=float("inf"), metavar="N", help="stop after this time")
    parser.add_argument("--precision", choices=("auto", "fp32", "bf16"), default="auto")
    parser.add_argument("--teacher", type=Path, help="folder of the model; default: fetched into the user's cache")
    asked = parser.parse_args(words)
    asked.rows = asked.rows or ROWS / MODELS[asked.model].rows
    return asked


def read_start(words: list[str]) -> Start:
    """NAME KEY=VALUE …; values are YAML.

    Raises:
        UserError: a word without =.
    """
    name, *settings = words
    if wrong := [word for word in settings if "=" not in word]:
        raise UserError(f"--start {name}: {wrong[0]} is not KEY=VALUE; write it as prune.ridge=0.01")
    pairs = (word.split("=", 1) for word in settings)
    return Start(name, {key: yaml.safe_load(value) for key, value in pairs})


def report(rows: list[Row], json_file: Path | None, figure: Path | None) -> None:
    """Print the tables and write the files."""
    results = Results(rows)
    print(markdown(results))
    if json_file:
        atomic_write_text(json_file, json.dumps(as_json(results), indent=1) + "\n")
    if figure:
        atomic_write_text(figure, svg(results))


def race(asked: argparse.Namespace, grid: Grid, rows: Rows, deadline_s: float) -> None:
    """Run what is left, one run at a time."""
    from pruning_race_training import race_of

    if "MINITRON_DATA" not in os.environ:
        raise UserError("MINITRON_DATA is not set: the runs read its corpora; set it, or use --plan or --report")
    options = {"deadline_s": deadline_s, "starts": {start.name: start for start in grid.starts}}
    data, model = Path(os.environ["MINITRON_DATA"]).absolute(), MODELS[asked.model]
    teacher = asked.teacher or model.folder()
    run_left(race_of(model, asked.folder.absolute(), teacher, data, asked.precision, **options), grid, rows, asked.only)


def run_left(runner: "Race", grid: Grid, rows: Rows, only: str = "") -> None:
    """Run what is left until nothing is, or until the deadline; every finished run gets its row at once."""
    for row in rows.read():
        runner.forget(run_of(row))  # a kill may have come between the row and this
    while left := grid.left(rows.read(), only):
        if time.monotonic() > runner.deadline_s:
            return print(f"time limit: {len(left)} runs left; the same command continues")
        run = left[0]
        print(f"{run.name}: begins, about {minutes(run, rows.read()):.0f} min", flush=True)
        try:
            row = runner.run(run)
        except SystemExit:
            print(f"{run.name}: stopped; the same command resumes it", flush=True)
            raise
        rows.append(row)
        runner.forget(run)
        print(f"{progress_line(run, row)}, {len(left) - 1} left", flush=True)


def progress_line(run: Run, row: Row) -> str:
    """The headline texts' losses of a finished run, and its minutes."""
    nats = {
        text: [DASH if value is None else f"{value:.3f}" for value in row["losses"][text].values()] for text in HEADLINE
    }
    shown = ", ".join(f"{text} {'/'.join(values)}" for text, values in nats.items())
    return f"{run.name}: {shown} (cross-entropy/KL), {row['seconds'] / 60:.1f} min"


def main() -> None:
    """Plan, run or report."""
    asked, start_s = parse(), time.monotonic()
    starts = (MODELOPT, OURS, *map(read_start, asked.start))
    grid = Grid(starts, [AMOUNTS[name] for name in asked.budget], asked.lr, asked.warmup)
    rows = Rows(asked.rows)
    if asked.report:
        return report(rows.read(), asked.json, asked.figure)
    if asked.plan:
        return print("\n".join(plan_lines(grid, rows.read(), asked.only)))
    logging.getLogger("minitron_train").setLevel("WARNING")
    with exclusive(asked.folder / "race.lock", asked.folder):
        race(asked, grid, rows, start_s + 60 * asked.minutes)


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)
