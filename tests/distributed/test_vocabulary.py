"""A vocabulary that the tensor-parallel size does not divide: padding rows get no probability and reach no file."""

from pathlib import Path
from typing import Any

import pytest
import torch

from minitron_train.arch import Shape
from minitron_train.hf import HFFolder
from minitron_train.runtime.errors import UserError
from tests.support.helpers import run_ranks
from tests.support.models import save_tiny
from tests.support.training import (
    VOCAB,
    Interrupted,
    assert_equal,
    before_step,
    interrupt,
    make_material,
    rows,
    run,
    student_of,
    train_here,
)

ODD = VOCAB + 1  # the last row belongs to no token, but it counts in the softmax
LABELS: dict[str, Any] = {"distill__ce_weight": 0.5}
SPLIT: dict[str, Any] = LABELS | {"parallel__tensor_model_parallel_size": 2}
LAST = VOCAB + 1  # the last token of a vocabulary that three ranks do not share evenly
PIECES = {"tied": "llama", "untied": "llama_untied"}


def test_training_over_two_ranks_and_exports(tmp_path: Path) -> None:
    """TP 2 logs what TP 1 logs, and checkpoints go from each of them to the other.

    Weights may differ where a gradient is nearly zero, because AdamW amplifies its rounding: by 1.7e-4 in one of 15,408.
    """
    materials, runs = {}, []
    for name, family in PIECES.items():
        (tmp_path / name).mkdir()
        materials[name] = material = make_material(tmp_path / name, family, vocab_size=ODD)
        run(material, tmp_path / f"{name}_one", **LABELS)
        with before_step(5, interrupt), pytest.raises(Interrupted):
            run(material, tmp_path / f"{name}_1_to_2", **LABELS)
        runs += [
            (material, tmp_path / f"{name}_two", SPLIT),
            (material, tmp_path / f"{name}_1_to_2", SPLIT),
            (material, tmp_path / f"{name}_2_to_1", SPLIT | {"stop_in": 5}),
        ]
    run_ranks(train_here, 2, runs)
    for name, material in materials.items():
        assert run(material, tmp_path / f"{name}_2_to_1", **LABELS)["resumed_at_step"] == 3
        wanted = student_of(tmp_path / f"{name}_one", tmp_path / f"{name}_exported")
        for kind in ("two", "1_to_2", "2_to_1"):
            folder = tmp_path / f"{name}_{kind}"
            assert_equal(folder, rows(tmp_path / f"{name}_one"))
            found = student_of(folder, folder.with_name(f"{folder.name}_exported"))
            for tensor_name, tensor in wanted.items():
                assert found[tensor_name].shape == tensor.shape
                assert torch.allclose(found[tensor_name], tensor, rtol=1e-4, atol=1e-3), (kind, tensor_name)


def scored(rank: int, world_size: int, folder: Path) -> tuple[list[float], list[int]]:
    """Log-probabilities of the last rows of the vocabulary, and sampled tokens."""
    from minitron_train.config import ParallelConfig
    from minitron_train.model.build import build
    from minitron_train.model.forward import hidden_states, inference, target_logprobs
    from minitron_train.model.generate import sample
    from minitron_train.model.load import load_weights
    from minitron_train.parallel.groups import start
    from minitron_train.runtime.launch import read_world

    files = HFFolder(folder)
    with start(ParallelConfig(tensor_model_parallel_size=world_size), read_world(), 1) as groups:
        model = build(files.shape, tp=world_size)
        load_weights(model, files.table, files.shape, files, rank, world_size)
        tokens_BS = torch.arange(LAST - 8, LAST + 1)[None]
        group = groups.tp_group if world_size > 1 else None
        with inference(model):
            hidden = hidden_states(model, tokens_BS, torch.arange(9)[None])[0]
            logprobs, _ = target_logprobs(hidden, model.output, tokens_BS[0], group)
            generator = torch.Generator(groups.device).manual_seed(3)
            text = torch.cat([*sample(model, [1, 2, 3], 2, 20, generator, groups)])
    return logprobs.tolist(), text.tolist()


def test_scores_and_samples_know_no_padding(tmp_path: Path) -> None:
    """transformers' log-probabilities at TP 1 and 3, which leaves two rows of padding; both sample the same tokens."""
    from transformers import AutoModelForCausalLM

    sizes = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 3, "intermediate_size": 96}
    folder = save_tiny("llama", tmp_path / "model", vocab_size=LAST + 1, **sizes)
    tokens_BS = torch.arange(LAST - 8, LAST + 1)[None]
    with torch.no_grad():
        logits_SV = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(tokens_BS).logits[0]
    wanted = logits_SV.log_softmax(-1)[torch.arange(9), tokens_BS[0]]
    whole, split = (run_ranks(scored, tp, folder)[0] for tp in (1, 3))
    for logprobs, _ in (whole, split):
        assert logprobs == pytest.approx(wanted.tolist(), abs=1e-5)
    assert whole[1] == split[1]


def test_a_rank_without_vocabulary_is_refused() -> None:
    shape = Shape(
        architecture="llama", num_layers=1, hidden_size=8, ffn_hidden_size=8, num_attention_heads=8, num_query_groups=8,
        kv_channels=8, vocab_size=9,
    )  # fmt: skip
    shape.check_parallel(2, "student")
    assert [shape.real_rows(rank, 2) for rank in range(2)] == [5, 4]
    with pytest.raises(UserError, match="leaves a rank without a row of the student's vocab_size=9; lower it"):
        shape.check_parallel(8, "student")
