"""Model families as tables. To add a family, add its table here."""

from minitron_train.arch.gemma import GEMMA, GEMMA2, GEMMA3_TEXT
from minitron_train.arch.granite import GRANITE
from minitron_train.arch.llama import LLAMA
from minitron_train.arch.mistral import MISTRAL
from minitron_train.arch.nemotron import NEMOTRON
from minitron_train.arch.olmo import OLMO2, OLMO3
from minitron_train.arch.qwen import QWEN2, QWEN3
from minitron_train.arch.seed_oss import SEED_OSS
from minitron_train.arch.shape import Shape
from minitron_train.arch.table import Architecture, ParamSpec
from minitron_train.runtime.errors import UserError

ARCHITECTURES = {
    table.name: table
    for table in (NEMOTRON, LLAMA, MISTRAL, QWEN2, QWEN3, SEED_OSS, GRANITE, GEMMA, GEMMA2, GEMMA3_TEXT, OLMO2, OLMO3)
}


def architecture(name: str) -> Architecture:
    """Return the table of one family.

    Raises:
        UserError: the family is not supported; the message lists the supported ones.
    """
    if name not in ARCHITECTURES:
        raise UserError(f"architecture {name!r} is not supported; supported: {', '.join(sorted(ARCHITECTURES))}")
    return ARCHITECTURES[name]


__all__ = ["ARCHITECTURES", "Architecture", "ParamSpec", "Shape", "architecture"]
