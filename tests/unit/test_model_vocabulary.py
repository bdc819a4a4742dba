"""One function multiplies by the output weights and one embeds tokens: every other part of the package goes through them."""

import ast
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import minitron_train
from minitron_train.config import PruneConfig, Refit
from minitron_train.distillation.loss import LossSpec, distillation_loss
from minitron_train.evaluation.perplexity import perplexity
from minitron_train.hf import HFFolder
from minitron_train.model.build import LanguageModel, build
from minitron_train.model.forward import hidden_states, inference
from minitron_train.model.generate import greedy, sample
from minitron_train.model.load import load_weights
from minitron_train.model.vocabulary import PLAIN, LogitMap, OutputLayer
from minitron_train.parallel.groups import Groups
from minitron_train.pruning.basis import principal_basis
from minitron_train.pruning.collect import collect
from minitron_train.pruning.layer_removal import without_each_layer
from minitron_train.pruning.layers import Layers
from minitron_train.pruning.repair import Repair
from minitron_train.pruning.select import Keep
from minitron_train.pruning.shards import RowReader

PACKAGE = Path(minitron_train.__file__).parent
PRODUCTS = {"mm", "matmul", "addmm", "bmm", "baddbmm", "einsum", "linear", "tensordot"}
OUTPUT_WEIGHT = re.compile(r"\w*_V[HD]\b|output_weight|output_layer|lm_head|word_embeddings")
LOOKUP = re.compile(r"(F|functional|model|self|student|teacher)\.embedding$|word_embeddings$|embed_tokens$")
MULTIPLIES = {"model/vocabulary.py": "OutputLayer and its block product"}
EMBEDS = {"model/build.py": "LanguageModel.embed"}
HOLDS_WEIGHTS = {  # who may touch the raw output weights, and what for
    "model/build.py": "OutputLayer is made of them",
    "distillation/step.py": "the loss takes plain tensors, so that it works in any training loop",
    "train/teach.py": "their dtype",
}


def nodes() -> Iterator[tuple[str, ast.AST]]:
    """Every syntax node of the package, with its file's path inside it."""
    for file in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            yield str(file.relative_to(PACKAGE)), node


def factors(node: ast.AST) -> list[ast.expr]:
    """What a node multiplies; nothing where it is no product."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult):
        return [node.left, node.right]
    if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] in PRODUCTS:
        return [*node.args, *([node.func.value] if isinstance(node.func, ast.Attribute) else [])]
    return []


def test_only_one_place_multiplies_by_output_weights() -> None:
    found = {file for file, node in nodes() for factor in factors(node) if OUTPUT_WEIGHT.search(ast.unparse(factor))}
    assert found == set(MULTIPLIES)


def test_only_one_place_embeds_tokens() -> None:
    calls = ((file, node.func) for file, node in nodes() if isinstance(node, ast.Call))
    assert {file for file, function in calls if LOOKUP.search(ast.unparse(function))} == set(EMBEDS)


def test_few_places_touch_the_raw_output_weights() -> None:
    reads = ((file, node) for file, node in nodes() if isinstance(node, ast.Attribute))
    assert {file for file, node in reads if node.attr == "output_weight"} == set(HOLDS_WEIGHTS)


TOKENS_NS = torch.arange(6 * 33).view(6, 33) * 7 % 128


def make_layers(teacher: HFFolder, groups: Groups) -> Layers:
    return Layers(teacher.table, teacher.shape, RowReader(teacher), groups, resident=True)


def make_model(teacher: HFFolder) -> LanguageModel:
    model = build(teacher.shape).eval()
    load_weights(model, teacher.table, teacher.shape, teacher)
    return model


def draw(teacher: HFFolder, groups: Groups) -> None:
    model = make_model(teacher)
    with inference(model):
        next(sample(model, [1], 2, 1, torch.Generator(), groups))


def removal(teacher: HFFolder, groups: Groups) -> None:
    without_each_layer(make_layers(teacher, groups), TOKENS_NS, micro_batch_size=3, chunk_tokens=10**6)


def loss(**settings: object) -> Callable[[HFFolder, Groups], None]:
    def run(teacher: HFFolder, groups: Groups) -> None:
        hidden, weight = torch.randn(2, 8, requires_grad=True), torch.randn(16, 8, requires_grad=True)
        distillation_loss(hidden, weight, hidden.detach(), weight.detach(), loss=LossSpec(**settings)).total.backward()  # type: ignore[arg-type]

    return run


def walk(teacher: HFFolder, groups: Groups) -> None:
    collect(make_layers(teacher, groups), TOKENS_NS, micro_batch_size=3, chunk_tokens=10**6)


def repair(teacher: HFFolder, groups: Groups) -> None:
    layers, shape = make_layers(teacher, groups), teacher.shape
    whole, depth = torch.arange(shape.hidden_size), torch.arange(shape.num_layers)
    keep = Keep(
        teacher=shape, student=shape, embedding=whole, layers=depth, heads={}, kv_groups={}, ffn={}, partners={}
    )
    Repair(layers, layers, keep, PruneConfig(refit=Refit.none), TOKENS_NS, 3)


OUTPUTS: dict[str, Callable[[HFFolder, Groups], object]] = {
    "logits": lambda teacher, _: make_model(teacher).logits(torch.zeros(1, 1, teacher.shape.hidden_size)),
    "perplexity": lambda teacher, groups: perplexity(make_model(teacher), TOKENS_NS, groups, 2),
    "greedy decoding": lambda teacher, groups: greedy(make_model(teacher), [[1]], 1, [lambda _: True], groups),
    "sampling": draw,
    "scoring without each layer": removal,
    "fused loss": loss(),
    "loss by autograd": loss(function=lambda student, teacher: (student - teacher).square().mean(-1)),
}
EMBEDDINGS: dict[str, Callable[[HFFolder, Groups], object]] = {
    "training": lambda teacher, _: make_model(teacher)(TOKENS_NS),
    "evaluation": lambda teacher, _: hidden_states(make_model(teacher), TOKENS_NS, torch.zeros_like(TOKENS_NS)),
    "scoring": walk,
    "rotation": lambda teacher, groups: principal_basis(make_layers(teacher, groups), TOKENS_NS, 64, 3),
    "repair": repair,
}


class Reached(Exception):
    """The one function was called."""


def reach(*_: object, **__: object) -> Tensor:
    raise Reached


@pytest.mark.parametrize("consumer", OUTPUTS)
def test_logits_come_from_the_output_layer(
    consumer: str, tiny_models: dict[str, Path], groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(OutputLayer, "logits", reach)
    with pytest.raises(Reached):
        OUTPUTS[consumer](HFFolder(tiny_models["llama_untied"]), groups)


@pytest.mark.parametrize("consumer", EMBEDDINGS)
def test_tokens_are_embedded_by_the_model(
    consumer: str, tiny_models: dict[str, Path], groups: Groups, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "embed", reach)
    with pytest.raises(Reached):
        EMBEDDINGS[consumer](HFFolder(tiny_models["llama_untied"]), groups)


@pytest.mark.parametrize("map", [PLAIN, LogitMap(divisor=0.5), LogitMap(divisor=2.0, softcap=3.0)])
def test_gradients_of_the_output_layer_are_autograds(map: LogitMap) -> None:
    """`pull_back` and `add_gradients` are the derivative of `logits`: whoever changes one must change the other."""
    hidden, weight, grad = (torch.randn(*size, dtype=torch.float64) for size in ((5, 8), (16, 8), (5, 16)))
    hidden.requires_grad_(), weight.requires_grad_()
    output = OutputLayer(weight, map)
    output.logits(hidden).backward(grad)
    hidden_grad, weight_grad = torch.zeros_like(hidden), torch.empty_like(weight)
    with torch.no_grad():
        logits = output.logits(hidden, torch.empty_like(grad))
        torch.testing.assert_close(logits, output.logits(hidden))
        output.add_gradients(
            map.pull_back(grad, logits),
            hidden,
            hidden_grad_NH=hidden_grad,
            weight_grad_VH=weight_grad,
            overwrite_weight_grad=True,
        )
    torch.testing.assert_close(hidden_grad, hidden.grad)
    torch.testing.assert_close(weight_grad, weight.grad)
