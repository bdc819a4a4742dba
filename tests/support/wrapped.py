"""Tiny random vision-language models, made by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText

TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "vocab_size": 128,
    "num_hidden_layers": 3,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
IDS = {"image_token_id": 120, "video_token_id": 121, "vision_start_token_id": 122, "vision_end_token_id": 123}
QWEN_VISION = {"hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "out_hidden_size": 64, "patch_size": 4}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "patch_size": 4, "image_size": 8}
CONFIGS: dict[str, dict[str, Any]] = {
    "llava": {
        "text_config": {"model_type": "llama", **TEXT},
        "vision_config": {"model_type": "clip_vision_model", "num_hidden_layers": 2, "vocab_size": 128, **VISION},
        "image_token_index": 120,
    },
    "mistral3": {
        "text_config": {"model_type": "mistral", "head_dim": 12, "sliding_window": None, **TEXT},
        "vision_config": {"model_type": "pixtral", "num_hidden_layers": 1, "head_dim": 16, **VISION},
        "image_token_index": 120,
        "tie_word_embeddings": False,
    },
    "qwen2_5_vl": {
        "text_config": {
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
            **TEXT,
        },
        "vision_config": {"depth": 1, "fullatt_block_indexes": [0], "window_size": 16, **QWEN_VISION},
        **IDS,
    },
    "qwen3_vl": {
        "text_config": {
            "rope_parameters": {"rope_theta": 1e6, "mrope_section": [2, 2, 2], "mrope_interleaved": True},
            "head_dim": 12,
            **TEXT,
        },
        "vision_config": {"depth": 2, "num_position_embeddings": 16, "deepstack_visual_indexes": [0], **QWEN_VISION},
        "tie_word_embeddings": True,
        **IDS,
    },
}


def save_wrapped(name: str, folder: Path, seed: int = 0, **text: Any) -> Path:
    """Write a model in which every parameter is random; `text` changes its text_config."""
    config = CONFIGS[name] | {"text_config": CONFIGS[name]["text_config"] | text}
    if "out_hidden_size" in config["vision_config"]:
        config["vision_config"] = config["vision_config"] | {"out_hidden_size": config["text_config"]["hidden_size"]}
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(name, **config))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    model.to(torch.float32).save_pretrained(folder)
    return folder


def wrapped_logits(folder: Path, tokens_BS: torch.Tensor) -> torch.Tensor:
    """transformers' logits [B, S, V] of text."""
    loaded: Any = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    model, report = loaded
    assert not any(report.values()), report
    with torch.no_grad():
        return model.eval()(tokens_BS).logits
