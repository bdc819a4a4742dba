"""One model, all its numbers: perplexity and lm-eval's tasks, written to one JSON file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minitron_train.arch.build import LanguageModel, build
from minitron_train.arch.convert import load
from minitron_train.config import Config, EvalConfig
from minitron_train.evaluation.perplexity import perplexity
from minitron_train.files import atomic_write_json
from minitron_train.hf import Checkpoint
from minitron_train.parallel.groups import Groups


def evaluate(
    config: Config,
    groups: Groups,
    *,
    model: Path,
    label: str,
    folder: Path,
    data_dir: Path | None,
    validation_tokens: Tensor | None,
) -> dict[str, Any]:
    """Evaluate a Hugging Face folder and write folder/LABEL.json.

    Args:
        model: Hugging Face folder; loaded at the tensor-parallel size of `groups`.
        label: names the result file.
        data_dir: local evaluation data (see evaluation.local_data); what is not there comes from the hub, if any.
        validation_tokens: int64 [sequences, length + 1] for the perplexity; None leaves it out.

    Returns:
        What was written: perplexity, results per task, tasks not run with the reason, model size, versions, data hashes.
    """
    checkpoint = Checkpoint(model)
    checkpoint.shape.check_parallel(groups.tp_size, label)
    live = build(checkpoint.shape, tp=groups.tp_size)
    load(live, checkpoint.table, checkpoint.shape, checkpoint, groups.tp_rank, groups.tp_size)
    results = run_tasks(live, model, checkpoint.shape.max_position_embeddings, config.eval, groups, data_dir)
    report = {
        "label": label,
        "model": str(model),
        "parameters": sum(torch.Size(size).numel() for size in checkpoint.table.tensors(checkpoint.shape).values()),
        "bytes": sum(path.stat().st_size for path in set(checkpoint.files.values())),
        "perplexity": None,
        **results,
    }
    if validation_tokens is not None:
        report["perplexity"] = perplexity(live, validation_tokens, groups, config.eval.batch_size)
    if groups.is_first:
        atomic_write_json(folder / f"{label}.json", report)
    groups.barrier()
    return report


def run_tasks(
    model: LanguageModel,
    tokenizer: Path,
    max_length: int,
    evaluation: EvalConfig,
    groups: Groups,
    data_dir: Path | None,
) -> dict[str, Any]:
    """lm-eval's tasks on a live model: `results`, `not_run` and `data`, the same on every rank."""
    if not evaluation.tasks:
        return {"results": {}, "not_run": {}, "data": {}}
    from importlib.metadata import version

    from lm_eval.evaluator import evaluate as lm_evaluate

    from minitron_train.evaluation.lm import MegatronLM, load_tokenizer
    from minitron_train.evaluation.results import collect
    from minitron_train.evaluation.tasks import load_tasks, quiet

    with quiet():
        chosen = load_tasks(evaluation, data_dir)
        report = {"results": {}, "not_run": chosen.not_run, "data": chosen.data, "lm_eval": version("lm_eval")}
        if chosen.tasks["tasks"]:
            lm = MegatronLM(model, load_tokenizer(tokenizer), max_length, groups, evaluation.batch_tokens)
            raw = lm_evaluate(lm, chosen.tasks, samples=chosen.rows, bootstrap_iters=1000)
            assert raw is not None, "lm-eval returns results on its rank 0, which every rank is"
            report |= {"results": collect(raw, list(chosen.data)), "truncated_requests": lm.num_truncated}
    return report
