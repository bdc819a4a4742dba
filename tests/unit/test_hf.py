"""Hugging Face folders: what is read, what is refused, what is written."""

import json
import math
import shutil
import struct
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from minitron_train.hf import HFFolder, fingerprint, shape_from_config, student_config, write_folder
from minitron_train.pruning.shards import RowReader
from minitron_train.runtime.errors import UserError


@pytest.fixture
def folder(tiny_models: dict[str, Path], tmp_path: Path) -> Path:
    """A copy of the tiny Nemotron that a test may damage."""
    return Path(shutil.copytree(tiny_models["nemotron"], tmp_path / "model"))


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value != "DELETE"}))


def cut_off(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.truncate(handle.seek(0, 2) - 100)


def empty(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"")


def garbage_header(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.seek(20)
        handle.write(b"\xff" * 40)


def absurd_header_length(folder: Path) -> None:
    with (folder / "model.safetensors").open("r+b") as handle:
        handle.write(struct.pack("<Q", 2**60))


def eight_bits(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(torch.float8_e4m3fn)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def header_without_shapes(folder: Path) -> None:
    header = json.dumps({"model.norm.weight": {"dtype": "F32", "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))


def damaged_index(folder: Path, weight_map: object) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut_off, "its header promises"),
        (empty, "not a safetensors file, or cut off"),
        (garbage_header, "header is corrupt"),
        (eight_bits, "tensor model.norm.weight has type F8_E4M3; supported: F64, F32, BF16, F16; take"),
        (absurd_header_length, "not a safetensors file, or cut off"),
        (missing_shard, "shard model-00002-of-00002.safetensors is missing"),
        (header_without_shapes, "header is corrupt"),
        *(
            (partial(damaged_index, weight_map=damage), "no weight_map from tensors to files")
            for damage in (None, [], {"a": 1})
        ),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds neither model.safetensors nor"),
        (lambda folder: (folder / "config.json").unlink(), "no such file"),
        (
            lambda folder: (folder / "config.json").write_text("{"),
            "config.json: damaged .*correct it, or copy the file again",
        ),
        (
            lambda folder: edit_config(folder, model_type="gpt2"),
            "'gpt2' is not supported; `python -m",
        ),
        (lambda folder: edit_config(folder, hidden_size="DELETE"), "the key 'hidden_size' is missing or null"),
        (lambda folder: edit_config(folder, num_hidden_layers=2.5), "num_hidden_layers=2.5 is not a whole number"),
        (lambda folder: edit_config(folder, hidden_size="64"), "hidden_size='64' is not a whole number"),
        (
            lambda folder: edit_config(folder, hidden_size=math.inf),
            "config.json: damaged .*correct it, or copy the file again",
        ),
        (
            lambda folder: edit_config(folder, rope_parameters={"rope_theta": "1e4x"}),
            "rope_theta='1e4x' is not a number",
        ),
        (lambda folder: edit_config(folder, rope_parameters=[1]), r"rope_parameters=\[1\] is not an object"),
        (lambda folder: edit_config(folder, rope_scaling="llama3"), "rope_scaling='llama3' is not an object"),
        (
            lambda folder: edit_config(folder, rope_scaling={"rope_type": "llama3"}),
            "rope type 'llama3' without factor; set it",
        ),
        (lambda folder: edit_config(folder, hidden_act="gelu"), "only 'relu2' is supported"),
        (lambda folder: edit_config(folder, intermediate_size=100), "the folder mixes two models"),
        (lambda folder: edit_config(folder, num_hidden_layers=4), "is missing; download"),
        (
            lambda folder: edit_config(folder, num_attention_heads=7),
            "num_attention_heads=7: must be a multiple of num_key_value_heads=4",
        ),
    ],
)
def test_damaged_folders_are_refused_in_one_line(folder: Path, damage, message: str) -> None:
    damage(folder)
    with pytest.raises(UserError, match=message) as caught:
        HFFolder(folder)
    assert "\n" not in str(caught.value)


def test_legacy_keys_are_understood(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    wanted = shape_from_config(config, "config.json")
    legacy = {key: value for key, value in config.items() if key not in ("rope_parameters", "head_dim")}
    legacy |= {"rope_percent": 0.5, "rope_theta": 10000.0, "kv_channels": 12, "rope_scaling": None}
    assert shape_from_config(legacy, "config.json") == wanted


@pytest.mark.parametrize("max_shard_bytes", [2**30, 20_000])
def test_written_folders_open_in_transformers(
    tiny_models: dict[str, Path], tmp_path: Path, max_shard_bytes: int
) -> None:
    source = HFFolder(tiny_models["llama"])
    tensors = ((name, source.read(name)) for name in source.sizes)
    write_folder(tmp_path, student_config(source.config, source.shape), tensors, None, max_shard_bytes)
    sharded = (tmp_path / "model.safetensors.index.json").exists()
    assert sharded == (max_shard_bytes < 2**30)
    opened = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    for name in source.sizes:
        assert torch.equal(opened[name], source.read(name)), name
    assert HFFolder(tmp_path).sizes == source.sizes


def test_tensors_beside_the_models_may_be_of_any_type(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    save_file(tensors | {"steps": torch.tensor([1])}, folder / "model.safetensors", metadata={"format": "pt"})
    assert torch.equal(RowReader(HFFolder(folder)).read("model.norm.weight"), tensors["model.norm.weight"])


def test_reading_rows_and_columns(tiny_models: dict[str, Path]) -> None:
    source = HFFolder(tiny_models["nemotron"])
    name = "model.layers.1.mlp.up_proj.weight"
    whole = source.read(name)
    assert torch.equal(source.read(name, 0, 8, 24), whole[8:24])
    assert torch.equal(source.read(name, 1, 8, 24), whole[:, 8:24])


def test_fingerprint_sees_a_changed_weight(folder: Path) -> None:
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    source = HFFolder(folder)
    tensors = {name: source.read(name).clone() for name in source.sizes}
    tensors["model.layers.2.mlp.down_proj.weight"][0, 0] += 1e-3
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    assert fingerprint(folder) != before


def test_fingerprint_sees_new_rows_and_another_end_of_documents(folder: Path) -> None:
    """Both decide tokens and scores: rows of added tokens at a vocabulary's end, and the tokenizer's settings."""
    tensors = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.zeros(4096, 64)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    before = fingerprint(folder)
    tensors["lm_head.weight"][-100:] = 1.0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    changed = fingerprint(folder)
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<end>"}')
    assert len({before, changed, fingerprint(folder)}) == 3


def test_student_config_keeps_what_it_does_not_change(tiny_models: dict[str, Path]) -> None:
    source = HFFolder(tiny_models["llama"])
    config = student_config(source.config, source.shape.smaller(hidden_size=32), torch.bfloat16)
    assert config["hidden_size"] == 32
    assert config["head_dim"] == 12
    assert config["dtype"] == "bfloat16"
    assert config["bos_token_id"] == 1
    assert shape_from_config(config, "x") == source.shape.smaller(hidden_size=32)


def test_write_folder_copies_the_tokenizer(tiny_models: dict[str, Path], tmp_path: Path) -> None:
    source = HFFolder(tiny_models["llama"])
    (tmp_path / "from").mkdir()
    (tmp_path / "from" / "tokenizer.json").write_text("{}")
    (tmp_path / "to").mkdir()
    tensors = ((name, source.read(name)) for name in source.sizes)
    write_folder(tmp_path / "to", source.config, tensors, tokenizer=tmp_path / "from")
    assert (tmp_path / "to" / "tokenizer.json").exists()
