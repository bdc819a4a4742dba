"""Evaluation speed compared with lm-eval's own `hf` model on the same rows, with the same answers, and in bf16.

    python benchmarks/speed/evaluation.py [--quick] [--json FILE] [--model FOLDER] [--data-dir FOLDER] [--baseline CHECKOUT]

The `hf` model in fp32 and ours in fp32 and bf16 score the same requests on this machine, in alternating rounds, so that other
load affects all. The time covers scoring alone, from the first request to the last answer, with tokenisation and without
loading models and data. The log-likelihoods are compared with those of an `hf` model whose softmax is in fp64: the fp32
softmax over 49,152 tokens has an error of about 3e-6 of the value (max_loglik_diff_fp32_softmax).

Answers in bf16 are compared with ours in fp32: the share of equal greedy flags, the share of rows that are right in both or
wrong in both, and the largest difference of a log-likelihood. --baseline also times the command `eval` of another checkout in
fp32, and of this one in fp32 and bf16.
"""

import argparse
import json
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import torch
from checkouts import against_baseline
from lm_eval.models.huggingface import HFLM

from minitron_train.config import EvalConfig, ParallelConfig
from minitron_train.data import tokenizers
from minitron_train.evaluation.lm import MegatronLM
from minitron_train.evaluation.run import find_batch_tokens
from minitron_train.evaluation.tasks import load_tasks, quiet, run_lm_eval
from minitron_train.hf import HFFolder
from minitron_train.model.build import build
from minitron_train.model.load import load_weights
from minitron_train.parallel import groups
from minitron_train.runtime.launch import read_world

SUBJECTS = (
    ("abstract_algebra", "anatomy", "astronomy", "business_ethics", "clinical_knowledge"),
    ("college_biology", "computer_security", "econometrics", "formal_logic", "global_facts"),
    ("high_school_us_history", "human_aging", "international_law", "machine_learning", "marketing"),
    ("nutrition", "philosophy", "prehistory", "sociology", "virology"),
)
HF_BATCH = 8  # sequences; lm-eval's default is 1, which is slower
ROUNDS = {  # rows of each round; those of the first round are also compared with the fp64 softmax
    "hellaswag": [EvalConfig(tasks=["hellaswag"], limit=30, num_fewshot=0, seed=seed) for seed in range(4)],
    "mmlu": [EvalConfig(tasks=[f"mmlu_{name}" for name in names], limit=5, num_fewshot=5) for names in SUBJECTS],
}
OURS = {"minitron_train": torch.float32, "minitron_train_bf16": torch.bfloat16}
QUICK = {
    "hellaswag": [EvalConfig(tasks=["hellaswag"], limit=4, num_fewshot=0)],
    "mmlu": [EvalConfig(tasks=["mmlu_marketing"], limit=3, num_fewshot=5)],
}


@dataclass(slots=True)
class Tally:
    """Results of one model on one task over all rounds."""

    rows: int = 0
    wall_s: float = 0.0
    cpu_s: float = 0.0
    answers: list[list[tuple[float, bool]]] = field(default_factory=list)  # by round
    is_correct: list[float] = field(default_factory=list)  # by row

    @property
    def correct(self) -> float:
        """Number of rows with the right choice."""
        return sum(self.is_correct)

    def add(self, clock: "Clock", samples: list[dict[str, Any]]) -> None:
        """One round."""
        self.rows += len(samples)
        self.is_correct += [sample["acc"] for sample in samples]
        self.wall_s += clock.wall_s
        self.cpu_s += clock.cpu_s
        self.answers.append([answer for sample in samples for answer in sample["filtered_resps"]])


class Clock:
    """An lm-eval model with a timed `loglikelihood`."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.wall_s, self.cpu_s = lm, 0.0, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def loglikelihood(self, requests: list[Any]) -> Any:
        """As the model's."""
        wall_s, cpu_s = time.perf_counter(), time.process_time()
        answers = self.lm.loglikelihood(requests, disable_tqdm=True)
        self.wall_s += time.perf_counter() - wall_s
        self.cpu_s += time.process_time() - cpu_s
        return answers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rows, within a minute")
    parser.add_argument("--json", type=Path, help="file for the figures")
    parser.add_argument(
        "--model", type=Path, default=Path("outputs/smollm2/teacher"), help="Hugging Face folder of the model"
    )
    parser.add_argument(
        "--data-dir", type=Path, default=Path("outputs/smollm2/eval_data"), help="folder of the evaluation data"
    )
    parser.add_argument("--baseline", type=Path, metavar="CHECKOUT", help="another checkout, timed in fp32")
    arguments = parser.parse_args()
    if not (arguments.model.exists() and arguments.data_dir.exists()):
        subprocess.run([sys.executable, "-m", "minitron_train", "fetch", "+recipe=smollm2"], check=True)
    with groups.start(ParallelConfig(), read_world(), seed=1) as group, quiet():
        models = {"hf": load_hf(arguments.model, group)}
        models |= {name: load_ours(arguments.model, group, dtype) for name, dtype in OURS.items()}
        tallies = {
            task: measure(task, rounds, models, arguments.data_dir)
            for task, rounds in (QUICK if arguments.quick else ROUNDS).items()
        }
    figures = summarise(tallies)
    if arguments.baseline:
        command = ["eval", f"eval.model={arguments.model.resolve()}", f"eval.data_dir={arguments.data_dir.resolve()}"]
        command += ["eval.label=timed", "eval.tasks=[hellaswag]", "eval.limit=30", "eval.num_fewshot=0"]
        rounds = 1 if arguments.quick else 5
        figures |= against_baseline(arguments.baseline, command, "eval.precision", "eval/timed.provenance.json", rounds)
    print(json.dumps(figures, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def load_hf(folder: Path, group: groups.Groups) -> Any:
    """lm-eval's own model in fp32."""
    return cast(Any, HFLM)(pretrained=str(folder), dtype="float32", device=str(group.device), batch_size=HF_BATCH)


def load_ours(folder: Path, group: groups.Groups, dtype: torch.dtype) -> MegatronLM:
    """The same weights in megatron-core's GPTModel."""
    checkpoint = HFFolder(folder)
    model = build(checkpoint.shape, dtype=dtype)
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    length, batch_tokens = checkpoint.shape.max_position_embeddings, find_batch_tokens(model, group)
    return MegatronLM(model, tokenizers.load(folder), length, group, batch_tokens)


def measure(task: str, rounds: list[EvalConfig], models: dict[str, Any], data_dir: Path) -> dict[str, Tally]:
    """Run all rounds of a task with each model, and the first round with the fp64 softmax."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for number, evaluation in enumerate(rounds):
        order = list(models.items())
        for name, lm in order if number % 2 == 0 else order[::-1]:
            one_round(tallies[name], lm, evaluation, data_dir)
        if number == 0:
            models["hf"].softmax_dtype = torch.float64
            one_round(tallies["oracle"], models["hf"], evaluation, data_dir)
            models["hf"].softmax_dtype = None
        spent = ", ".join(f"{name} {tallies[name].wall_s:.1f} s" for name in models)
        print(f"{task}: {tallies['hf'].rows} rows: {spent}", file=sys.stderr, flush=True)
    return tallies


def one_round(tally: Tally, lm: Any, evaluation: EvalConfig, data_dir: Path) -> None:
    """Score the rows of one round with one model."""
    chosen = load_tasks(evaluation, data_dir)
    assert not chosen.not_run, chosen.not_run
    clock = Clock(lm)
    raw = run_lm_eval(clock, chosen, evaluation)
    tally.add(clock, [sample for task in sorted(raw["samples"]) for sample in raw["samples"][task]])


def summarise(tallies: dict[str, dict[str, Tally]]) -> dict[str, Any]:
    """The flat figures, and one case per task and model."""
    figures: dict[str, Any] = {"rows": 0, "max_loglik_diff": 0.0, "max_loglik_diff_fp32_softmax": 0.0}
    figures |= {"different_greedy": 0, "same_accuracies": True}
    cases = []
    for task, models in tallies.items():
        theirs, oracle = models["hf"], models["oracle"]
        ours, bf16 = (models[name] for name in OURS)
        figures |= {f"{task}_{key}": value for key, value in compare_precisions(ours, bf16).items()}
        figures["rows"] += ours.rows
        figures[f"{task}_rows"] = ours.rows
        figures[f"{task}_speedup"] = theirs.wall_s / ours.wall_s
        figures[f"{task}_speedup_cpu_time"] = theirs.cpu_s / ours.cpu_s
        for key, reference in (("max_loglik_diff", oracle), ("max_loglik_diff_fp32_softmax", theirs)):
            pairs = answer_pairs(ours, reference)
            figures[key] = max(figures[key], *(abs(a[0] - b[0]) for a, b in pairs))
        figures["different_greedy"] += sum(a[1] != b[1] for a, b in answer_pairs(ours, theirs))
        figures["same_accuracies"] &= theirs.correct == ours.correct
        for name in ("hf", *OURS):
            tally = models[name]
            case = {"task": task, "model": name, "rows": tally.rows, "acc": tally.correct / tally.rows}
            case |= {"wall_s": tally.wall_s, "cpu_s": tally.cpu_s, "items_per_second": tally.rows / tally.wall_s}
            cases.append(case)
    on_gpu = torch.cuda.is_available()
    figures["device"] = torch.cuda.get_device_name() if on_gpu else f"cpu, {torch.get_num_threads()} threads"
    return figures | {"cases": cases}


def compare_precisions(fp32: Tally, bf16: Tally) -> dict[str, float]:
    """Speed of bf16 by that of fp32, and how far its answers are from those in fp32."""
    pairs = answer_pairs(bf16, fp32)
    same_rows = sum(a == b for a, b in zip(bf16.is_correct, fp32.is_correct, strict=True))
    return {
        "speedup_vs_fp32": fp32.wall_s / bf16.wall_s,
        "speedup_vs_fp32_cpu_time": fp32.cpu_s / bf16.cpu_s,
        "equal_greedy": sum(a[1] == b[1] for a, b in pairs) / len(pairs),
        "rows_equally_right": same_rows / fp32.rows,
        "max_loglik_diff_bf16": max(abs(a[0] - b[0]) for a, b in pairs),
    }


def answer_pairs(ours: Tally, reference: Tally) -> list[tuple[tuple[float, bool], tuple[float, bool]]]:
    """Pairs of answers to the same requests; the reference may have fewer rounds."""
    rounds = zip(ours.answers, reference.answers, strict=False)
    return [pair for mine, theirs in rounds for pair in zip(mine, theirs, strict=True)]


if __name__ == "__main__":
    main()
