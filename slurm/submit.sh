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
read -ra of_command <<<"${site_sbatch_of[$what]:-}"
mkdir -p logs # a job whose log has no folder fails without a word
id=$(sbatch --parsable "${site_sbatch[@]}" "${of_command[@]}" "${options[@]}" "slurm/$what.sbatch" "${overrides[@]}")
echo "${id%%;*}"
