#!/bin/bash
# Slurm: Llasa-8B on two machines of eight GPUs that share a file system.
#
#   sbatch docs/jobs/slurm.sh
#
# One process a machine, with all of its GPUs. Slurm sends SIGUSR1 two minutes before the time is
# over; the run saves, and the job is queued again.
#SBATCH --job-name=llasa
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=24:00:00
#SBATCH --signal=USR1@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -u
srun .venv/bin/llasa-jax train --config configs/llasa_8b_full.yaml \
  --config configs/machines/8x80gb.yaml --mesh.hosts=true --mesh.data=2 --mesh.slices=2 \
  --train.save_minutes=15
status=$?
# 128 + SIGUSR1: the time was over, and the run is saved.
if [ "$status" -eq 138 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
