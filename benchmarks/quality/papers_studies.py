"""The table of studies of papers_in_miniature.py: what each varies, and the papers' published rows.

P1 is arXiv 2407.14679, P2 arXiv 2408.11796. Student sizes are near the recipe's 28 % of the parameters, or near the 60 %
that half of the layers have.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from miniature import RECIPE

Start = Literal["cut", "shuffled", "random", "itself"]


def shape(num_layers: int, hidden_size: int, ffn_hidden_size: int, num_attention_heads: int) -> dict[str, int]:
    """Sizes with the names of the `student` section."""
    sizes = {"hidden_size": hidden_size, "ffn_hidden_size": ffn_hidden_size, "num_attention_heads": num_attention_heads}
    return {"num_layers": num_layers, **sizes}


TEACHER = shape(6, 256, 1024, 8)
SMALL = RECIPE["student"] | {"num_layers": 6}  # 28 %
DEPTH = shape(3, 256, 1024, 8)  # 3.2 M parameters, 60 %, as the next three
WIDTH = shape(6, 192, 800, 4)
WIDTH_DEPTH = shape(5, 208, 880, 4)
HEADS_FFN = shape(6, 256, 448, 4)
MIDDLE = shape(6, 192, 704, 8)  # 61 %, between TEACHER and SMALL
CHANNELS = shape(6, 168, 1024, 8)  # about two thirds of the channels, as 6144 -> 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One row of a study.

    Attributes:
        published: the paper's row.
        preset: preset of conf/prune.
        prune, train: overrides of the cut and of the training.
        start: origin of the student: cut by importance, cut by shuffled importance (random pruning), random weights of its
            sizes, or the parent itself.
        parent, taught_by: the trained variants that are cut and that teach; None is the teacher.
        share: fraction of the study's tokens.
    """

    label: str
    published: str = ""
    preset: str = "modelopt"
    prune: tuple[str, ...] = ()
    train: tuple[str, ...] = ()
    sizes: Mapping[str, int]
    start: Start = "cut"
    parent: "Variant | None" = None
    taught_by: "Variant | None" = None
    share: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """One table.

    Attributes:
        published: unit of the papers' rows.
        reference: label of the row that the others are compared with, seed by seed.
        tokens: training tokens of a run; a multiple of `evaluations` steps.
        evaluations: number of equidistant evaluations on held-out text, including the end.
        data: overrides for everything in this study except the teacher's own training.
    """

    name: str
    question: str
    published: str
    variants: tuple[Variant, ...]
    reference: str
    tokens: int = 131_072
    evaluations: int = 1
    seeds: int = 3
    data: tuple[str, ...] = ()

    @property
    def ancestors(self) -> list[Variant]:
        """Variants that others are cut from or taught by."""
        return [found for variant in self.variants for found in (variant.parent, variant.taught_by) if found]


def aggregations() -> Iterable[Variant]:
    """The nine of P1 table 13."""
    published = {
        ("l2", "l2"): "8.73, 8.37",
        ("l2", "mean"): "7.18, 7.23",
        ("l2", "var"): "8.18, 8.61",
        ("mean", "l2"): "8.41, 7.84",
        ("mean", "mean"): "7.21, 6.89",
        ("mean", "var"): "7.94, 8.29",
        ("var", "l2"): "9.01, 9.30",
        ("var", "mean"): "8.34, 8.72",
        ("var", "var"): "10.55, 11.14",
    }
    for (batch, sequence), row in published.items():
        changes = (f"prune.batch_aggregation={batch}", f"prune.sequence_aggregation={sequence}")
        yield Variant(label=f"{batch} / {sequence}", published=row, prune=changes, sizes=SMALL)


def axes() -> Iterable[Variant]:
    """P1 tables 1 and 10, with about equal parameter counts."""
    yield Variant(label="width", published="7.74 B, 6.33 -> 0.37, 2.049", sizes=WIDTH)
    yield Variant(label="width, channels kept", published="5.07 -> 0.42, 2.101", sizes=HEADS_FFN)
    yield Variant(label="width and depth", published="7.91 B, 5.35 -> 0.38, 2.062", sizes=WIDTH_DEPTH)
    depths = {
        "perplexity": "9.39 B, 8.35 -> 0.49, 2.155",
        "block": "9.39 B, 2.177",
        "contiguous": "not in these tables (P2 drops such a block)",
    }
    for depth, row in depths.items():
        prune = (f"prune.depth={depth}",)
        yield Variant(label=f"depth, {depth}", published=row, prune=prune, sizes=DEPTH)
    yield Variant(label="random weights", published="12.27 -> 2.34, 3.953", sizes=WIDTH, start="random")


def losses() -> Iterable[Variant]:
    """P1 tables 15 and 16: its four temperatures except 0.1, and its top-k."""
    with_labels, reverse = "distill.ce_weight=1", "distill.loss=reverse_kl"
    rows = {
        "KL": ("2.107, 8.720; table 16: 2.155", ()),
        "KL + CE": ("2.117, 8.791", (with_labels,)),
        "reverse KL": ("table 16: 2.665", (reverse,)),
        "reverse KL + CE": ("2.140, 9.008", (reverse, with_labels)),
        "cosine + CE": ("2.134, 8.965", ("distill.loss=cosine", with_labels)),
        "MSE + CE": ("2.144, 9.007", ("distill.loss=mse", with_labels)),
        "KL, temperature 0.5": ("worse than 1", ("distill.temperature=0.5",)),
        "KL, temperature 3": ("worse than 1", ("distill.temperature=3",)),
        "KL, top 10": ("a significant drop up to 100", ("distill.loss=top_k_kl", "distill.top_k=10")),
        "KL, top 100": ("a significant drop up to 100", ("distill.loss=top_k_kl", "distill.top_k=100")),
    }
    for label, (row, train) in rows.items():
        yield Variant(label=label, published=row, train=train, sizes=SMALL)


def random_pruning() -> Iterable[Variant]:
    """P2 figure 6."""
    on_labels = ("distill.kd_weight=0", "distill.ce_weight=1")
    yield Variant(label="importance, KL", published="the best of the three", sizes=SMALL)
    yield Variant(label="importance, CE", published="worse", train=on_labels, sizes=SMALL)
    yield Variant(label="random, KL", published="worse", sizes=SMALL, start="shuffled")


def repairs() -> Iterable[Variant]:
    """Does the gain of a repair survive training? The papers have the merge alone, without figures."""
    rows = {
        "plain cut": (),
        "norms rescaled": ("prune.norm_scale=true",),
        "outputs refitted": ("prune.refit=outputs",),
        "all refitted": ("prune.refit=all",),
        "heads merged, as printed": ("prune.head_merge=queries",),
        "heads merged in the output": ("prune.head_merge=outputs",),
    }
    for label, repair in rows.items():
        row = "a boost, no figures" if label == "heads merged, as printed" else "-"
        yield Variant(label=label, published=row, prune=repair, sizes=SMALL)
    yield Variant(label="the default preset", published="-", preset="default", sizes=SMALL)


def iterations() -> Iterable[Variant]:
    """P1 table 14."""
    for count, row in {"1": "5.43 -> 1.92", "2": "5.55 -> 1.92", "4": "5.24 -> 1.92"}.items():
        yield Variant(label=count, published=row, prune=(f"prune.iterations={count}",), sizes=CHANNELS)


def hidden_losses() -> Iterable[Variant]:
    """P1 table 17. Its pairs are TEACHER:STUDENT of 32 and 16 layers; ours are STUDENT/TEACHER of 3 and 6."""
    rows = {
        "logits": ("2.155", []),
        "0/3": ("29:13, 2.145", ["0/3"]),
        "embedding, 0/3": ("29:13 and embedding, 2.141", ["embedding/embedding", "0/3"]),
        "embedding, 1/4": ("30:14 and embedding, 2.150", ["embedding/embedding", "1/4"]),
        "embedding, 2/5": ("31:15 and embedding, 2.180", ["embedding/embedding", "2/5"]),
        "embedding, 2/2": ("15:15 and embedding, 2.240", ["embedding/embedding", "2/2"]),
        "embedding, 0/1, 1/3, 2/5": ("several pairs: no gain, or worse", ["embedding/embedding", "0/1", "1/3", "2/5"]),
    }
    for label, (row, pairs) in rows.items():
        train = (f"distill.hidden_layers=[{','.join(pairs)}]",) if pairs else ()
        yield Variant(label=label, published=row, train=train, sizes=DEPTH)


def two_steps() -> Iterable[Variant]:
    """P1 table 11's last rows: the small model cut from the teacher, or from a middle one."""
    middle = Variant(label="the middle model", sizes=MIDDLE, share=0.5)
    second = Variant(label="two steps, taught by the teacher", sizes=SMALL, parent=middle, share=0.5)
    yield Variant(label="one shot", published="-", sizes=SMALL)
    yield Variant(label="one shot, half of the tokens", published="51.04, 37.81", sizes=SMALL, share=0.5)
    yield middle
    yield replace(second, published="52.04, 42.45")
    label = "two steps, taught by the middle"
    yield replace(second, label=label, published="worse than by the teacher", taught_by=middle)


def correction() -> Iterable[Variant]:
    """P2 §2: first train the teacher on the students' corpus, with cross-entropy and a fifth of the learning rate."""
    train = ("distill.kd_weight=0", "distill.ce_weight=1", "train.lr=4e-4", "train.min_lr=2e-5")
    corrected = Variant(label="the teacher, corrected", train=train, sizes=TEACHER, start="itself")
    yield Variant(label="uncorrected", published="-", sizes=SMALL)
    yield corrected
    cut = Variant(label="corrected", published="over 6 % lower", sizes=SMALL, parent=corrected, taught_by=corrected)
    yield cut
    yield replace(cut, label="cut before, taught by the corrected", published="on par with it (figure 5)", parent=None)


STUDIES = (
    Study(
        name="aggregations",
        question="Which aggregation over batch / sequence ranks best?",
        published="P1 table 13, right after the cut: loss on 8T, on WikiText2",
        variants=tuple(aggregations()),
        reference="l2 / mean",
        tokens=98_304,
    ),
    Study(
        name="axes",
        question="Width, depth or both, at about equal sizes, and does the order change with training?",
        published="P1 tables 1 and 10: size, KL before -> after 1.8 B tokens, loss",
        variants=tuple(axes()),
        reference="width",
        tokens=204_800,
        evaluations=4,
        seeds=2,
    ),
    Study(
        name="losses",
        question="Which loss trains best?",
        published="P1 table 15: loss, perplexity; its text on temperature and top-k",
        variants=tuple(losses()),
        reference="KL",
        seeds=2,
    ),
    Study(
        name="random",
        question="Does importance matter, and does the teacher?",
        published="P2 figure 6",
        variants=tuple(random_pruning()),
        reference="importance, KL",
        evaluations=4,
    ),
    Study(
        name="repair",
        question="Does the gain of a repair survive training?",
        published="P1 §2.2 on the merge of heads",
        variants=tuple(repairs()),
        reference="plain cut",
        evaluations=4,
    ),
    Study(
        name="iterative",
        question="Is scoring and cutting the channels in several steps better than in one?",
        published="P1 table 14: loss before -> after 1.8 B tokens",
        variants=tuple(iterations()),
        reference="1",
    ),
    Study(
        name="intermediate",
        question="Do losses between hidden states (STUDENT/TEACHER layers) help after a cut to half of the depth?",
        published="P1 table 17, TEACHER:STUDENT of 32 and 16 layers: loss",
        variants=tuple(hidden_losses()),
        reference="logits",
    ),
    Study(
        name="two_steps",
        question="Is an intermediate size worth its tokens?",
        published="P1 table 11, 100 B tokens in the last step: HellaSwag, MMLU",
        variants=tuple(two_steps()),
        reference="one shot",
    ),
    Study(
        name="correction",
        question="Does a teacher teach better if it is first trained on the students' corpus (the embedded one)?",
        published="P2 §2, figure 5: loss",
        variants=tuple(correction()),
        reference="uncorrected",
        data=("data.path=null",),
    ),
)
