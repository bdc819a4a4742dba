#!/usr/bin/env bash
# Submit a search: the scores, then a job array with one task per candidate, then a job that ranks the candidates.
#   slurm/search.sh RECIPE [--SBATCH-OPTION=…] [OVERRIDE…]      (the options apply to every job)
#   slurm/search.sh 4b teacher.path=/models/nemotron-15b search.retrain_tokens=1_800_000_000
# Submit it again to resume: finished candidates end at once. The ranking follows after all tasks succeeded.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh

read_words RECIPE "$@"

answer=$("${site_python[@]}" -m minitron_train.commands.slurm candidates "+recipe=$what" "${overrides[@]}")
mapfile -t lines <<<"$answer"
name=$(basename "${lines[0]}")
count=${lines[1]}

overrides=("+recipe=$what" "${overrides[@]}")

# submit_one LABEL COMMAND DEPENDENCY [SBATCH-OPTION]: sets `id` to the job's id
submit_one() {
  id=$(queue "$2" --job-name="$name-$1" --dependency="$3" --kill-on-invalid-dep=yes "${@:4}" "${options[@]}")
  printf '  %-8s job %s\n' "$1" "$id"
}

echo "$what -> ${lines[0]}, $count candidates"
submit_one score score singleton
submit_one try search "afterok:$id,singleton" "--array=1-$count"
submit_one rank search "afterok:$id,singleton" --nodes=1
