"""Model folders that are ambiguous, or that their config.json does not describe."""

from typing import Any

import torch

from tests.bad_input.scene import (
    MICRO,
    TAUGHT,
    TEACHER,
    WEIGHTS,
    Case,
    Step,
    change_tensors,
    copy,
    edit,
    fifo,
    folder,
    loop,
    remove,
    reorder_index,
    shard,
    write,
)

PRUNE = f"prune {MICRO}"
CONFIG = f"{TEACHER}/config.json"
TOKENIZER = f"{TEACHER}/tokenizer.json"
INDEX = f"{TEACHER}/model.safetensors.index.json"
SHARD_2 = f"{TEACHER}/model-00002-of-00002.safetensors"
NORM, HEAD, EMBEDDING = "model.norm.weight", "lm_head.weight", "model.embed_tokens.weight"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
DEEP = "[" * 100_000 + "]" * 100_000

FILES: list[tuple[str, str, tuple[Step, ...]]] = [
    (
        "shards beside a single file",
        "as well as model.safetensors",
        (copy(WEIGHTS, f"{TEACHER}/kept"), shard, copy(f"{TEACHER}/kept", WEIGHTS)),
    ),
    ("index that names another shard", "the index says", (shard, reorder_index)),
    (
        "index that names a file elsewhere",
        "no file of its folder",
        (shard, edit(INDEX, weight_map={NORM: "../x.safetensors"})),
    ),
    ("index nested too deeply", "damaged", (shard, write(INDEX, DEEP))),
    (
        "a tensor in two shards",
        "is stored twice|the index says",
        (shard, change_tensors(SHARD_2, lambda held: held | {HEAD: torch.zeros(1024, 96)})),
    ),
    (
        "LoRA adapter beside the weights",
        "belongs to a LoRA adapter",
        (write(f"{TEACHER}/adapter_config.json", "{}"), write(f"{TEACHER}/adapter_model.safetensors", "x")),
    ),
    ("pointer of Git LFS for weights", "is a Git LFS pointer", (write(WEIGHTS, POINTER),)),
    ("weights as GGUF alone", "holds GGUF files", (remove(WEIGHTS), write(f"{TEACHER}/model-q4.gguf", b"GGUF"))),
    (
        "weights that are quantised",
        "weights are quantised",
        (
            change_tensors(
                WEIGHTS,
                lambda held: {name.replace("proj.weight", "proj.qweight"): tensor for name, tensor in held.items()},
            ),
        ),
    ),
    (
        "weights of whole numbers",
        "int8|I8",
        (change_tensors(WEIGHTS, lambda held: held | {NORM: held[NORM].to(torch.int8)}),),
    ),
    (
        "weights without a head",
        "does not tie it to the embedding",
        (change_tensors(WEIGHTS, lambda held: {name: tensor for name, tensor in held.items() if name != HEAD}),),
    ),
    (
        "embedding with more rows than the vocabulary",
        "set vocab_size=1030",
        (change_tensors(WEIGHTS, lambda held: held | {name: torch.zeros(1030, 96) for name in (HEAD, EMBEDDING)}),),
    ),
    (
        "weights of a part of another model",
        "the model was saved inside another one",
        (change_tensors(WEIGHTS, lambda held: {f"language_model.{name}": tensor for name, tensor in held.items()}),),
    ),
    (
        "norm with a number that is none",
        "NaN or infinity, first seen at",
        (change_tensors(WEIGHTS, lambda held: held | {NORM: held[NORM] * float("nan")}),),
    ),
    ("weights that are a pipe", "is not a regular file", (remove(WEIGHTS), fifo(WEIGHTS))),
    ("weights that are a folder", "model.safetensors", (remove(WEIGHTS), folder(WEIGHTS))),
    ("config that is a pipe", "config.json", (remove(CONFIG), fifo(CONFIG))),
    ("config whose link leads to itself", "config.json", (remove(CONFIG), loop(CONFIG))),
    ("config nested too deeply", "config.json: damaged", (write(CONFIG, DEEP),)),
    ("config that is not UTF-8", "config.json: damaged", (write(CONFIG, b'{"a": "\xff"}'),)),
    ("config of no bytes", "config.json: damaged", (write(CONFIG, ""),)),
    ("tokenizer that is a list", "tokenizer", (write(TOKENIZER, "[]"),)),
    ("tokenizer that is a pipe", "tokenizer.json", (remove(TOKENIZER), fifo(TOKENIZER))),
    ("tokenizer that is a pointer of Git LFS", "tokenizer", (write(TOKENIZER, POINTER),)),
]

CONFIGS: list[tuple[str, str, dict[str, Any]]] = [
    (
        "attention that sees the future",
        "is_causal=false: only True is supported|is_causal=False: only",
        {"is_causal": False},
    ),
    ("settings of single layers", "per_layer_config", {"per_layer_config": {"0": {}}}),
    ("renamed settings", "attribute_map", {"attribute_map": {"hidden_size": "n_embd"}}),
    ("a billion layers", "at most 10,000", {"num_hidden_layers": 10**9}),
    ("more layers than are stored", "layers 0 to", {"num_hidden_layers": 5000}),
    ("width with a decimal point", "without a decimal point", {"hidden_size": 96.0}),
    ("negative width in config", "hidden_size", {"hidden_size": -96}),
    ("width of yes in config", "hidden_size", {"hidden_size": True}),
    (
        "rotary embedding of an unknown type",
        "is not supported for nemotron; supported",
        {"rope_parameters": {"rope_type": "axial", "factor": 2.0, "rope_theta": 1e4}},
    ),
    (
        "rotary base of zero",
        "rope_theta",
        {"rope_theta": 0, "rope_parameters": {"rope_type": "default", "rope_theta": 0}},
    ),
    ("activation that is not the model's", "hidden_act", {"hidden_act": "tanh"}),
    ("family of another model", "only .silu. or .swish. is supported for mixtral", {"model_type": "mixtral"}),
    ("no model type", "model_type", {"model_type": None}),
    ("switch that is a word", "transformers rejects it|use_cache", {"use_cache": "yes"}),
]

FOLDERS = [
    *(Case(name, PRUNE, says, (*TAUGHT, *prepare)) for name, says, prepare in FILES),
    *(Case(name, PRUNE, says, (*TAUGHT, edit(CONFIG, **changes))) for name, says, changes in CONFIGS),
    Case(
        "embedding of zeros",
        PRUNE,
        "prune.refit: the model's activations are NaN or infinite",
        (*TAUGHT, change_tensors(WEIGHTS, lambda held: held | {EMBEDDING: torch.zeros(1024, 96)})),
        finishes=("out/scores",),
    ),
]
