"""Reads and writes Hugging Face folders: config.json, (sharded) safetensors, tokenizer files."""

from minitron_train.hf.around import read_rest, values, with_rest, write_rest
from minitron_train.hf.config import portable_tokenizer_config, read_json, shape_from_config, student_config
from minitron_train.hf.dtypes import DTYPES, STORED_DTYPES, cast, named_dtype
from minitron_train.hf.folder import (
    MAX_SHARD_BYTES,
    copy_tokenizer,
    fingerprint,
    in_shards,
    shard_names,
    write_folder,
    write_index,
)
from minitron_train.hf.headers import read_header
from minitron_train.hf.locate import INDEX, LICENCE_FILES, SINGLE, TOKENIZER_FILES, weight_bytes
from minitron_train.hf.rows import RowReader, runs
from minitron_train.hf.weights import HFFolder, folder_shape
from minitron_train.hf.wrapped import auto_class, wrapper_of

__all__ = [
    "DTYPES",
    "INDEX",
    "LICENCE_FILES",
    "MAX_SHARD_BYTES",
    "SINGLE",
    "STORED_DTYPES",
    "TOKENIZER_FILES",
    "HFFolder",
    "RowReader",
    "auto_class",
    "cast",
    "copy_tokenizer",
    "fingerprint",
    "folder_shape",
    "in_shards",
    "named_dtype",
    "portable_tokenizer_config",
    "read_header",
    "read_json",
    "read_rest",
    "runs",
    "shape_from_config",
    "shard_names",
    "student_config",
    "values",
    "weight_bytes",
    "with_rest",
    "wrapper_of",
    "write_folder",
    "write_index",
    "write_rest",
]
