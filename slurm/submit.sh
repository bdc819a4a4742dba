#!/usr/bin/env bash
# Submit one command as a job and print the job's id.
#   slurm/submit.sh COMMAND [--SBATCH-OPTION=…] [OVERRIDE…]
#   slurm/submit.sh distill --nodes=16 --time=08:00:00 +recipe=4b teacher.path=/models/nemotron-15b
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh

command=${1:-}
if [[ ! -e slurm/$command.sbatch ]]; then
  echo "usage: slurm/submit.sh COMMAND [--SBATCH-OPTION=…] [OVERRIDE…]" >&2
  echo "commands: $(basename --suffix=.sbatch --multiple slurm/*.sbatch | paste --serial --delimiters=' ')" >&2
  exit 2
fi
shift
options=()
while [[ ${1:-} == --* ]]; do
  options+=("$1")
  shift
done
read -ra of_command <<<"${site_sbatch_of[$command]:-}"
mkdir -p logs # a job whose log has no folder fails without a word
id=$(sbatch --parsable "${site_sbatch[@]}" "${of_command[@]}" "${options[@]}" "slurm/$command.sbatch" "$@")
echo "${id%%;*}"
