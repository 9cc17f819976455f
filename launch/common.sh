# Sourced by the launch scripts: their arguments, --dry-run, and what Ray is told everywhere.
#   PLACE.sh [--dry-run] STUDY [further arguments of `ablate launch`]
DRY_RUN=
if [ "${1:-}" = --dry-run ]; then
  DRY_RUN=1
  shift
fi
if [ $# -eq 0 ] || [ "${1#-}" != "$1" ]; then
  sed -n '2,/^set -/{/^set -/!{/^#SBATCH/!s/^# \{0,1\}//p;};}' "$0" >&2
  exit 2
fi
STUDY=$1
shift
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)

run() { # do it, or with --dry-run say it, in a form that a shell reads back
  if [ -n "$DRY_RUN" ]; then
    local line
    printf -v line '%q ' "$@"
    printf '%s\n' "${line% }"
  else
    "$@"
  fi
}

set_up_ray() { # environment of every Ray process, and a secret that nobody else knows
  local setting
  while IFS= read -r setting; do
    case $setting in '' | '#'*) continue ;; esac
    export "${setting?}"
    [ -z "$DRY_RUN" ] || printf 'export %s\n' "$setting"
  done < "$HERE/ray.env"
  if [ -n "$DRY_RUN" ]; then
    echo 'export RAY_AUTH_TOKEN=<64 random hexadecimal digits>'
  else
    RAY_AUTH_TOKEN=${RAY_AUTH_TOKEN:-$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')}
    export RAY_AUTH_TOKEN
  fi
}
