# shellcheck shell=bash disable=SC2034
# Sets the defaults of the site's settings and reads slurm/site.env, or the file that MINITRON_SITE names. See
# site.env.example. The functions at the end parse the command lines of submit.sh, chain.sh and search.sh, and submit a job.
site_sbatch=()              # options of every job
declare -A site_sbatch_of=() # options by command, separated by blanks
site_srun=()                # options of every step
site_modules=()             # environment modules
site_check() { :; }         # a health check at the start of a job
max_requeues=50             # requeues of one job
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

# read_words WHAT WORD…: parse WHAT [--SBATCH-OPTION=…] [OVERRIDE…]; sets what, options and overrides
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
      echo "error: $word: put sbatch's options before the settings, in the form --nodes=2" >&2
      exit 2
    fi
  done
}

# ranks_of COMMAND [SBATCH-OPTION…]: print --ranks=COMMAND:N, with the number of processes of the command's job. Print nothing if
# the options do not tell it, as with -N2 or --nodes=2-4.
ranks_of() {
  local word nodes=1 per_node=1 tasks="" of_command header
  read -ra of_command <<<"${site_sbatch_of[$1]:-}"
  mapfile -t header < <(sed -nE 's/^#SBATCH //p' "slurm/$1.sbatch")
  for word in "${header[@]}" "${site_sbatch[@]}" "${of_command[@]}" "${@:2}"; do
    case $word in
      --nodes=*) nodes=${word#*=} ;;
      --ntasks-per-node=*) per_node=${word#*=} ;;
      --ntasks=*) tasks=${word#*=} ;; # wins over --ntasks-per-node
      -N* | -n*) return ;;
    esac
  done
  if [[ $nodes$per_node$tasks =~ ^[0-9]+$ ]]; then echo "--ranks=$1:${tasks:-$((nodes * per_node))}"; fi
}

# queue COMMAND [SBATCH-OPTION…]: submit the command with the overrides, print the job's id
queue() {
  local of_command id
  read -ra of_command <<<"${site_sbatch_of[$1]:-}"
  mkdir -p logs # a job whose log folder is missing fails without a message
  id=$(sbatch --parsable "${site_sbatch[@]}" "${of_command[@]}" "${@:2}" "slurm/$1.sbatch" "${overrides[@]}") || return
  echo "${id%%;*}"
}
