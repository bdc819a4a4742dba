"""python -m minitron_train COMMAND [+recipe=NAME] [key=value …]

Kept light on imports: --help and --cfg answer without loading torch; plan loads it to read a teacher's folder or to measure
this machine, and else does without.
"""

import sys

try:  # first of all: from `guard` on, a signal ends the process in one line
    from minitron_train.runtime.signals import guard
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

import logging
import os
import warnings


def main() -> None:
    """One command, as a process."""
    guard(answer)


def answer() -> int:
    """Run one command; a user's mistake is one line and exit code 2, a fault of the machine one line and exit code 1."""
    from minitron_train.runtime.errors import MachineError, UserError, error_line, too_many_files
    from minitron_train.runtime.launch import World, read_world, share_cores
    from minitron_train.runtime.masking import Output

    sys.stdout = Output(sys.stdout, line_buffering=bool(sys.stdout.line_buffering))
    sys.stderr = Output(sys.stderr, line_buffering=True)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # about optional packages
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's to megatron-core: nothing a user can act on
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # a CUDA compiler without a GPU
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed by Hydra
    world = World()
    try:
        world = read_world()
        share_cores(world)
        from minitron_train.commands import cli

        cli.run(sys.argv, world)
    except Exception as failure:
        error = too_many_files(failure) or failure
        if not isinstance(error, UserError | MachineError):
            raise
        print(error_line(error, world.rank if world.size > 1 else None), file=sys.stderr)
        return 2 if isinstance(error, UserError) else 1
    return 0


if __name__ == "__main__":
    main()
