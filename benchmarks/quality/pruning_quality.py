"""Effect of each ranking and each repair: loss right after the cut, without training.

    python benchmarks/quality/pruning_quality.py [--quick] [--only TEXT] [--json FILE] [--teacher FOLDER] [--tiny FOLDER]

SmolLM2-135M-Instruct (fetched into the user's cache, unless --teacher gives a folder) is cut to 432 channels,
1024 neurons and 6 heads of 576, 1536 and 9. With MINITRON_DATA, calibration uses its corpora and validation WikiText-2.
Without it, both use the embedded corpus (validation its held-out part). --tiny adds the same comparison for a Nemotron
teacher from `pretrain +recipe=tiny`, calibrated and validated on the embedded corpus. The first two cases give the headline
figures. FILE is written after every case, and its cases are not measured again. --only runs the cases whose name contains TEXT.
"""

import argparse
import collections
import dataclasses
import functools
import json
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import AutoTokenizer

from minitron_train import hf
from minitron_train.arch.shape import Shape
from minitron_train.config import (
    CalibrationConfig,
    Config,
    DataConfig,
    ParallelConfig,
    Precision,
    PruneConfig,
    TeacherConfig,
)
from minitron_train.data.calibration import calibration_batches
from minitron_train.data.stream import validation_tokens
from minitron_train.fetch.teacher import fetch_teacher
from minitron_train.parallel.groups import Groups, start
from minitron_train.pruning.collect import Statistics
from minitron_train.pruning.layers import Layers, RowSource, forward
from minitron_train.pruning.prune import choose, repaired_tensors
from minitron_train.pruning.scoring import gather_evidence
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import Sliced
from minitron_train.runtime.launch import World

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "minitron_train"
SMOLLM2_SIZES = {"hidden_size": 432, "ffn_hidden_size": 1024, "num_attention_heads": 6}
QUICKSTART_SIZES = {"hidden_size": 504, "ffn_hidden_size": 1056, "num_attention_heads": 6}
TINY_SIZES = {"hidden_size": 192, "ffn_hidden_size": 640, "num_attention_heads": 4}
AGGREGATIONS = ("mean", "l2", "var")


@dataclasses.dataclass(frozen=True, slots=True)
class Case:
    """One line of the comparison: a preset, the changes to it, and the sizes that are cut."""

    name: str
    preset: str
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    sizes: Mapping[str, int] | None = None  # None: all axes


def cases(sizes: Mapping[str, int], *, quick: bool) -> list[Case]:
    """The cases for one target."""
    found = [Case("modelopt", "modelopt"), Case("default", "default")]
    if quick:
        return found
    heads, ffn, hidden = ({key: sizes[key]} for key in ("num_attention_heads", "ffn_hidden_size", "hidden_size"))
    found += [Case("paper", "paper")]
    found += [
        Case(
            f"batch {batch}, sequence {sequence}",
            "modelopt",
            {"batch_aggregation": batch, "sequence_aggregation": sequence},
        )
        for batch in AGGREGATIONS
        for sequence in AGGREGATIONS
    ]
    found += [
        Case("ffn alone", "modelopt", {}, ffn),
        Case("ffn alone, summed over layers", "modelopt", {"ffn_scope": "network"}, ffn),
        Case("ffn alone, before the activation", "modelopt", {"neuron_activation": "pre"}, ffn),
        Case("heads alone", "modelopt", {}, heads),
        Case("heads alone, norms of tokens", "modelopt", {"head_norm": "token"}, heads),
        Case("heads alone, merged as printed", "modelopt", {"head_merge": "queries"}, heads),
        Case("heads alone, merged in the output", "modelopt", {"head_merge": "outputs"}, heads),
        Case("heads alone, outputs refitted", "modelopt", {"refit": "outputs"}, heads),
        Case("hidden alone", "modelopt", {}, hidden),
        Case("hidden alone, final norm counted", "modelopt", {"include_final_norm": True}, hidden),
        Case("hidden alone, norms rescaled", "modelopt", {"norm_scale": True}, hidden),
        Case("hidden alone, rotated", "modelopt", {"rotate": True}, hidden),
        Case("norms rescaled", "modelopt", {"norm_scale": True}),
        Case("rotated", "modelopt", {"rotate": True}),
        Case("merged in the output", "modelopt", {"head_merge": "outputs"}),
        Case("outputs refitted", "modelopt", {"refit": "outputs"}),
        Case("two iterations", "modelopt", {"iterations": 2}),
        Case("default, mean over the batch", "default", {"batch_aggregation": "mean"}),
        Case("default, not rotated", "default", {"rotate": False}),
        Case("default, ridge 0.003", "default", {"ridge": 0.003}),
    ]
    return found


class Overlay:
    """A source in which some tensors are replaced, whole or in pieces, first rows first."""

    def __init__(self, below: RowSource, replaced: Iterable[tuple[str, Tensor]]) -> None:
        self.below, pieces = below, collections.defaultdict[str, list[Tensor]](list)
        for name, rows in replaced:
            pieces[name].append(rows)
        self.replaced = {name: torch.cat(rows) for name, rows in pieces.items()}

    def read(self, name: str, dim: int | None = None, start: int = 0, stop: int | None = None) -> Tensor:
        """The tensor, replaced if the overlay has it."""
        if name not in self.replaced:
            return self.below.read(name, dim, start, stop)
        tensor = self.replaced[name]
        return tensor if dim is None else tensor.narrow(dim, start, (stop or tensor.shape[dim]) - start)

    def rows(self, name: str, index_N: Tensor) -> Tensor:
        """Rows `index_N` of the tensor, replaced if the overlay has it."""
        return self.replaced[name][index_N] if name in self.replaced else self.below.rows(name, index_N)


@torch.no_grad()
def loss_of(teacher: hf.HFFolder, shape: Shape, source: RowSource, groups: Groups, tokens_NS: Tensor) -> float:
    """Mean next-token cross-entropy, nats."""
    layers = Layers(teacher.table, shape, source, groups, resident=False)
    batches = tokens_NS.split(8)
    hidden, rotary = [layers.embed(batch) for batch in batches], layers.rotary(tokens_NS.shape[1])
    for i in range(shape.num_layers):
        layer = layers[i]
        hidden = [forward(layer, x, rotary) for x in hidden]
    output, total = layers.output_layer(0, shape.vocab_size), 0.0
    for x_SBH, batch in zip(hidden, batches, strict=True):
        for y_SH, tokens_S in zip(layers.final_norm(x_SBH).transpose(0, 1), batch, strict=True):
            total += torch.nn.functional.cross_entropy(output.logits(y_SH[:-1]), tokens_S[1:], reduction="sum").item()
    return total / tokens_NS[:, 1:].numel()


def configuration(case: Case, calibration: CalibrationConfig) -> Config:
    """The program's configuration for one case."""
    preset = OmegaConf.load(ROOT / "conf" / "prune" / f"{case.preset}.yaml")
    merged = OmegaConf.merge(OmegaConf.structured(PruneConfig), preset, OmegaConf.create(dict(case.changes)))
    return Config(prune=OmegaConf.to_object(merged), calibration=calibration)  # type: ignore[arg-type]


@dataclasses.dataclass
class Bench:
    """One teacher; its statistics are computed at first use."""

    teacher: hf.HFFolder
    groups: Groups
    calibration: CalibrationConfig
    tokens: Tensor  # [batches, sequences, length]
    validation_NS: Tensor

    @functools.cached_property
    def statistics(self) -> Statistics:
        """Statistics of the calibration tokens, from a forward pass through all layers."""
        layers = Layers(self.teacher.table, self.teacher.shape, RowReader(self.teacher), self.groups, resident=False)
        return gather_evidence(layers, self.tokens, self.calibration)

    def run(self, case: Case, sizes: Mapping[str, int]) -> dict[str, Any]:
        """Cut, repair, measure."""
        start_s, config = time.perf_counter(), configuration(case, self.calibration)
        student = self.teacher.shape.smaller(**(case.sizes or sizes))
        keep = choose(config, self.groups, self.teacher, student, self.statistics, lambda: self.tokens)
        source: RowSource = Sliced(self.teacher, keep)
        if config.prune.repairs:
            source = Overlay(source, repaired_tensors(config, self.groups, self.teacher, keep, self.tokens))
        loss = loss_of(self.teacher, student, source, self.groups, self.validation_NS)
        seconds = time.perf_counter() - start_s
        print(f"{case.name:45}{loss:9.4f}{seconds:8.0f} s", flush=True)
        return {"case": case.name, "preset": case.preset, **case.changes, "loss": loss, "seconds": round(seconds, 1)}


def embedded_data() -> DataConfig:
    """Configuration of the embedded corpus."""
    merged = OmegaConf.merge(OmegaConf.structured(DataConfig), OmegaConf.load(ROOT / "conf" / "data" / "embedded.yaml"))
    return OmegaConf.to_object(merged)  # type: ignore[return-value]


def prepare(folder: Path, groups: Groups, *, local: bool, num_samples: int, num_validation: int) -> Bench:
    """Calibration and validation tokens of one teacher; `local`: from MINITRON_DATA if that is set."""
    teacher, tokenizer = hf.HFFolder(folder), AutoTokenizer.from_pretrained(folder)
    calibration = CalibrationConfig(
        num_samples=num_samples, seq_length=512, micro_batch_size=8, precision=Precision.fp32
    )
    data, corpus = embedded_data(), os.environ.get("MINITRON_DATA") if local else None
    data.validation_tokens = 512 * num_validation
    if corpus:
        calibration.path = str(Path(corpus) / "corpus" / "[!v]*.jsonl.gz")  # all but valid_wikitext2
        data.validation_path = str(Path(corpus) / "corpus" / "valid_wikitext2.jsonl.gz")
    tokens = calibration_batches(calibration, data, tokenizer, seed=1234)
    validation_NS = validation_tokens(data, tokenizer, 512, seed=1234)[:num_validation]
    return Bench(teacher, groups, calibration, tokens, validation_NS)


def teacher_folder() -> Path:
    """SmolLM2 in this user's cache, fetched once."""
    folder = CACHE / "smollm2"
    if not folder.exists():
        fetch_teacher(TeacherConfig(**OmegaConf.load(ROOT / "recipes" / "smollm2.yaml").teacher), folder)
    return folder


def teacher_loss(bench: Bench) -> float:
    """Loss of the whole model."""
    loss = loss_of(bench.teacher, bench.teacher.shape, RowReader(bench.teacher), bench.groups, bench.validation_NS)
    print(f"{'teacher':45}{loss:9.4f}", flush=True)
    return loss


@dataclasses.dataclass(slots=True)
class Report:
    """All figures so far, written to disk after every case."""

    path: Path | None
    found: dict[str, Any] = dataclasses.field(default_factory=dict)
    rows: list[dict[str, Any]] = dataclasses.field(default_factory=list)

    def __post_init__(self) -> None:
        """Read the measurements of an earlier run."""
        if self.path and self.path.exists():
            self.rows = json.loads(self.path.read_text())["cases"]

    def about(self, facts: Mapping[str, Any]) -> None:
        """Set the facts common to all rows. A file with another teacher or other amounts is not continued."""
        known = json.loads(self.path.read_text()) if self.path and self.rows else {}
        if other := [key for key, value in facts.items() if known.get(key, value) != value]:
            raise SystemExit(
                f"{self.path}: has rows of another run ({', '.join(other)} differ); give another --json FILE"
            )
        self.found |= facts

    def has(self, name: str) -> bool:
        """Whether a case was measured."""
        return any(row["case"] == name for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        losses = {row["case"]: row["loss"] for row in self.rows}
        headline = {"modelopt_loss": losses.get("modelopt"), "ours_loss": losses.get("default")}
        if self.path:
            self.path.write_text(json.dumps({**self.found, **headline, "cases": self.rows}, indent=2) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="two cases on few tokens; the docs have other figures")
    parser.add_argument("--only", default="", metavar="TEXT", help="run the cases whose name contains it")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--teacher", type=Path, help="folder of SmolLM2; default: fetched into the user's cache")
    parser.add_argument("--tiny", type=Path, help="folder of a tiny Nemotron teacher")
    arguments = parser.parse_args()
    report, quick = Report(arguments.json), arguments.quick
    amounts = {"num_samples": 16, "num_validation": 2} if quick else {"num_samples": 128, "num_validation": 32}
    with start(ParallelConfig(), World(), 1234) as groups:
        bench = prepare(arguments.teacher or teacher_folder(), groups, local=True, **amounts)
        seen = {"calibration_tokens": bench.tokens.numel(), "validation_tokens": bench.validation_NS.numel()}
        report.about({"teacher": hf.fingerprint(bench.teacher.folder), **seen})
        report.found["teacher_loss"] = teacher_loss(bench)
        wanted = cases(SMOLLM2_SIZES, quick=quick)
        if not quick:
            names = ("modelopt", "default")
            wanted += [Case(f"{name}, quickstart's target", name, {}, QUICKSTART_SIZES) for name in names]
        for case in wanted:
            if arguments.only in case.name and not report.has(case.name):
                report.add(bench.run(case, SMOLLM2_SIZES))
        if arguments.tiny:
            bench = prepare(arguments.tiny, groups, local=False, **amounts)
            report.found["tiny_teacher_loss"] = teacher_loss(bench)
            for case in cases(TINY_SIZES, quick=quick):
                name = f"tiny: {case.name}"
                if arguments.only in name and not report.has(name):
                    report.add({**bench.run(case, TINY_SIZES), "case": name})


if __name__ == "__main__":
    main()
