"""Selection on statistics made by hand: groups stay valid, ties and order, merge partners, depth, refusals."""

from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch

from minitron_train.arch.shape import Shape
from minitron_train.config import Merge, PruneConfig, Scope
from minitron_train.pruning.collect import FINAL_NORM, Statistics
from minitron_train.pruning.criterion import Evidence
from minitron_train.pruning.importance import importance
from minitron_train.pruning.prune import between
from minitron_train.pruning.select import ALONE, select
from minitron_train.pruning.statistics import Moments
from minitron_train.pruning.target import check_target
from minitron_train.runtime.errors import UserError
from tests.support.pruning import PLAIN

TEACHER = Shape(
    architecture="nemotron",
    num_layers=4,
    hidden_size=8,
    ffn_hidden_size=6,
    num_attention_heads=6,
    num_query_groups=2,
    kv_channels=2,
    vocab_size=16,
)
WIDTH = {"input_norm": 8, "mlp_norm": 8, "head_channels": 12, "head_norms": 6, "neurons_pre": 6, "neurons_post": 6}


def statistics(**given: torch.Tensor) -> Statistics:
    """Of one sequence: every point's means are `given`, or random."""
    made = Statistics(TEACHER.num_layers)
    torch.manual_seed(0)

    def moments(point: str, width: int) -> Moments:
        mean = given.get(point, torch.rand(width)).double().expand(3, width)
        return Moments(torch.tensor(1.0).double(), mean, torch.zeros(3, width).double())

    for i in range(TEACHER.num_layers):
        made.moments |= {f"layers.{i}.{point}": moments(point, width) for point, width in WIDTH.items()}
        made.blocks[f"layers.{i}.block"] = torch.tensor([[4.0, 1.0, 3.0, 2.0][i], 1.0])
    made.moments[FINAL_NORM] = moments("input_norm", 8)
    made.spans = torch.eye(5).double()
    made.spans[1, 3] = made.spans[3, 1] = 0.9  # layers 1 and 2 change the stream least
    return made


def choose(prune: PruneConfig | None = None, given: dict | None = None, **sizes: int):
    prune = prune or PruneConfig()
    student = TEACHER.smaller(**sizes)
    check_target(TEACHER, student, prune)
    return select(evidence(prune, statistics(**given or {})), student)


def evidence(prune: PruneConfig, made: Statistics) -> Evidence:
    table: Any = None  # these criteria look at activations only
    return Evidence(statistics=made, source=table, table=table, shape=TEACHER, prune=prune, seed=0)


def head_scores(*scores: float) -> dict:
    return {"head_channels": torch.tensor(scores).repeat_interleave(2)}


def test_the_same_number_of_heads_in_every_group():
    keep = choose(given=head_scores(9, 8, 7, 1, 3, 2), num_attention_heads=4)
    assert keep.heads[0].tolist() == [0, 1, 4, 5]
    assert keep.rows("q", 0).tolist() == [0, 1, 2, 3, 8, 9, 10, 11]
    assert keep.rows("kv", 0) is None


def test_fewer_groups_are_the_best_ones():
    keep = choose(given=head_scores(1, 1, 1, 5, 9, 7), num_attention_heads=2, num_query_groups=1)
    assert (keep.heads[0].tolist(), keep.kv_groups[0].tolist()) == ([4, 5], [1])


def test_merge_partners_pair_the_last_kept_with_the_first_dropped():
    keep = choose(PruneConfig(head_merge=Merge.outputs), head_scores(5, 9, 7, 1, 2, 3), num_attention_heads=4)
    assert keep.heads[0].tolist() == [1, 2, 4, 5]  # ranks of group 0: 1, 2, 0; of group 1: 5, 4, 3
    assert keep.partners[0].tolist() == [ALONE, 0, 3, ALONE]


def test_kept_indices_ascend_and_ties_go_to_the_first():
    keep = choose(given={"neurons_post": torch.tensor([1.0, 2, 2, 2, 1, 3])}, ffn_hidden_size=3)
    assert keep.ffn[2].tolist() == [1, 2, 5]


def test_network_scope_keeps_the_same_in_every_layer():
    prune = PruneConfig(ffn_scope=Scope.network, heads_scope=Scope.network)
    keep = choose(prune, ffn_hidden_size=2, num_attention_heads=2)
    assert len({tuple(index.tolist()) for index in keep.ffn.values()}) == 1
    assert len({tuple(index.tolist()) for index in keep.heads.values()}) == 1


def test_final_norm_counts_when_asked():
    made = statistics()
    with_final, without = (
        importance(evidence(PruneConfig(include_final_norm=flag), made)).embedding for flag in (True, False)
    )
    torch.testing.assert_close(with_final - without, made.moments[FINAL_NORM].mean[0])


@pytest.mark.parametrize(
    ("prune", "kept"),
    [
        (PruneConfig(), [0, 2]),
        (PruneConfig(depth="contiguous"), [0, 3]),
        (PruneConfig(drop_layers=[0, 3]), [1, 2]),
    ],
)
def test_depth(prune, kept):
    assert choose(prune, num_layers=2).layers.tolist() == kept


@pytest.mark.parametrize("tp", [1, 2])
def test_every_step_is_a_model_that_the_ranks_can_share(tp):
    teacher = replace(TEACHER, num_attention_heads=24, num_query_groups=8, ffn_hidden_size=38)
    student = teacher.smaller(num_attention_heads=4, num_query_groups=2, ffn_hidden_size=12, hidden_size=5)
    steps = [between(teacher, student, step, 3, tp) for step in (1, 2, 3)]
    assert steps[2] == student
    found = [(s.num_attention_heads, s.num_query_groups, s.ffn_hidden_size, s.hidden_size) for s in steps]
    assert found[:2] == ([(12, 6, 29, 7), (8, 4, 20, 6)] if tp == 1 else [(12, 6, 28, 7), (8, 4, 20, 6)])
    for before, after in pairwise([teacher, *steps]):
        check_target(before, after, PruneConfig(multiple_of=1))


@pytest.mark.parametrize(
    ("prune", "sizes", "message"),
    [
        (PruneConfig(), {"hidden_size": 9}, "larger than the teacher's 8"),
        (PruneConfig(), {"num_attention_heads": 3}, "choose 2 or 4"),
        (PruneConfig(), {"num_query_groups": 1, "num_attention_heads": 4}, "choose at most 3"),
        (PruneConfig(multiple_of=4), {"ffn_hidden_size": 5}, "choose 4"),
        (PruneConfig(drop_layers=[1]), {"num_layers": 2}, "needs 2 different layers"),
        (PruneConfig(head_merge=Merge.queries), {"num_attention_heads": 2}, "at least half"),
        (
            PruneConfig(**PLAIN, head_merge=Merge.queries, iterations=2),
            {},
            r"prune\.iterations=2: .* prune\.head_merge=none",
        ),
        (
            PruneConfig(**PLAIN, drop_layers=[1], iterations=2),
            {"num_layers": 3},
            r"prune\.iterations=2: .* prune\.drop_layers=null",
        ),
    ],
)
def test_refusals_name_the_remedy(prune, sizes, message):
    with pytest.raises(UserError, match=message):
        choose(prune, **sizes)
