"""Section teach: what the command `teach` writes about the teacher."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import opt, require, require_positive


class TeachKind(StrEnum):
    """What a teacher cache holds of each token: draws from the teacher's distribution, or its final hidden state."""

    samples = "samples"
    hidden = "hidden"


MOST_DRAWS = 65536
WEIGHT_BITS = 16  # float16


def most_sample_bytes(vocab_size: int, draws: int, *, has_weights: bool) -> float:
    """Bytes of a token's samples where all draws differ (the layout is in distillation.sample_codec)."""
    count_bits = (draws - 1).bit_length()
    each = (vocab_size - 1).bit_length() + (WEIGHT_BITS if has_weights else count_bits)
    return (count_bits + draws * each) / 8


@dataclass(kw_only=True, slots=True)
class TeachConfig:
    """The teacher cache: predictions for a stretch of the training stream (arXiv 2503.16870)."""

    kind: TeachKind = opt(
        TeachKind.samples,
        "what is stored of each token; samples: draws from the teacher's distribution, for loss=forward_kl; hidden: the "
        "exact final hidden state, for every loss on logits",
    )
    draws: int = opt(50, "kind=samples: draws of each token; more cost more bytes and give less noise in the gradient")
    proposal_exponent: float = opt(
        1.0, "kind=samples: draw from the teacher's probabilities to this power; other values than 1 store weights"
    )
    num_tokens: int | None = opt(None, "tokens of the stream to store, from its beginning; default: train.num_tokens")
    file_mib: float = opt(256.0, "size of each file, MiB; a killed `teach` repeats the work of its unfinished files")

    @property
    def has_weights(self) -> bool:
        """Whether draws have unequal weights, which are then stored."""
        return self.proposal_exponent != 1

    def validate(self) -> None:
        require_positive(self, "teach", "draws", "proposal_exponent", "num_tokens", "file_mib")
        rule = f"must be at most {MOST_DRAWS}"
        require(self.draws <= MOST_DRAWS, "teach.draws", self.draws, rule, "50 is usual")
