#!/usr/bin/env bash
# One process per host, which drives all GPUs of the host.
#   sbatch experiments/clusters/slurm_per_host.sh --config=configs/tele_flm_52b.py --workdir=/shared/run
#SBATCH --job-name=flm
#SBATCH --nodes=8
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=96
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
