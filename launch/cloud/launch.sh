#!/usr/bin/env bash
# Machines rented for one study: Ray's cluster launcher brings them up, and they go when it ends.
#
#   ABLATE_SHARE=fs-1.efs.us-west-2.amazonaws.com:/ bash launch/cloud/launch.sh [--dry-run] STUDY [arguments]
#
# STUDY is a path on the machines, e.g. /shared/studies/rn50_cc3m.yaml. Also read: ABLATE_NAME
# (ablate), ABLATE_IMAGE, ABLATE_NODES (1), ABLATE_MACHINE (p4d.24xlarge), ABLATE_REGION (us-west-2).
# Workers are spot machines: one that is taken away costs at most a checkpoint interval.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
config=$folder/aws.yaml
token=$folder/token
(umask 077 && od -An -N32 -tx1 /dev/urandom | tr -d ' \n' > "$token")
environment=$(grep -v '^#' "$HERE/ray.env" | tr '\n' ' ')
shown=$token
[ -z "$DRY_RUN" ] || shown='<a file with 64 random hexadecimal digits>'
command=(ablate launch "$STUDY" --yes --address auto --runs /shared/runs "$@")
python3 "$HERE/render.py" "$HERE/cloud/aws.yaml" \
  NAME="${ABLATE_NAME:-ablate}" IMAGE="${ABLATE_IMAGE:-ablate:0.1.0}" NODES="${ABLATE_NODES:-1}" \
  MACHINE="${ABLATE_MACHINE:-p4d.24xlarge}" REGION="${ABLATE_REGION:-us-west-2}" \
  SHARE="${ABLATE_SHARE:-fs-1.efs.us-west-2.amazonaws.com:/}" TOKEN_FILE="$shown" \
  RAY_ENVIRONMENT="${environment% }" -- > "$config"
study="env ${environment}RAY_AUTH_TOKEN_PATH=\$HOME/ablate_ray_token $(printf '%q ' "${command[@]}")"
if [ -n "$DRY_RUN" ]; then
  printf 'cat > aws.yaml <<CONFIG\n%s\nCONFIG\n' "$(cat "$config")"
  config=aws.yaml
fi
run ray up --yes --no-config-cache "$config"
code=0
run ray exec "$config" "${study% }" || code=$?
run ray down --yes "$config"
exit "$code"
