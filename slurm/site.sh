# shellcheck shell=bash disable=SC2034
# Defaults of the site's settings, then slurm/site.env (or the file named by MINITRON_SITE). See site.env.example.
# Last, what submit.sh, chain.sh and search.sh share: their command lines, and how a job is submitted.
site_sbatch=()              # options of every job
declare -A site_sbatch_of=() # options by command, separated by blanks
site_srun=()                # options of every step
site_modules=()             # environment modules
site_check() { :; }         # a health check at the start of a job
max_requeues=50             # of one job
site_python=(python3)
[[ ! -x .venv/bin/python ]] || site_python=(.venv/bin/python)

site_file=${MINITRON_SITE:-slurm/site.env}
if [[ -e $site_file ]]; then
  # shellcheck source=slurm/site.env.example
  source "$site_file"
elif [[ -n ${MINITRON_SITE:-} ]]; then
  echo "MINITRON_SITE=$MINITRON_SITE: no such file" >&2
  exit 2
fi

if ((${#site_modules[@]})); then
  set +u # some sites' module function reads variables that are not set
  module load "${site_modules[@]}"
  set -u
fi

# read_words WHAT WORD...: the words are WHAT [--SBATCH-OPTION=…] [OVERRIDE…]; sets what, options, overrides
read_words() {
  if [[ $# -eq 1 || $2 == -* || $2 == *=* ]]; then
    echo "usage: slurm/$(basename "$0") $1 [--SBATCH-OPTION=…] [OVERRIDE…]" >&2
    exit 2
  fi
  local word
  what=$2
  shift 2
  options=()
  while [[ ${1:-} == --* ]]; do
    options+=("$1")
    shift
  done
  overrides=("$@")
  for word in "$@"; do
    if [[ $word == -* ]]; then
      echo "error: $word: sbatch's options look like --nodes=2 and stand before the settings" >&2
      exit 2
    fi
  done
}

# queue COMMAND [SBATCH-OPTION…]: submit the command with the overrides and print the job's id
queue() {
  local of_command id
  read -ra of_command <<<"${site_sbatch_of[$1]:-}"
  mkdir -p logs # a job whose log has no folder fails without a word
  id=$(sbatch --parsable "${site_sbatch[@]}" "${of_command[@]}" "${@:2}" "slurm/$1.sbatch" "${overrides[@]}") || return
  echo "${id%%;*}"
}
