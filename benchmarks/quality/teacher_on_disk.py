"""Students of a teacher on disk, compared with students of the live teacher at equal tokens (arXiv 2503.16870).

    python benchmarks/quality/teacher_on_disk.py [--recipe NAME] [--pretrain-tokens N] [--tokens N] [--draws K ...]
        [--seeds N] [--folder DIR] [--json FILE]

The recipe's teacher is trained once and pruned once. The pruned model is then distilled from the same start: with the exact
KL of the live teacher, from hidden states on disk, from K draws a token, and with `top_k_kl` of as many bytes as the draws
took. One entry of top k counts as a token id and 16 bits of probability. Each seed reads the text in another order.

The table has the held-out loss and the exact KL from the teacher after the last step, and the paired difference to the live
teacher. Finished stages in DIR are reused, so an interrupted benchmark resumes.
"""

import argparse
import json
import logging
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import minitron_train as mt
from minitron_train.api.functions import run

PROBABILITY_BITS = 16
LIVE = "live teacher, exact KL"


@dataclass(frozen=True, slots=True, kw_only=True)
class Student:
    """One training: what the teacher took on disk, and the last evaluation on held-out text, in nats."""

    name: str
    seed: int
    bytes_per_token: float
    kl: float
    loss: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """The commands of the comparison, in one folder."""

    folder: Path
    recipe: str
    pretrain_tokens: int
    tokens: int

    @property
    def settings(self) -> dict[str, Any]:
        """What all commands have in common."""
        return {"recipe": self.recipe, "tracking.wandb.mode": "disabled", "eval.every_tokens": 0}

    def models(self) -> tuple[Path, Path]:
        """The teacher, and the pruned model."""
        pretraining = self.settings | {"pretrain.num_tokens": self.pretrain_tokens}
        teacher = run("pretrain", self.folder / "teacher", {}, pretraining).teacher_folder
        return teacher, mt.prune(teacher, self.folder / "pruned", settings=self.settings).folder

    def student(self, name: str, seed: int, bytes_per_token: float, **settings: Any) -> Student:
        """Distil the pruned model; double underscores in the names of settings stand for dots."""
        teacher, pruned = self.models()
        changed = {key.replace("__", "."): value for key, value in settings.items()}
        out = self.folder / f"seed-{seed}" / name.replace(" ", "-")
        found = mt.distill(
            teacher, pruned, out, num_tokens=self.tokens, settings={**self.settings, "seed": seed, **changed}
        ).evaluation
        kl, loss = found["validation.kl"], found["validation.loss"]
        return Student(name=name, seed=seed, bytes_per_token=bytes_per_token, kl=kl, loss=loss)

    def cached(self, name: str, seed: int, **settings: Any) -> Student:
        """Write a teacher cache, and distil from it."""
        changed = {key.replace("__", "."): value for key, value in settings.items()} | {"seed": seed}
        out = self.folder / f"seed-{seed}" / f"cache-{name.replace(' ', '-')}"
        taught = mt.teach(self.models()[0], out, num_tokens=self.tokens, settings={**self.settings, **changed})
        return self.student(name, seed, taught.bytes_per_token, teacher__cache=taught.folder)

    def students(self, seed: int, draws: list[int]) -> list[Student]:
        """All students of one seed."""
        found = [self.student(LIVE, seed, 0.0), self.cached("hidden states", seed, teach__kind="hidden")]
        vocab_size = json.loads((self.models()[0] / "config.json").read_text())["vocab_size"]
        entry_bits = (vocab_size - 1).bit_length() + PROBABILITY_BITS
        for number in draws:
            sampled = self.cached(f"{number} draws", seed, teach__draws=number)
            top_k = max(1, round(8 * sampled.bytes_per_token / entry_bits))
            size = top_k * entry_bits / 8
            name = f"top {top_k}, the bytes of {number} draws"
            found += [sampled, self.student(name, seed, size, distill__loss="top_k_kl", distill__top_k=top_k)]
        return found


def table(students: list[Student]) -> str:
    """One row per way to learn: means over the seeds, and the mean and range of the difference in KL to the live teacher."""
    live = {student.seed: student.kl for student in students if student.name == LIVE}
    lines = [f"{'':<32}{'bytes/token':>12}{'loss':>8}{'KL':>8}{'KL more than the live teacher':>32}"]
    for name in dict.fromkeys(student.name for student in students):
        own = [student for student in students if student.name == name]
        size, loss, kl = (
            statistics.mean(getattr(student, key) for student in own) for key in ("bytes_per_token", "loss", "kl")
        )
        more = [student.kl - live[student.seed] for student in own]
        spread = f"{statistics.mean(more):+.4f} ({min(more):+.4f} to {max(more):+.4f})"
        lines.append(f"{name:<32}{size:>12.1f}{loss:>8.3f}{kl:>8.4f}{spread:>32}")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="micro", help="a recipe that trains its own teacher; default: %(default)s")
    parser.add_argument(
        "--pretrain-tokens", type=int, metavar="N", default=204_800, help="of the teacher; default: %(default)s"
    )
    parser.add_argument("--tokens", type=int, metavar="N", default=40_960, help="of each student; default: %(default)s")
    parser.add_argument("--draws", type=int, nargs="+", metavar="K", default=[4, 12, 50], help="default: 4 12 50")
    parser.add_argument("--seeds", type=int, metavar="N", default=2, help="number of seeds; default: %(default)s")
    parser.add_argument(
        "--folder", type=Path, metavar="DIR", default=Path("outputs/teacher_on_disk"), help="default: %(default)s"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the figures")
    asked = parser.parse_args()
    logging.getLogger("minitron_train").setLevel("WARNING")
    bench = Bench(
        folder=asked.folder / f"{asked.recipe}-{asked.pretrain_tokens}-{asked.tokens}",
        recipe=asked.recipe,
        pretrain_tokens=asked.pretrain_tokens,
        tokens=asked.tokens,
    )
    students: list[Student] = []
    for seed in range(1, asked.seeds + 1):
        students += bench.students(seed, asked.draws)
        print(f"{seed} of {asked.seeds} seeds\n{table(students)}", flush=True)
    if asked.json:
        asked.json.write_text(json.dumps([asdict(student) for student in students], indent=1))


if __name__ == "__main__":
    main()
