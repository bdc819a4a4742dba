"""Tokens that pruning and distillation save, compared with training the small model from scratch (arXiv 2407.14679, table 11).

    python benchmarks/quality/token_efficiency.py [--quick] [--json FILE] [--folder DIR] [--pretrain-tokens N]

Recipe `miniature` trains a Nemotron teacher of 5.4 M parameters and cuts it to 28 % of them. The same small shape is
trained from scratch on at least as many tokens as the teacher saw. The pruned model is trained with the KL, and with
cross-entropy alone, on several budgets of tokens, each with its own learning-rate schedule. `token_ratio` is how many
times fewer tokens the KL needs to reach the final held-out loss from scratch (interpolated over the logarithm of tokens).
The text is MINITRON_DATA's corpora if that is set, otherwise the embedded corpus.

Every run is the real command and is kept in DIR (default: below ~/.cache/minitron_train, see miniature.py). The teacher
and the model from scratch are trained once (about an hour on two cores). An interrupted benchmark resumes.
"""

import itertools
import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from miniature import RECIPE, Miniature, Run, arguments, evaluations, open_recipe

BUDGETS = (10_000, 25_000, 50_000, 100_000, 200_000, 400_000, 800_000, 1_600_000)  # tokens
QUICK_BUDGETS = (8_192, 16_384)
LARGEST_SHARE = 1 / 6  # largest budget as a fraction of the pretraining's tokens
LOSSES = {"kl": [], "ce": ["distill.kd_weight=0", "distill.ce_weight=1"]}


@dataclass(frozen=True, slots=True)
class Bench:
    """The commands of the comparison."""

    recipe: Miniature

    @property
    def teacher(self) -> Path:
        return self.recipe.folder / "teacher" / "teacher"

    def from_scratch(self) -> tuple[Run, list[Run]]:
        """The teacher's last evaluation, and all evaluations of the small shape from scratch."""
        teacher = self.recipe.pretrained("teacher")
        scratch = self.recipe.pretrained(
            "scratch", *(f"model.{key}={value}" for key, value in RECIPE["student"].items())
        )
        return evaluations(teacher / "pretrain", "teacher")[-1], evaluations(scratch / "pretrain", "scratch")

    def pruned(self) -> tuple[Path, float]:
        """The cut teacher, and its fraction of the parameters."""
        target = self.recipe.command("prune", "cut", f"teacher.path={self.teacher}")
        plan = self.recipe.command("plan", "plan") / "plan.json"
        sizes = {name: json.loads(plan.read_text())[name]["parameters"] for name in ("teacher", "student")}
        return target / "pruned", sizes["student"] / sizes["teacher"]

    def retrained(self, pruned: Path, loss: str, tokens: int) -> Run:
        """The pruned model after `tokens` of training."""
        where = [f"teacher.path={self.teacher}", f"student.path={pruned}"]
        learn = [f"train.num_tokens={tokens}", f"train.warmup_steps={warmup_steps(tokens)}", "eval.every_tokens=0"]
        target = self.recipe.command("distill", f"{loss}-{tokens}", *where, *learn, *LOSSES[loss])
        return evaluations(target, loss)[-1]


def warmup_steps(tokens: int) -> int:
    """The recipe's value, but at most a tenth of a short run."""
    train = RECIPE["train"]
    steps = tokens // (train["global_batch_size"] * train["seq_length"])
    return min(train["warmup_steps"], max(1, steps // 10))


def tokens_until(loss: float, runs: list[Run]) -> tuple[float | None, bool]:
    """Tokens at which `runs`, by increasing tokens, reach a loss (None: never), and whether the first run already did."""
    if runs[0].loss <= loss:
        return runs[0].tokens, True
    for before, after in itertools.pairwise(runs):
        if after.loss <= loss:
            share = (before.loss - loss) / (before.loss - after.loss)
            return math.exp(math.log(before.tokens) + share * math.log(after.tokens / before.tokens)), False
    return None, False


def main() -> None:
    """Train and compare; print and write after every run."""
    asked = arguments(__doc__).parse_args()
    bench = Bench(open_recipe(asked))
    teacher, scratch = bench.from_scratch()
    pruned, size_ratio = bench.pruned()
    runs: dict[str, list[Run]] = {loss: [] for loss in LOSSES}
    largest = LARGEST_SHARE * bench.recipe.pretrain_tokens
    for tokens in QUICK_BUDGETS if asked.quick else [budget for budget in BUDGETS if budget <= largest]:
        for loss in LOSSES:
            runs[loss].append(bench.retrained(pruned, loss, tokens))
            write(asked.json, figures(teacher, scratch, runs, size_ratio))
    show(figures(teacher, scratch, runs, size_ratio))


def figures(teacher: Run, scratch: list[Run], runs: dict[str, list[Run]], size_ratio: float) -> dict[str, Any]:
    """All figures so far."""
    goal = scratch[-1]
    found: dict[str, Any] = {"scratch_tokens": goal.tokens, "scratch_loss": goal.loss, "teacher_loss": teacher.loss}
    found["size_ratio"] = size_ratio
    for loss, key in (("kl", "token_ratio"), ("ce", "token_ratio_ce")):
        needed, is_bound = tokens_until(goal.loss, runs[loss]) if runs[loss] else (None, False)
        found[key], found[f"{key}_is_bound"] = goal.tokens / needed if needed else None, is_bound
    return found | {"cases": [asdict(run) for run in [teacher, *scratch, *runs["kl"], *runs["ce"]]]}


def write(path: Path | None, found: dict[str, Any]) -> None:
    """Write the figures so far."""
    if path:
        path.write_text(json.dumps(found, indent=1) + "\n")


def show(found: dict[str, Any]) -> None:
    print(f"{'':10}{'tokens':>12}{'held-out loss':>16}")
    for row in found["cases"]:
        print(f"{row['name']:10}{row['tokens']:12,}{row['loss']:16.4f}")
    for key in ("size_ratio", "token_ratio", "token_ratio_ce"):
        value = found[key]
        print(f"{key} = " + ("the loss from scratch is not reached" if value is None else f"{value:.3g}"))


if __name__ == "__main__":
    main()
