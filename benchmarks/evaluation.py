"""Evaluation against lm-eval's own `hf` model: the same rows, the same answers, and how much sooner.

    python benchmarks/evaluation.py [--quick] [--json FILE] [--model FOLDER] [--data-dir FOLDER]

Both models score the same requests on this machine, one after the other, in fp32. Time is the scoring alone, from the
first request to the last answer, tokenisation included; loading models and data is not counted.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM

from minitron_train.arch.build import build
from minitron_train.arch.convert import load
from minitron_train.config import EvalConfig, ParallelConfig
from minitron_train.data import tokenizer
from minitron_train.evaluation.lm import MegatronLM
from minitron_train.evaluation.tasks import load_tasks, quiet
from minitron_train.hf import Checkpoint
from minitron_train.parallel import groups
from minitron_train.parallel.launch import read_world

SUBJECTS = (
    "abstract_algebra",
    "anatomy",
    "astronomy",
    "business_ethics",
    "clinical_knowledge",
    "college_biology",
    "computer_security",
    "econometrics",
    "formal_logic",
    "global_facts",
    "high_school_us_history",
    "human_aging",
    "international_law",
    "machine_learning",
    "marketing",
    "nutrition",
    "philosophy",
    "prehistory",
    "sociology",
    "virology",
)
BATCH_TOKENS = 4096  # of ours
BATCH_SEQUENCES = 8  # of lm-eval's hf model; its own default is 1, which is slower


def main() -> None:
    """Measure each task with both models and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few rows, within a minute")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--model", type=Path, default=Path("outputs/smollm2/teacher"), help="Hugging Face folder")
    parser.add_argument(
        "--data-dir", type=Path, default=Path("outputs/smollm2/eval_data"), help="local evaluation data"
    )
    arguments = parser.parse_args()
    if not (arguments.model.exists() and arguments.data_dir.exists()):
        subprocess.run([sys.executable, "-m", "minitron_train", "fetch", "+recipe=smollm2"], check=True)
    subjects = [f"mmlu_{subject}" for subject in (SUBJECTS[:1] if arguments.quick else SUBJECTS)]
    plans = {
        "hellaswag": EvalConfig(tasks=["hellaswag"], limit=5 if arguments.quick else 120, num_fewshot=0),
        "mmlu": EvalConfig(tasks=subjects, limit=3 if arguments.quick else 5, num_fewshot=5),
    }
    with groups.start(ParallelConfig(), read_world(), seed=1) as group, quiet():
        models = {"hf": load_hf(arguments.model), "minitron_train": load_ours(arguments.model, group)}
        rows = [case for name, plan in plans.items() for case in measure(name, plan, models, arguments.data_dir)]
    figures = summarise(rows)
    print(json.dumps({key: value for key, value in figures.items() if key != "cases"}, indent=2))
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def load_hf(folder: Path) -> HFLM:
    """lm-eval's own model in fp32."""
    return HFLM(pretrained=str(folder), dtype="float32", device=device(), batch_size=BATCH_SEQUENCES)


def load_ours(folder: Path, group: groups.Groups) -> MegatronLM:
    """The same weights in megatron-core's GPTModel."""
    checkpoint = Checkpoint(folder)
    model = build(checkpoint.shape)
    load(model, checkpoint.table, checkpoint.shape, checkpoint)
    return MegatronLM(model, tokenizer.load(folder), checkpoint.shape.max_position_embeddings, group, BATCH_TOKENS)


def device() -> str:
    """Where both models run."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def measure(name: str, plan: EvalConfig, models: dict[str, Any], data_dir: Path) -> list[dict[str, Any]]:
    """One case per model: seconds, items per second, accuracy, and every log-likelihood."""
    cases = []
    for label, lm in models.items():
        chosen = load_tasks(plan, data_dir)
        assert not chosen.not_run, chosen.not_run
        clock = Clock(lm)
        raw = evaluate(clock, chosen.tasks, samples=chosen.rows, bootstrap_iters=0)
        samples = [sample for task in sorted(raw["samples"]) for sample in raw["samples"][task]]
        answers = [answer for sample in samples for answer in sample["filtered_resps"]]
        case = {
            "task": name,
            "model": label,
            "rows": len(samples),
            "num_fewshot": plan.num_fewshot,
            "seconds": clock.seconds,
            "items_per_second": len(samples) / clock.seconds,
            "acc": sum(sample["acc"] for sample in samples) / len(samples),
            "loglikelihoods": [value for value, _ in answers],
            "greedy": [greedy for _, greedy in answers],
        }
        print(
            f"{name:10} {label:15} {case['rows']:5} rows {case['items_per_second']:8.2f} items/s  acc {case['acc']:.3f}"
        )
        cases.append(case)
    return cases


class Clock:
    """An lm-eval model that counts the seconds spent inside `loglikelihood`."""

    def __init__(self, lm: Any) -> None:
        self.lm, self.seconds = lm, 0.0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.lm, name)

    def loglikelihood(self, requests: list[Any]) -> Any:
        """As the model's, timed."""
        start_s = time.perf_counter()
        answers = self.lm.loglikelihood(requests, disable_tqdm=True)
        self.seconds += time.perf_counter() - start_s
        return answers


def summarise(cases: list[dict[str, Any]]) -> dict[str, Any]:
    """The flat figures, and the cases without their lists of log-likelihoods."""
    figures: dict[str, Any] = {"rows": 0, "max_loglik_diff": 0.0, "different_greedy": 0, "same_accuracies": True}
    for theirs, ours in zip(cases[::2], cases[1::2], strict=True):
        pairs = list(zip(theirs.pop("loglikelihoods"), ours.pop("loglikelihoods"), strict=True))
        greedy = zip(theirs.pop("greedy"), ours.pop("greedy"), strict=True)
        figures[f"{ours['task']}_speedup"] = theirs["seconds"] / ours["seconds"]
        figures[f"{ours['task']}_rows"] = ours["rows"]
        figures["rows"] += ours["rows"]
        figures["max_loglik_diff"] = max(figures["max_loglik_diff"], *(abs(a - b) for a, b in pairs))
        figures["different_greedy"] += sum(a != b for a, b in greedy)
        figures["same_accuracies"] &= theirs["acc"] == ours["acc"]
    figures["device"] = (
        torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    )
    return figures | {"cases": cases}


if __name__ == "__main__":
    main()
