#!/bin/bash
# One study on one node with four GPUs, which goes on by itself after a preemption and after the time limit:
#     sbatch slurm.sh recipe.yaml launch.num_processes=4
#SBATCH --job-name=rpsa
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=32
#SBATCH --mem=256G
#SBATCH --time=12:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=TERM@300

# srun, so that SIGTERM reaches rpsa and its ranks: 300 seconds before the time limit, or when the job is preempted
srun --cpus-per-task="$SLURM_CPUS_PER_TASK" rpsa run "$@"
status=$?

# 130: stopped by SIGTERM, a checkpoint is kept; 143: it had not begun
if [ "$status" -eq 130 ] || [ "$status" -eq 143 ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$status"
