#!/usr/bin/env bash
# Submit one command as a job and print the job's id.
#   slurm/submit.sh COMMAND [--SBATCH-OPTION=…] [OVERRIDE…]
#   slurm/submit.sh distill --nodes=16 --time=08:00:00 +recipe=4b teacher.path=/models/nemotron-15b
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh

read_words COMMAND "$@"
if [[ ! -e slurm/$what.sbatch ]]; then
  echo "unknown command '$what'; commands: $(basename --suffix=.sbatch --multiple slurm/*.sbatch | paste --serial --delimiters=' ')" >&2
  exit 2
fi
# this call reports mistakes in the settings, and missing data
mapfile -t ranks < <(ranks_of "$what" "${options[@]}")
"${site_python[@]}" -m minitron_train.commands.slurm accept "${ranks[@]}" "$what" "${overrides[@]}" >/dev/null
queue "$what" "${options[@]}"
