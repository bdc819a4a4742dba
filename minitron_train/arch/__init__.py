"""Model families as tables. To add a family, add its table here."""

from minitron_train.arch.cwm import CWM
from minitron_train.arch.fused import GLM, PHI3
from minitron_train.arch.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from minitron_train.arch.granite import GRANITE
from minitron_train.arch.llama import LLAMA
from minitron_train.arch.llama_likes import ARCEE, ERNIE_4_5, HELIUM, INTERNLM3, IQUESTCODER
from minitron_train.arch.mistral import MINISTRAL, MINISTRAL3, MISTRAL
from minitron_train.arch.mixtral import MIXTRAL
from minitron_train.arch.nemotron import NEMOTRON
from minitron_train.arch.olmo import OLMO2, OLMO3, OLMOE
from minitron_train.arch.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from minitron_train.arch.seed_oss import SEED_OSS
from minitron_train.arch.shape import Shape
from minitron_train.arch.smollm3 import SMOLLM3
from minitron_train.arch.stablelm import STABLELM
from minitron_train.arch.table import Architecture, ParamSpec
from minitron_train.arch.wrappers import TEXTS
from minitron_train.runtime.errors import UserError

TABLES = (
    *(NEMOTRON, LLAMA, MISTRAL, MINISTRAL, MINISTRAL3, QWEN2, QWEN3, SEED_OSS, SMOLLM3, CWM),
    *(ARCEE, ERNIE_4_5, INTERNLM3, IQUESTCODER, HELIUM, STABLELM, PHI3, GLM, GRANITE),
    *(GEMMA, GEMMA2, GEMMA3_TEXT, OLMO2, OLMO3, QWEN2_MOE, QWEN3_MOE, MIXTRAL, OLMOE),
    *TEXTS,
)
ARCHITECTURES = {table.name: table for table in TABLES}


def architecture(name: str) -> Architecture:
    """Return the table of one family.

    Raises:
        UserError: the family is not supported; the message lists the supported ones.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"architecture {name!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


__all__ = ["ARCHITECTURES", "Architecture", "ParamSpec", "Shape", "architecture"]
