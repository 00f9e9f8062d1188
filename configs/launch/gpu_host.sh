#!/bin/bash
# Train on plain GPU hosts without a scheduler. Run it on every host, with the variables that torchrun knows:
#   MASTER_ADDR=host0 MASTER_PORT=12321 WORLD_SIZE=2 RANK=0 bash configs/launch/gpu_host.sh configs/pretrain/llama_1b.py
# One process takes all GPUs of its host. A hang (5) or a lost process (7 or 134) starts this host's process again, up to
# RESTARTS times (20 unless set); the processes wait for each other for five minutes and resume from the last checkpoint.
set -u
config=$1
shift
restarts=${RESTARTS:-20}
while true; do
  python -m pretrain.main --config "$config" distributed.cluster=torchrun "$@"
  code=$?
  case $code in
    5 | 7 | 134 | 137) [ "$restarts" -gt 0 ] || exit "$code" ;;
    *) exit "$code" ;;
  esac
  restarts=$((restarts - 1))
  echo "process $RANK ended with code $code; starting it again, $restarts restarts left" >&2
done
