"""Pruning methods compared: loss right after the cut, and after equal tokens of distillation.

    python benchmarks/quality/pruning_peers.py [--model NAME] [--target H/F/N …] [--only NAME …] [--distill TOKENS]
        [--tasks PRESET] [--quick] [--json FILE]

The models are SmolLM2-135M and `tiny`, the Nemotron teacher of 7 M parameters that recipe `tiny` pretrains. Targets are
channels/neurons/heads: 432/1024/6 and the gentler 504/1024/6 of SmolLM2's 576/1536/9, 192/640/4 of tiny's 256/1024/8. Methods:

    random           channels, neurons and heads drawn at random; the mean of two seeds
    magnitude        keeps the largest weights, by the L2 norm of all weights that belong to each unit
    shortgpt         arXiv 2403.03853: removes the layers of lowest block importance until the parameters are closest to the
                     target's; keeps the width
    slicegpt-like    arXiv 2401.15024 with one rotation for the whole residual stream, so that the result is a plain Llama:
                     removes the lowest principal directions; heads and neurons by ModelOpt's ranking. The rotation needs
                     its own output layer: vocabulary x channels more parameters than the target has. SmolLM2 only
    modelopt         conf/prune/modelopt.yaml, NVIDIA's ranking and plain slicing
    ours             conf/prune/default.yaml, the program's default
    ours-mixed       ours by the real `prune` with calibration.self_generated_fraction=0.5: the teacher generates half of the text
    nvidia-modelopt  a check: nvidia-modelopt 0.43.0 itself on the same tokens; `different` counts the channels, neurons
                     and heads that it keeps and `modelopt` does not. Not distilled: it is the same model. SmolLM2 only

Each result is a Hugging Face folder that transformers opens. `--distill` then runs the real `distill` and `export` of the
model's recipe on each, with the same teacher, text, seed and settings. One function computes both losses as next-token
cross-entropy on the same held-out tokens. With MINITRON_DATA, SmolLM2's text is its corpora and validation is WikiText-2.
Otherwise, and for tiny, both are the embedded corpus (validation is its held-out part).

`own loss` and `KL` come from the training's last evaluation, on the held-out part of its own text; WikiText-2 is not part of
it. `--tasks` runs the real `eval` on the teacher, every cut and every student: the tasks of a preset of conf/eval, and the loss
on the same held-out part. Every result is a line of results.jsonl in the folder, so an interrupted benchmark resumes. The
folder holds a model per row and target, 0.4 GB each for SmolLM2, and twice that with distillation.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from miniature import evaluations
from pruning_peers_methods import (
    as_many_layers,
    keep_best,
    norm_tensors,
    num_parameters,
    principal_directions,
    rms_restored,
    rotated_shape,
    rotated_tensors,
)
from pruning_peers_nvidia import num_different
from pruning_peers_subjects import SUBJECTS, Subject, program
from pruning_peers_tables import show, show_tasks, table, task_figures, write
from pruning_quality import CACHE, Bench, Case, configuration, loss_of, prepare
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from minitron_train import hf
from minitron_train.arch import Shape
from minitron_train.config import Config, ParallelConfig, PruneConfig
from minitron_train.parallel.groups import Groups, start
from minitron_train.pruning.criterion import Evidence, width_criterion
from minitron_train.pruning.layers import Layers
from minitron_train.pruning.prune import choose, repaired_tensors
from minitron_train.pruning.select import Keep, select
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import slice_checkpoint
from minitron_train.runtime.files import atomic_folder
from minitron_train.runtime.launch import World

ROOT = Path(__file__).parents[2]
AXES = ("hidden_size", "ffn_hidden_size", "num_attention_heads")
MODELOPT_PACKAGES = ("nvidia-modelopt==0.43.0", "pulp==2.9.0")
ROTATION_ERROR = 1e-3  # tolerance of the rotated teacher's logits
LOSS_ERROR = 1e-3  # tolerance between transformers and megatron-core


@dataclass(frozen=True, slots=True)
class Run:
    """One model of the comparison."""

    name: str
    case: str  # several runs of one case are averaged
    write: Callable[
        ["Peers", Shape, Path], Any
    ]  # writes the cut for a target into an empty folder; returns facts for the result
    distilled: bool = True


def by_criterion(peers: "Peers", target: Shape, folder: Path, *, width: str, seed: int = 0) -> None:
    """Prune by one of the program's width criteria, without repair."""
    evidence = peers.evidence(PruneConfig(width=width), seed)
    slice_checkpoint(peers.bench.teacher, select(evidence, target), target, folder)


def shortgpt(peers: "Peers", target: Shape, folder: Path) -> dict[str, int]:
    """Remove layers."""
    teacher = peers.bench.teacher
    student = as_many_layers(teacher.shape, num_parameters(target))
    slice_checkpoint(teacher, select(peers.evidence(PruneConfig()), student), student, folder)
    return {"layers": student.num_layers}


def slicegpt_like(peers: "Peers", target: Shape, folder: Path) -> None:
    """Keep the rotated teacher's first channels, ModelOpt's heads and neurons; norms as if the dropped channels were zero."""
    rotated = peers.rotated
    student, gamma = rms_restored(rotated.shape, rotated_shape(target))
    prune = configuration(Case("modelopt", "modelopt"), peers.bench.calibration).prune
    falling = -torch.arange(rotated.shape.hidden_size).double()
    scores = replace(width_criterion(prune.width).width(peers.evidence(prune)), embedding=falling)
    keep = keep_best(scores, rotated.shape, student)
    slice_checkpoint(rotated, keep, student, folder, norm_tensors(student, gamma))


def preset(peers: "Peers", target: Shape, folder: Path, *, name: str) -> None:
    """Prune with one of conf/prune/*.yaml."""
    bench, (config, keep) = peers.bench, peers.chosen(target, name)
    changed: Iterable[tuple[str, Tensor]] = ()
    if config.prune.repairs:
        changed = repaired_tensors(config, bench.groups, bench.teacher, keep, bench.tokens)
    slice_checkpoint(bench.teacher, keep, target, folder, changed)


def ours_mixed(peers: "Peers", target: Shape, folder: Path) -> None:
    """Run the real command on as many calibration tokens as the others, half of them generated by the teacher."""
    output, amounts = folder.parent / "stages", peers.bench.calibration
    sizes = [f"student.{axis}={size}" for axis, size in sizes_of(target).items()]
    numbers = [
        f"calibration.{key}={getattr(amounts, key)}" for key in ("num_samples", "seq_length", "micro_batch_size")
    ]
    peers.program(output, "prune", "calibration.self_generated_fraction=0.5", *numbers, *sizes)
    shutil.copytree(output / "pruned", folder, dirs_exist_ok=True)
    shutil.rmtree(output)


def nvidia_modelopt(peers: "Peers", target: Shape, folder: Path) -> dict[str, int]:
    """Run ModelOpt itself in a separate process, so that nothing of it affects this one."""
    packages = CACHE / "peers-modelopt-0.43.0"
    if not packages.exists():
        with atomic_folder(packages) as scratch:
            pip = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", "--target", str(scratch)]
            subprocess.run([*pip, *MODELOPT_PACKAGES], check=True)
    tokens = peers.folder / "calibration_tokens.safetensors"
    save_file({"tokens": peers.bench.tokens}, tokens)
    paths = {"teacher": peers.teacher, "tokens": tokens, "peers": packages, "folder": folder}
    task = {key: str(path.absolute()) for key, path in paths.items()}
    worker = Path(__file__).with_name("pruning_peers_nvidia.py")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    command = [sys.executable, "-W", "ignore", str(worker), json.dumps(task | {"sizes": sizes_of(target)})]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"nvidia-modelopt failed:\n{done.stdout[-3000:]}")
    _, keep = peers.chosen(target, "modelopt")
    return {"different": num_different(peers.bench.teacher, hf.HFFolder(folder), keep)}


RUNS = (
    Run("random-1", "random", partial(by_criterion, width="random", seed=1)),
    Run("random-2", "random", partial(by_criterion, width="random", seed=2)),
    Run("magnitude", "magnitude", partial(by_criterion, width="magnitude")),
    Run("shortgpt", "shortgpt", shortgpt),
    Run("slicegpt-like", "slicegpt-like", slicegpt_like),
    Run("modelopt", "modelopt", partial(preset, name="modelopt")),
    Run("ours", "ours", partial(preset, name="default")),
    Run("ours-mixed", "ours-mixed", ours_mixed),
    Run("nvidia-modelopt", "nvidia-modelopt", nvidia_modelopt, distilled=False),
)
QUICK = ("magnitude", "slicegpt-like")


class Peers:
    """The comparison in one folder; expensive results are made at first use."""

    def __init__(self, subject: Subject, folder: Path, teacher: Path, groups: Groups, *, quick: bool) -> None:
        self.subject, self.folder, self.teacher, self.groups, self.quick = subject, folder, teacher, groups, quick
        self.journal = folder / "results.jsonl"
        folder.mkdir(parents=True, exist_ok=True)

    @cached_property
    def bench(self) -> Bench:
        """Teacher, calibration and validation tokens, statistics."""
        amounts = {"num_samples": 8, "num_validation": 2} if self.quick else {"num_samples": 128, "num_validation": 32}
        return prepare(self.teacher, self.groups, local=self.subject.local, **amounts)

    @cached_property
    def rotated(self) -> hf.HFFolder:
        """The teacher on its principal directions; it must compute the same logits."""
        folder, bench = self.folder / "rotated", self.bench
        if not folder.exists():
            teacher = bench.teacher
            layers = Layers(teacher.table, teacher.shape, RowReader(teacher), self.groups, resident=False)
            size = bench.calibration.micro_batch_size
            directions_HH = principal_directions(layers, bench.tokens.flatten(0, 1), size)
            config = hf.student_config(teacher.config, rotated_shape(teacher.shape))
            with atomic_folder(folder) as scratch:
                hf.write_folder(scratch, config, rotated_tensors(teacher, directions_HH), self.teacher)
                expected, found = (logits(path, bench.validation_NS[:2, :128]) for path in (self.teacher, scratch))
                error = float((expected - found).abs().max())
                assert error < ROTATION_ERROR, f"the rotated teacher's logits differ by {error}"
                print(f"rotated teacher before the cut: logits differ by {error:.1e} at most", flush=True)
        return hf.HFFolder(folder)

    def chosen(self, target: Shape, name: str) -> tuple[Config, Keep]:
        """The configuration of a preset, and its kept indices."""
        bench, config = self.bench, configuration(Case(name, name), self.bench.calibration)
        return config, choose(config, self.groups, bench.teacher, target, bench.statistics, lambda: bench.tokens)

    def evidence(self, prune: PruneConfig, seed: int = 0) -> Evidence:
        """The input of a criterion: the teacher and its statistics."""
        teacher, statistics = self.bench.teacher, self.bench.statistics
        return Evidence(
            statistics=statistics, source=teacher, table=teacher.table, shape=teacher.shape, prune=prune, seed=seed
        )

    def loss(self, folder: Path) -> float:
        """Cross-entropy on the held-out tokens."""
        model = hf.HFFolder(folder)
        return loss_of(model, model.shape, RowReader(model), self.groups, self.bench.validation_NS)

    def results(self) -> list[dict[str, Any]]:
        """All finished lines."""
        return [json.loads(line) for line in self.journal.read_text().splitlines()] if self.journal.exists() else []

    def finished(self, run: str, target: str, tokens: int) -> dict[str, Any] | None:
        """The line of one model after this many tokens of distillation (0: the cut)."""
        wanted = {"run": run, "target": target, "tokens": tokens}
        return next((line for line in self.results() if wanted.items() <= line.items()), None)

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        """Append one line; it is on disk when this returns."""
        with self.journal.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)
        return line

    def teacher_loss(self) -> float:
        """The teacher's loss, measured once."""
        line = self.finished("teacher", "", 0)
        return (line or self.add({"run": "teacher", "target": "", "tokens": 0, "loss": self.loss(self.teacher)}))[
            "loss"
        ]

    def cut(self, run: Run, target: str) -> dict[str, Any]:
        """Write the folder, check that it opens, measure its loss."""
        line = self.finished(run.name, target, 0)
        if line:
            return line
        folder = self.folder / target.replace("/", "-") / run.name / "pruned"
        sizes = dict(zip(AXES, map(int, target.split("/")), strict=True))
        with atomic_folder(folder) as scratch:
            facts = run.write(self, self.bench.teacher.shape.smaller(**sizes), scratch) or {}
        check_opens(folder, self.bench.validation_NS[:1], self.groups)
        model = hf.HFFolder(folder)
        facts |= {"parameters": num_parameters(model.shape), "loss": self.loss(folder)}
        return self.add({"run": run.name, "case": run.case, "target": target, "tokens": 0, "loss_after": None, **facts})

    def distilled(self, run: Run, target: str, tokens: int) -> dict[str, Any]:
        """Distil the cut with the real commands and measure its loss again."""
        line = self.finished(run.name, target, tokens)
        if line:
            return line
        folder = self.folder / target.replace("/", "-") / run.name
        output = folder / f"distilled-{tokens}"
        look = f"eval.every_tokens={self.subject.tokens}"
        self.program(
            output,
            "distill",
            f"student.path={folder / 'pruned'}",
            f"train.num_tokens={tokens}",
            look,
            *self.subject.rates,
        )
        self.program(output, "export", "export.dtype=float32")
        own = evaluations(output, run.name)[-1]
        facts = {"loss_after": self.loss(output / "student"), "own_loss_after": own.loss, "own_kl_after": own.kl}
        line = self.add(self.cut(run, target) | {"tokens": tokens, **facts})
        shutil.rmtree(output / "train" / "checkpoints")  # gigabytes; metrics and student are kept
        return line

    def evaluated(self, label: str, model: Path, preset: str) -> dict[str, Any]:
        """Evaluate one model with the real commands, all in one folder, where `eval.compare` finds their rows."""
        output, corpora = self.folder / f"tasks-{preset}", os.environ.get("MINITRON_DATA")
        local = [f"eval.data_dir={corpora}/eval"] if corpora else []
        if not local:
            self.program(output, "fetch")
        self.program(output, "eval", f"eval={preset}", f"eval.model={model}", f"eval.label={label}", *local)
        return {"model": label, **task_figures(hf.read_json(output / "eval" / f"{label}.json"))}

    def program(self, output: Path, command: str, *overrides: str) -> None:
        """Run one command of the subject's recipe with its teacher and text."""
        corpora = self.subject.corpora
        text = [f"data.path='{corpora}/corpus/[!v]*.jsonl.gz'"] if corpora else []  # all but valid_wikitext2
        program(self.subject.name, output, command, f"teacher.path={self.teacher}", *text, *overrides)

    def models(self, targets: Iterable[str], runs: Iterable[Run], tokens: int) -> Iterator[tuple[str, Path]]:
        """Label and folder of the teacher, and of every cut and its student."""
        yield "teacher", self.teacher
        for target, run in product(targets, runs):
            name = target.replace("/", "-")
            folder = self.folder / name / run.name
            yield f"{name}-{run.name}", folder / "pruned"
            if tokens and run.distilled:
                yield f"{name}-{run.name}-{tokens}", folder / f"distilled-{tokens}" / "student"


def sizes_of(shape: Shape) -> dict[str, int]:
    """The `student` sizes of a target."""
    return {axis: getattr(shape, axis) for axis in AXES}


@torch.no_grad()
def logits(folder: Path, tokens_NS: Tensor) -> Tensor:
    """Logits of transformers' model."""
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens_NS).logits


def check_opens(folder: Path, tokens_NS: Tensor, groups: Groups) -> None:
    """Check that transformers and megatron-core compute the same loss."""
    found = logits(folder, tokens_NS)[:, :-1].flatten(0, 1)
    theirs = torch.nn.functional.cross_entropy(found, tokens_NS[:, 1:].flatten()).item()
    model = hf.HFFolder(folder)
    ours = loss_of(model, model.shape, RowReader(model), groups, tokens_NS)
    assert abs(ours - theirs) < LOSS_ERROR * ours, (
        f"{folder}: loss {theirs} with transformers, {ours} with megatron-core"
    )


def main() -> None:
    """Cut all, distil all; print and write every result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    cases = list(dict.fromkeys(run.case for run in RUNS))
    amounts = ", ".join(f"{subject.tokens} for {subject.name}" for subject in SUBJECTS)
    parser.add_argument("--model", choices=[subject.name for subject in SUBJECTS], default=SUBJECTS[0].name)
    parser.add_argument("--target", nargs="+", help="targets of the model; default: all; with --quick the first")
    parser.add_argument("--only", nargs="+", choices=cases, metavar="NAME", help=", ".join(cases))
    parser.add_argument(
        "--distill", type=int, metavar="TOKENS", help=f"tokens of distillation; default: {amounts}; with --quick 0"
    )
    parser.add_argument(
        "--tasks", metavar="PRESET", help="preset of conf/eval, such as quick (minutes per model); default: none"
    )
    parser.add_argument(
        "--quick", action="store_true", help=f"few tokens, {' and '.join(QUICK)}; the docs have other figures"
    )
    parser.add_argument("--json", type=Path)
    parser.add_argument("--teacher", type=Path, help="the model's folder; default: made in the user's cache")
    parser.add_argument("--folder", type=Path, default=Path("outputs/pruning_peers"))
    asked = parser.parse_args()
    subject = next(subject for subject in SUBJECTS if subject.name == asked.model)
    targets = asked.target or (subject.targets[:1] if asked.quick else subject.targets)
    if unknown := set(targets) - set(subject.targets):
        parser.error(f"--target {' '.join(unknown)}: {subject.name} has {', '.join(subject.targets)}")
    tokens = asked.distill if asked.distill is not None else 0 if asked.quick else subject.tokens
    wanted = set(asked.only or (QUICK if asked.quick else cases)) - set(subject.without)
    runs = [run for run in RUNS if run.case in wanted]
    parts = [subject.name, "corpora" if subject.corpora else "embedded"]
    parts += [hf.fingerprint(asked.teacher)[:8]] if asked.teacher else []
    name = "-".join([*parts, *(["quick"] if asked.quick else [])])
    disable_progress_bar()
    with start(ParallelConfig(), World(), 1234) as groups:
        peers = Peers(subject, asked.folder / name, asked.teacher or subject.teacher(), groups, quick=asked.quick)
        steps = [partial(peers.cut, run, target) for target in targets for run in runs]
        if tokens:
            steps += [
                partial(peers.distilled, run, target, tokens) for target in targets for run in runs if run.distilled
            ]
        report: dict[str, Any] = {}
        for step in steps:
            step()
            report = {"teacher_loss": peers.teacher_loss(), "cases": table(peers.results(), cases, tokens)}
            write(asked.json, report)
        show(report["teacher_loss"], report["cases"])
        if asked.tasks:
            models = peers.models(targets, runs, tokens)
            report["tasks"] = [peers.evaluated(label, model, asked.tasks) for label, model in models]
            write(asked.json, report)
            show_tasks(report["tasks"])


if __name__ == "__main__":
    main()
