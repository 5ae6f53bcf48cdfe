#!/usr/bin/env bash
# Asks Google Cloud for a TPU slice by a queued resource, and waits until it is there.
#
#   PROJECT=my-project ZONE=us-west4-a ./launchers/tpu_queued_resource.sh NAME ACCELERATOR_TYPE
#   PROJECT=my-project ZONE=us-west4-a ./launchers/tpu_queued_resource.sh bert v5litepod-16
#
# SPOT=0 asks for one that is not preempted; NODES=2 for two slices that train together;
# RUNTIME_VERSION (default by type: v2-alpha-tpuv5-lite, v2-alpha-tpuv5, v2-alpha-tpuv6e) and
# VALID_FOR (default 6h: how long the request stands) are passed on.
set -euo pipefail

name=${1:?the name of the slice is missing}
type=${2:?the accelerator type is missing, such as v5litepod-16}
: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE, such as us-west4-a}"

case $type in
  v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
  v5p-*) runtime=v2-alpha-tpuv5 ;;
  v6e-*) runtime=v2-alpha-tpuv6e ;;
  *) runtime=tpu-ubuntu2204-base ;;
esac

options=(--project="$PROJECT" --zone="$ZONE")
request=(--accelerator-type="$type" --runtime-version="${RUNTIME_VERSION:-$runtime}"
  --valid-until-duration="${VALID_FOR:-6h}")
if ((${NODES:-1} > 1)); then
  request+=(--node-count="$NODES" --node-prefix="$name")
else
  request+=(--node-id="$name")
fi
if [[ ${SPOT:-1} == 1 ]]; then
  request+=(--spot)
fi

gcloud compute tpus queued-resources create "$name" "${options[@]}" "${request[@]}"
while :; do
  state=$(gcloud compute tpus queued-resources describe "$name" "${options[@]}" \
    --format='value(state.state)')
  echo "$(date +%T) $name: $state"
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED) exit 1 ;;
  esac
  sleep 30
done
