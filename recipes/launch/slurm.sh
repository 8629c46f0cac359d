#!/usr/bin/env bash
# One training over the nodes of a SLURM job, one task a GPU. From the root of the repository:
#
#   sbatch recipes/launch/slurm.sh clip gpu strategy=zero2
#   sbatch --nodes=4 recipes/launch/slurm.sh clip gpu strategy=zero3 --out /shared/run     # other sizes: sbatch's own flags
#
# Lightning reads ranks, main address and port from SLURM. The root and the folder of checkpoints have to lie on a file
# system that all nodes share. A job that is requeued, or submitted again with the same line, resumes by itself.
#
# Environment (with its default): PYTHON (python), PAPERS_CACHE (~/.cache/papers; shared by the nodes),
# NCCL_SOCKET_IFNAME (unset: the network card, where NCCL takes a wrong one).
#SBATCH --job-name=vision-language
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=8
#SBATCH --gres=gpu:8
#SBATCH --cpus-per-task=8
#SBATCH --mem=0
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --output=slurm-%j.out
set -euo pipefail

if [[ $# -lt 2 ]]; then
  echo "usage: sbatch [--nodes=n ...] $0 PAPER SCALE [key=value ...]" >&2
  exit 2
fi
if [[ -z ${SLURM_JOB_ID:-} ]]; then
  echo "$0: not inside a SLURM job; submit it: sbatch $0 $*" >&2
  exit 2
fi
paper=$1 scale=$2
shift 2

cd -- "$SLURM_SUBMIT_DIR" # sbatch runs a copy of this file from elsewhere
python=${PYTHON:-python}
export OMP_NUM_THREADS=${SLURM_CPUS_PER_TASK:-1}

srun --kill-on-bad-exit=1 --cpus-per-task="$OMP_NUM_THREADS" \
  "$python" -m papers train "$paper" --scale "$scale" \
  "nodes=$SLURM_JOB_NUM_NODES" "devices=$SLURM_NTASKS_PER_NODE" "$@"
