"""How a repair generalises: the error of the student's residual stream after each layer, on calibration text and on other text.

    python benchmarks/quality/repair_gap.py [--layers N] [--teacher FOLDER] [--folder FOLDER] [--json FILE] [KEY=VALUE …]

SmolLM2-135M is cut to 504 channels, 1,024 neurons and 6 heads, as in pruning_race.py, and repaired up to layer N. KEY=VALUE are
settings of `prune`. The table has Σ w ‖t - s‖² / Σ w ‖t - t̄‖², where t is the teacher's stream, s the student's stream in the
teacher's channels, and w the repair's weight of a token. `calibration` are the first sequences that were fitted. The other texts
are those of pruning_race.py, 2,048 held-out tokens each. The last column is the error of the first linears' outputs (mean over
qkv and fc1 of all N layers). Scores are shared by runs with the same calibration text.

A lower error on `calibration` than on `own`, which is the same kind of text, is the part of the fit that does not generalise.
"""

import argparse
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml
from miniature import short_hash
from pruning_quality import teacher_folder
from pruning_race_models import MODELS
from pruning_race_training import Race, race_of
from torch import Tensor

from minitron_train import hf
from minitron_train.config import Config
from minitron_train.data import tokenizers
from minitron_train.data.calibration import calibration_batches, read_tokens
from minitron_train.parallel.groups import Groups
from minitron_train.parallel.groups import start as start_groups
from minitron_train.pruning import samples
from minitron_train.pruning.halves import HALVES
from minitron_train.pruning.importance import Scores
from minitron_train.pruning.layers import Layers, seeing
from minitron_train.pruning.prune import choose
from minitron_train.pruning.repair import Repair, Streams, kept_rows
from minitron_train.pruning.scoring import score_checkpoint, scoring_dtype
from minitron_train.pruning.select import Keep
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import Sliced
from minitron_train.pruning.target import num_repair_sequences
from minitron_train.runtime.launch import World

TEXT_TOKENS = 2_048  # of each text
BATCH = 8  # sequences of a forward pass

Sums = list[float]  # squared error, squared size


@dataclass
class Gap:
    """Errors of one text."""

    streams: list[float]  # after each layer
    first: float  # of the first linears' outputs


def ratio(sums: Sums) -> float:
    return sums[0] / sums[1]


def add(sums: Sums, wanted: Tensor, found: Tensor, weight: Tensor) -> None:
    """Add a micro-batch's squared error and squared size around the mean; tensors are [S, B, …], the weight [S, B]."""
    middle = (weight[..., None] * wanted).sum((0, 1)) / weight.sum()
    sums[0] += float((weight[..., None] * (wanted - found).square()).sum())
    sums[1] += float((weight[..., None] * (wanted - middle).square()).sum())


def widened(stream_SBH: Tensor, keep: Keep) -> Tensor:
    """The student's stream in the teacher's channels, [S, B, D]."""
    if keep.basis is not None:
        return stream_SBH @ keep.basis.up_DH.t()
    wide = stream_SBH.new_zeros(*stream_SBH.shape[:2], keep.teacher.hidden_size)
    return wide.index_copy(-1, keep.embedding, stream_SBH)


def gap(repair: Repair, tokens_NS: Tensor, num_layers: int) -> Gap:
    """Run both models over `tokens_NS`. The student's first `num_layers` layers must be repaired and in memory."""
    teacher, student, keep = repair.teacher, repair.student, repair.keep
    rotary, teacher_rotary = (layers.rotary(tokens_NS.shape[1]) for layers in (student, teacher))
    batches = [
        Streams(teacher.embed(part), student.embed(part), mask := (part >= 0).t(), mask[mask])
        for part in tokens_NS.split(BATCH)
    ]
    errors, first = [], []
    for i, layer in enumerate(keep.layers.tolist()[:num_layers]):
        for half in HALVES:
            stream, linear = [0.0, 0.0], [0.0, 0.0]
            rows = kept_rows(repair.rows[f"{half.first}.weight"], keep, layer)
            modules = teacher[layer].get_submodule(half.first), student[i].get_submodule(half.first)
            for batch in batches:
                with seeing(modules[0], of_input=False) as wanted, seeing(modules[1], of_input=False) as found:
                    batch.teacher = half.forward(teacher[layer], batch.teacher, teacher_rotary, repair.dtype)
                    batch.student = half.forward(student[i], batch.student, rotary, repair.dtype)
                weight = batch.weight().view_as(batch.mask)
                add(linear, wanted[0][..., rows].float(), found[0].float(), weight)
                add(stream, batch.teacher, widened(batch.student, keep), weight)
            first.append(ratio(linear))
        errors.append(ratio(stream))
    return Gap(errors, sum(first) / len(first))


def calibration(config: Config, groups: Groups, teacher: hf.HFFolder, folder: Path) -> tuple[Tensor, Path]:
    """Calibration tokens and the file of their scores, which are kept in `folder`."""
    tokenizer, generates = tokenizers.load(teacher.folder), config.calibration.self_generated_fraction
    folder.mkdir(parents=True, exist_ok=True)
    scores, written = folder / "scores.safetensors", folder / samples.FILE
    if generates and scores.exists():
        return read_tokens(written), scores
    if generates:
        tokens = samples.tokens_with_samples(config, groups, teacher, tokenizer, folder)
    else:
        tokens = calibration_batches(config.calibration, config.data, tokenizer, config.seed)
    if not scores.exists():
        score_checkpoint(config, groups, teacher=teacher, tokens=tokens, folder=folder)
    return tokens, scores


@torch.no_grad()
def measure(race: Race, settings: Mapping[str, Any], num_layers: int) -> dict[str, Gap]:
    """Score, cut, repair the first layers, and measure every text."""
    config = replace(race, settings={**race.settings, **settings}).config()
    with start_groups(config.parallel, World(), config.seed) as groups:
        teacher, dtype = hf.HFFolder(race.teacher), scoring_dtype(config.calibration, groups)
        chosen = {key: value for key, value in settings.items() if key.startswith("calibration.")}
        tokens, scores = calibration(config, groups, teacher, race.folder / "scores" / short_hash(chosen))
        student = teacher.shape.smaller(hidden_size=504, ffn_hidden_size=1_024, num_attention_heads=6)
        statistics = Scores.read(scores, teacher).statistics
        keep = choose(config, groups, teacher, student, statistics, lambda: tokens)
        sequences_NS = tokens.flatten(0, 1)
        used_NS = sequences_NS[: num_repair_sequences(config.prune, sequences_NS.shape[1])]
        sources = (teacher.shape, RowReader(teacher)), (keep.student, Sliced(teacher, keep))
        before, after = (Layers(teacher.table, *source, groups, resident=True) for source in sources)
        repair = Repair(before, after, keep, config.prune, used_NS, BATCH, dtype)
        for name, _ in repair.tensors():
            if f"layers.{num_layers - 1}." in name:  # the layer's tensors come when all its linears are fitted
                break
        texts = {"calibration": used_NS[: TEXT_TOKENS // used_NS.shape[1]]}
        texts |= {name: text_NS[:, :-1] for name, text_NS in race.tokens.items()}
        return {name: gap(repair, text_NS, num_layers) for name, text_NS in texts.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="settings of prune and calibration")
    parser.add_argument("--layers", type=int, default=8, metavar="N", help="layers that are repaired and measured")
    parser.add_argument("--teacher", type=Path, help="folder of SmolLM2; default: fetched into the user's cache")
    parser.add_argument("--folder", type=Path, default=Path("outputs/repair_gap"), help="scores")
    parser.add_argument("--json", type=Path, metavar="FILE", help="file for the errors")
    asked, start_s = parser.parse_args(), time.monotonic()
    data = Path(os.environ["MINITRON_DATA"]).absolute()
    asked.folder.mkdir(parents=True, exist_ok=True)
    teacher = asked.teacher or teacher_folder()
    race = race_of(
        MODELS["smollm2"], asked.folder.absolute(), teacher.absolute(), data, "auto", text_tokens=TEXT_TOKENS
    )
    settings = {key: yaml.safe_load(value) for key, value in (word.split("=", 1) for word in asked.settings)}
    gaps = measure(race, settings, asked.layers)
    shown = sorted({*range(0, asked.layers, max(1, asked.layers // 4)), asked.layers - 1})
    print(f"| text | {' | '.join(f'layer {i + 1}' for i in shown)} | first linears |\n|---{'|---' * (len(shown) + 1)}|")
    for name, found in gaps.items():
        print(f"| {name} | {' | '.join(f'{found.streams[i]:.3f}' for i in shown)} | {found.first:.3f} |")
    print(f"{time.monotonic() - start_s:.0f} s")
    if asked.json:
        asked.json.write_text(json.dumps({name: vars(found) for name, found in gaps.items()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
