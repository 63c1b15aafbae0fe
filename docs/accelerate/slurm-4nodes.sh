#!/bin/bash
# Four machines of eight GPUs under Slurm, a task for each GPU. Slurm signals the tasks two minutes before the end
# (SIGUSR1) or when the job is pre-empted (SIGTERM); the run saves itself and exits with 85, and the job puts itself back
# into the queue and goes on where it stopped. There is no launcher in between: `accelerate launch` and `torchrun` do not
# pass SIGUSR1 on, and exit with 1 whatever the run's status. What they set is set here.
#SBATCH --job-name=sit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=8
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export MASTER_ADDR MASTER_PORT=29500 WORLD_SIZE=$SLURM_NTASKS

# srun exits with the highest status of its tasks. When one ends, the others get five minutes to do so: killed at once,
# they would hide the 85, and left alone, they would wait for a task that crashed.
srun --kill-on-bad-exit=0 --wait=300 bash -c '
    export RANK=$SLURM_PROCID LOCAL_RANK=$SLURM_LOCALID
    exec python train.py --recipe imagenet256-xl2-400k --mixer atconv --mixed-precision bf16 \
        --output-dir runs/xl2-atconv --resume auto'
status=$?
if [ $status -eq 85 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
