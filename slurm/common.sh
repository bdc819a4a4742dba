# shellcheck shell=bash
# What all job scripts share; sourced by slurm/*.sbatch, which say `run COMMAND "$@"`.
#
# A job: site settings -> environment on the log -> check (a short step on all ranks) -> the command (a step on all
# ranks) -> the job ends with the step's exit code, or goes back into the queue: when it was asked to stop, or when a
# training failed after it had saved a checkpoint.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with slurm/submit.sh or slurm/chain.sh}"
source slurm/site.sh

GAVE_UP=75           # exit code of a job that has been requeued too often
stop_asked=""        # the signal that this script was sent
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # of a torchrun that this was submitted from
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # below the ports that Linux gives to outgoing connections
export MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not take it from sbatch
fi

log() { printf '%(%F %T)T %s: %s\n' -1 "${SLURM_JOB_NAME:-job}" "$*" >&2; }

# Whether a text holds an address with a password, or with a query, which may be a signature.
has_credentials() { [[ $1 == *://*@* || $1 == *://*\?*=* ]]; }

print_arguments() {
  local word
  for word in "$@"; do
    if has_credentials "$word"; then word="${word%%=*}=(an address with credentials, not shown)"; fi
    printf '  argument %q\n' "$word"
  done
}

# Variables whose names look like credentials, and addresses with a password, are printed without their values.
print_environment() {
  local name
  for name in $(compgen -e | LC_ALL=C sort); do
    if has_credentials "${!name}"; then
      printf '  %s=(an address with credentials, not shown)\n' "$name"
      continue
    fi
    case $name in
      *KEY* | *TOKEN* | *SECRET* | *PASS* | *CREDENTIAL* | *AUTH*) printf '  %s=(set, not shown)\n' "$name" ;;
      SLURM_JOB_* | SLURM_NTASKS* | SLURM_RESTART_COUNT | SLURM_GPUS* | SLURM_CPUS_PER_TASK | SLURM_ARRAY_TASK_ID | \
        MASTER_* | NCCL_* | GLOO_* | CUDA_* | TORCH_* | OMP_* | HF_* | WANDB_* | PYTHON* | MINITRON_*)
        printf '  %s=%q\n' "$name" "${!name}"
        ;;
    esac
  done
}

# A signal to this script reaches the ranks. They save at the same step, leave stopped.json and exit with 0.
on_stop() {
  stop_asked=$1
  log "SIG$1: passed on to all ranks"
  scancel --signal="$1" "$SLURM_JOB_ID" 2>/dev/null || true # refused when Slurm is ending the job: it tells them itself
}

# Run a job step and set rc. It runs in the background, for bash runs traps only between commands and in `wait`.
# A failing rank ends the step at once; should that be missed, the others get a minute after the first has left.
step() {
  local pid log_size
  log_size=$(stat --dereference --format=%s /dev/stderr)
  srun --kill-on-bad-exit=1 --wait=60 "${site_srun[@]}" "$@" </dev/null &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true # a signal interrupts it
  done
  rc=0
  wait "$pid" || rc=$?
  ((rc == 0)) || rc=$(first_failure "$log_size")
}

# srun's exit code is the largest of all ranks: 143 of those that it ended itself would hide the 2 of the one that failed.
# The log tells what came first: "srun: error: n2: task 1: Exited with exit code 2", or "... task 1: Killed".
first_failure() {
  local first
  first=$(tail --bytes="+$(($1 + 1))" /dev/stderr | sed -nE '/^srun: error: [^ ]+: tasks? [^ ]+: /{s///p;q}')
  case $first in
    "Exited with exit code "*) echo "${first##* }" ;;
    Killed | "Out Of Memory") echo 137 ;;
    *) echo "$rc" ;;
  esac
}

show_job() { scontrol --oneliner show job "$SLURM_JOB_ID"; }

# The newest checkpoint of every training of this job, a line each; an empty line where there is none.
newest_checkpoints() {
  local mark
  for mark in "${marks[@]}"; do
    printf '%s\n' "$(cat "${mark%/*}/checkpoints/latest" 2>/dev/null || true)"
  done
}

# Whether a training of this job has saved a checkpoint since the start of the step. A failure that every start repeats
# before the next checkpoint is thus not retried for ever.
has_saved() {
  local now i
  mapfile -t now < <(newest_checkpoints)
  for i in "${!now[@]}"; do
    [[ -z ${now[i]} || ${now[i]} == "${saved_before[i]-}" ]] || return 0
  done
  return 1
}

# Whether the step ended with work left that another start can do. rc is the step's exit code.
can_go_on() {
  local shown mark
  shown=$(show_job)
  case $shown in
    *" JobState=RUNNING "* | *" JobState=SIGNALING "*) ;;                  # warned before its limit, or being preempted
    *" JobState=COMPLETING Reason=TimeLimit "*) ((rc == 0)) || return 1 ;; # at its limit: only if it could save
    *) return 1 ;;                                                         # cancelled; or requeued by Slurm itself
  esac
  if ((rc == 0)); then
    for mark in "${marks[@]}"; do [[ ! -e $mark ]] || return 0; done
    return 1
  fi
  if ((rc != 2)) && has_saved; then # 2 is a mistake of the user's: another start would repeat it
    log "failed with exit code $rc, after a checkpoint: starting again from there"
    return 0
  fi
  # ended by a signal before it could save (still loading, or a command without checkpoints): begin again
  ((rc >= 128)) && [[ -n $stop_asked || $shown != *" PreemptTime=None "* ]]
}

requeue() {
  local count=${SLURM_RESTART_COUNT:-0}
  if ((count >= max_requeues)); then
    log "has work left, and has been requeued $count times already (max_requeues=$max_requeues): giving up"
    exit "$GAVE_UP"
  fi
  log "requeued (restart $((count + 1)) of at most $max_requeues)"
  scontrol requeue "$SLURM_JOB_ID"
  exit 0
}

# run COMMAND [OVERRIDE...]: the words reach Python as they are; no shell reads them again.
run() {
  local command=$1 answer rc marks=() saved_before=()
  shift
  log "$command on ${SLURM_JOB_NODELIST} (job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0})"
  print_arguments "$@"
  print_environment
  trap 'on_stop USR1' USR1
  trap 'on_stop TERM' TERM
  site_check

  answer=$(mktemp)
  step "${site_python[@]}" -m minitron_train.commands.slurm check "$command" "$@" >"$answer"
  mapfile -t marks <"$answer" # files that a training leaves which was stopped
  rm -f "$answer"
  if ((rc == 0)); then
    rm -f "${marks[@]}"
    mapfile -t saved_before < <(newest_checkpoints)
    step "${site_python[@]}" -m minitron_train "$command" "$@"
  fi
  if can_go_on; then
    requeue
  fi
  log "$command ended with exit code $rc"
  exit "$rc"
}
