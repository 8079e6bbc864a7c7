#!/usr/bin/env bash
# Trains on a Cloud TPU slice of one's own, asking for another each time it is taken away:
#   ZONE=us-east5-b TYPE=v6e-16 RUNTIME=v2-alpha-tpuv6e PACKAGE=gs://BUCKET/capjax.tar.gz \
#     launch/tpu_vm/queued.sh l14 train --config=cappa_l14 --workdir=gs://BUCKET/runs/l14
# PACKAGE: a checkout as an archive (git archive --format=tar.gz -o capjax.tar.gz HEAD).
# SPOT=1 takes a spot slice. DRY_RUN=1 prints the commands of one round, and that is all.
set -uo pipefail
if (($# < 2)) || [[ -z ${ZONE:-} || -z ${TYPE:-} || -z ${RUNTIME:-} || -z ${PACKAGE:-} ]]; then
  echo "usage: ZONE=... TYPE=... RUNTIME=... PACKAGE=... launch/tpu_vm/queued.sh NAME ARGUMENTS..." >&2
  exit 2
fi
name=$1
shift
printf -v command '%q ' .venv/bin/capjax "$@"

gcloud_() { # SUBCOMMAND... : of this zone
  if [[ -n ${DRY_RUN:-} ]]; then
    printf '%q ' gcloud compute tpus "$@" --zone="$ZONE"
    echo
  else
    gcloud compute tpus "$@" --zone="$ZONE"
  fi
}

everywhere() { # COMMAND: on all machines of the slice
  gcloud_ tpu-vm ssh "$name" --worker=all --command="$1"
}

state() {
  gcloud compute tpus queued-resources describe "$name" --zone="$ZONE" --format='value(state.state)'
}

while true; do
  spot=()
  [[ -n ${SPOT:-} ]] && spot=(--spot)
  gcloud_ queued-resources create "$name" --node-id="$name" --accelerator-type="$TYPE" \
    --runtime-version="$RUNTIME" "${spot[@]}" || exit 1
  until [[ -n ${DRY_RUN:-} || $(state) =~ ^(ACTIVE|FAILED|SUSPENDED)$ ]]; do
    sleep 30
  done
  everywhere "sudo apt-get -qq install -y python3.11-venv && mkdir -p capjax &&
    gsutil -q cp $(printf %q "$PACKAGE") - | tar -xz -C capjax && cd capjax &&
    python3.11 -m venv .venv && .venv/bin/pip install -q -c constraints/py311.txt '.[tpu,gcs]'" &&
    everywhere "cd capjax && exec $command"
  status=$?
  again=
  if ((status)) && { ((status == 75)) || [[ $(state) != ACTIVE ]]; }; then
    again=yes # stopped and saved, or the slice is gone
  fi
  gcloud_ queued-resources delete "$name" --force --quiet
  [[ -n $again ]] || exit "$status"
  echo "launch: the slice was taken (status $status); asking for another" >&2
done
