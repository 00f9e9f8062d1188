#!/bin/bash
# Train on Cloud TPU slices under GKE, by xpk (https://github.com/AI-Hypercomputer/xpk):
#   CLUSTER=mine IMAGE=image-with-this-repository TPU=v5p-128 SLICES=1 WORKDIR=/runs \
#     bash configs/launch/tpu_xpk.sh configs/pretrain/llama_8b.py mesh.fsdp=64
# WORKDIR must be a file system that all workers mount. With several slices set mesh.replica to a multiple of SLICES:
# only that axis crosses between slices. xpk restarts the workload whatever its code, and the run resumes by itself.
set -euo pipefail
config=$1
shift
name=$(basename "$config" .py | tr '_' '-')-$(date +%H%M%S)
xpk workload create \
  --cluster="$CLUSTER" \
  --workload="$name" \
  --docker-image="$IMAGE" \
  --tpu-type="$TPU" \
  --num-slices="${SLICES:-1}" \
  --max-restarts=50 \
  --command="python -m pretrain.main --config $config distributed.cluster=tpu run.workdir=$WORKDIR $*"
