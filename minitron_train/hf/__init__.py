"""Hugging Face folders: config.json, (sharded) safetensors, tokenizer files. The only place that knows their layout."""

from minitron_train.hf.config import portable_tokenizer_config, read_json, shape_from_config, student_config
from minitron_train.hf.folder import (
    DTYPES,
    MAX_SHARD_BYTES,
    TOKENIZER_FILES,
    copy_tokenizer,
    fingerprint,
    in_shards,
    shard_names,
    write_folder,
    write_index,
)
from minitron_train.hf.weights import INDEX, SINGLE, STORED_DTYPES, Checkpoint, read_header

__all__ = [
    "DTYPES",
    "INDEX",
    "MAX_SHARD_BYTES",
    "SINGLE",
    "STORED_DTYPES",
    "TOKENIZER_FILES",
    "Checkpoint",
    "copy_tokenizer",
    "fingerprint",
    "in_shards",
    "portable_tokenizer_config",
    "read_header",
    "read_json",
    "shape_from_config",
    "shard_names",
    "student_config",
    "write_folder",
    "write_index",
]
