#!/usr/bin/env bash
# Kubernetes with the KubeRay operator: a RayJob that runs one study and takes itself down.
#
#   ABLATE_IMAGE=registry.example/ablate:0.1 bash launch/kuberay/launch.sh [--dry-run] STUDY [arguments]
#
# STUDY is a path in the pods, e.g. /shared/studies/rn50_cc3m.yaml. What the cluster needs (image,
# volume, nodes, queue, priority, ...) stands in values.sh; ABLATE_VALUES names a copy of it. Each
# launch is a job of its own, named after the study and the time (ABLATE_NAME: another name).
# Exit code: that of `ablate launch`; 3 where Kubernetes could not run it.
set -euo pipefail
source "$(dirname "$0")/../common.sh"
source "${ABLATE_VALUES:-$HERE/kuberay/values.sh}"

study=$(basename "${STUDY%.*}" | tr 'A-Z_.' 'a-z--' | tr -cd 'a-z0-9-' | cut -c 1-40)
moment=$([ -n "$DRY_RUN" ] && echo '0' || date -u +%Y%m%d-%H%M%S)
name=${ABLATE_NAME:-ablate-$study-$moment}
labels="{\"ablate/study\": \"$study\"}"
[ -z "$ABLATE_QUEUE" ] || labels="{\"ablate/study\": \"$study\", \"kueue.x-k8s.io/queue-name\": \"$ABLATE_QUEUE\"}"
manifest=$(
  python3 "$HERE/render.py" "$HERE/kuberay/rayjob.yaml" \
    NAME="$name" LABELS="$labels" SUSPEND="$([ -n "$ABLATE_QUEUE" ] && echo true || echo false)" \
    AUTOSCALE="$([ "$ABLATE_LEAST_NODES" = "$ABLATE_NODES" ] && echo false || echo true)" \
    IMAGE="$ABLATE_IMAGE" CLAIM="$ABLATE_CLAIM" NODES="$ABLATE_NODES" \
    LEAST_NODES="$ABLATE_LEAST_NODES" CPUS="$ABLATE_CPUS" MEMORY="$ABLATE_MEMORY" \
    GPUS="$ABLATE_GPUS" SHM="$ABLATE_SHM" PRIORITY="\"$ABLATE_PRIORITY\"" \
    NODE_SELECTOR="$ABLATE_NODE_SELECTOR" NODE_LABELS="$ABLATE_NODE_LABELS" \
    DEADLINE_S="$ABLATE_DEADLINE_S" PODS_DEADLINE_S="$ABLATE_PODS_DEADLINE_S" -- \
    ablate launch "$STUDY" --yes --address auto --runs /shared/runs "$@"
)
if [ -n "$DRY_RUN" ]; then
  printf 'kubectl create -f - <<MANIFEST\n%s\nMANIFEST\n' "$manifest"
  exit 0
fi
kubectl create -f - <<< "$manifest"
trap 'kubectl delete networkpolicy "$name" --ignore-not-found > /dev/null || true' EXIT
echo "Follow it with: kubectl logs -f job/$name"
echo "Stop it with:   ablate stop on the study's folder; deleting the RayJob costs the steps since the last checkpoint"

status() { kubectl get rayjob "$name" -o "jsonpath={.status.$1}"; }
said=
while :; do
  state=$(status jobDeploymentStatus)
  case $state in
    Complete)
      [ "$(status jobStatus)" != STOPPED ] || { echo "The job was stopped." >&2; exit 130; }
      exit 0
      ;;
    Failed)
      message=$(status message)
      printf '%s\n' "$message" >&2
      # What Ray's job server says of an entrypoint that ended: `ablate`'s own exit code.
      code=$(sed -n 's/.*entrypoint command failed with exit code \([0-9]*\).*/\1/p' <<< "$message")
      exit "${code:-3}"
      ;;
    ValidationFailed)
      printf 'KubeRay refuses the job: %s\n' "$(status message)" >&2
      exit 3
      ;;
    Suspended)
      if [ -z "$ABLATE_QUEUE" ]; then
        echo "The job was suspended; launch again to go on from the last checkpoints." >&2
        exit 3
      fi
      [ "$said" = "$state" ] || echo "Waiting for quota in the queue $ABLATE_QUEUE."
      ;;
  esac
  said=$state
  sleep "${ABLATE_POLL_S:-10}"
done
