"""GGUF -> Hugging Face: the weights bit for bit, the tokenizer as trained, no trace of the GGUF."""

import json

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minitron_train.errors import UserError
from minitron_train.fetch.gguf import convert_gguf

NUM_HEADS, NUM_GROUPS, HEAD_SIZE = 4, 2, 4
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "model.layers.": "blk.",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "input_layernorm": "attn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_cpp_order(weight: torch.Tensor, num_heads: int) -> torch.Tensor:
    """llama.cpp rotates neighbouring channels where Hugging Face rotates halves: [heads, 2, half, in] -> [.., half, 2, ..]."""
    rows, columns = weight.shape
    return weight.view(num_heads, 2, rows // num_heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf(path, model, pre_tokenizer):
    """What llama.cpp's converter writes for a small Llama with a byte-level BPE tokenizer that knows 'Ġ Ġ' and '1 0'."""
    tokens = [*SPECIAL, *bytes_to_unicode().values(), "ĠĠ", "10"]
    config = model.config
    writer = GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_license("mit")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(NUM_HEADS)
    writer.add_head_count_kv(NUM_GROUPS)
    writer.add_rope_dimension_count(HEAD_SIZE)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer)
    writer.add_token_list(tokens)
    writer.add_token_types([TokenType.CONTROL] * len(SPECIAL) + [TokenType.NORMAL] * (len(tokens) - len(SPECIAL)))
    writer.add_token_merges(["Ġ Ġ", "1 0"])
    for add, index in ((writer.add_unk_token_id, 0), (writer.add_bos_token_id, 1), (writer.add_eos_token_id, 2)):
        add(index)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight":  # tied
            continue
        if "q_proj" in name or "k_proj" in name:
            weight = llama_cpp_order(weight, NUM_HEADS if "q_proj" in name else NUM_GROUPS)
        for theirs, ours in GGUF_NAMES.items():
            name = name.replace(theirs, ours)
        writer.add_tensor(name, weight.numpy().astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def model():
    """Random weights, tied embeddings, 261 tokens."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(SPECIAL) + 256 + 2,
        hidden_size=NUM_HEADS * HEAD_SIZE,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=NUM_HEADS,
        num_key_value_heads=NUM_GROUPS,
        max_position_embeddings=64,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


def test_weights_are_equal_and_the_gguf_is_forgotten(model, tmp_path, capsys):
    write_gguf(tmp_path / "model.gguf", model, "smollm")
    folder = tmp_path / "out"
    folder.mkdir()
    facts = convert_gguf(tmp_path / "model.gguf", folder)
    assert capsys.readouterr().err == "", "no progress bars away from a terminal"
    assert facts["model_name"] == "tiny" and facts["license"] == "mit"
    assert facts["tensor_types"] == {"F32": 2 * 9 + 2}
    reopened = AutoModelForCausalLM.from_pretrained(folder)
    for name, weight in model.state_dict().items():
        assert torch.equal(reopened.state_dict()[name], weight), name
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert config["rms_norm_eps"] == 1e-5


def test_digits_are_split_as_in_training(model, tmp_path):
    write_gguf(tmp_path / "model.gguf", model, "smollm")
    plain = AutoTokenizer.from_pretrained(tmp_path, gguf_file="model.gguf")
    assert plain.tokenize("x =  10") == ["x", "Ġ", "=", "Ġ", "Ġ", "10"], "what transformers makes of the GGUF alone"
    folder = tmp_path / "out"
    folder.mkdir()
    convert_gguf(tmp_path / "model.gguf", folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.tokenize("x =  10") == ["x", "Ġ", "=", "ĠĠ", "1", "0"]
    assert tokenizer.decode(tokenizer("x =  10").input_ids) == "x =  10"
    assert tokenizer.model_max_length == 64


def test_unknown_pre_tokenizer_is_refused(model, tmp_path):
    write_gguf(tmp_path / "model.gguf", model, "llama-bpe")
    with pytest.raises(UserError, match=r"tokenizer\.ggml\.pre=llama-bpe.*teacher\.path"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_not_a_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(UserError, match="not a GGUF file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)
