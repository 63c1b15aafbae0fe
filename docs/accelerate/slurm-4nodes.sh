#!/bin/bash
# Four machines of eight GPUs under Slurm. The signal comes two minutes before the end or the pre-emption; the run saves
# itself and exits with 85, and the job puts itself back into the queue and goes on where it stopped.
#SBATCH --job-name=sit
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=USR1@120

head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)

srun bash -c "exec accelerate launch \
    --multi_gpu --num_machines $SLURM_NNODES --num_processes $((SLURM_NNODES * 8)) \
    --machine_rank \$SLURM_NODEID --main_process_ip $head --main_process_port 29500 \
    --rdzv_backend static --mixed_precision bf16 \
    train.py --recipe imagenet256-xl2-400k --mixer atconv --output-dir runs/xl2-atconv --resume auto"
status=$?
if [ $status -eq 85 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit $status
