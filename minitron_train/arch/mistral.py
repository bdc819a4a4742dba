"""Mistral (arXiv 2310.06825; Mistral NeMo): Llama's tensors, and heads that need not divide the hidden size."""

from dataclasses import replace

from minitron_train.arch.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    name="mistral",
    hf_class="MistralForCausalLM",
    config_facts={"hidden_act": "silu", "sliding_window": None},
    config_defaults={"sliding_window": 4096},
    rules=(),
)
