"""Greedy generation with a cache gives transformers' tokens, on one rank and split over two."""

from pathlib import Path

import pytest
import torch

from minitron_train.config import ParallelConfig
from minitron_train.runtime.launch import read_world
from tests.support.eval_data import save_model
from tests.support.helpers import run_ranks


@pytest.mark.parametrize("tp", [1, 2])
def test_generated_tokens_equal_transformers(tmp_path: Path, tp: int) -> None:
    from transformers import AutoModelForCausalLM

    folder = save_model("llama", tmp_path / "model")
    prompts = [[5, 6, 7, 8, 9, 10, 11], [3, 4], [20, 21, 22, 23]]
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    wanted = []
    for prompt in prompts:
        settings = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        tokens = model.generate(torch.tensor([prompt]), **settings)
        wanted.append(tokens[0, len(prompt) :].tolist())
    for found in [generate(0, 1, folder, prompts)] if tp == 1 else run_ranks(generate, tp, folder, prompts):
        assert found == wanted


def generate(rank: int, world_size: int, folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens of unequal prompts in one batch; one of them ends early and leaves the batch."""
    from minitron_train.hf import HFFolder
    from minitron_train.model.build import build
    from minitron_train.model.generate import greedy
    from minitron_train.model.load import load_weights
    from minitron_train.parallel.groups import start

    with start(ParallelConfig(tensor_model_parallel_size=world_size), read_world(), seed=1) as groups:
        checkpoint = HFFolder(folder)
        model = build(checkpoint.shape, tp=world_size, sequence_parallel=True)
        load_weights(model, checkpoint.table, checkpoint.shape, checkpoint, groups.tp_rank, world_size)
        ends = [lambda text: False, lambda text: len(text) == 5, lambda text: False]
        first = greedy(model, prompts, 24, ends, groups)
        assert len(first[1]) == 5
        full = greedy(model, prompts, 24, [lambda text: False] * 3, groups)
        assert [first[0], first[1], first[2]] == [full[0], full[1][:5], full[2]]
        return full
