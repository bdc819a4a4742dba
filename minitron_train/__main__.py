"""python -m minitron_train COMMAND [+recipe=NAME] [key=value …]

Kept light on imports: --help and --cfg answer without loading torch; plan loads it to read a teacher's folder or to measure
this machine, and else does without.
"""

import os
import sys
import warnings

from minitron_train.errors import UserError
from minitron_train.parallel.launch import World, read_world, share_cores


def main() -> None:
    """Run one command; a user's mistake is one line and exit code 2."""
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")  # about optional packages
    warnings.filterwarnings("ignore", category=FutureWarning)  # torch's to megatron-core: nothing a user can act on
    os.environ["HYDRA_FULL_ERROR"] = "1"  # exceptions come to us instead of being printed by Hydra
    world = World()
    try:
        world = read_world()
        share_cores(world)
        from minitron_train import cli

        cli.run(sys.argv, world)
    except UserError as error:
        print(f"error: {error}" if world.size == 1 else f"error: {error} (rank {world.rank})", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; finished stages are kept", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
