# shellcheck shell=bash
# The functions of all job scripts. slurm/*.sbatch source this file and call `run COMMAND "$@"`.
#
# A job reads the site's settings, logs the environment, runs the checks (a short step on all ranks) and then the command
# (a step on all ranks). It ends with the step's exit code, or requeues itself: after a request to stop, and after a
# training that saved a checkpoint and then failed, without the node that failed. Slurm itself requeues a job whose node
# is down.
set -euo pipefail
cd "${SLURM_SUBMIT_DIR:?submit this with slurm/submit.sh or slurm/chain.sh}"
source slurm/site.sh

GAVE_UP=75           # exit code of a job that was requeued too often
stop_asked=""        # the signal that this script received
unset RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE # a torchrun in the submitting shell would have set these
MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
MASTER_PORT=$((15000 + SLURM_JOB_ID % 15000)) # below Linux's range for outgoing connections
export MASTER_ADDR MASTER_PORT
export PYTHONUNBUFFERED=1
export CUDA_DEVICE_MAX_CONNECTIONS=${CUDA_DEVICE_MAX_CONNECTIONS:-1} # GPUs then start communication before what hides it
if [[ -n ${SLURM_CPUS_PER_TASK:-} ]]; then
  export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$SLURM_CPUS_PER_TASK}
  export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK # since Slurm 22.05 srun does not inherit it from sbatch
fi

log() { printf '%(%F %T)T %s: %s\n' -1 "${SLURM_JOB_NAME:-job}" "$*" >&2; }

# Whether a text contains an address with a password, or with a query, which may be a signature.
has_credentials() { [[ $1 == *://*@* || $1 == *://*\?*=* ]]; }

print_arguments() {
  local word
  for word in "$@"; do
    if has_credentials "$word"; then word="${word%%=*}=(an address with credentials, not shown)"; fi
    printf '  argument %q\n' "$word"
  done
}

# Print the relevant variables. Hide the values of credentials (by the variable's name) and of addresses with a password.
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
        MASTER_* | NCCL_* | GLOO_* | CUDA_* | TORCH_* | OMP_* | HF_* | WANDB_* | MLFLOW_* | PYTHON* | MINITRON_*)
        printf '  %s=%q\n' "$name" "${!name}"
        ;;
    esac
  done
}

# Pass a signal on to all ranks. They save at the same step, write stopped.json and exit with 0.
on_stop() {
  stop_asked=$1
  log "SIG$1: passed on to all ranks"
  scancel --signal="$1" "$SLURM_JOB_ID" 2>/dev/null || true # refused while Slurm ends the job and signals the ranks itself
}

# Run a job step and set rc and failed_node. The step runs in the background, because bash runs traps only between commands and in `wait`.
# A failing rank ends the step at once (--kill-on-bad-exit). --wait ends it a minute after the first rank exits in any case.
step() {
  local pid log_size
  log_size=$(stat --dereference --format=%s /dev/stderr)
  srun --kill-on-bad-exit=1 --wait=60 "${site_srun[@]}" "$@" </dev/null &
  pid=$!
  while kill -0 "$pid" 2>/dev/null; do
    wait "$pid" || true # a signal interrupts `wait`
  done
  rc=0
  wait "$pid" || rc=$?
  failed_node=""
  if ((rc != 0)); then
    failed_node=$(first_failed_node "$log_size")
    rc=$(first_failure "$log_size")
  fi
}

# Print the exit code of the first rank that failed. srun's own exit code is the largest of all ranks: the 143 of ranks that
# srun ended would hide the 2 of the rank that failed. The log has the first failure:
# "srun: error: n2: task 1: Exited with exit code 2", or "... task 1: Killed".
first_failure() {
  local first
  first=$(tail --bytes="+$(($1 + 1))" /dev/stderr | sed -nE '/^srun: error: [^ ]+: tasks? [^ ]+: /{s///p;q}')
  case $first in
    "Exited with exit code "*) echo "${first##* }" ;;
    Killed | "Out Of Memory") echo 137 ;;
    *) echo "$rc" ;;
  esac
}

# Print the node of the first failure: where srun saw a rank fail, or where the other ranks report that a rank has ended.
# Print nothing if ranks of several nodes failed together: then no single node is the cause.
first_failed_node() {
  local lost='rank [0-9]+ on ([^ ]+) has ended or hangs' failed='^srun: error: ([^ ]+): tasks? [^ ]+: ' nodes
  nodes=$(tail --bytes="+$(($1 + 1))" /dev/stderr | grep --extended-regexp --max-count=1 "$lost|$failed" |
    grep --extended-regexp --only-matching "$lost|$failed" | sed -E "s/$lost/\\1/; s/$failed/\\1/" | sort --unique) || true
  if [[ $nodes != *[$'\n,[']* ]]; then echo "$nodes"; fi
}

show_job() { scontrol --oneliner show job "$SLURM_JOB_ID"; }

# Print the newest checkpoint of every training of this job, one line each; an empty line if a training has none.
newest_checkpoints() {
  local mark
  for mark in "${marks[@]}"; do
    printf '%s\n' "$(cat "${mark%/*}/checkpoints/latest" 2>/dev/null || true)"
  done
}

# Whether a training of this job has saved a checkpoint since the start of the step. This limits retries: a failure that
# recurs before the next checkpoint is not retried.
has_saved() {
  local now i
  mapfile -t now < <(newest_checkpoints)
  for i in "${!now[@]}"; do
    [[ -z ${now[i]} || ${now[i]} == "${saved_before[i]-}" ]] || return 0
  done
  return 1
}

# Whether another start of the job can continue the work. rc is the step's exit code.
can_continue() {
  local shown mark
  shown=$(show_job)
  case $shown in
    *" JobState=RUNNING "* | *" JobState=SIGNALING "*) ;;                  # warned before its limit, or preempted
    *" JobState=COMPLETING Reason=TimeLimit "*) ((rc == 0)) || return 1 ;; # at its limit: continue only if it saved
    *) return 1 ;;                                                         # cancelled, or requeued by Slurm itself
  esac
  if ((rc == 0)); then
    for mark in "${marks[@]}"; do [[ ! -e $mark ]] || return 0; done
    return 1
  fi
  if ((rc != 2)) && has_saved; then # 2 is a user's mistake, which another start would repeat
    log "failed with exit code $rc, after a checkpoint: resuming from it"
    bad_node=$failed_node
    return 0
  fi
  # a signal ended the step before it could save (still loading, or a command without checkpoints): restart it
  ((rc >= 128)) && [[ -n $stop_asked || $shown != *" PreemptTime=None "* ]]
}

# Exclude a node from later starts of this job, if the partition has enough others. Slurm accepts that for pending jobs.
exclude() {
  local excluded others
  excluded=$(show_job | sed -nE 's/.* ExcNodeList=([^ ]*) .*/\1/p')
  excluded=$(scontrol show hostnames "$1,${excluded#(null)}")
  others=$(sinfo --noheader --Node --partition="$SLURM_JOB_PARTITION" --format='%N %t' |
    grep --invert-match --extended-regexp ' .*(down|drain|drng|fail|maint|unk|[*!%$@^])' | cut --delimiter=' ' --fields=1 |
    grep --count --invert-match --line-regexp --fixed-strings "$excluded") || true
  if ((others < SLURM_JOB_NUM_NODES)); then
    log "$1 failed; not excluded, because too few other nodes of partition $SLURM_JOB_PARTITION are in service ($others)"
  elif scontrol update "jobid=$SLURM_JOB_ID" "excnodelist=${excluded//$'\n'/,}"; then
    log "$1 failed; the next start excludes it"
  fi
}

# End the job if it has been requeued so often.
give_up_after() {
  local count=${SLURM_RESTART_COUNT:-0}
  if ((count >= $1)); then
    log "unfinished, but already requeued $count times (max_requeues=$max_requeues): giving up"
    exit "$GAVE_UP"
  fi
}

requeue() {
  local count=${SLURM_RESTART_COUNT:-0}
  give_up_after "$max_requeues"
  log "requeued (restart $((count + 1)) of at most $max_requeues)"
  trap '' TERM USR1 # Slurm now ends this script
  scontrol requeue "$SLURM_JOB_ID"
  [[ -z $bad_node ]] || exclude "$bad_node"
  exit 0
}

# run COMMAND [OVERRIDE…]: check and run the command. The overrides reach Python unchanged; no shell parses them again.
run() {
  local command=$1 answer rc failed_node bad_node="" marks=() saved_before=()
  shift
  log "$command on ${SLURM_JOB_NODELIST} (job $SLURM_JOB_ID, restart ${SLURM_RESTART_COUNT:-0})"
  print_arguments "$@"
  print_environment
  give_up_after "$((max_requeues + 1))" # requeues by Slurm itself, after failures of nodes, count too
  trap 'on_stop USR1' USR1
  trap 'on_stop TERM' TERM
  site_check

  answer=$(mktemp)
  step "${site_python[@]}" -m minitron_train.commands.slurm check "$command" "$@" >"$answer"
  mapfile -t marks <"$answer" # paths of stopped.json, which a stopped training writes
  rm -f "$answer"
  if ((rc == 0)); then
    rm -f "${marks[@]}"
    mapfile -t saved_before < <(newest_checkpoints)
    step "${site_python[@]}" -m minitron_train "$command" "$@"
  fi
  if can_continue; then
    requeue
  fi
  log "$command ended with exit code $rc"
  exit "$rc"
}
