"""GGUF -> Hugging Face: the weights bit for bit, the tokenizer as trained, no trace of the GGUF."""

import contextlib
import json
import struct
import time

import numpy as np
import pytest
import torch
from gguf import GGUFWriter, TokenType
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM
from transformers.convert_slow_tokenizer import bytes_to_unicode

from minitron_train.fetch.gguf import convert_gguf, read_header
from minitron_train.runtime.errors import UserError

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


KEY = b"general.architecture"


def gguf(*, tensors: int = 0, keys: int = 0, body: bytes = b"", version: int = 3) -> bytes:
    """A GGUF file with such counts in its header."""
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + body + bytes(64)


def entry(kind: int, value: bytes, key: bytes = KEY) -> bytes:
    """One key with its value."""
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


STRING, ARRAY, UINT8 = 8, 9, 0
TENSOR = struct.pack("<Q", 1) + b"t"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"GGUF",
        b"GGUF" + bytes(8),
        gguf(version=99),
        gguf(tensors=2**63),
        gguf(keys=2**64 - 1),
        gguf(keys=1, body=struct.pack("<Q", 2**63)),
        gguf(keys=1, body=entry(STRING, struct.pack("<Q", 2**64 - 1))),
        gguf(keys=1, body=entry(ARRAY, struct.pack("<IQ", UINT8, 2**60))),
        gguf(keys=1, body=entry(ARRAY, struct.pack("<IQ", ARRAY, 2**40)) * 3),
        gguf(keys=1, body=entry(77, b"")),
        gguf(keys=1, body=entry(UINT8, b"x", key=b"\xff\xfe")),
        gguf(keys=2, body=entry(UINT8, b"x") * 2),
        gguf(keys=1, body=entry(STRING, struct.pack("<Q", 2) + b"\xff\xff")),
        gguf(keys=1, body=entry(STRING, struct.pack("<Q", 4) + b"gpt2")),
        gguf(tensors=1, body=TENSOR + struct.pack("<I", 2**31)),
        gguf(tensors=1, body=TENSOR + struct.pack("<IQQIQ", 2, 2**40, 2**40, 0, 0)),
        gguf(tensors=1, body=TENSOR + struct.pack("<IQIQ", 1, 4, 0, 2**62)),
        gguf(tensors=1, body=TENSOR + struct.pack("<IQIQ", 1, 4, 250, 0)),
        gguf(tensors=2, body=(TENSOR + struct.pack("<IQIQ", 1, 4, 0, 0)) * 2),
        gguf(keys=1, body=entry(4, struct.pack("<I", 0), key=b"general.alignment")),
    ],
)
def test_a_hostile_header_is_one_line_at_once(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    start_s = time.process_time()
    with pytest.raises(UserError, match=r"^model\.gguf: .*use another wheel$"):
        read_header(tmp_path / "model.gguf")
    assert time.process_time() - start_s < 1


def test_a_cut_or_flipped_file_is_one_line(model, tmp_path):
    """At every place of the header, and at the end of the tensors."""
    write_gguf(tmp_path / "model.gguf", model, "smollm")
    whole = (tmp_path / "model.gguf").read_bytes()
    path = tmp_path / "other.gguf"
    for end in [*range(0, 2000, 97), len(whole) - 65]:
        path.write_bytes(whole[:end])
        with pytest.raises(UserError, match="use another wheel"):
            read_header(path)
    for place in range(0, 2000, 41):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x81]) + whole[place + 1 :])
        with contextlib.suppress(UserError):
            read_header(path)


@pytest.mark.parametrize("key", ["block_count", "embedding_length", "feed_forward_length"])
def test_sizes_that_are_not_the_tensors_are_refused_before_a_model_is_made(model, tmp_path, key, monkeypatch):
    monkeypatch.setattr(GGUFWriter, f"add_{key}", lambda self, _: self.add_uint32(f"llama.{key}", 10**9))
    write_gguf(tmp_path / "model.gguf", model, "smollm")
    with pytest.raises(UserError, match=f"llama.{key}=1000000000, its tensors say"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)


def test_what_transformers_cannot_convert_is_one_line(model, tmp_path, monkeypatch):
    monkeypatch.setattr(GGUFWriter, "add_head_count", lambda self, _: self.add_uint32("llama.attention.head_count", 0))
    write_gguf(tmp_path / "model.gguf", model, "smollm")
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="transformers cannot convert it"):
        convert_gguf(tmp_path / "model.gguf", tmp_path / "out")


def test_not_a_gguf(tmp_path):
    (tmp_path / "model.gguf").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(UserError, match="not a readable GGUF file"):
        convert_gguf(tmp_path / "model.gguf", tmp_path)
