#!/usr/bin/env bash
# One process per GPU. All processes of a host see its 8 GPUs, so that NCCL can use NVLink; each
# takes its own.
#   sbatch experiments/clusters/slurm_per_gpu.sh --config=configs/tele_flm_52b.py --workdir=/shared/run
#SBATCH --job-name=flm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --gpu-bind=none
#SBATCH --cpus-per-task=12
#SBATCH --exclusive
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
set -euo pipefail
export SRUN_CPUS_PER_TASK="$SLURM_CPUS_PER_TASK" # since Slurm 22.05, srun does not take it itself
srun --kill-on-bad-exit=1 flm doctor --distributed "$@"
# srun ends with the highest status of its tasks.
exec python -m experiments.clusters.restart \
  srun --kill-on-bad-exit=1 flm train --distributed "$@"
