"""Evaluate one model: perplexity and lm-eval's tasks, written to LABEL.json and, per row, to LABEL.items.jsonl."""

import json
import math
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypedDict

import torch
from torch import Tensor

from minitron_train.config import Config, EvalConfig
from minitron_train.evaluation.journal import Journal
from minitron_train.evaluation.perplexity import perplexity
from minitron_train.evaluation.results import collect, items, without_infinities
from minitron_train.evaluation.source import open_origin
from minitron_train.evaluation.task_names import check_keys
from minitron_train.hf import HFFolder
from minitron_train.model.build import DTYPES, LanguageModel
from minitron_train.parallel.groups import Groups
from minitron_train.planning.precision import agreed
from minitron_train.runtime.console import say
from minitron_train.runtime.files import atomic_file
from minitron_train.runtime.records import Count, read_record
from minitron_train.stages import PROVENANCE
from minitron_train.train.batches import held_out_batch
from minitron_train.train.export import VerifiedCheckpoint


def evaluate_model(
    config: Config,
    groups: Groups,
    *,
    model: Path | VerifiedCheckpoint,
    label: str,
    folder: Path,
    data_dir: Path | None,
    validation_tokens: Tensor | None,
) -> dict[str, Any]:
    """Evaluate a Hugging Face folder or a training checkpoint; write folder/LABEL.json and folder/LABEL.items.jsonl.

    An interrupted evaluation resumes from folder/LABEL.partial.

    Args:
        model: Hugging Face folder or training checkpoint, as returned by evaluation.source.locate.
        data_dir: local evaluation data (see evaluation.local_data); data of other tasks come from the hub.
        validation_tokens: sequences for the perplexity (see data.stream.validation_tokens); None skips it.

    Returns:
        The contents of LABEL.json: perplexity, results, tasks that were not run with the reason, sizes, versions, data hashes.

    Raises:
        UserError: an unknown task, damaged data or weights, or a shape that the tensor-parallel size does not divide.
    """
    check_keys(config.eval)
    origin = open_origin(model)
    if isinstance(origin.source, HFFolder):
        origin.source.announce()
    origin.shape.check_parallel(groups.tp_size, label)
    precision = agreed(config.eval.precision, groups)
    live = origin.build(groups, DTYPES[precision])
    report = {
        "label": label,
        "model": str(origin.path),
        "parameters": origin.num_parameters,
        "bytes": origin.num_bytes,
        "precision": precision.name,
        "perplexity": None,
    }
    if validation_tokens is not None:
        value = perplexity(live, validation_tokens, groups, config.eval.validation_batch_size)
        report["perplexity"] = value if math.isfinite(value) else None
        if not math.isfinite(value):
            report["perplexity_reason"] = f"{value}: the model's log-likelihoods overflow or are not numbers"
            say(f"{label}: perplexity is {report['perplexity_reason']}; continuing with the tasks")
        report["perplexity_tokens"] = int(held_out_batch(validation_tokens).mask_BS.count_nonzero())
    answered_by = f"{origin.identity} {precision.name} lm_eval {version('lm_eval')}"
    journal = Journal(folder / f"{label}.partial", answered_by, groups)
    max_length = origin.shape.max_position_embeddings
    results, rows = run_tasks(live, origin.tokenizer, max_length, config.eval, groups, data_dir, journal)
    report |= results
    if groups.is_first:
        publish(folder, label, report, rows)
        journal.remove()
    groups.barrier()
    return report


def publish(folder: Path, label: str, report: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Replace LABEL.json and LABEL.items.jsonl together.

    The provenance of an earlier evaluation is deleted before the renames. After a kill between them it would otherwise
    describe results of other settings.
    """
    with (
        atomic_file(folder / f"{label}.items.jsonl") as items_file,
        atomic_file(folder / f"{label}.json") as report_file,
    ):
        items_file.write_text("".join(line(item) for item in rows), encoding="utf-8")
        report_file.write_text(json.dumps(report, indent=2, allow_nan=False) + "\n", encoding="utf-8")
        (folder / f"{label}.{PROVENANCE}").unlink(missing_ok=True)


def line(item: dict[str, Any]) -> str:
    """Format one row as a line of JSON."""
    return json.dumps(without_infinities(item), allow_nan=False) + "\n"


def run_tasks(
    model: LanguageModel,
    tokenizer: Path,
    max_length: int,
    evaluation: EvalConfig,
    groups: Groups,
    data_dir: Path | None,
    journal: Journal | None = None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Run lm-eval's tasks on a model in memory. Every rank returns the same result.

    Args:
        tokenizer: Hugging Face folder with the tokenizer.
        is_stopped: called after each batch; true ends the evaluation.

    Returns:
        The fields of eval/LABEL.json about tasks (`results`, `not_run`, `data`, …), and one object per evaluated row.
    """
    if not evaluation.tasks:
        return {"results": {}, "not_run": {}, "data": {}}, []
    from minitron_train.data import tokenizers
    from minitron_train.evaluation.lm import MegatronLM
    from minitron_train.evaluation.tasks import load_tasks, quiet, run_lm_eval

    with quiet():
        chosen = load_tasks(evaluation, data_dir, groups, max_length)
        report: dict[str, Any] = {
            "results": {},
            "not_run": chosen.not_run,
            "data": chosen.data,
            "seed": evaluation.seed,
        }
        report["lm_eval"] = version("lm_eval")
        if not chosen.leaves:
            return report, []
        batch_tokens = evaluation.batch_tokens or find_batch_tokens(model, groups)
        ends = end_tokens(tokenizer)
        opened = tokenizers.load(tokenizer)
        tokenizers.check_tokenizer(opened, model.vocab_size)
        lm = MegatronLM(model, opened, max_length, groups, batch_tokens, journal, ends, is_stopped)
        raw = run_lm_eval(lm, chosen, evaluation)
        lm.bar.close()
    report["results"] = collect(raw, chosen.leaves)
    report["truncated_requests"] = {task: count for task, count in lm.num_truncated.items() if count}
    report["answers_from_interrupted_run"] = journal.num_found if journal else 0
    return report, list(items(raw))


class EndTokens(TypedDict, total=False):
    """The one field that is read from generation_config.json or config.json."""

    eos_token_id: Count | list[Count] | None


def end_tokens(folder: Path) -> frozenset[int]:
    """Return the end-of-text tokens in generation_config.json or config.json. Chat models have several.

    Raises:
        UserError: one of the files is damaged.
    """
    for name in ("generation_config.json", "config.json"):
        try:
            found = read_record(folder / name, EndTokens, "copy the file again").get("eos_token_id")
        except FileNotFoundError:
            continue
        if found is not None:
            return frozenset([found] if isinstance(found, int) else found)
    return frozenset()


def find_batch_tokens(model: LanguageModel, groups: Groups) -> int:
    """Return the tokens of one forward pass: 1024 on a CPU, because of its caches; on a GPU what half the free memory holds.

    Per token, a layer without gradients needs about eight hidden states, three MLP states and one mask byte per key. All
    ranks use the smallest value of any rank.
    """
    if groups.device.type == "cpu":
        return 1024
    config = model.config
    width = 8 * config.hidden_size + 3 * (config.ffn_hidden_size or 0) // groups.tp_size
    free_bytes, _ = torch.cuda.mem_get_info(groups.device)
    least = torch.tensor([free_bytes / 2 / (4 * width + 2048)], device=groups.device)
    if groups.world_size > 1:
        torch.distributed.all_reduce(least, op=torch.distributed.ReduceOp.MIN)
    return max(4096, min(65536, int(least.item())))
