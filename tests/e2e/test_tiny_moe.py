"""The whole chain of `tiny_moe`, made smaller still."""

import json
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_train.hf import HFFolder

SMALLER = (
    *("model.num_layers=2", "model.hidden_size=48", "model.ffn_hidden_size=24", "model.kv_channels=12"),
    *("model.vocab_size=512", "model.num_moe_experts=6", "student.num_moe_experts=3", "student.ffn_hidden_size=16"),
    *("pretrain.num_tokens=4096", "train.num_tokens=4096", "train.global_batch_size=8", "train.micro_batch_size=4"),
    *("train.seq_length=64", "calibration.num_samples=16", "calibration.seq_length=64"),
    *("train.warmup_steps=2", "data.validation_tokens=1024", "eval.every_tokens=2048", "data.num_workers=0"),
)


def test_chain_of_a_mixture_of_experts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "minitron_train", "run", "+recipe=tiny_moe", f"output_dir={tmp_path}", *SMALLER]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    for label in ("teacher", "pruned", "student"):
        assert json.loads((tmp_path / "eval" / f"{label}.json").read_text())["perplexity"] > 1
    report = (tmp_path / "report.html").read_text()
    assert "experts were kept" in report
    shape = HFFolder(tmp_path / "student").shape
    assert (shape.num_moe_experts, shape.ffn_hidden_size, shape.moe_router_topk) == (3, 16, 2)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "student")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "student")
    with torch.no_grad():
        assert model(**tokenizer("def main():", return_tensors="pt")).logits.isfinite().all()
