"""Two rotary embeddings in one config.json, read as transformers reads them and written for a student."""

from typing import Any

import pytest
import torch
from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
from transformers.models.olmo3.modeling_olmo3 import Olmo3RotaryEmbedding

from minitron_train.hf import shape_from_config, student_config
from minitron_train.model.rotary import frequencies
from minitron_train.runtime.errors import UserError
from tests.unit.test_hf_config import LLAMA3, config_of, theirs

ROTARY = {"gemma3_text": Gemma3RotaryEmbedding, "olmo3": Olmo3RotaryEmbedding}
SCALED = {**LLAMA3, "original_max_position_embeddings": 64}
NESTED = {
    "full_attention": {"rope_type": "default", "rope_theta": 3e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 2e4},
}
ROPES: dict[str, dict[str, Any]] = {
    "nothing": {},
    "top level": {"rope_theta": 7e5, "rope_local_base_freq": 3e4},
    "scaling": {"rope_theta": 7e5, "rope_local_base_freq": 3e4, "rope_scaling": SCALED},
    "nested": {"rope_parameters": NESTED},
    "half of it nested": {"rope_theta": 7e5, "rope_parameters": {"sliding_attention": NESTED["sliding_attention"]}},
}


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("family", ROTARY)
def test_both_ropes_are_transformers(family: str, name: str) -> None:
    """Also after one more reading of what a student's config.json says."""
    config = config_of(family, sliding_window=8, num_hidden_layers=6, **ROPES[name])
    wanted = ROTARY[family](theirs(config))
    shape = shape_from_config(config, "config.json")
    sliding, full = shape.layer_kinds[0], shape.layer_kinds[{"gemma3_text": 5, "olmo3": 3}[family]]
    assert (sliding.window, full.window) == (8, None)
    student = student_config(config, shape)
    for rotary in (wanted, ROTARY[family](theirs(student))):
        for name, rope in (("sliding_attention", sliding.rope), ("full_attention", full.rope)):
            assert rope is not None
            found = frequencies(rope, shape.kv_channels, torch.device("cpu"))
            torch.testing.assert_close(found, getattr(rotary, f"{name}_inv_freq"), rtol=1e-6, atol=0)
    assert shape_from_config(student, "config.json") == shape


def test_a_rope_for_all_layers_is_refused() -> None:
    config = config_of("gemma3_text", rope_parameters={"rope_type": "default", "rope_theta": 1e6})
    with pytest.raises(
        UserError, match="gemma3_text needs one object for full_attention and one for sliding_attention"
    ):
        shape_from_config(config, "config.json")
    with pytest.raises(UserError, match="rope_scaling=8 is not an object"):
        shape_from_config(config_of("olmo3", rope_scaling=8), "config.json")
    with pytest.raises(UserError, match="sliding_window_pattern=0: must be a whole number from 1"):
        shape_from_config(config_of("gemma3_text", sliding_window_pattern=0), "config.json")


def test_a_key_that_transformers_ignores_is_refused() -> None:
    yarn = {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64, "truncate": False}
    with pytest.raises(UserError, match="truncate=False: transformers ignores it"):
        shape_from_config(config_of("olmo3", rope_scaling=yarn), "config.json")
