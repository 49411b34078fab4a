#!/bin/bash
# gpt_jax on two nodes of eight GPUs under Slurm: sbatch docs/launch/slurm.sh
# Send it from the repository's folder, on a file system that all nodes share.
#SBATCH --job-name=gpt_jax
#SBATCH --nodes=2
# One process for each GPU: JAX gives process i of a node its i-th GPU, so every process
# must see all of them (no --gpus-per-task, no --gpu-bind).
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# SIGTERM three minutes before the time is up: all save at the same step and leave
# with exit code 143. It is more than config.grace_s, 120 seconds.
#SBATCH --signal=TERM@180
#SBATCH --requeue

source .venv/bin/activate  # where requirements.txt and "jax[cuda13]" are installed

# Slurm says which processes there are. One that is lost ends the others (JAX after
# config.heartbeat_timeout_seconds, srun at once with --kill-on-bad-exit).
# Newer Slurm does not hand --cpus-per-task on by itself.
srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
  python -u -m experiments.train --distributed --config=configs/gpt2.py:size=xl \
    --workdir=runs/xl --config.mesh.fsdp=8 --config.batch_size=512 \
    --config.accumulate=2
code=$?

# Stopped by the clock: back into the queue, where the same command goes on.
if [ "$code" -eq 143 ]; then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
