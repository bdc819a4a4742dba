"""The table of families, and the refusal of others with the nearest family's name."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from minitron_train.arch import ARCHITECTURES
from minitron_train.arch.families import BEYOND, HEADER, families_table
from minitron_train.arch.wrappers import TEXTS, WRAPPERS
from minitron_train.hf import HFFolder, shape_from_config
from minitron_train.hf.around import text_name
from minitron_train.planning.counts import parameters
from minitron_train.runtime.errors import UserError
from tests.support.families import TABLES, save_family
from tests.support.models import save_tiny

README = Path(__file__).parents[2] / "README.md"


def test_the_readme_holds_the_table() -> None:
    table = families_table()
    assert table in README.read_text(), f"README.md must hold what `python -m minitron_train families` prints:\n{table}"
    assert len(table.splitlines()) == 2 + len(ARCHITECTURES) - len(TEXTS) + len(WRAPPERS)
    assert {line.count("|") for line in table.splitlines()} == {len(HEADER) + 1}


def test_every_family_names_its_models() -> None:
    assert len({table.models for table in ARCHITECTURES.values()}) == len(ARCHITECTURES)
    assert all(table.models for table in ARCHITECTURES.values())


UNUSABLE = ("nemotron", "ministral")  # transformers' own model cannot be made from its default config
ALONE = [name for name, table in ARCHITECTURES.items() if table not in TEXTS]
COUNTED = [name for name in (*ALONE, *WRAPPERS) if name not in UNUSABLE]


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_transformers_default_model(name: str) -> None:
    """Without weights. Only the text model of a vision-language model counts."""
    config, loader = (
        AutoConfig.for_model(name),
        AutoModelForImageTextToText if name in WRAPPERS else AutoModelForCausalLM,
    )
    with torch.device("meta"):
        parts = loader.from_config(config).named_parameters()
    total = sum(tensor.numel() for part, tensor in parts if name not in WRAPPERS or text_name(part))
    assert parameters(shape_from_config(config.to_dict(), "config.json"))["parameters"] == total


def test_sizes_that_a_loader_accepts_together_only_are_named_so() -> None:
    rows = {line.split("`")[1]: line for line in families_table().splitlines()[2:]}
    assert "layers, MLP, KV groups; hidden size and heads together" in rows["helium"]
    assert "| layers, MLP, heads, KV groups | no |" in rows["llava"] and "| all | yes |" in rows["qwen3_vl"]
    assert "| layers, MLP, KV groups; hidden size and heads together | yes |" in rows["qwen2_5_vl"]
    assert "| all |" in rows["phi3"] and "| where untied |" in rows["stablelm"]


@pytest.mark.parametrize("name", BEYOND)
def test_what_is_beyond_the_tables_is_refused_with_the_reason_and_the_nearest_family(name: str) -> None:
    why, nearest = BEYOND[name]
    assert name in CONFIG_MAPPING and name not in ARCHITECTURES and nearest in ARCHITECTURES
    with pytest.raises(
        UserError, match=f"model_type '{name}' is not supported .*the nearest supported family is"
    ) as caught:
        shape_from_config({"model_type": name}, "config.json")
    assert why in str(caught.value) and "\n" not in str(caught.value)


def renamed(folder: Path) -> Path:
    """The folder with a model_type that has no table."""
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "someones_own"}))
    return folder


@pytest.mark.parametrize(
    "family", ["llama", "llama_untied", "nemotron", *(name for name in TABLES if name != "helium")]
)
def test_another_family_with_the_same_tensors_names_the_nearest(tmp_path: Path, family: str) -> None:
    save = save_family if family in TABLES else save_tiny
    folder = renamed(save(family, tmp_path))
    with pytest.raises(UserError, match="model_type 'someones_own' is not supported") as caught:
        HFFolder(folder)
    near = str(caught.value).partition("set model_type=")[2].split(" ")[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": near}))
    assert not HFFolder(folder).unexpected
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_a_tensor_more_or_of_another_size_is_another_family(tmp_path: Path) -> None:
    folder = renamed(save_tiny("llama", tmp_path))
    tensors = load_file(folder / "model.safetensors")
    norm = tensors["model.norm.weight"]
    for changed in ({"model.layers.0.extra.weight": norm.clone()}, {"model.norm.weight": norm[:-1].contiguous()}):
        save_file(tensors | changed, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=r"lists the supported ones$"):
            HFFolder(folder)
