#!/usr/bin/env bash
# Installs this checkout on every host of a Cloud TPU slice and trains there, all hosts together.
#
#   PROJECT=my-project ZONE=us-west4-a ./launchers/tpu_run.sh NAME RECIPE --workdir DIR [...]
#
# What follows the name goes to run_pretraining.py. --data-dir and --workdir must name folders that
# every host sees: a bucket, or a mounted file system. The processes find each other by the
# machines' metadata; NODES=2, as given to tpu_queued_resource.sh, takes all its slices. Each host's supervisor starts its process again after a crash, a hang or the
# loss of another host, RESTARTS times (default 20); `stop` in place of a recipe sends SIGTERM to
# all, which makes them save and end.
#
#   ./launchers/tpu_run.sh NAME stop
set -euo pipefail

name=${1:?the name of the slice is missing}
shift
: "${PROJECT:?set PROJECT to the Google Cloud project}"
: "${ZONE:?set ZONE, such as us-west4-a}"
(($# > 0)) || {
  echo "give a recipe such as configs/bert_base.py, or stop" >&2
  exit 2
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
where=(--project="$PROJECT" --zone="$ZONE")
if ((${NODES:-1} > 1)); then
  tpus=(gcloud compute tpus queued-resources)
  all=(--node=all --worker=all)
  first=(--node=0 --worker=0)
else
  tpus=(gcloud compute tpus tpu-vm)
  all=(--worker=all)
  first=(--worker=0)
fi

on_all() {
  "${tpus[@]}" ssh "$name" "${where[@]}" "${all[@]}" --command="$1"
}

if [[ $1 == stop ]]; then
  on_all 'kill -TERM "$(cat flaxpretrain.pid)"'
  exit
fi

archive=$(mktemp --suffix=.tar.gz)
trap 'rm -f "$archive"' EXIT
git -C "$root" archive --format=tar.gz --output="$archive" HEAD
"${tpus[@]}" scp "$archive" "$name":flaxpretrain.tar.gz "${where[@]}" "${all[@]}"
on_all 'mkdir -p flaxpretrain && tar -xzf flaxpretrain.tar.gz -C flaxpretrain &&
  python3 -m venv flaxpretrain/.venv && flaxpretrain/.venv/bin/pip install -q "./flaxpretrain[tpu]"'

arguments=$(printf ' %q' "$@")
# The log stays on the hosts, so that a lost connection ends nothing.
on_all "cd flaxpretrain && { setsid nohup .venv/bin/python run_pretraining.py$arguments \
  --restarts ${RESTARTS:-20} >>../flaxpretrain.log 2>&1 </dev/null & } &&
  echo \$! >../flaxpretrain.pid"
exec "${tpus[@]}" ssh "$name" "${where[@]}" "${first[@]}" \
  --command='tail --pid="$(cat flaxpretrain.pid)" -n +1 -f flaxpretrain.log'
