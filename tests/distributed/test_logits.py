"""The model against transformers, whole and split; export gives back what was imported, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import numpy
import pytest
import torch

from minitron_train.arch.convert import shards_to_parts
from minitron_train.config import ParallelConfig
from minitron_train.hf import HFFolder
from minitron_train.runtime.launch import read_world
from tests.support.families import LAYERED, TABLES, save_family, save_layered
from tests.support.helpers import run_ranks
from tests.support.models import COMMON, EXPERTS, exported, hf_logits, save_random
from tests.support.wrapped import CONFIGS, save_wrapped, wrapped_logits

TOKENS_BS = torch.arange(2 * 17).view(2, 17) * 7 % 128

OTHERS = [
    {
        "model_type": "granite",
        "attention_bias": True,
        "embedding_multiplier": 12.0,
        "residual_multiplier": 0.22,
        "attention_multiplier": 0.1,
        "logits_scaling": 8.0,
    },
    {"model_type": "gemma"},
    {"model_type": "olmo2"},
    {"model_type": "gemma3_text", "sliding_window": 9, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    {"model_type": "olmo3", "sliding_window": 9, "layer_types": ["sliding_attention"] * 2 + ["full_attention"]},
    {"model_type": "gemma2", "sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 3.0},
]


def split_logits(rank: int, world_size: int, folders: list[Path], sequence_parallel: bool) -> list[torch.Tensor]:
    """Full-vocabulary logits [B, S, V] of each folder at TP = world_size, after the bit-equality of the export."""
    from minitron_train.model.build import build
    from minitron_train.model.load import load_weights
    from minitron_train.parallel.groups import start

    found = []
    with start(ParallelConfig(tensor_model_parallel_size=world_size), read_world(), seed=1) as groups:
        for folder in folders:
            checkpoint = HFFolder(folder)
            model = build(checkpoint.shape, tp=world_size, sequence_parallel=sequence_parallel).eval()
            load_weights(model, checkpoint.table, checkpoint.shape, checkpoint, groups.tp_rank, groups.tp_size)
            with torch.no_grad():
                tokens = TOKENS_BS[:, :16] if sequence_parallel else TOKENS_BS
                logits = torch.cat(groups.gather(model.logits(model(tokens))), dim=-1).transpose(0, 1)
            given_back = exported(model, checkpoint, groups.gather)
            assert set(given_back) == set(checkpoint.sizes)
            for name, tensor in given_back.items():
                assert torch.equal(tensor, checkpoint.read(name)), name
            found.append(logits.numpy().copy())
    return found


@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (2, False), (2, True), (4, False)])
def test_logits_equal_transformers(tiny_models: dict[str, Path], tp: int, sequence_parallel: bool) -> None:
    compare(list(tiny_models.values()), tp, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_biases_head_norms_and_experts_are_split(tmp_path: Path, sequence_parallel: bool) -> None:
    biases, heads = {"attention_bias": True, "mlp_bias": True}, {"attention_bias": True}
    families = {"qwen2": {}, "qwen3": {}, "seed_oss": {}, "llama": biases, "nemotron": biases}
    families |= {
        "qwen2_moe": EXPERTS | {"shared_expert_intermediate_size": 40},
        "qwen3_moe": EXPERTS | heads,
        "mixtral": EXPERTS,
        "olmoe": EXPERTS | {"num_experts": 6, "head_dim": 8},
    }
    folders = [save_random({**COMMON, "model_type": name, **keys}, tmp_path / name) for name, keys in families.items()]
    compare(folders, 2, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_dense_layers_among_experts_are_split(tmp_path: Path, sequence_parallel: bool) -> None:
    more = {"qwen3_moe": {"mlp_only_layers": [1]}, "qwen2_moe": {"decoder_sparse_step": 2, "num_experts": 6}}
    common = COMMON | EXPERTS | {"use_sliding_window": True, "sliding_window": 6}
    folders = [save_random({**common, "model_type": name, **keys}, tmp_path / name) for name, keys in more.items()]
    compare(folders, 2, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_multipliers_and_other_norms_are_split(tmp_path: Path, sequence_parallel: bool) -> None:
    folders = [save_random({**COMMON, **keys}, tmp_path / keys["model_type"]) for keys in OTHERS]
    compare(folders, 2, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_families_of_one_table_are_split(tmp_path: Path, sequence_parallel: bool) -> None:
    compare([save_family(name, tmp_path / name) for name in TABLES], 2, sequence_parallel)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_layers_of_several_kinds_are_split(tmp_path: Path, sequence_parallel: bool) -> None:
    compare([save_layered(name, tmp_path / name) for name in LAYERED], 2, sequence_parallel)


def test_text_models_of_vision_language_models_are_split(tmp_path: Path) -> None:
    folders = [save_wrapped(name, tmp_path / name) for name in CONFIGS]
    compare(folders, 2, True, wrapped_logits)  # no token stands for an image


def compare(
    folders: list[Path], tp: int, sequence_parallel: bool, theirs: Callable[..., torch.Tensor] = hf_logits
) -> None:
    """Assert that each folder's split logits are those of transformers."""
    for answers in zip(folders, *run_ranks(split_logits, tp, folders, sequence_parallel), strict=True):
        wanted = theirs(answers[0], TOKENS_BS)
        for found in answers[1:]:
            torch.testing.assert_close(torch.from_numpy(found), wanted[:, : found.shape[1]], rtol=0, atol=1e-4)


def gradients(rank: int, world_size: int, folder: Path, sequence_parallel: bool) -> dict[str, numpy.ndarray]:
    """Gradients of one layer's parameters, as exported, after a backward pass of a loss on all logits."""
    from minitron_train.model.build import build
    from minitron_train.model.load import load_weights, parameters_by_row
    from minitron_train.parallel.groups import start

    with start(ParallelConfig(tensor_model_parallel_size=world_size), read_world(), seed=1) as groups:
        checkpoint = HFFolder(folder)
        model = build(checkpoint.shape, tp=world_size, sequence_parallel=sequence_parallel)
        load_weights(model, checkpoint.table, checkpoint.shape, checkpoint, groups.tp_rank, groups.tp_size)
        model.logits(model(TOKENS_BS[:, :16])).square().sum().backward()
        for parameter in model.parameters():
            if getattr(parameter, "sequence_parallel", False) and sequence_parallel:  # as megatron-core does later
                torch.distributed.all_reduce(parameter.grad)
        found, parameters = {}, parameters_by_row(model)
        for row in checkpoint.table.layer_rows(checkpoint.shape, checkpoint.shape.layer_kinds[1]):
            shards = groups.gather(parameters[row.mcore.format(i=1)].grad)  # type: ignore[arg-type]
            found |= shards_to_parts(row, checkpoint.shape, shards)
        return {name: tensor.numpy().copy() for name, tensor in found.items()}


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_gradients_of_split_norms_are_those_of_whole_ones(tmp_path: Path, sequence_parallel: bool) -> None:
    folder = save_random({**COMMON, "model_type": "olmo2"}, tmp_path / "olmo2")
    (whole,) = run_ranks(gradients, 1, folder, False)
    for split in run_ranks(gradients, 2, folder, sequence_parallel):
        for name, wanted in whole.items():
            numpy.testing.assert_allclose(split[name], wanted, rtol=1e-3, atol=1e-3 * abs(wanted).max())
