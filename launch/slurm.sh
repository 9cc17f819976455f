#!/usr/bin/env bash
#SBATCH --job-name=ablate
#SBATCH --ntasks-per-node=1
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# A Slurm allocation: Ray across its nodes, one study, Ray down again.
#
#   sbatch --nodes=4 --gpus-per-node=8 --cpus-per-task=72 launch/slurm.sh STUDY [arguments]
#   bash launch/slurm.sh [--dry-run] STUDY [arguments]    # in an allocation; a dry run anywhere
#
# 300 s before the time limit, and when the job is preempted, trials write a checkpoint and stop.
# A job that was preempted (PreemptMode=REQUEUE), or lost a node, goes back into the queue and
# continues where it stopped; with ABLATE_REQUEUE=1 so does one that came to its time limit.
# Without --cpus-per-task Slurm gives a node's task one CPU: what the study's gang needs is compared
# with the allocation before anything starts.
# ABLATE_INTERFACE (e.g. ib0) names the network that Ray uses; otherwise the node's first address.
# The study, its runs folder and its data must be on storage that every node mounts.
set -euo pipefail
# Slurm runs a copy of this script from its spool folder; submit from the repository.
cd "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}"
source launch/common.sh

if [ -n "$DRY_RUN" ]; then
  : "${SLURM_JOB_ID:=4711}" "${SLURM_JOB_NUM_NODES:=2}" "${SLURM_JOB_CPUS_PER_NODE:=64(x2)}"
  head_address='<address of the first node>'
else
  : "${SLURM_JOB_ID:?submit with sbatch, or look first with --dry-run}"
  if [ -n "${ABLATE_INTERFACE:-}" ]; then
    head_address=$(ip -4 -o addr show "$ABLATE_INTERFACE" | awk '{sub("/.*", "", $4); print $4; exit}')
  else
    head_address=$(hostname -I | awk '{print $1}')
  fi
fi
if [ -n "${SLURM_ARRAY_JOB_ID:-}" ]; then
  echo "An array would start one study several times at once; submit without --array: a study's" \
    "trials already run side by side on the job's nodes." >&2
  exit 2
fi
if [ "${SLURM_HET_SIZE:-1}" != 1 ]; then
  echo "This job has $SLURM_HET_SIZE components, and a study runs in one alone; submit one, without" \
    "':' between sets of options. Its nodes may differ: each gives as many CPUs as the smallest has." >&2
  exit 2
fi
# Such as 72(x3),36: every node's task asks for as many CPUs as the smallest node has.
cpus=$(tr , '\n' <<< "$SLURM_JOB_CPUS_PER_NODE" | sed 's/(.*//' | sort -n | head -n 1)
run python "$HERE/check_nodes.py" "$STUDY" "$SLURM_JOB_NUM_NODES" "$cpus" \
  "${SLURM_GPUS_ON_NODE:-0}"
# Jobs that share a node get ports of their own.
port=$((20000 + SLURM_JOB_ID % 20000))
set_up_ray

# One task per node; the job script runs on the first node, which is node 0 of the step.
node='
if [ "$SLURM_NODEID" = 0 ]; then
  set -- --head --node-ip-address="$1" --port="$2" --include-dashboard=false
else
  set -- --address="$1:$2"
fi
files=/tmp/ablate-$SLURM_JOB_ID-$SLURM_NODEID
rm -rf "$files"   # of a first life of this job that was killed
# Jobs of ours that were killed left theirs.
if mine=$(squeue --noheader --me --format=%A); then
  for old in /tmp/ablate-[0-9]*-[0-9]*; do
    job=${old#/tmp/ablate-}
    if [ -O "$old" ] && ! grep --quiet --line-regexp "${job%-*}" <<< "$mine"; then rm -rf "$old"; fi
  done
fi
mkdir -m 700 "$files"
exec ray start "$@" --num-cpus="$SLURM_CPUS_ON_NODE" \
  ${SLURM_GPUS_ON_NODE:+--num-gpus="$SLURM_GPUS_ON_NODE"} --temp-dir="$files" \
  --object-store-memory=200000000 --disable-usage-stats --block'
clear='rm -rf "/tmp/ablate-$SLURM_JOB_ID-$SLURM_NODEID"'
on_every_node=(srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1
  --cpus-per-task="$cpus" --cpu-bind=none --overlap bash -c)
if [ -n "$DRY_RUN" ]; then
  run "${on_every_node[@]}" "$node" ray-node "$head_address" "$port"
else
  "${on_every_node[@]}" "$node" ray-node "$head_address" "$port" &
  step=$!
  # srun ends its step with SIGKILL, so Ray's files are removed after it.
  take_down() {
    kill "$step" 2>/dev/null || true
    wait "$step" 2>/dev/null || true
    "${on_every_node[@]}" "$clear"
  }
  trap take_down EXIT
fi
run python "$HERE/wait_for_nodes.py" "$head_address:$port" "$SLURM_JOB_NUM_NODES"

if [ -n "$DRY_RUN" ]; then
  run ablate launch "$STUDY" --yes --address "$head_address:$port" "$@"
  run "${on_every_node[@]}" "$clear"
  exit 0
fi
ablate launch "$STUDY" --yes --address "$head_address:$port" "$@" &
study=$!
ending=
# Ctrl-C for the study: running trials write a checkpoint and stop.
trap 'ending=limit; kill -INT "$study" 2>/dev/null || true' USR1
trap 'ending=preempted; kill -INT "$study" 2>/dev/null || true' TERM
code=0
wait "$study" || code=$?
# A signal ends `wait`, not the study.
while kill -0 "$study" 2>/dev/null; do
  code=0
  wait "$study" || code=$?
done
if [ "$ending" = limit ] && [ "$code" -ne 0 ] && [ "${ABLATE_REQUEUE:-}" = 1 ]; then
  trap - EXIT
  take_down   # a requeue ends this script where it stands
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
