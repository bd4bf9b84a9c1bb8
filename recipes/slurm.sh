#!/usr/bin/env bash
# Trains a recipe on the GPUs of several nodes, and goes on where it was when the job is pre-empted or its time is up.
#
#     sbatch recipes/slurm.sh recipes/mnist5k/full.yaml [KEY=VALUE …]
#
# The recipe, the data and the run's folder lie on a file system that all nodes share. data.batch_size is that of one
# GPU: an update takes batch_size × grad_accum × GPUs images. A job that goes on may have another number of GPUs if that
# product stays, since then the weights do as well. The recipes of imagenet1k are for 8 GPUs: on these 16, give half of
# their data.batch_size.
#
# A run that is told to stop (SIGTERM) saves a checkpoint. By itself `vit-efficient train` then ends with status 75,
# torchrun with 1 as for any other end that is none; so this script goes by the reason why the job ends:
#   time      120 s before the end SLURM sends USR1 to this script, which stops the run and queues the job again;
#   pre-emption (PreemptMode=REQUEUE), or a node that fails: SLURM sends TERM to the run and queues the job again;
#   a process that dies: torchrun names it and ends those of its node, srun those of the others; the job has failed.
# Pre-emption often leaves 30 s only: with checkpoint_steps=500 no more than 500 updates are lost if that is too short.
# Where users may not requeue jobs, scontrol's error ends the job, and the same sbatch command goes on.
#
# Options of sbatch override the lines below: `sbatch --nodes=1 --gpus-per-node=4 --cpus-per-task=32 …` is one node of 4
# GPUs. Many clusters want a partition and an account (## is a comment), some --gres=gpu:8 instead of --gpus-per-node=8.

##SBATCH --partition=NAME
##SBATCH --account=NAME
#SBATCH --job-name=vit-efficient
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
#SBATCH --output=slurm-%j.out

# The job has the environment that sbatch is called in. To have it activated here:
# source /path/to/environment/bin/activate

set -euo pipefail

if (($# == 0)); then
    echo "usage: sbatch $0 RECIPE [KEY=VALUE …]" >&2
    exit 2
fi

nodes=$(scontrol show hostnames "$SLURM_JOB_NODELIST")
first=${nodes%%$'\n'*}
export OMP_NUM_THREADS=1                  # loader processes are the parallelism of the CPU (data.workers)
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=100 # seconds for the checkpoint, before torchrun kills what is left

requeue=
# The signal is for the steps of the job, not for this script.
trap 'requeue=yes; scancel --signal=TERM "$SLURM_JOB_ID"' USR1

srun --kill-on-bad-exit=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    torchrun \
    --nnodes="$SLURM_NNODES" \
    --nproc-per-node="$SLURM_GPUS_ON_NODE" \
    --rdzv-id="$SLURM_JOB_ID.${SLURM_RESTART_COUNT:-0}" \
    --rdzv-backend=c10d \
    --rdzv-endpoint="$first:$((20000 + SLURM_JOB_ID % 20000))" \
    -m vit_efficient train "$@" resume=auto &
step=$!

status=0
wait "$step" || status=$?
if [[ $requeue ]]; then # the signal has interrupted the first wait
    status=0
    wait "$step" || status=$?
    if ((status)); then
        exec scontrol requeue "$SLURM_JOB_ID"
    fi
fi
exit "$status"
