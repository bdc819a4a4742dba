"""Section speed: how the size and speed of models are measured."""

from dataclasses import dataclass

from minitron_train.config.base import Precision, opt, require, require_positive


@dataclass(kw_only=True, slots=True)
class SpeedConfig:
    """How models are timed, through transformers and in one process."""

    in_run: bool = opt(True, "true: `run` and slurm/chain.sh include this command; false: they leave it out")
    batch_sizes: list[int] = opt(lambda: [1, 8], "numbers of sequences to time together, one measurement each")
    prompt_tokens: int = opt(128, "tokens of a prompt; cut where prompt and new tokens exceed a model's context")
    new_tokens: int = opt(16, "tokens to generate after the prompt, for each sequence")
    turns: int = opt(3, "measurements of each model, in turn with the other models; their median is reported")
    precision: Precision = opt(
        Precision.auto, "dtype of all models; auto: bf16 where this machine multiplies it faster"
    )

    def validate(self) -> None:
        require_positive(self, "speed", "prompt_tokens", "new_tokens", "turns")
        require(
            bool(self.batch_sizes) and all(size > 0 for size in self.batch_sizes),
            "speed.batch_sizes",
            self.batch_sizes,
            "must be one or more numbers greater than 0",
            "[1,8] times one sequence and eight",
        )
