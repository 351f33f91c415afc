#!/usr/bin/env bash
#SBATCH --job-name=twig_jax
#SBATCH --nodes=1
#SBATCH --gpus-per-node=1
#SBATCH --ntasks-per-node=1
#SBATCH --signal=TERM@300
#SBATCH --requeue
#SBATCH --open-mode=append
#
# Trains on the GPUs of a Slurm job, one process a GPU, and queues itself again until it is done.
#
#   sbatch [SBATCH OPTIONS] launch/slurm.sh --config FILE [--out FOLDER] [--export FOLDER]
#                                           [--dry_run] [-- ARGUMENT...]
#
# Submit it from the repository's folder, on a file system that all nodes share, with the Python
# environment active. Options of sbatch ask for more than one GPU; give as many tasks as GPUs:
#   sbatch --nodes=2 --gpus-per-node=8 --ntasks-per-node=8 --time=4:00:00 launch/slurm.sh ...
#
#   --config FILE    the run's configuration, see configs/
#   --out FOLDER     where the run keeps its checkpoints, if not where the configuration says
#   --export FOLDER  write the trained model there at the end
#   --dry_run        print what would run; needs no Slurm: bash launch/slurm.sh --dry_run ...
#   ARGUMENT...      further arguments of launch.train, such as --set optim.lr=2e-4
#
# Five minutes before the time limit the processes are told to save and stop, and the job is queued
# again to go on from there. Each node's output is in runs/slurm/JOB-NODE.log.

set -euo pipefail

if [[ ! -f launch/job.sh ]]; then
  echo "slurm.sh: start this from the repository's folder" >&2
  exit 2
fi
arguments=() dry_run="" config="" out="" export=""
source launch/job.sh
parse_flags "config out export" "dry_run" "$@"
require_config

if [[ -z $dry_run ]]; then
  [[ -n ${SLURM_JOB_ID:-} ]] || die "not in a Slurm job: submit it, sbatch launch/slurm.sh ..."
  tasks=${SLURM_NTASKS_PER_NODE:-1} gpus=${SLURM_GPUS_ON_NODE:-}
  # JAX gives each process of a Slurm job the one GPU that its number on the node names.
  [[ -z $gpus || $gpus == "$tasks" ]] ||
    die "$tasks tasks for the $gpus GPUs of a node: give sbatch --ntasks-per-node=$gpus"
fi
# srun takes most of a job's options over from sbatch, but this one only from here.
[[ -z ${SLURM_CPUS_PER_TASK:-} ]] || export SRUN_CPUS_PER_TASK=$SLURM_CPUS_PER_TASK
export PYTHONUNBUFFERED=1

# Preempting a job may signal this shell too: it must outlive srun to read its status.
trap : TERM

train=(python -m launch.train --distributed --config "$config")
[[ -z $out ]] || train+=(--set "out=$out")
[[ -z $export ]] || train+=(--export "$export")
train+=(${arguments[@]+"${arguments[@]}"})

run mkdir -p runs/slurm
# The first process to have saved and stopped must not take the others down while they still save,
# but after one has failed the others must not hold the nodes for long.
status=0
run srun --label --kill-on-bad-exit=0 --wait=600 --open-mode=append \
  --output=runs/slurm/%j-%N.log "${train[@]}" || status=$?
note "Status 75, the run was told to stop and wants to go on, is followed by: scontrol requeue JOB"
if ((status == 75)); then
  say "told to stop before its end; queueing job $SLURM_JOB_ID again"
  run scontrol requeue "$SLURM_JOB_ID" || say "that failed: submit the same command again"
elif ((status)); then
  say "training failed with status $status, see runs/slurm/$SLURM_JOB_ID-*.log"
fi
exit "$status"
