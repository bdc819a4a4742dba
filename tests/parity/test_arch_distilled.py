"""Distillation and export of families with names, norms or rotary embeddings of their own."""

import pytest
import torch
from safetensors.torch import load_file

from minitron_train import hf
from minitron_train.config import ParallelConfig
from minitron_train.hf.around import text_name
from minitron_train.hf.config import UNTRUE_KEYS
from minitron_train.parallel.groups import start
from minitron_train.runtime.launch import read_world
from tests.support.families import TABLES, save_family, save_layered
from tests.support.models import COMMON, EXPERTS, hf_logits, opened, save_random
from tests.support.pruning import random_tokens
from tests.support.training import ROWS, SEQ_LENGTH, make_material, run, student_of
from tests.support.wrapped import CONFIGS, save_wrapped, wrapped_logits

TOKENS = random_tokens()
DISTILLED = ("mistral", "qwen2", "smollm3 with windows", "ministral", "ministral3 with a window", "cwm")
OTHERS = {
    "qwen3": {},
    "qwen2_moe": {"shared_expert_intermediate_size": 40},
    "mixtral": {"intermediate_size": 24},
    "olmoe": {"intermediate_size": 24, "head_dim": 8},
}


def save_other(name, folder, seed=0, **changes):
    """Write a tiny random model of one of OTHERS. Dense families ignore the settings of experts."""
    return save_random(COMMON | EXPERTS | {"model_type": name} | changes | OTHERS[name], folder, seed)


@pytest.mark.parametrize("family", [*TABLES, *DISTILLED, *OTHERS])
def test_a_distilled_student_opens_in_transformers(tmp_path, family):
    """After three steps and an export: tensors and keys of the student's folder, and the logits that this program computes."""
    save = save_layered if family in DISTILLED else save_other if family in OTHERS else save_family
    material = make_material(tmp_path, family, save)
    run(material, tmp_path / "run", train__num_tokens=3 * ROWS * SEQ_LENGTH, train__warmup_steps=1)
    student_of(tmp_path / "run", tmp_path / "exported")
    before, after = (load_file(folder / "model.safetensors") for folder in (material.student, tmp_path / "exported"))
    assert set(after) == set(before)
    given, written = (hf.HFFolder(folder).config for folder in (material.student, tmp_path / "exported"))
    kept = given.keys() - UNTRUE_KEYS
    assert {key: written.get(key) for key in kept} == {key: given[key] for key in kept}
    assert not torch.equal(after["model.norm.weight"], before["model.norm.weight"])
    with start(ParallelConfig(), read_world(), seed=1):
        model = opened(tmp_path / "exported")[1]
        with torch.no_grad():
            logits = model.logits(model(TOKENS[0])).transpose(0, 1)
    torch.testing.assert_close(logits, hf_logits(tmp_path / "exported", TOKENS[0]), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_distilled_text_model_keeps_the_vision_model(tmp_path, name):
    """Bit for bit, from the student's folder through a training to the export; the text model is the trained one."""
    material = make_material(tmp_path, name, save_wrapped)
    run(material, tmp_path / "run", train__num_tokens=2 * ROWS * SEQ_LENGTH, train__warmup_steps=1)
    student_of(tmp_path / "run", tmp_path / "exported")
    before, after = (load_file(folder / "model.safetensors") for folder in (material.student, tmp_path / "exported"))
    assert set(after) == set(before)
    for key, tensor in before.items():
        assert torch.equal(after[key], tensor) == (text_name(key) is None), key
    with start(ParallelConfig(), read_world(), seed=1):
        model = opened(tmp_path / "exported")[1]
        with torch.no_grad():
            logits = model.logits(model(TOKENS[0] % 120)).transpose(0, 1)
    wanted = wrapped_logits(tmp_path / "exported", TOKENS[0] % 120)
    torch.testing.assert_close(logits, wanted, rtol=0, atol=1e-4)
