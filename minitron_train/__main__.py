"""python -m minitron_train COMMAND [+recipe=NAME] [key=value …]

Kept light on imports: --help and --cfg answer without loading torch; plan loads it to read a teacher's folder or to measure
this machine, and else does without.
"""

import sys

try:  # first of all: from `guard` on, a signal ends the process in one line
    from minitron_train.signals import guard
except KeyboardInterrupt:
    print("interrupted", file=sys.stderr)
    sys.exit(130)

import io
import os
import signal
import warnings
from typing import NoReturn


class Output(io.TextIOWrapper):
    """Standard output. Once its reader has left (`| head`), it ends this process as SIGPIPE would: silently.

    By SystemExit: Hydra has a line of its own for exceptions. Other pipes that break are errors.
    """

    def write(self, text: str, /) -> int:
        """As always."""
        try:
            return super().write(text)
        except BrokenPipeError:
            self.end()

    def flush(self) -> None:
        """As always."""
        try:
            super().flush()
        except BrokenPipeError:
            self.end()

    def end(self) -> NoReturn:
        """Nowhere is where the rest goes, which Python writes at its end."""
        os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
        raise SystemExit(128 + signal.SIGPIPE) from None


def main() -> None:
    """One command, as a process."""
    guard(answer)


def answer() -> int:
    """Run one command; a user's mistake is one line and exit code 2."""
    from minitron_train.errors import UserError
    from minitron_train.parallel.launch import World, read_world, share_cores

    out = sys.stdout
    by_lines = bool(out.line_buffering)
    sys.stdout = Output(out.buffer, out.encoding, out.errors, line_buffering=by_lines, write_through=True)
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
        return 2
    return 0


if __name__ == "__main__":
    main()
