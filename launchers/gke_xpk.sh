#!/usr/bin/env bash
# Trains on TPU slices of a GKE cluster through xpk (https://github.com/AI-Hypercomputer/xpk).
#
#   PROJECT=my-project ZONE=us-east5-b CLUSTER=my-cluster IMAGE=my-image \
#     ./launchers/gke_xpk.sh NAME TPU_TYPE RECIPE --workdir gs://bucket/run [...]
#
# IMAGE is a container image that has this checkout in /flaxpretrain, installed with [tpu]:
#
#   FROM python:3.12-slim
#   COPY . /flaxpretrain
#   RUN pip install --no-cache-dir "/flaxpretrain[tpu]"
#
# NODES=2 takes two slices. GKE starts preempted pods again, RESTARTS times (default 20) as the
# supervisor in each pod does with a process that ends: --restarts handles what a new process mends,
# xpk's --max-restarts what needs a new machine. xpk gives a pod 30 s or more between SIGTERM and
# SIGKILL; the run saves in them.
set -euo pipefail

name=${1:?the name of the workload is missing}
type=${2:?the TPU type is missing, such as v5litepod-16}
shift 2
: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE, such as us-east5-b}"
: "${CLUSTER:?set CLUSTER to the name of the GKE cluster}"
: "${IMAGE:?set IMAGE to a container image with this checkout in /flaxpretrain}"
(($# > 0)) || {
  echo "give a recipe such as configs/bert_base.py" >&2
  exit 2
}

arguments=$(printf ' %q' "$@")
exec xpk workload create \
  --workload="$name" \
  --cluster="$CLUSTER" --project="$PROJECT" --zone="$ZONE" \
  --tpu-type="$type" --num-slices="${NODES:-1}" \
  --docker-image="$IMAGE" \
  --max-restarts="${RESTARTS:-20}" \
  --command="cd /flaxpretrain && exec python run_pretraining.py$arguments --restarts ${RESTARTS:-20}"
