#!/usr/bin/env bash
# The same through XPK (pip install xpk), in a cluster that `xpk cluster create` made:
#   CLUSTER=mine TPU_TYPE=v5litepod-16 IMAGE=REGISTRY/capjax:tpu \
#     launch/gke/xpk.sh l14 train --config=cappa_l14 --workdir=gs://BUCKET/runs/l14
# SLICES=2 takes two. DRY_RUN=1 prints the command, and that is all.
set -euo pipefail
if (($# < 2)) || [[ -z ${CLUSTER:-} || -z ${TPU_TYPE:-} || -z ${IMAGE:-} ]]; then
  echo "usage: CLUSTER=... TPU_TYPE=... IMAGE=... launch/gke/xpk.sh NAME ARGUMENTS_OF_CAPJAX..." >&2
  exit 2
fi
name=$1
shift
printf -v command '%q ' capjax "$@"
set -- xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$name" \
  --tpu-type="$TPU_TYPE" \
  --num-slices="${SLICES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts=100 \
  --restart-on-exit-codes=75 \
  --termination-grace-period-seconds=300 \
  --command="exec $command"
if [[ -n ${DRY_RUN:-} ]]; then
  printf '%q ' "$@"
  echo
else
  exec "$@"
fi
