"""Pruning by NVIDIA's own ModelOpt, for benchmarks/quality/pruning_peers.py: its scores, its selection, its slicing, on a CPU.

    python benchmarks/quality/pruning_peers_nvidia.py TASK    (JSON: teacher, tokens, sizes, peers, folder)

ModelOpt needs a megatron-core GPTModel; without Transformer Engine it needs megatron-core's own attention. Llama's RMSNorm
is registered with it here. The result is a Hugging Face folder. Its channels, neurons and heads are in ModelOpt's order,
best first, so it is compared by the kept units and by its loss.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from safetensors.torch import load_file
from torch import Tensor

from minitron_train import hf
from minitron_train.arch.convert import export_tensors
from minitron_train.config import ParallelConfig
from minitron_train.model.build import Norm, layer_spec, transformer_config
from minitron_train.model.load import load_weights, parameters_by_row
from minitron_train.parallel.groups import start
from minitron_train.pruning.select import Keep
from minitron_train.runtime.launch import World

DIVISOR = 8  # divides hidden and ffn sizes; ModelOpt's defaults, 256 and 512, leave SmolLM2 little choice
PREFIX = 64  # entries of a row that identify it


def prune(teacher: hf.HFFolder, tokens: Tensor, sizes: dict[str, int]) -> GPTModel:
    """Prune the teacher as a GPTModel by modelopt.torch.prune with mode mcore_minitron; tokens [batches, B, S]."""
    import modelopt.torch.prune as mtp  # type: ignore  # installed for this process only
    from modelopt.torch.nas.plugins.megatron import _DynamicFusedLayerNorm  # type: ignore
    from modelopt.torch.nas.registry import DMRegistry  # type: ignore
    from modelopt.torch.prune.plugins.mcore_minitron import get_mcore_minitron_config  # type: ignore

    class DynamicNorm(_DynamicFusedLayerNorm):
        def _setup(self, *, num_features: Any) -> None:
            self._register_hparam("num_features", num_features)
            self._register_dynamic_attribute("weight", self._cut_to_active_features)
            self._register_dynamic_attribute("size", self._get_normalized_shape)

    DMRegistry.register({Norm: "Norm"})(DynamicNorm)
    hidden_SS = torch.ones(tokens.shape[-1], tokens.shape[-1], dtype=torch.bool).triu(1)[None, None]

    def calibrate(model: GPTModel) -> None:
        for batch in tokens:
            model(batch, torch.arange(batch.shape[1]).expand_as(batch), hidden_SS)

    config = get_mcore_minitron_config(hidden_size_divisor=DIVISOR, ffn_hidden_size_divisor=DIVISOR)
    model, _ = mtp.prune(
        gpt_model(teacher),
        mode=[("mcore_minitron", config)],
        constraints={"export_config": sizes},
        dummy_input=None,  # type: ignore[arg-type]
        config={"forward_loop": calibrate},
    )
    return model


def gpt_model(teacher: hf.HFFolder) -> GPTModel:
    """megatron-core's GPTModel in ModelOpt's form, with the teacher's weights."""
    spec, shape, norm = layer_spec(), teacher.shape, Norm
    spec.submodules.self_attention.submodules.core_attention = DotProductAttention  # type: ignore[union-attr]
    model = GPTModel(
        transformer_config(shape, tp=1, sequence_parallel=False, dtype=torch.float32),
        TransformerBlockSubmodules(layer_specs=[spec] * shape.num_layers, layer_norm=norm),  # type: ignore[arg-type]
        vocab_size=shape.vocab_size,
        max_sequence_length=shape.max_position_embeddings,
        position_embedding_type="rope",
        rotary_base=shape.ropes[0].theta,  # type: ignore[arg-type]
        share_embeddings_and_output_weights=shape.tie_embeddings,
    )
    load_weights(model, teacher.table, shape, teacher)
    return model


def num_different(teacher: hf.HFFolder, pruned: hf.HFFolder, keep: Keep) -> int:
    """Count the channels, neurons and heads that `pruned` keeps and `keep` does not, found by their weights."""
    channels = places(pruned.read("model.embed_tokens.weight").t(), teacher.read("model.embed_tokens.weight").t())
    different = len(set(channels.tolist()) - set(keep.embedding.tolist()))
    for i in range(teacher.shape.num_layers):
        for part, size, kept in (
            ("mlp.gate", 1, keep.ffn[i]),
            ("self_attn.q", teacher.shape.kv_channels, keep.heads[i]),
        ):
            ours, theirs = (source.read(f"model.layers.{i}.{part}_proj.weight") for source in (teacher, pruned))
            found = places(theirs[::size], ours[::size][:, channels])
            different += len(set(found.tolist()) - set(kept.tolist()))
    return different


def places(rows: Tensor, among: Tensor) -> Tensor:
    """Index in `among` of each of `rows`, found by equal first entries."""
    equal = (rows[:, None, :PREFIX] == among[None, :, :PREFIX]).all(-1)
    assert bool((equal.sum(1) == 1).all()), "rows that are not among the teacher's, or there twice"
    return equal.int().argmax(1)


def main() -> None:
    task = json.loads(sys.argv[1])
    sys.path.append(task["peers"])
    teacher = hf.HFFolder(Path(task["teacher"]))
    student = teacher.shape.smaller(**task["sizes"])
    with start(ParallelConfig(), World(), 1234):
        model = prune(teacher, load_file(task["tokens"])["tokens"], task["sizes"])
    parameters = parameters_by_row(model)
    tensors = export_tensors(teacher.table, student, lambda row, i: [parameters[row.mcore.format(i=i)].detach()])
    hf.write_folder(Path(task["folder"]), hf.student_config(teacher.config, student), tensors, teacher.folder)


if __name__ == "__main__":
    main()
