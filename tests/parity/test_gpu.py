"""On a CUDA device: the same logits as transformers', a bf16 training step, checkpoints that resume."""

import json
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
TOKENS_BS = torch.arange(2 * 17).view(2, 17) * 7 % 128


def test_logits_equal_transformers(tiny_models: dict[str, Path]) -> None:
    from minitron_train.config import ParallelConfig
    from minitron_train.hf import HFFolder
    from minitron_train.model.build import build
    from minitron_train.model.load import load_weights
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import World
    from tests.support.models import hf_logits

    torch.backends.cuda.matmul.allow_tf32 = False
    with start(ParallelConfig(), World(), seed=1) as groups:
        for folder in tiny_models.values():
            checkpoint = HFFolder(folder)
            model = build(checkpoint.shape).eval()
            load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
            with torch.no_grad():
                found = model.logits(model(TOKENS_BS.to(groups.device))).transpose(0, 1).cpu()
            torch.testing.assert_close(found, hf_logits(folder, TOKENS_BS), rtol=0, atol=1e-4)


def test_pruning_in_steps(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    from minitron_train.config import ParallelConfig
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import World
    from tests.support.pruning import configuration, random_tokens, run_cut

    with start(ParallelConfig(), World(), seed=1) as groups:
        run_cut(tmp_path, tiny_models["llama"], configuration(iterations=2), random_tokens(), groups, hidden_size=48)


def run_micro(folder: Path, *arguments: str) -> list[dict]:
    """The chain of `micro` without evaluation; its metrics."""
    import subprocess
    import sys

    shared = ("eval.tasks=[]", "tracking.wandb.mode=disabled", "train.distributed_optimizer=false")
    for command in ("pretrain", "prune", "distill"):
        words = [
            sys.executable,
            "-m",
            "minitron_train",
            command,
            "+recipe=micro",
            f"output_dir={folder}",
            *shared,
            *arguments,
        ]
        result = subprocess.run(words, capture_output=True, text=True, timeout=280)
        assert result.returncode == 0, result.stderr[-3000:]
    return [json.loads(line) for line in (folder / "train" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_chain_trains(tmp_path: Path, precision: str) -> None:
    rows = run_micro(tmp_path, f"train.precision={precision}")
    kl = [row["eval.validation.kl"] for row in rows if "eval.validation.kl" in row]
    assert kl[-1] == kl[-1] and kl[-1] < rows[0]["loss"]
