"""A sliced model against the whole one with the same things masked; slicing against conversion; memory modes."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from minitron_train import hf
from minitron_train.arch import convert
from minitron_train.config import Merge, Precision, Refit
from minitron_train.pruning import repair
from minitron_train.pruning.layers import Layers
from minitron_train.pruning.shards import RowReader
from minitron_train.pruning.slice import Sliced
from tests.support.models import FAMILIES, hf_logits
from tests.support.pruning import configuration, evidence_of, random_tokens, run_cut

TOKENS = random_tokens()
SIZES = {"hidden_size": 48, "ffn_hidden_size": 56, "num_attention_heads": 4, "num_layers": 2}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("sizes", [{"ffn_hidden_size": 56}, {"num_attention_heads": 4}, {"num_layers": 2}])
def test_sliced_equals_masked(tmp_path, tiny_models, groups, family, sizes):
    folder = run_cut(tmp_path, tiny_models[family], configuration(), TOKENS, groups, **sizes)
    kept = load_file(folder / "kept.safetensors")
    masked = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.float32)
    for i, layer in enumerate(masked.model.layers):
        if f"layers.{i}.ffn" not in kept:  # a dropped layer adds nothing to the residual stream
            keep_q = keep_f = torch.tensor([], dtype=torch.int64)
        else:
            keep_q = (kept[f"layers.{i}.heads"][:, None] * 12 + torch.arange(12)).flatten()
            keep_f = kept[f"layers.{i}.ffn"]
        for weight, keep in ((layer.self_attn.o_proj.weight, keep_q), (layer.mlp.down_proj.weight, keep_f)):
            mask = torch.zeros(weight.shape[1])
            mask[keep] = 1.0
            weight.data *= mask
    with torch.no_grad():
        wanted = masked(TOKENS[0]).logits
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("merge", [Merge.none, Merge.queries, Merge.outputs])
def test_slicing_commutes_with_conversion(tmp_path, tiny_models, groups, family, merge):
    """The written folder, imported, is the import of the sliced view, bit for bit."""
    from minitron_train.pruning.importance import Scores
    from minitron_train.pruning.select import select

    config = configuration(head_merge=merge)
    folder = run_cut(tmp_path, tiny_models[family], config, TOKENS, groups, **SIZES)
    teacher, student = hf.HFFolder(tiny_models[family]), hf.HFFolder(folder)
    statistics = Scores.read(tmp_path / "scores.safetensors", teacher).statistics
    view = Sliced(teacher, select(evidence_of(teacher, statistics, config.prune), student.shape))
    for row in student.table.rows_of(student.shape):
        for i in row.layers(student.shape):
            for rank in range(2):
                shards = (convert.read_shard(row, i, student.shape, source, rank, 2) for source in (view, student))
                assert torch.equal(*shards), row.mcore


@pytest.mark.parametrize("family", ["nemotron", "llama"])
def test_steps_cut_kv_groups_too(tmp_path, tiny_models, groups, family):
    sizes = SIZES | {"num_attention_heads": 2, "num_query_groups": 1}
    folder = run_cut(tmp_path, tiny_models[family], configuration(iterations=2), TOKENS, groups, **sizes)
    kept = load_file(folder / "kept.safetensors")
    assert hf.HFFolder(folder).shape.sizes() == sizes
    for i in kept["layers"].tolist():
        assert kept[f"layers.{i}.heads"].tolist() == [2 * kept[f"layers.{i}.groups"].item() + k for k in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_scores_are_bit_equal(tmp_path, tiny_models, groups, family):
    found = []
    for streamed, chunk_tokens in ((False, 10**6), (True, 10**6), (True, 96)):
        config = configuration()
        config.calibration.streamed, config.calibration.chunk_tokens = streamed, chunk_tokens
        folder = tmp_path / f"{streamed}{chunk_tokens}"
        run_cut(folder, tiny_models[family], config, TOKENS, groups, ffn_hidden_size=56)
        found.append(load_file(folder / "scores.safetensors"))
    for other in found[1:]:
        assert set(other) == set(found[0])
        for name, tensor in found[0].items():
            if "spans" in name or "block" in name:  # sums over tokens, whose order the chunks change
                torch.testing.assert_close(other[name], tensor, rtol=1e-6, atol=1e-6)
            else:
                assert torch.equal(other[name], tensor), name


def test_rows_are_read_together(tiny_models, groups, monkeypatch):
    """Of the vocabulary's rows those that a batch asks for, in one call: a product with a basis would cost the same each time."""
    teacher, asked = hf.HFFolder(tiny_models["llama"]), []
    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=False)
    monkeypatch.setattr(layers.source, "read_rows", lambda _, rows, out: asked.append(rows.tolist()) or out.fill(0))
    layers.embed(torch.tensor([[7, 3, 7, -1]]))
    assert asked == [[0, 3, 7]]


def test_scoring_sees_the_model_that_transformers_sees(tiny_models, groups):
    """The walk through the layers ends in transformers' logits."""
    teacher = hf.HFFolder(tiny_models["llama"])
    layers = Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=False)
    with torch.no_grad():
        hidden = layers.embed(TOKENS[0])
        for i in range(teacher.shape.num_layers):
            hidden = layers[i](hidden_states=hidden, attention_mask=None, rotary_pos_emb=layers.rotary(32))[0]
        logits = layers.final_norm(hidden).transpose(0, 1) @ teacher.read("model.embed_tokens.weight").t()
    torch.testing.assert_close(logits, hf_logits(tiny_models["llama"], TOKENS[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_of_nothing_changes_nothing(tmp_path, tiny_models, groups, family, monkeypatch):
    monkeypatch.setattr(repair, "VOCABULARY_ROWS", 48)  # the output layer comes in pieces
    config = configuration(refit=Refit.all, norm_scale=True)
    folder = run_cut(tmp_path, tiny_models[family], config, TOKENS, groups)
    wanted = hf_logits(tiny_models[family], TOKENS[0])
    torch.testing.assert_close(hf_logits(folder, TOKENS[0]), wanted, rtol=0, atol=1e-3)


@pytest.mark.parametrize(("family", "offset"), [("nemotron", 1.0), ("llama", 0.0)])
def test_norms_alone_are_scaled_by_what_is_kept(tmp_path, tiny_models, groups, family, offset):
    """Without least squares the factor is that of the teacher's stream: a drifting student's own would feed the drift."""
    folder = run_cut(tmp_path, tiny_models[family], configuration(norm_scale=True), TOKENS, groups, hidden_size=48)
    whole = AutoModelForCausalLM.from_pretrained(tiny_models[family], dtype=torch.float32)
    with torch.no_grad():
        stream = whole(TOKENS.flatten(0, 1), output_hidden_states=True).hidden_states[2].flatten(0, 1)
    kept = load_file(folder / "kept.safetensors")["embedding"]

    def spread(x: torch.Tensor) -> torch.Tensor:
        return x.std(-1, correction=0) if offset else x.square().mean(-1).sqrt()

    wanted = (whole.model.layers[2].input_layernorm.weight[kept] + offset) * (
        spread(stream[:, kept]) / spread(stream)
    ).mean()
    found = hf.HFFolder(folder).read("model.layers.2.input_layernorm.weight") + offset
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_makes_up_for_a_dropped_first_layer(tmp_path, tiny_models, groups, family):
    tokens = random_tokens(sequences=24)
    wanted = hf_logits(tiny_models[family], tokens[0]).log_softmax(-1)

    def divergence(refit: Refit) -> float:
        config = configuration(drop_layers=[0], refit=refit)
        folder = run_cut(tmp_path / refit.value, tiny_models[family], config, tokens, groups, num_layers=2)
        found = hf_logits(folder, tokens[0]).log_softmax(-1)
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum").item()

    assert divergence(Refit.all) < 0.8 * divergence(Refit.none)


@pytest.mark.parametrize("family", FAMILIES)
def test_repair_brings_the_student_nearer(tmp_path, tiny_models, groups, family):
    tokens = random_tokens(sequences=24)
    wanted = hf_logits(tiny_models[family], tokens[0]).log_softmax(-1)

    def divergence(name: str, **prune) -> float:
        folder = run_cut(tmp_path / name, tiny_models[family], configuration(**prune), tokens, groups, **SIZES)
        found = hf_logits(folder, tokens[0]).log_softmax(-1)
        return torch.nn.functional.kl_div(found, wanted, log_target=True, reduction="sum").item()

    plain, outputs, everything = (divergence(kind.value, refit=kind) for kind in Refit)
    assert everything < outputs < plain
    assert everything < 0.8 * plain


@pytest.mark.parametrize("family", FAMILIES)
def test_scores_in_bf16_are_near_those_in_fp32(tmp_path, tiny_models, groups, family):
    """The same sets but for near ties: statistics are fp32 and fp64 whatever the weights are."""
    scores, kept = {}, {}
    for precision in (Precision.fp32, Precision.bf16):
        config = configuration(depth="perplexity")
        config.calibration.precision = precision
        folder = run_cut(tmp_path / precision.name, tiny_models[family], config, TOKENS, groups, **SIZES)
        scores[precision] = load_file(folder.parent / "scores.safetensors")
        kept[precision] = load_file(folder / "kept.safetensors")
    for name, exact in scores[Precision.fp32].items():
        if not name.startswith("raw."):
            torch.testing.assert_close(scores[Precision.bf16][name], exact, rtol=0.05, atol=0.05 * exact.abs().mean())
    indices = [
        {(name, i) for name, index in kept[p].items() if not name.startswith("importance.") for i in index.tolist()}
        for p in (Precision.fp32, Precision.bf16)
    ]
    exact, rounded = indices
    assert len(exact & rounded) >= 0.95 * len(exact)
