#!/usr/bin/env bash
# Submit a recipe's whole chain. Each job starts after the jobs succeeded that it depends on; a failure cancels its dependents.
#   slurm/chain.sh RECIPE [--SBATCH-OPTION=…] [OVERRIDE…]      (the options apply to every job)
#   slurm/chain.sh tiny --partition=debug train.lr=5e-4
# A member of a model family starts when the models that it comes from are exported; the jobs of member 8b end in -8b.
# Submit it again to resume an interrupted chain: finished stages end at once, training resumes from its checkpoint.
# A job waits for the user's jobs of the same name (singleton): the last part of the output folder, and the command.
# If another process works on the same stage, the command itself refuses to run.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source slurm/site.sh

read_words RECIPE "$@"

# the first line of the answer is the output folder; this call reports mistakes before anything is queued
mapfile -t ranks < <(for command in pretrain distill; do ranks_of "$command" "${options[@]}"; done)
answer=$("${site_python[@]}" -m minitron_train.commands.slurm chain "${ranks[@]}" "+recipe=$what" "${overrides[@]}")
mapfile -t jobs <<<"$answer"
output_dir=${jobs[0]}

words=("+recipe=$what" "${overrides[@]}")
ids=()
trap '((${#ids[@]} == 0)) || echo "the chain is incomplete; cancel the submitted jobs: scancel ${ids[*]}" >&2' ERR
echo "$what -> $output_dir"
for line in "${jobs[@]:1}"; do
  read -r waits command member <<<"$line" # such as: 4,9 score member=NAME
  job=$command${member:+-${member#member=}}
  overrides=("${words[@]}" ${member:+"$member"})
  before=()
  if [[ $waits != - ]]; then
    for number in ${waits//,/ }; do before+=("${ids[number]}"); done
  fi
  after=$(IFS=:; echo "${before[*]}")
  id=$(queue "$command" --job-name="$(basename "$output_dir")-$job" --dependency="${after:+afterok:$after,}singleton" \
    --kill-on-invalid-dep=yes "${options[@]}")
  printf '  %-8s job %s%s\n' "$job" "$id" "${before[*]:+, after ${before[*]:-}}"
  ids+=("$id")
done
echo "logs: logs/$(basename "$output_dir")-COMMAND-JOB.out; watch: squeue --jobs=$(IFS=,; echo "${ids[*]}"); cancel: scancel ${ids[*]}"
