"""Training on conversations: loss and perplexity equal those of each conversation alone, computed by transformers."""

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from minitron_train.config import ParallelConfig, SourceConfig, SourceKind
from minitron_train.data import tokenizers
from minitron_train.data.pack import PAD
from minitron_train.data.stream import Batch, TokenStream, validation_tokens
from minitron_train.evaluation.perplexity import perplexity
from minitron_train.evaluation.source import open_origin
from minitron_train.parallel.groups import start
from minitron_train.runtime.launch import World
from minitron_train.train.batches import held_out_batch
from tests.support.chats import turn
from tests.support.training import ROWS, SEQ_LENGTH, Material, make_config, rows, run

TEMPLATE = "{% for turn in messages %}{{ turn.role[0] + ':' + turn.content }}\n{% endfor %}"
STEPS = 3


@pytest.fixture
def settings(training: Material, tmp_path: Path) -> dict:
    """Three steps on text and conversations in turn."""
    chats = [[turn("user", "ab" * (1 + i % 3)), turn("assistant", f"{i} is" + " x" * (i % 5))] for i in range(300)]
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps({"messages": messages}) + "\n" for messages in chats))
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    chat = SourceConfig(path=str(path), kind=SourceKind.chat, template=str(tmp_path / "t.jinja"), weight=0.6)
    text = SourceConfig(path=str(training.corpus), weight=0.4)
    num_tokens = STEPS * ROWS * SEQ_LENGTH
    return {"data__path": None, "data__sources": {"chat": chat, "text": text}, "train__num_tokens": num_tokens}


def documents(batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Tokens, labels and mask of each document of a batch."""
    assert batch.documents_BS is not None
    for tokens, labels, mask, numbers in zip(
        batch.tokens_BS, batch.labels_BS, batch.mask_BS, batch.documents_BS, strict=True
    ):
        for number in set(numbers.tolist()) - {PAD}:
            chosen = numbers == number
            yield tokens[chosen], labels[chosen], mask[chosen] != 0


def mean_losses(batch: Batch, student: Path, teacher: Path) -> tuple[float, float]:
    """Cross-entropy and KL(teacher || student), averaged over the tokens that count."""
    models = [AutoModelForCausalLM.from_pretrained(folder).double().eval() for folder in (student, teacher)]
    sums = torch.zeros(3, dtype=torch.float64)
    with torch.no_grad():
        for tokens, labels, mask in documents(batch):
            own, taught = (model(tokens[None]).logits[0].log_softmax(-1)[mask] for model in models)
            ce = -own.gather(1, labels[mask][:, None]).sum()
            sums += torch.stack([ce, (taught.exp() * (taught - own)).sum(), mask.sum().double()])
    return (sums[0] / sums[2]).item(), (sums[1] / sums[2]).item()


def test_the_loss_is_that_of_each_conversation_alone(training: Material, settings: dict, tmp_path: Path) -> None:
    config = make_config(training, **settings)
    stream = TokenStream(config.data, tokenizers.load(training.student), seq_length=SEQ_LENGTH, seed=config.seed)
    batch = stream.next_batch(ROWS)
    assert batch.sources == {"chat": 5, "text": 3} and 0.3 < batch.mask_BS.mean() < 0.9
    cross_entropy, divergence = mean_losses(batch, training.student, training.teacher)
    run(training, tmp_path / "taught", **settings)
    run(training, tmp_path / "alone", alone=True, **settings)
    taught, alone = rows(tmp_path / "taught"), rows(tmp_path / "alone")
    assert len(taught) == STEPS
    assert taught[0]["loss"] == pytest.approx(divergence, rel=1e-4)
    assert alone[0]["loss"] == pytest.approx(cross_entropy, rel=1e-4)
    assert taught[-1]["loss"] < taught[0]["loss"] and math.isfinite(taught[-1]["eval.validation.kl"])


def with_strong_attention(model: Path, folder: Path) -> Path:
    """A copy of a model whose logits depend on the tokens before: a random model's attention hardly changes them."""
    shutil.copytree(model, folder)
    tensors = load_file(folder / "model.safetensors")
    tensors = {name: tensor * 20 if "self_attn" in name else tensor for name, tensor in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_perplexity_counts_answers_alone(training: Material, settings: dict, tmp_path: Path) -> None:
    """Each after its own conversation, though sequences hold several."""
    teacher = with_strong_attention(training.teacher, tmp_path / "teacher")
    data = replace(make_config(training, **settings).data, validation_tokens=32 * SEQ_LENGTH, validation_fraction=0.5)
    tokens = validation_tokens(data, tokenizers.load(teacher), 4 * SEQ_LENGTH, seed=1)
    assert max(len(set(row[2].tolist()) - {PAD}) for row in tokens) > 2
    wanted, _ = mean_losses(held_out_batch(tokens), teacher, teacher)
    with start(ParallelConfig(), World(), seed=1) as groups:
        model = open_origin(teacher).build(groups, torch.float32)
        assert math.log(perplexity(model, tokens, groups, 3)) == pytest.approx(wanted, rel=1e-5)
