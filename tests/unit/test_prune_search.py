"""The search's grid: the paper's candidate lists, budgets, refusals."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from minitron_train.arch.shape import Shape
from minitron_train.commands.workspace import shape_of_recipe
from minitron_train.config import (
    CalibrationConfig,
    Config,
    ModelConfig,
    ParallelConfig,
    PruneConfig,
    Refit,
    SearchConfig,
)
from minitron_train.pruning.candidates import candidates, grid, table, usable
from minitron_train.runtime.errors import UserError
from tests.support.pruning import PLAIN

ROOT = Path(__file__).parents[2]
TABLE_19 = {  # arXiv 2407.14679: layers, heads, MLP, hidden of the 15 candidates for 8B
    *((32, 32, 12800, 5120), (32, 32, 13824, 4608), (32, 48, 11520, 4608), (32, 48, 16384, 4096)),
    *((31, 32, 12800, 5120), (31, 32, 16128, 4608), (31, 48, 13824, 4608), (31, 48, 16384, 4096)),
    *((30, 32, 12800, 5120), (30, 32, 16128, 4608), (30, 48, 13824, 4608), (30, 48, 16384, 4096)),
    *((29, 32, 12800, 5120), (29, 32, 16128, 4608), (29, 48, 13824, 4608)),
}


@pytest.fixture(scope="module")
def teacher() -> Shape:
    model = yaml.safe_load((ROOT / "conf" / "model" / "nemotron4_15b.yaml").read_text())
    shape = shape_of_recipe(Config(model=ModelConfig(**model)))
    assert shape is not None
    return shape


def settings(recipe: str) -> Config:
    """The search section of a recipe, with what it inherits from 4b; 8 ranks share every shape."""
    sections = [yaml.safe_load((ROOT / "recipes" / f"{name}.yaml").read_text())["search"] for name in ("4b", recipe)]
    merged = {key: float(value) if key == "target" else value for section in sections for key, value in section.items()}
    return Config(
        search=SearchConfig(**merged), prune=PruneConfig(**PLAIN), parallel=ParallelConfig(tensor_model_parallel_size=8)
    )


def changed(config: Config, **search: Any) -> Config:
    return replace(config, search=replace(config.search, **search))


def sizes(found) -> list[tuple[int, ...]]:
    shapes = [candidate.shape for candidate in found]
    return [(s.num_layers, s.num_attention_heads, s.ffn_hidden_size, s.hidden_size) for s in shapes]


def test_4b_has_the_papers_18_candidates(teacher):
    found = sizes(candidates(settings("4b"), teacher))
    assert len(found) == 18
    assert (32, 24, 9216, 3072) in found
    assert len(list(grid(settings("4b").search, teacher))) == 240


def test_8b_gives_table_19(teacher):
    found = candidates(settings("8b"), teacher)
    assert set(sizes(found)) == TABLE_19
    assert [round(found[k].parameters / 1e9, 4) for k in (-1, 0)] == [7.8712, 8.4941]
    assert len(list(grid(settings("8b").search, teacher))) == 160


def test_memory_counts_weights_and_cache(teacher):
    config = changed(settings("4b"), budget="memory_gib", target=8.0, batch_size=4, context=4096)
    shape_bytes = {c.name: c.memory_gib for c in usable(config, teacher)[0]}["l32-a24-f9216-h3072"] * 2**30
    assert shape_bytes == pytest.approx(2 * 4_190_509_056 + 2 * 2 * 32 * 8 * 128 * 4 * 4096)
    assert all(abs(c.memory_gib / 8.0 - 1) <= 0.05 for c in candidates(config, teacher))


def test_refusals_name_the_remedy(teacher):
    with pytest.raises(UserError, match=r"search\.target is not set"):
        candidates(Config(), teacher)
    with pytest.raises(UserError, match="the nearest, l29-a24-f6400-h2560, has"):
        candidates(changed(settings("4b"), target=1e9), teacher)


@pytest.mark.parametrize(
    ("architecture", "ranks", "reason"),
    [("llama", 8, "2560 must be a multiple of num_attention_heads=24"), ("nemotron", 16, "num_query_groups=8")],
)
def test_what_loaders_or_ranks_refuse_is_left_out(teacher, architecture, ranks, reason):
    teacher = replace(teacher, architecture=architecture)
    config = replace(settings("4b"), parallel=ParallelConfig(tensor_model_parallel_size=ranks))
    found, refusals = usable(config, teacher)
    assert len(found) + len(refusals) == 240 and any(reason in refusal for refusal in refusals)
    if architecture == "llama":
        assert all(c.shape.hidden_size % c.shape.num_attention_heads == 0 for c in candidates(config, teacher))
    else:
        with pytest.raises(UserError, match="all 240 candidate shapes were rejected; first reason: l29-a24-f"):
            candidates(config, teacher)


def test_shapes_that_the_teacher_does_not_have_are_left_out(teacher):
    lists = {"hidden_size": [4096, 6144, 8192], "ffn_expansion": [3.0, 4.0, 5.0], "num_attention_heads": [46, 48]}
    found, refusals = usable(changed(settings("8b"), num_layers=[32], **lists), teacher)
    assert len(found) == 5 and len(refusals) == 13
    for name, reason in (("l32-a48-f30720-h6144", "larger than the teacher's 24576"), ("-a46-", "a multiple of")):
        assert any(name in refusal and reason in refusal for refusal in refusals)


def test_shapes_with_too_few_tokens_to_repair_are_left_out(teacher):
    config = replace(
        settings("8b"), prune=PruneConfig(**PLAIN | {"refit": Refit.all}), calibration=CalibrationConfig(num_samples=9)
    )
    config.calibration.seq_length = 4096  # 8 of 9 sequences are fitted, 32,768 tokens: enough for 8,192 inputs
    found, refusals = usable(changed(config, num_layers=[32], hidden_size=[4096], ffn_expansion=[2.0, 4.0]), teacher)
    assert {candidate.shape.ffn_hidden_size for candidate in found} == {8192}
    assert all("too few to fit 16384 inputs" in refusal for refusal in refusals) and refusals


def test_an_overflow_ranks_last(teacher):
    first, second = candidates(settings("4b"), teacher)[:2]
    first.zero_shot_loss, first.retrained_loss = 1.0, math.inf
    second.zero_shot_loss, second.retrained_loss = 5.0, 4.0
    assert second.loss < first.loss
    assert json.loads(json.dumps(first.row(), allow_nan=False))["retrained_loss"] is None


def test_the_table_has_a_line_per_candidate(teacher):
    assert len(table(candidates(settings("4b"), teacher)).splitlines()) == 19
