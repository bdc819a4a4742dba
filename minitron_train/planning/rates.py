"""The learning rate and the warm-up of a distillation where the user gives none (docs/method.md#learning-rate)."""

from dataclasses import replace

from minitron_train.config import TrainConfig
from minitron_train.runtime import numbers

# docs/data/pruning_race.jsonl has a student of 88.7 M parameters and runs of up to 300,032 tokens.
PARAMETERS = (40_000_000, 200_000_000)  # of students that the rule covers: about half and twice the measured ones
TOKENS = 300_032  # of the longest run
LR, WARMUP = 4e-4, 0.3  # the best of the rates tried, and the share of the steps in which the rate rises
MOST_WARMUP_STEPS = 88  # of the longest run
STUDENTS = f"students of {numbers.short(PARAMETERS[0])} to {numbers.short(PARAMETERS[1])} parameters"


def with_rates(train: TrainConfig, parameters: int) -> tuple[TrainConfig, str]:
    """The settings with a learning rate and a warm-up in place of null, and a line that says which and why.

    A student of another size gets the rate of arXiv 2408.11796 for 4B to 8B students. In a run longer than those of the race,
    the warm-up takes no more steps than there.

    Args:
        parameters: of the student.

    Returns:
        The settings, and the line; the line is empty where the user gave the learning rate.
    """
    chosen, why = train, f"that of the papers' larger students; {STUDENTS} were measured"
    if train.lr is None and PARAMETERS[0] <= parameters <= PARAMETERS[1]:
        steps = min(round(WARMUP * train.num_steps), MOST_WARMUP_STEPS)
        chosen = replace(train, lr=LR, warmup_steps=steps if train.warmup_steps is None else train.warmup_steps)
        limit = f", in runs of up to {numbers.short(TOKENS)} tokens" if train.num_tokens > TOKENS else ""
        why = f"the best that was measured for {STUDENTS}{limit}"
    lr, min_lr, warmup_steps = chosen.rates
    line = (
        f"learning rate {numbers.tiny(lr)}, at the end {numbers.tiny(min_lr)}, warm-up {warmup_steps} of {train.num_steps} "
        f"steps: {why}; train.lr, train.min_lr and train.warmup_steps choose other values"
    )
    settled = replace(chosen, lr=lr, min_lr=min_lr, warmup_steps=warmup_steps)
    return settled, "" if train.lr is not None else line
