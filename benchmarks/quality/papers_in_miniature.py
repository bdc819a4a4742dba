"""The claims of the Minitron papers (arXiv 2407.14679, 2408.11796), tested on recipe `miniature`: one table per claim.

    python benchmarks/quality/papers_in_miniature.py [--list] [--only NAME …] [--seeds N …] [--quick] [--json FILE] [--folder DIR]
        [--pretrain-tokens N]

papers_studies.py has the table of studies. A run is one row of a study with one seed, which sets the calibration, the order
of the data and the choice of held-out text. The real commands score the teacher once per seed, cut it, train the result
for about 100,000 tokens and evaluate it on held-out text. Losses are in nats, ± is the standard deviation over the
seeds. The last difference is computed per seed, on the same held-out text. The papers' published rows are shown too.

The teacher is token_efficiency.py's; it is trained if it does not exist (about an hour). Every finished run is a line of
papers/NAME.jsonl in DIR and is not repeated. Its folder is deleted.
"""

import json
import math
import shutil
import statistics
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from miniature import RECIPE, ROOT, Miniature, arguments, evaluations, open_recipe, short_hash
from papers_studies import STUDIES, Study, Variant
from safetensors import safe_open
from safetensors.torch import save_file

from minitron_train import hf
from minitron_train.arch import architecture
from minitron_train.arch.init import RandomWeights
from minitron_train.runtime.files import atomic_folder

QUICK_TOKENS = 8_192
VALIDATION_TOKENS = 32_768

Row = dict[str, Any]  # a line of NAME.jsonl


@dataclass(frozen=True, slots=True)
class Papers:
    """The runs of one study with one seed."""

    recipe: Miniature  # in folder `papers`, next to the teacher
    teacher: Path
    study: Study
    seed: int

    def key(self, variant: Variant) -> str:
        """Hash of everything that decides a run."""
        named = asdict(replace(variant, label="", published=""))
        files = [RECIPE, (ROOT / "conf" / "prune" / f"{variant.preset}.yaml").read_text()]
        settings = [self.study.tokens, self.study.evaluations, *self.recipe.data(), *self.everywhere()]
        return short_hash([hf.fingerprint(self.teacher), named, *files, *settings])

    def everywhere(self) -> list[str]:
        """Overrides of every command, in addition to those of the recipe."""
        amount = [] if self.recipe.quick else [f"data.validation_tokens={VALIDATION_TOKENS}"]
        return [f"seed={self.seed}", "checkpoint.keep=1", "checkpoint.keep_best=0", *amount, *self.study.data]

    def command(self, command: str, name: str, *overrides: str) -> Path:
        """Run one command in papers/NAME."""
        return self.recipe.command(command, name, *self.everywhere(), *overrides, quiet=True)

    def scored(self, model: Path) -> Path:
        """A folder with `scores` and `eval` of a model that is to be cut; made once."""
        name = f"scored/{short_hash([hf.fingerprint(model), *self.recipe.data(), *self.everywhere()])}"
        folder = self.recipe.folder / name
        if not (folder / "eval" / "teacher.provenance.json").exists():
            self.command("score", name, f"teacher.path={model}", "prune.depth=perplexity")
            self.command("eval", name, f"teacher.path={model}", "eval.model=teacher")
        return folder

    def student(self, variant: Variant | None) -> Path:
        """The model that a variant's run produces; the teacher for None."""
        if variant is None:
            return self.teacher
        folder = self.recipe.folder / "runs" / self.key(variant)
        if not (folder / "student").exists():
            self.train(variant)
            self.command("export", f"runs/{folder.name}")
        return folder / "student"

    def train(self, variant: Variant) -> Path:
        """The finished run of a variant; an interrupted one is resumed."""
        parent, taught_by = self.student(variant.parent), self.student(variant.taught_by)
        name = f"runs/{self.key(variant)}"
        folder = self.recipe.folder / name
        if not folder.exists():
            self.prepare(variant, parent, folder)
        tokens = round((QUICK_TOKENS if self.recipe.quick else self.study.tokens) * variant.share)
        learn = [f"train.num_tokens={tokens}", f"eval.every_tokens={tokens // self.study.evaluations}", *variant.train]
        cut = [
            f"prune={variant.preset}",
            *variant.prune,
            *(f"student.{key}={value}" for key, value in variant.sizes.items()),
        ]
        if variant.start in ("itself", "random"):
            begin = parent if variant.start == "itself" else folder / "random"
            return self.command("distill", name, f"teacher.path={taught_by}", f"student.path={begin}", *learn)
        if parent == taught_by:  # one process for all stages
            return self.command("run", name, f"teacher.path={parent}", *cut, *learn)
        self.command("prune", name, f"teacher.path={parent}", *cut)
        return self.command("distill", name, f"teacher.path={taught_by}", *learn)

    def prepare(self, variant: Variant, parent: Path, folder: Path) -> None:
        """Make the run's folder atomically, with the scores that the cut reads, or with random weights."""
        with atomic_folder(folder) as scratch:
            if variant.start == "random":
                write_random(parent, variant.sizes, self.seed, scratch / "random")
            elif variant.start != "itself":
                shutil.copytree(self.scored(parent), scratch, dirs_exist_ok=True)
            if variant.start == "shuffled":
                shuffle(scratch / "scores" / "scores.safetensors", self.seed)

    def row(self, variant: Variant) -> Row:
        """Run a variant and return its figures."""
        folder, key = self.train(variant), self.key(variant)
        before = folder / "eval" / "pruned.json"
        found = evaluations(folder, variant.label)
        row: Row = {"key": key, "study": self.study.name, "variant": variant.label, "seed": self.seed}
        row["teacher_loss"] = loss_of(self.scored(self.teacher) / "eval" / "teacher.json")
        row["cut_loss"] = loss_of(before) if before.exists() else None
        row["evaluations"] = [{"tokens": run.tokens, "loss": run.loss, "kl": run.kl} for run in found]
        shape = hf.shape_from_config(hf.read_json(folder / "train" / "checkpoints" / "model" / "config.json"), key)
        return row | {"parameters": sum(architecture(shape.architecture).parameters(shape).values())}

    def record(self, variant: Variant) -> Row:
        """The row of an earlier invocation, or a new one, which is saved at once."""
        file, key = self.recipe.folder / f"{self.study.name}.jsonl", self.key(variant)
        known = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        for row in known:
            if row["key"] == key:
                return row | {"variant": variant.label}
        row = self.row(variant)
        with file.open("a") as handle:
            handle.write(json.dumps(row) + "\n")
        if variant not in self.study.ancestors:
            shutil.rmtree(self.recipe.folder / "runs" / key)
        last = row["evaluations"][-1]
        print(
            f"{self.study.name}, seed {self.seed}, {variant.label}: {last['loss']:.4f} after {last['tokens']:,} tokens",
            flush=True,
        )
        return row


def loss_of(evaluation: Path) -> float | None:
    """Nats per token from a file that `eval` wrote; None if they overflowed."""
    perplexity = json.loads(evaluation.read_text())["perplexity"]
    return None if perplexity is None else math.log(perplexity)


def write_random(teacher: Path, sizes: Mapping[str, int], seed: int, folder: Path) -> None:
    """Write an untrained model of the given sizes with the teacher's tokenizer."""
    files = hf.HFFolder(teacher)
    shape = files.shape.smaller(**sizes)
    weights = RandomWeights(shape, files.config["initializer_range"], seed)
    folder.mkdir()
    tensors = ((name, weights.read(name)) for name in files.table.tensors(shape))
    hf.write_folder(folder, hf.student_config(files.config, shape), tensors, teacher)


def shuffle(scores: Path, seed: int) -> None:
    """Permute the statistics of channels, heads and neurons, so that the ranking is random."""
    generator = torch.Generator().manual_seed(seed)
    with safe_open(str(scores), framework="pt") as file:
        metadata, tensors = file.metadata(), {name: file.get_tensor(name) for name in list(file.keys())}
    for name, value in tensors.items():
        if name.startswith("raw.") and value.dim() == 3:  # [2, 3, channels]: what pruning/importance.py ranks by
            tensors[name] = value[..., torch.randperm(value.shape[-1], generator=generator)].contiguous()
    save_file(tensors, scores, metadata=metadata)


def summary(study: Study, rows: Iterable[Row]) -> dict[str, Any]:
    """The figures of a study: the losses over the seeds for every variant that has been run."""
    by_variant: dict[str, dict[int, Row]] = {variant.label: {} for variant in study.variants}
    for row in rows:
        by_variant[row["variant"]][row["seed"]] = row
    ends = {
        label: {seed: row["evaluations"][-1]["loss"] for seed, row in found.items()}
        for label, found in by_variant.items()
    }
    reference, cases = ends[study.reference], []
    for variant in study.variants:
        found = by_variant[variant.label]
        if not found:
            continue
        cuts = [row["cut_loss"] for row in found.values() if row["cut_loss"] is not None]
        losses = {"cut": spread(cuts)} if cuts else {}
        for index, evaluation in enumerate(next(iter(found.values()))["evaluations"]):
            losses[str(evaluation["tokens"])] = spread([row["evaluations"][index]["loss"] for row in found.values()])
        apart = [loss - reference[seed] for seed, loss in ends[variant.label].items() if seed in reference]
        case = {"variant": variant.label, "seeds": sorted(found), "losses": losses, "published": variant.published}
        case["parameters"] = next(iter(found.values()))["parameters"]
        comparable = variant.label != study.reference and variant not in study.ancestors
        cases.append(case | {"difference": spread(apart) if comparable and apart else None})
    teachers = {row["seed"]: row["teacher_loss"] for found in by_variant.values() for row in found.values()}
    facts = {"question": study.question, "published": study.published, "reference": study.reference}
    return {**facts, "teacher_loss": spread(list(teachers.values())), "cases": cases}


def spread(values: list[float]) -> dict[str, float | None]:
    """Mean and standard deviation; a single value has no deviation."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}


def text(value: Mapping[str, float | None] | None, sign: str = "") -> str:
    """Format as 2.345 ± 0.012."""
    if value is None:
        return ""
    std = value["std"]
    return f"{value['mean']:{sign}.3f}" + ("" if std is None else f" ± {std:.3f}")


def show(name: str, found: dict[str, Any]) -> None:
    """Print the table of a study."""
    cases = found["cases"]
    counts = sorted({key for case in cases for key in case["losses"] if key != "cut"}, key=int)
    titles = ["", "parameters", "after the cut", *(f"{int(count):,} tokens" for count in counts)]
    lines = [[*titles, f"against {found['reference']}", "as published"]]
    for case in cases:
        losses = [text(case["losses"].get(key)) for key in ("cut", *counts)]
        lines.append(
            [case["variant"], f"{case['parameters']:,}", *losses, text(case["difference"], "+"), case["published"]]
        )
    widths = [max(len(line[i]) for line in lines) for i in range(len(titles) + 1)]
    print(f"\n{name}: {found['question']}\npublished: {found['published']}\nthe teacher: {text(found['teacher_loss'])}")
    for line in lines:
        cells = [
            line[0].ljust(widths[0]),
            *(cell.rjust(width) for cell, width in zip(line[1:-1], widths[1:], strict=True)),
        ]
        print("  ".join([*cells, line[-1]]).rstrip())


def main() -> None:
    parser = arguments(__doc__)
    names = [study.name for study in STUDIES]
    parser.add_argument("--only", nargs="+", metavar="NAME", choices=names, default=names, help=", ".join(names))
    parser.add_argument(
        "--seeds", nargs="+", type=int, metavar="N", help="seeds to run; default: 1 to each study's own number"
    )
    parser.add_argument("--list", action="store_true", help="print the studies and exit")
    asked = parser.parse_args()
    chosen = [study for study in STUDIES if study.name in asked.only]
    if asked.list:
        for study in chosen:
            print(
                f"{study.name:14}{len(study.variants):3} rows x {study.seeds} seeds, {study.tokens:,} tokens  {study.question}"
            )
        return
    recipe = open_recipe(asked)
    teacher = recipe.pretrained("teacher") / "teacher"
    own, figures = replace(recipe, folder=recipe.folder / "papers"), {}
    own.folder.mkdir(parents=True, exist_ok=True)
    for study in chosen:
        seeds = asked.seeds or range(1, 1 + (1 if asked.quick else study.seeds))
        rows = [Papers(own, teacher, study, seed).record(variant) for seed in seeds for variant in study.variants]
        figures[study.name] = summary(study, rows)
        show(study.name, figures[study.name])
        if asked.json:
            asked.json.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
