"""Families that store several linears as one tensor: names, bits and reads of the stored tensors."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from minitron_train import hf
from minitron_train.arch import convert
from minitron_train.config import Refit
from minitron_train.hf import rows as reading
from minitron_train.runtime.errors import UserError
from tests.support.families import save_family
from tests.support.models import exported
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS = random_tokens()
FUSED = {"phi3": ("self_attn.qkv_proj", "mlp.gate_up_proj"), "glm": ("mlp.gate_up_proj",)}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("fused")
    return {family: save_family(family, root / family) for family in FUSED}


@pytest.mark.parametrize("family", FUSED)
def test_what_is_written_has_the_names_and_bits_of_what_was_read(tmp_path, models, groups, family):
    """By pruning that cuts nothing, and by an export of the imported parameters."""
    from minitron_train.model.build import build
    from minitron_train.model.load import load_weights

    original = load_file(models[family] / "model.safetensors")
    assert all(f"model.layers.0.{name}.weight" in original for name in FUSED[family])
    pruned = load_file(run_cut(tmp_path, models[family], configuration(), TOKENS, groups) / "model.safetensors")
    checkpoint = hf.HFFolder(models[family])
    model = build(checkpoint.shape)
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    written = dict(convert.stored(checkpoint.table, checkpoint.shape, exported(model, checkpoint).items()))
    for found in (pruned, written):
        assert set(found) == set(original)
        assert all(torch.equal(found[name], tensor) for name, tensor in original.items())


def test_slicing_reads_the_kept_rows_alone(tmp_path, models, groups, monkeypatch):
    """The kept half of the neurons and the dropped layer: no byte of other rows of gate_up_proj is read."""
    read = []
    teacher = hf.HFFolder(models["phi3"])
    place = teacher.stored["model.layers.0.mlp.up_proj.weight"]
    assert place.name == "model.layers.0.mlp.gate_up_proj.weight" and place.size == (96, 64)
    read_at = reading.read_at

    def spy(file, entry, offset, view):
        read.append((entry.name, entry.start, offset, len(view)))
        read_at(file, entry, offset, view)

    from minitron_train.pruning.select import select
    from minitron_train.pruning.slice import slice_checkpoint
    from tests.support.pruning import measured

    keep = select(
        measured(teacher, TOKENS, groups, rotate=False, refit=Refit.none), teacher.shape.smaller(ffn_hidden_size=56)
    )
    monkeypatch.setattr(reading, "read_at", spy)
    slice_checkpoint(teacher, keep, keep.student, tmp_path)
    ups = [(offset, size) for name, start, offset, size in read if (name, start) == (place.name, place.start)]
    assert sum(size for _, size in ups) == 56 * 64 * 4
    first_rows = {(offset - place.start) // (64 * 4) for offset, _ in ups}
    assert first_rows <= set(keep.ffn[0].tolist())


def test_a_fused_tensor_of_another_size_is_named_as_it_is_stored(tmp_path, models):
    folder = save_family("phi3", tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.self_attn.qkv_proj.weight"
    for changed, message in (
        (tensors[name][:-4], r"qkv_proj.weight has size \[188, 64\].* \[192, 64\]"),
        (None, "qkv_proj.weight is missing"),
    ):
        kept = {key: tensor for key, tensor in tensors.items() if key != name}
        save_file(
            kept if changed is None else kept | {name: changed.contiguous()},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        with pytest.raises(UserError, match=message) as caught:
            hf.HFFolder(folder)
        assert "\n" not in str(caught.value) and "q_proj.weight" not in str(caught.value)
