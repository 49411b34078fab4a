#!/bin/bash
# gpt_jax on a slice of a Cloud TPU pod: NAME=mine ZONE=us-west4-a docs/launch/tpu_pod.sh
# Every host of the slice runs one process; JAX asks Cloud TPU which of them it is.
set -euo pipefail
: "${NAME:?the name of the slice}" "${ZONE:?the zone of the slice}"

# Once: the slice, and on each of its hosts the repository and its packages. /shared is a
# file system of all hosts (Filestore, say): a bucket has neither locks nor renames.
#   gcloud compute tpus tpu-vm create $NAME --zone=$ZONE \
#     --accelerator-type=v5litepod-64 --version=v2-alpha-tpuv5-lite
#   gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=all --command='
#     cd /shared/gpt_jax && python3 -m venv ~/venv &&
#     ~/venv/bin/pip install -r requirements.txt "jax[tpu]"'

# The same command again goes on from the last checkpoint, also on another slice.
gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command='
  cd /shared/gpt_jax && source ~/venv/bin/activate &&
  exec python -u -m experiments.train --distributed --config=configs/gpt2.py:size=xl \
    --workdir=/shared/runs/xl --config.data.folder=/shared/data \
    --config.mesh.fsdp=8 --config.batch_size=512 --config.accumulate=1'
