"""The start of a teacher trained from scratch: a tokenizer trained on the corpus, and random weights."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from minitron_train.arch import Shape, architecture
from minitron_train.arch.convert import stored
from minitron_train.arch.init import RandomWeights
from minitron_train.config import Config, DataConfig
from minitron_train.data import tokenizers
from minitron_train.data.hub import HubSource
from minitron_train.data.indexed import IndexedSource
from minitron_train.data.sources import parts, train_split
from minitron_train.data.units import permutation
from minitron_train.hf import student_config, write_folder
from minitron_train.hf.layers import written_layers
from minitron_train.hf.rope import written_rope
from minitron_train.runtime.errors import UserError

TOKENIZER_CHARACTERS = 8_000_000  # enough text for the merges of a small vocabulary


def write_initial(config: Config, shape: Shape, folder: Path) -> Mapping[str, Any]:
    """Write a Hugging Face folder with a tokenizer of `shape.vocab_size` entries and random weights in fp32.

    Returns:
        Facts for the provenance.

    Raises:
        UserError: the corpus is too small for the vocabulary.
    """
    tokenizer = tokenizers.train_bpe(corpus_sample(config.data, config.seed), shape.vocab_size)
    tokenizers.save(tokenizer, folder, shape.max_position_embeddings)
    table, weights = architecture(shape.architecture), RandomWeights(shape, config.model.init_std, config.seed)

    def tensors() -> Iterator[tuple[str, Any]]:
        for name in table.tensors(shape):
            yield name, weights.read(name)

    bos, eos = tokenizer.token_to_id(tokenizers.BOS), tokenizer.token_to_id(tokenizers.EOS)
    written = stored(table, shape, tensors())
    write_folder(folder, fresh_config(shape, bos, eos, config.model.init_std), written, tokenizer=None)
    return {"parameters": sum(table.parameters(shape).values()), "vocab_size": shape.vocab_size}


def corpus_sample(data: DataConfig, seed: int) -> Iterator[str]:
    """Yield about TOKENIZER_CHARACTERS of training text, from random blocks of each source, in proportion to its weight."""
    found, split = parts(data), train_split(data)
    total = sum(part.weights[0] for part in found)
    for part in found:
        source = part.open(split)
        if isinstance(source, IndexedSource | HubSource):
            raise UserError(
                f"data source {part.name}: a tokenizer can be trained only on text files; use text, JSONL or Parquet"
            )
        num_wanted = TOKENIZER_CHARACTERS * part.weights[0] / total
        for block in permutation(source.num_blocks, seed):
            if num_wanted <= 0:
                break
            for passages in source.read(int(block)):
                for text in split.documents(passages):
                    num_wanted -= len(text)
                    yield text


def fresh_config(shape: Shape, bos_token_id: int | None, eos_token_id: int | None, init_std: float) -> dict[str, Any]:
    """Return the config.json of a new model, made by transformers' own config class.

    Raises:
        UserError: rotary_percent below 1 for a family whose heads transformers always rotates completely.
    """
    table, (rope,) = architecture(shape.architecture), shape.ropes
    if table.local_rope is not None:
        raise UserError(
            f"model.architecture={table.name}: has two rotary embeddings, and section model names one; choose another"
        )
    if rope.percent != 1.0 and not table.partial_rotary:
        raise UserError(
            f"model.rotary_percent={rope.percent:g}: transformers always rotates all channels of a "
            f"{shape.architecture} head; remove it"
        )
    sizes = {key: getattr(shape, field) for field, key in table.config_keys.items()}
    settings = written_layers(sizes, table, shape.layer_kinds)
    made = AutoConfig.for_model(
        shape.architecture,
        **sizes | settings,
        **{key: supported[0] for key, supported in table.config_facts.items()},
        rope_parameters=written_rope(rope, table, {})["rope_parameters"],
        bos_token_id=bos_token_id,
        eos_token_id=eos_token_id,
        pad_token_id=None,
        initializer_range=init_std,
        dtype="float32",
        architectures=[table.hf_class],
    )
    return student_config(made.to_dict(), shape)  # also readable by transformers 4


def pretrain_config(config: Config) -> Config:
    """Return the training configuration of the teacher, with the `pretrain` section's tokens and learning rates."""
    names = ("num_tokens", "lr", "min_lr")
    train = dataclasses.replace(config.train, **{name: getattr(config.pretrain, name) for name in names})
    if config.model.num_moe_experts:
        train = dataclasses.replace(train, router_aux_loss=config.pretrain.router_aux_loss)
    checkpoint = dataclasses.replace(config.checkpoint, best_metric=None)  # the setting is for the student
    return dataclasses.replace(config, train=train, checkpoint=checkpoint)
