"""Mistakes in a model folder: weights, config.json, tokenizer."""

import json

import torch

from tests.bad_input.scene import (
    MICRO,
    TAUGHT,
    TEACHER,
    WEIGHTS,
    Case,
    cut_off,
    edit,
    flip,
    folder,
    narrow_vocabulary,
    remove,
    shard,
    tensors,
    without_tensor,
    write,
)

TEXT = {
    "model_type": "llama",
    "vocab_size": 128,
    "num_hidden_layers": 2,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
}
MODELS = [
    Case(
        "weights cut off",
        f"prune {MICRO}",
        "model.safetensors: .* bytes, its header promises",
        (*TAUGHT, cut_off(WEIGHTS)),
    ),
    Case(
        "weights that are something else",
        f"prune {MICRO}",
        "not a safetensors file",
        (*TAUGHT, write(WEIGHTS, "<html>")),
    ),
    Case("weights of no bytes", f"prune {MICRO}", "not a safetensors file", (*TAUGHT, write(WEIGHTS, ""))),
    Case("header corrupt", f"prune {MICRO}", "header is corrupt", (*TAUGHT, flip(WEIGHTS, 8))),
    Case("weights missing", f"prune {MICRO}", "holds neither model.safetensors", (*TAUGHT, remove(WEIGHTS))),
    Case(
        "weights as pickles alone",
        f"prune {MICRO}",
        "convert it with save_pretrained",
        (*TAUGHT, remove(WEIGHTS), write(f"{TEACHER}/pytorch_model.bin", "x")),
    ),
    Case(
        "a tensor missing",
        f"prune {MICRO}",
        "tensor model.norm.weight is missing",
        (*TAUGHT, without_tensor("model.norm.weight")),
    ),
    Case(
        "a shard missing",
        f"prune {MICRO}",
        "shard model-00002-of-00002.safetensors is missing",
        (*TAUGHT, shard, remove(f"{TEACHER}/model-00002-of-00002.safetensors")),
    ),
    Case(
        "a shard cut off",
        f"prune {MICRO}",
        "00002.*header promises",
        (*TAUGHT, shard, cut_off(f"{TEACHER}/model-00002*")),
    ),
    Case(
        "index that is no JSON",
        f"prune {MICRO}",
        "index.json: damaged",
        (*TAUGHT, shard, cut_off(f"{TEACHER}/*.index.json")),
    ),
    Case(
        "index without its map",
        f"prune {MICRO}",
        "no weight_map from tensors to files; download it again",
        (*TAUGHT, shard, write(f"{TEACHER}/model.safetensors.index.json", "{}")),
    ),
    Case(
        "config missing",
        f"prune {MICRO} teacher.path={TEACHER}",
        "config.json: no such file",
        (*TAUGHT, remove(f"{TEACHER}/config.json")),
    ),
    Case(
        "config that is no JSON",
        f"prune {MICRO}",
        "config.json: damaged",
        (*TAUGHT, cut_off(f"{TEACHER}/config.json")),
    ),
    Case(
        "config that is a list",
        f"prune {MICRO}",
        "config.json: damaged .*Expected `object`, got `array`",
        (*TAUGHT, write(f"{TEACHER}/config.json", "[]")),
    ),
    Case(
        "config without a key",
        f"prune {MICRO}",
        "'intermediate_size' is missing",
        (*TAUGHT, edit(f"{TEACHER}/config.json", intermediate_size=None)),
    ),
    Case(
        "config with a word for a number",
        f"prune {MICRO}",
        "hidden_size",
        (*TAUGHT, edit(f"{TEACHER}/config.json", hidden_size="wide")),
    ),
    Case(
        "config of another model",
        f"prune {MICRO}",
        "the folder mixes two models",
        (*TAUGHT, edit(f"{TEACHER}/config.json", intermediate_size=320)),
    ),
    Case(
        "architecture that is not supported",
        f"prune {MICRO}",
        "model_type 'gpt2' is not supported",
        (*TAUGHT, edit(f"{TEACHER}/config.json", model_type="gpt2")),
    ),
    Case(
        "biases that config.json names and the folder lacks",
        f"prune {MICRO}",
        "self_attn.q_proj.bias is missing",
        (*TAUGHT, edit(f"{TEACHER}/config.json", attention_bias=True)),
    ),
    Case(
        "projector of another width than the text model",
        f"score {MICRO} teacher.path=seeing",
        "linear_2.weight has 40 rows, but llava adds its output to a stream of 64 channels",
        (
            folder("seeing"),
            write("seeing/config.json", json.dumps({"model_type": "llava", "text_config": TEXT})),
            tensors("seeing/model.safetensors", **{"multi_modal_projector.linear_2.weight": torch.zeros(40, 64)}),
        ),
        quick=True,
    ),
    Case("no tokenizer", f"prune {MICRO}", "no tokenizer", (*TAUGHT, remove(f"{TEACHER}/tokenizer.json"))),
    Case(
        "tokenizer corrupt",
        f"prune {MICRO}",
        "tokenizer cannot be opened",
        (*TAUGHT, cut_off(f"{TEACHER}/tokenizer.json")),
    ),
    Case(
        "tokenizer of another model",
        f"score {MICRO} teacher.path=small",
        "the model's embedding has 512 rows",
        (*TAUGHT, narrow_vocabulary),
    ),
    Case(
        "student of another vocabulary",
        f"distill {MICRO} student.path=small",
        "embedding has 512 rows",
        (*TAUGHT, narrow_vocabulary),
    ),
]
