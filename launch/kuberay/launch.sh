#!/usr/bin/env bash
# Kubernetes with the KubeRay operator: a RayJob that runs one study and takes itself down.
#
#   ABLATE_IMAGE=registry.example/ablate:0.1 bash launch/kuberay/launch.sh [--dry-run] STUDY [arguments]
#
# STUDY is a path in the pods, e.g. /shared/studies/rn50_cc3m.yaml. Also read: ABLATE_NAME (ablate),
# ABLATE_CLAIM (claim of the shared volume: ablate), ABLATE_NODES (1), ABLATE_CPUS (16),
# ABLATE_MEMORY (128Gi) and ABLATE_GPUS (8), the last three per node.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
name=${ABLATE_NAME:-ablate}
manifest=$(
  python3 "$HERE/render.py" "$HERE/kuberay/rayjob.yaml" \
    NAME="$name" IMAGE="${ABLATE_IMAGE:-ablate:0.1.0}" CLAIM="${ABLATE_CLAIM:-ablate}" \
    NODES="${ABLATE_NODES:-1}" CPUS="${ABLATE_CPUS:-16}" MEMORY="${ABLATE_MEMORY:-128Gi}" \
    GPUS="${ABLATE_GPUS:-8}" -- \
    ablate launch "$STUDY" --yes --address auto --runs /shared/runs "$@"
)
if [ -n "$DRY_RUN" ]; then
  printf 'kubectl apply -f - <<MANIFEST\n%s\nMANIFEST\n' "$manifest"
  exit 0
fi
kubectl apply -f - <<< "$manifest"
echo "Follow it with: kubectl logs -f job/$name"
while :; do
  state=$(kubectl get rayjob "$name" -o jsonpath='{.status.jobDeploymentStatus}')
  case $state in
    Complete) exit 0 ;;
    Failed)
      kubectl get rayjob "$name" -o jsonpath='{.status.message}' >&2
      exit 1
      ;;
  esac
  sleep 10
done
