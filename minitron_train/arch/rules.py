"""Rules of the programs that load an exported folder, checked before any work is done."""

from minitron_train.arch import Shape, architecture
from minitron_train.runtime.errors import UserError


def check_rules(shape: Shape, where: str) -> None:
    """Reject a shape that transformers' own config class would reject."""
    for rule in architecture(shape.architecture).rules:
        broken = rule(shape)
        if broken:
            raise UserError(
                f"{where}: {broken} (a rule of transformers' {shape.architecture} config); change the target"
            )
