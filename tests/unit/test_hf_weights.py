"""Weights of Hugging Face folders: what is accepted is what transformers computes, what is refused has a true reason."""

import json
import os
import re
import shutil
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minitron_train.hf import HFFolder, RowReader, cast, copy_tokenizer, fingerprint, folder_shape, locate
from minitron_train.model.build import build
from minitron_train.model.load import load_weights
from minitron_train.runtime.errors import UserError
from tests.support.models import hf_logits
from tests.support.pruning import configuration, random_tokens, run_cut

TOKENS_BS = random_tokens()[0]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
SHARDS = [f"model-{k:05d}-of-00002.safetensors" for k in (1, 2)]
EMBEDDING, HEAD, DOWN = "model.embed_tokens.weight", "lm_head.weight", "model.layers.1.mlp.down_proj.weight"
Tensors = dict[str, Tensor]


@pytest.fixture
def make(tiny_models: dict[str, Path], tmp_path: Path) -> Callable[[str], Path]:
    """Copies a tiny model that a test may change."""
    return lambda name: Path(shutil.copytree(tiny_models[name], tmp_path / name))


def tensors_of(folder: Path) -> Tensors:
    return {name: tensor.clone() for name, tensor in load_file(folder / SINGLE).items()}


def write(folder: Path, tensors: Tensors, name: str = SINGLE) -> None:
    save_file({key: value.contiguous() for key, value in tensors.items()}, folder / name, metadata={"format": "pt"})


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | changes))


def rewrite(change: Callable[[Tensors], Tensors]) -> Callable[[Path], None]:
    """Replaces the tensors of model.safetensors."""
    return lambda folder: write(folder, change(tensors_of(folder)))


def renamed(rename: Callable[[str], str]) -> Callable[[Path], None]:
    return rewrite(lambda tensors: {rename(name): tensor for name, tensor in tensors.items()})


def shard(folder: Path, *, keep_single: bool = False) -> dict[str, str]:
    """Writes the tensors as two shards with an index; returns its map."""
    tensors = tensors_of(folder)
    if not keep_single:
        (folder / SINGLE).unlink()
    weight_map: dict[str, str] = {}
    for k, file in enumerate(SHARDS):
        part = dict(list(tensors.items())[k::2])
        write(folder, part, file)
        weight_map |= dict.fromkeys(part, file)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder: Path, weight_map: Any) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def logits_of(checkpoint: HFFolder) -> Tensor:
    """Our logits [B, S, V]."""
    model = build(checkpoint.shape).eval()
    load_weights(model, checkpoint.table, checkpoint.shape, checkpoint)
    with torch.no_grad():
        return model.logits(model(TOKENS_BS)).transpose(0, 1)


def with_head(scale: float) -> Callable[[Tensors], Tensors]:
    return lambda tensors: tensors | {HEAD: scale * tensors[EMBEDDING]}


def stale_index(folder: Path) -> None:
    """What transformers leaves when a model is saved in shards, then as one file."""
    shard(folder, keep_single=True)
    for file in SHARDS:
        (folder / file).unlink()


def consolidated(folder: Path) -> None:
    write(folder, {"tok_embeddings.weight": torch.zeros(2, 2)}, "consolidated.safetensors")


def mixed_types(tensors: Tensors) -> Tensors:
    types = (torch.float32, torch.bfloat16, torch.float16)
    return {name: tensor.to(types[k % 3]) for k, (name, tensor) in enumerate(tensors.items())}


def linked(folder: Path) -> None:
    """As in the cache of huggingface_hub."""
    (folder / SINGLE).rename(folder / "blob")
    (folder / SINGLE).symlink_to("blob")


ACCEPTED: dict[str, tuple[str, Callable[[Path], Any], bool, str | None]] = {  # model, change, tied afterwards, note
    "shards": ("llama_untied", shard, False, None),
    "shards of another family": ("nemotron", shard, False, None),
    "tied, another head stored": ("llama", rewrite(with_head(-1.0)), False, "both are stored and differ"),
    "tied, the same head stored": ("llama", rewrite(with_head(1.0)), True, None),
    "tied, stored as the head alone": (
        "llama",
        renamed(lambda name: HEAD if name == EMBEDDING else name),
        True,
        None,
    ),
    "saved from the base model": ("llama", renamed(lambda name: name.removeprefix("model.")), True, None),
    "a prefix too many": ("llama_untied", renamed(lambda name: f"model.{name}"), False, None),
    "an index left behind": ("llama_untied", stale_index, False, "names shards that are not there"),
    "tensors beyond the model's": (
        "llama_untied",
        rewrite(lambda tensors: tensors | {"model.layers.7.x": torch.tensor([1])}),
        False,
        r"1 stored tensors are not part of the model and are ignored: model.layers.7.x",
    ),
    "a buffer of older versions": (
        "llama_untied",
        rewrite(lambda tensors: tensors | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}),
        False,
        None,
    ),
    "float64": (
        "llama_untied",
        rewrite(lambda tensors: {name: tensor.double() for name, tensor in tensors.items()}),
        False,
        "float64 weights are read as float32",
    ),
    "one number type per tensor": ("llama", rewrite(mixed_types), True, None),
    "a quantisation that was undone": (
        "llama",
        lambda folder: edit(folder, quantization_config={"quant_method": "fp8"}),
        True,
        r"says that the weights are quantised \(fp8\), but the stored ones are not",
    ),
    "padding from the end": ("llama", lambda folder: edit(folder, pad_token_id=-1), True, None),
    "another format beside": ("llama_untied", consolidated, False, None),
    "links": ("llama_untied", linked, False, None),
}


@pytest.mark.parametrize("kind", ACCEPTED)
def test_an_accepted_folder_computes_what_transformers_computes(groups, make, kind: str) -> None:
    model, change, tied, note = ACCEPTED[kind]
    folder = make(model)
    change(folder)
    opened = HFFolder(folder)
    torch.testing.assert_close(logits_of(opened), hf_logits(folder, TOKENS_BS), rtol=0, atol=1e-4)
    assert opened.shape.tie_embeddings == folder_shape(folder).tie_embeddings == tied
    assert set(opened.sizes) == set(opened.table.tensors(opened.shape))
    assert len(opened.notes) == (note is not None) and all(re.search(str(note), line) for line in opened.notes)
    for name in opened.sizes:
        assert torch.equal(RowReader(opened).read(name), opened.read(name)), name


def wrong_file_in_index(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, weight_map | {DOWN: SHARDS[weight_map[DOWN] == SHARDS[0]]})


def tensor_outside_index(folder: Path) -> None:
    weight_map = shard(folder)
    write_index(folder, {name: file for name, file in weight_map.items() if name != DOWN})


def tensor_in_two_shards(folder: Path) -> None:
    weight_map = shard(folder)
    other = folder / SHARDS[weight_map[DOWN] == SHARDS[0]]
    write(folder, load_file(other) | {DOWN: torch.zeros(2, 2)}, other.name)


def shard_outside_index(folder: Path) -> None:
    shard(folder)
    write(folder, {"x": torch.ones(1)}, "model-00003-of-00003.safetensors")


def two_names_for_one(tensors: Tensors) -> Tensors:
    return tensors | {DOWN.removeprefix("model."): tensors[DOWN] + 1}


def gptq(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    renamed(lambda name: name.replace("proj.weight", "proj.qweight"))(folder)


def bitsandbytes(folder: Path) -> None:
    tensors = tensors_of(folder)
    packed = {n: torch.zeros(t.numel() // 2, 1, dtype=torch.uint8) if "proj" in n else t for n, t in tensors.items()}
    write(folder, packed | {f"{DOWN}.absmax": torch.ones(4)})


def without_weights(*files: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in (SINGLE, "config.json") if "adapter_config.json" in files else (SINGLE,):
            (folder / name).unlink()
        for name in files:
            (folder / name).write_text("{}")

    return change


def add(name: str, text: str = "{}") -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).write_text(text)

    return change


def rows_added(tensors: Tensors) -> Tensors:
    return tensors | {name: torch.cat([tensors[name], tensors[name][:8]]) for name in (EMBEDDING, HEAD)}


def empty_index(folder: Path) -> None:
    (folder / SINGLE).unlink()
    edit(folder, tie_word_embeddings=True)
    write_index(folder, {})


def exl2_settings(folder: Path) -> None:
    edit(folder, quantization_config={"quant_method": "exl3"})
    renamed(lambda name: name.replace("_proj.weight", "_proj.unheard_of"))(folder)


def bare_index(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": shard(folder)}))


def two_lines(folder: Path) -> None:
    write(folder, {"a\nb" * 99: torch.ones(1)})


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "single file and shards": (
        lambda folder: shard(folder, keep_single=True),
        f"holds {SHARDS[0]} as well as {SINGLE}",
    ),
    "a shard that no index names": (shard_outside_index, r"00003.safetensors as well as the shards of"),
    "index names another file": (
        wrong_file_in_index,
        f"{DOWN} is in model-0000(1-of-00002.safetensors, the index says model-00002|2.*says model-00001)",
    ),
    "index lacks a tensor": (tensor_outside_index, f"{DOWN} is in model-.*, the index does not name it"),
    "a tensor in two shards": (tensor_in_two_shards, f"tensor {DOWN} is stored twice"),
    "a tensor under two names": (rewrite(two_names_for_one), f"stored twice .*{DOWN.removeprefix('model.')} in"),
    "index outside the folder": (
        lambda f: write_index(f, {DOWN: "../x.safetensors"}),
        r"'\.\./x.safetensors', which is no",
    ),
    "other weights named": (lambda f: edit(f, transformers_weights="other.safetensors"), "names other weights; rename"),
    "LoRA adapter beside": (add("adapter_config.json"), "belongs to a LoRA adapter.*merge it"),
    "LoRA adapter alone": (without_weights("adapter_config.json"), "belongs to a LoRA adapter"),
    "pointer for weights": (add(SINGLE, POINTER), f"{SINGLE}: is a Git LFS pointer.*git lfs pull"),
    "pointer for the tokenizer": (add("tokenizer.json", POINTER), "tokenizer.json: is a Git LFS pointer"),
    "GGUF alone": (without_weights("x.gguf"), "holds GGUF files"),
    "pickles alone": (without_weights("pytorch_model.bin"), "pickled weights.*save_pretrained"),
    "shards without index": (without_weights(SHARDS[0]), f"holds shards but no {INDEX}"),
    **{
        kind: (renamed(lambda name, end=end: name.replace("_proj.weight", f"_proj.{end}")), message)
        for kind, end, message in (
            ("EXL2", "q_weight", r"weights are quantised \(EXL2: .*q_weight\); take the model's unquantised"),
            ("HQQ", "W_q", r"weights are quantised \(HQQ: .*W_q\)"),
            (
                "unmerged adapter",
                "base_layer.weight",
                "base_layer.weight belongs to an adapter that was not merged; merge",
            ),
            (
                "torch.compile",
                "weight._flat",
                "missing, and model.layers.0.self_attn.q_proj.weight._flat is no tensor of",
            ),
        )
    },
    "a quantisation by its settings": (exl2_settings, r"quantised, as config.json says \(exl3\)"),
    "quantised in every forward pass": (
        lambda f: edit(f, quantization_config={"quant_method": "bitnet", "quantization_mode": "online"}),
        "quantization_config names bitnet, with which transformers quantises",
    ),
    "layers of another library": (
        renamed(lambda name: name.replace("model.layers", "transformer.h")),
        "input_layernorm.weight is missing, and transformer.h.0.* is no tensor of llama; take a checkpoint",
    ),
    "gathered by nobody": (
        rewrite(lambda tensors: {n: torch.zeros(0) if "_proj" in n else t for n, t in tensors.items()}),
        "q_proj.weight is empty, as when a model sharded by DeepSpeed ZeRO-3 or FSDP",
    ),
    "another layout": (
        rewrite(lambda tensors: tensors | {DOWN: tensors[DOWN].T}),
        r"down_proj.weight has size \[96, 64\], config.json says \[64, 96\]: the same number of values in another layout",
    ),
    "rows added to the embedding alone": (
        rewrite(lambda tensors: rows_added(tensors) | {HEAD: tensors[HEAD]}),
        r"rows of embedding and output layer differ \(lm_head.weight 128 and model.embed_tokens.weight 136; .*resize_token",
    ),
    "an index without metadata": (bare_index, 'opens no index without metadata; add "metadata": {}'),
    "padding beyond the vocabulary": (lambda f: edit(f, pad_token_id=128), "pad_token_id=128: transformers opens no"),
    "padding below it": (lambda f: edit(f, pad_token_id=-129), "pad_token_id=-129: transformers opens no"),
    "GPTQ": (gptq, r"weights are quantised \(gptq: .*qweight\); take the model's unquantised"),
    "bitsandbytes": (bitsandbytes, r"weights are quantised \(bitsandbytes, 4 bits"),
    "eight bits": (
        rewrite(lambda tensors: tensors | {DOWN: tensors[DOWN].to(torch.int8)}),
        f"tensor {DOWN} has type I8; supported: F64",
    ),
    "no head": (rewrite(lambda t: {n: v for n, v in t.items() if n != HEAD}), "does not tie it to the embedding"),
    "rows beyond the vocabulary": (
        rewrite(rows_added),
        "embed_tokens.weight has 136 rows, config.json says vocab_size=128; set vocab_size=136",
    ),
    "another model's names": (
        renamed(lambda name: f"language_model.{name}"),
        "stored as language_model.model.embed_tokens.weight: .*save the language model alone",
    ),
    "too many layers": (
        lambda f: edit(f, num_hidden_layers=5000),
        r"num_hidden_layers=5000 .*layers 0 to 2 are stored",
    ),
    "a billion layers": (lambda f: edit(f, num_hidden_layers=10**9), r"num_hidden_layers=1000000000"),
    "an empty index": (empty_index, "tensor model.embed_tokens.weight is missing"),
    "a file name of 300 bytes": (lambda f: write_index(f, {DOWN: "x" * 300}), "which is no file of its folder"),
    "a file name of two lines": (lambda f: write_index(f, {DOWN: "a\nb"}), "which is no file of its folder"),
    "a tensor's name of two lines": (two_lines, r"are named like 'a\\nb"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_refused_folder_says_why_in_one_line(make, kind: str) -> None:
    change, message = REFUSED[kind]
    folder = make("llama_untied")
    change(folder)
    with pytest.raises(UserError, match=message) as caught:
        HFFolder(folder)
    assert "\n" not in str(caught.value)


def fifo(path: Path) -> None:
    os.mkfifo(path)


def bound_socket(path: Path) -> None:
    here = Path.cwd()
    os.chdir(path.parent)  # a socket's path has at most 108 bytes
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(here)


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def broken_link(path: Path) -> None:
    path.symlink_to("nowhere")


@pytest.mark.parametrize("put", [fifo, bound_socket, loop, broken_link, Path.mkdir])
@pytest.mark.parametrize("name", ["config.json", SINGLE, INDEX, "tokenizer.json", "chat_template.jinja"])
def test_what_is_no_file_is_refused_at_once(make, name: str, put: Callable[[Path], None]) -> None:
    folder = make("llama")
    (folder / name).unlink(missing_ok=True)
    put(folder / name)
    for opens in (HFFolder, folder_shape, fingerprint):
        with pytest.raises(UserError, match=name) as caught:
            opens(folder)
        assert "\n" not in str(caught.value)


def test_a_student_of_a_teacher_with_another_head_keeps_it(groups, make, tmp_path: Path) -> None:
    folder = make("llama")
    rewrite(with_head(-1.0))(folder)
    student = run_cut(tmp_path / "out", folder, configuration(), random_tokens(), groups, ffn_hidden_size=48)
    assert json.loads((student / "config.json").read_text())["tie_word_embeddings"] is False
    assert torch.equal(load_file(student / SINGLE)[HEAD], tensors_of(folder)[HEAD])


CARRIED = (
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "tokenizer.model.v3",
    "tekken.json",
    "qwen.tiktoken",
    "spiece.model",
    "sentencepiece.bpe.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/tool_use.jinja",
    "preprocessor_config.json",
    "processor_config.json",
    "generation_config.json",
)
LICENCES = ("LICENSE", "LICENSE.md", "NOTICE.txt", "USE_POLICY.md")
LEFT = ("tokenization_x.py", "LICENSE.py", "README.md", "training_args.bin", "tokenizer.jsonl", "a/tokenizer.json")


def test_every_file_of_tokenizer_and_processor_is_carried_and_counts(make, tmp_path: Path) -> None:
    folder, target = make("llama"), tmp_path / "target"
    target.mkdir()
    (folder / "generation_config.json").unlink(missing_ok=True)
    seen = {fingerprint(folder)}
    for name in (*CARRIED, *LICENCES, *LEFT):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text('{"a": 1}')
        assert (fingerprint(folder) not in seen) == (name in CARRIED), name
        seen.add(fingerprint(folder))
    copy_tokenizer(folder, target)
    copied = {str(path.relative_to(target)) for path in target.rglob("*") if path.is_file()}
    assert copied == {*CARRIED, *LICENCES}


def test_a_fingerprint_is_of_the_files_that_are_read(make) -> None:
    folder = make("llama")
    before = fingerprint(folder)
    write(folder, {"layers": torch.ones(2)}, "kept.safetensors")
    assert fingerprint(folder) == before
    rewrite(lambda tensors: tensors | {EMBEDDING: tensors[EMBEDDING] + 1})(folder)
    assert fingerprint(folder) != before


@pytest.mark.parametrize(
    ("value", "source", "dtype", "fits"),
    [
        (65504.0, torch.float32, torch.float16, True),
        (65530.0, torch.float32, torch.float16, False),
        (1e38, torch.float32, torch.bfloat16, True),
        (torch.finfo(torch.float32).max, torch.float32, torch.bfloat16, False),
        (-1e39, torch.float64, torch.float32, False),
        (float("inf"), torch.float32, torch.float16, True),  # was infinite before
        (70000.0, torch.bfloat16, torch.float16, False),
        (60000.0, torch.float16, torch.bfloat16, True),
    ],
)
def test_only_a_finite_value_that_becomes_infinite_is_refused(value, source, dtype, fits: bool) -> None:
    tensor = torch.tensor([1.0, value], dtype=source)
    if fits:
        assert torch.equal(cast(tensor, dtype, "x", "y"), tensor.to(dtype))
    else:
        with pytest.raises(UserError, match=r"tensor a: holds .*but .*float\d+ ends at .*; choose another"):
            cast(tensor, dtype, "tensor a", "choose another")


def test_a_float64_value_beyond_float32_is_refused_when_it_is_read(make) -> None:
    folder = make("llama")
    rewrite(lambda tensors: tensors | {DOWN: tensors[DOWN].double() * 1e300})(folder)
    with pytest.raises(UserError, match=f"tensor {DOWN}: holds .*float32 ends at"):
        HFFolder(folder).read(DOWN)


def test_a_file_that_vanishes_while_it_is_read_is_named(make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    folder = make("llama")
    opened = HFFolder(folder)
    (folder / SINGLE).rename(tmp_path / "aside")
    with pytest.raises(UserError, match=f"{SINGLE}: was removed or replaced while it was read"):
        RowReader(opened)
    (tmp_path / "aside").rename(folder / SINGLE)
    for opens in (HFFolder, fingerprint, folder_shape):
        with monkeypatch.context() as patched:
            patched.setattr(locate, "read_header", lambda file: locate.open_file(file.with_name("gone")).__enter__())
            with pytest.raises(UserError, match="gone: was removed or replaced while it was read"):
                opens(folder)


def test_a_file_that_is_cut_off_while_it_is_read_is_named(make) -> None:
    folder = make("llama")
    opened = HFFolder(folder)
    with (folder / SINGLE).open("r+b") as handle:
        handle.truncate(5000)
    with pytest.raises(UserError, match=r"ends inside tensor .*; it was changed while it was read"):
        [opened.read(name) for name in opened.sizes]
