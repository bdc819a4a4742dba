"""Section teach: what the command `teach` writes about the teacher."""

from dataclasses import dataclass
from enum import StrEnum

from minitron_train.config.base import opt, require, require_positive


class TeachKind(StrEnum):
    """What a teacher cache holds of each token: draws from the teacher's distribution, or its final hidden state."""

    samples = "samples"
    hidden = "hidden"


MOST_DRAWS = 65536


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

    def validate(self) -> None:
        require_positive(self, "teach", "draws", "proposal_exponent", "num_tokens", "file_mib")
        rule = f"must be at most {MOST_DRAWS}"
        require(self.draws <= MOST_DRAWS, "teach.draws", self.draws, rule, "50 is usual")
