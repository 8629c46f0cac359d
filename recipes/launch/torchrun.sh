#!/usr/bin/env bash
# One training over one node or several with torchrun. Run the same line on every node, with its own NODE_RANK:
#
#   NODES=2 NODE_RANK=0 MASTER_ADDR=node0 recipes/launch/torchrun.sh clip gpu strategy=zero2     # on node0
#   NODES=2 NODE_RANK=1 MASTER_ADDR=node0 recipes/launch/torchrun.sh clip gpu strategy=zero2     # on node1
#   DEVICES=2 recipes/launch/torchrun.sh clip smoke strategy=ddp accelerator=cpu                 # two ranks, no GPU
#
# Words behind paper and scale are handed on: key=value of the recipe, --out FOLDER. The folder of checkpoints has to be
# the same on all nodes (a shared file system). After a crash start it again with the same line: it resumes by itself.
#
# Environment (with its default):
#   NODES (1)  NODE_RANK (0)  DEVICES (the node's GPUs; processes a node)
#   MASTER_ADDR (127.0.0.1; needed where NODES > 1)  MASTER_PORT (29500)
#   PYTHON (python)  OMP_NUM_THREADS (this node's cores, shared by its processes)
#   NCCL_SOCKET_IFNAME (unset): the network card, where NCCL takes a wrong one
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: [NODES=n NODE_RANK=i MASTER_ADDR=host] [DEVICES=n] $0 PAPER SCALE [key=value ...]" >&2
  exit 2
fi
paper=$1 scale=$2
shift 2

nodes=${NODES:-1}
if [[ $nodes -gt 1 && ( -z ${MASTER_ADDR:-} || -z ${NODE_RANK:-} ) ]]; then
  echo "$0: $nodes nodes need MASTER_ADDR (the first node's name) and NODE_RANK (0 to $((nodes - 1)))" >&2
  exit 2
fi
python=${PYTHON:-python}
devices=${DEVICES:-$("$python" -c 'import torch; print(torch.cuda.device_count())')}
if [[ $devices -lt 1 ]]; then
  echo "$0: this node has no GPU; for ranks on its CPU: DEVICES=2 $0 $paper $scale accelerator=cpu" >&2
  exit 2
fi
cores=$(getconf _NPROCESSORS_ONLN)
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((cores > devices ? cores / devices : 1))}

cd -- "$(dirname -- "${BASH_SOURCE[0]}")/../.."
exec "$python" -m torch.distributed.run \
  --nnodes "$nodes" --node-rank "${NODE_RANK:-0}" --nproc-per-node "$devices" \
  --master-addr "${MASTER_ADDR:-127.0.0.1}" --master-port "${MASTER_PORT:-29500}" \
  -m papers train "$paper" --scale "$scale" "nodes=$nodes" "devices=$devices" "$@"
