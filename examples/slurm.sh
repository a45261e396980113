#!/bin/bash
# One command as a Slurm job array: each task does part K of N, the last one to end completes it.
#
#   sbatch examples/slurm.sh export SOURCE OUT --recipe nvfp4_experts_only --input-scale one
#   sbatch examples/slurm.sh check OUT --base SOURCE --depth payload --records RECORDS -o report.json
#
# SOURCE, OUT and RECORDS are on a file system that all nodes mount. A task that failed is done
# again by `sbatch --array=K` with the same number of tasks in CKPTGATE_TASKS; parts that are
# complete are not done again.
#SBATCH --job-name=ckptgate
#SBATCH --array=1-16
#SBATCH --requeue
#SBATCH --cpus-per-task=4
#SBATCH --mem=8G
set -euo pipefail
export OMP_NUM_THREADS=1
exec ckptgate "$@" --units "$SLURM_ARRAY_TASK_ID/${CKPTGATE_TASKS:-$SLURM_ARRAY_TASK_COUNT}"
