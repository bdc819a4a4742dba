"""Vision-language models around a text model of a supported family: what is pruned is the text model alone."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from minitron_train.arch.llama import LLAMA_KEYS
from minitron_train.arch.llama_likes import heads_fill_hidden
from minitron_train.arch.qwen import QWEN2, QWEN3
from minitron_train.arch.table import Windows


@dataclass(frozen=True, kw_only=True, slots=True)
class Wrapper:
    """One class of transformers that holds a text model, a vision model and a projector between them."""

    name: str  # Hugging Face model_type
    hf_class: str
    models: str
    texts: Mapping[str, str]  # model_type of text_config -> family; the first is the default
    prefix: str  # of the text model's tensors, where the vision model's do not begin with "model."
    output: str  # stored name of the output layer, in the same case
    writers: re.Pattern[str]  # tensors outside the text model, with a row for each channel of its stream
    hidden_size: str | None = None  # why the hidden size cannot be cut; None: it can, see `writers`
    writers_key: str | None = None  # key of vision_config with their number of rows
    tied: bool = False  # default of the outer tie_word_embeddings
    text_ties: bool = True  # whether text_config can tie the embeddings too
    flat: bool = False  # whether the keys of text_config may stand at the top level
    text_defaults: Mapping[str, Any] = field(default_factory=dict)  # of keys without which no model can be read


QWEN2_5_VL_TEXT = replace(
    QWEN2,
    name="qwen2_5_vl_text",
    hf_class="Qwen2_5_VLTextModel",
    models="text part of Qwen2.5-VL",
    config_keys={field: key for field, key in LLAMA_KEYS.items() if field != "kv_channels"},  # hidden / heads, always
    config_defaults={
        **{key: value for key, value in QWEN2.config_defaults.items() if key != "head_dim"},
        "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5,
        "max_window_layers": 80,
    },
    config_nullable=QWEN2.config_nullable | {"use_sliding_window", "max_window_layers"},
    rope_theta=1_000_000.0,
    rules=(heads_fill_hidden,),
)
QWEN3_VL_TEXT = replace(
    QWEN3,
    name="qwen3_vl_text",
    hf_class="Qwen3VLTextModel",
    models="text part of Qwen3-VL",
    config_defaults={
        "num_key_value_heads": 32,
        "head_dim": 128,
        "attention_bias": False,
        "tie_word_embeddings": False,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 128_000,
    },
    config_read=QWEN3.config_read - {"use_sliding_window", "sliding_window", "max_window_layers"},
    config_nullable=frozenset({"num_key_value_heads"}),
    rope_theta=500_000.0,
    windows=Windows(),
)
TEXTS = (QWEN2_5_VL_TEXT, QWEN3_VL_TEXT)  # families that stand inside a wrapper only
PROJECTOR = (
    "transformers' class gives both linears of multi_modal_projector this width, and a text says nothing about which neurons "
    "between them matter"
)
PROJECTOR_OUTPUT = re.compile(r"(^|\.)multi_modal_projector\.linear_2\.(weight|bias)$")
LLAVA = Wrapper(
    name="llava",
    hf_class="LlavaForConditionalGeneration",
    models="LLaVA 1.5",
    texts={"llama": "llama", "mistral": "mistral", "qwen2": "qwen2"},
    prefix="language_model.model.",
    output="language_model.lm_head.weight",
    writers=PROJECTOR_OUTPUT,
    hidden_size=PROJECTOR,
    text_defaults={  # LlamaConfig's, on which LLaVA 1.5's own config.json relies
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
    },
)
MISTRAL3 = Wrapper(
    name="mistral3",
    hf_class="Mistral3ForConditionalGeneration",
    models="Mistral Small 3.1 and 3.2",
    texts={"mistral": "mistral"},
    prefix="language_model.model.",
    output="language_model.lm_head.weight",
    writers=PROJECTOR_OUTPUT,
    hidden_size=PROJECTOR,
    tied=True,
    text_ties=False,
)
QWEN2_5_VL = Wrapper(
    name="qwen2_5_vl",
    hf_class="Qwen2_5_VLForConditionalGeneration",
    models="Qwen2.5-VL",
    texts={"qwen2_5_vl_text": "qwen2_5_vl_text"},
    prefix="model.",
    output="lm_head.weight",
    writers=re.compile(r"(^|\.)visual\.merger\.mlp\.2\.(weight|bias)$"),
    writers_key="out_hidden_size",
    flat=True,
)
QWEN3_VL = Wrapper(
    name="qwen3_vl",
    hf_class="Qwen3VLForConditionalGeneration",
    models="Qwen3-VL (dense)",
    texts={"qwen3_vl_text": "qwen3_vl_text"},
    prefix="model.language_model.",
    output="lm_head.weight",
    writers=re.compile(r"(^|\.)visual\.(merger|deepstack_merger_list\.\d+)\.linear_fc2\.(weight|bias)$"),
    writers_key="out_hidden_size",
    text_ties=False,
)
WRAPPERS = {wrapper.name: wrapper for wrapper in (LLAVA, MISTRAL3, QWEN2_5_VL, QWEN3_VL)}
