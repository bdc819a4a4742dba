#!/usr/bin/env bash
# Submit a recipe's whole chain: each job starts when the one before has succeeded; a failure cancels the rest.
#   slurm/chain.sh RECIPE [--SBATCH-OPTION=…] [OVERRIDE…]      (the options apply to every job)
#   slurm/chain.sh tiny --partition=debug train.lr=5e-4
# Run it again to go on with a half-done chain: finished stages say so and end at once, training resumes from its
# checkpoint. Jobs of an earlier chain that are still there are waited for (singleton), never run beside.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh

read_words RECIPE "$@"

# the first line is the output folder; mistakes in the command line are found here, before anything is queued
answer=$("${site_python[@]}" -m minitron_train.slurm chain "+recipe=$what" "${overrides[@]}")
mapfile -t commands <<<"$answer"
output_dir=${commands[0]}
unset 'commands[0]'

ids=()
trap '((${#ids[@]} == 0)) || echo "not complete; cancel what was submitted: scancel ${ids[*]}" >&2' ERR
echo "$what -> $output_dir"
for command in "${commands[@]}"; do
  dependency=singleton
  ((${#ids[@]} == 0)) || dependency=afterok:${ids[-1]},singleton
  id=$(slurm/submit.sh "$command" --job-name="$(basename "$output_dir")-$command" --dependency="$dependency" \
    --kill-on-invalid-dep=yes "${options[@]}" "+recipe=$what" "${overrides[@]}")
  printf '  %-8s job %s%s\n' "$command" "$id" "${ids[*]:+, after ${ids[-1]:-}}"
  ids+=("$id")
done
echo "logs: logs/$(basename "$output_dir")-COMMAND-JOB.out; watch: squeue --jobs=$(IFS=,; echo "${ids[*]}"); cancel: scancel ${ids[*]}"
