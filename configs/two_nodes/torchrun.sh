#!/usr/bin/env bash
# On each of two machines, with the first one's address: NODE_RANK=0 MAIN=10.0.0.1 configs/two_nodes/torchrun.sh
# More arguments go to lightning-sft: configs/two_nodes/torchrun.sh --trainer.devices 1
set -euo pipefail
: "${MAIN:?the address of the first machine}" "${NODE_RANK:?0 on the first machine, 1 on the second}"
exec torchrun --nnodes 2 --node-rank "$NODE_RANK" --nproc-per-node "${DEVICES:-8}" \
  --master-addr "$MAIN" --master-port "${PORT:-29500}" \
  -m lightning_sft fit --config "$(dirname "$0")/fit.yaml" "$@"
