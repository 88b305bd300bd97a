#!/bin/bash
#SBATCH --job-name=@name@
#SBATCH --nodes=@machines@
#SBATCH --ntasks-per-node=1
@gpus@
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=@time@
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
#SBATCH --requeue
#SBATCH --signal=B:TERM@@lead@
# Submit it with `sbatch FILE` in the folder to which the paths of the configuration are relative. This folder has to be
# on a file system that all machines share, and so have the datasets, the models and the run's folder. Add what your
# cluster asks for, such as --account, --partition or --qos.
set -euo pipefail
cd "$SLURM_SUBMIT_DIR"

# The environment, which all machines see under the same path, and one cache of the Hub for all of them.
export PATH="@bin@:$PATH"
export HF_HOME="${HF_HOME:-$SLURM_SUBMIT_DIR/.cache/huggingface}"

# The network interface of the machines' fast network (`ip -brief address` lists them).
@interface@
# export NCCL_DEBUG=INFO

# SIGTERM comes @lead@ s before the time limit, and before a pre-emption if the cluster has send_user_signal among its
# PreemptParameters. The run then finishes its step, saves it and exits with 143; the job is queued again and goes on
# from there. A job that is cancelled stays so.
queue_again() {
    if [[ $(scontrol show job "$SLURM_JOB_ID") == *JobState=RUNNING* ]]; then scontrol requeue "$SLURM_JOB_ID"; fi
}
trap 'queue_again; exit 143' TERM # before there is a run

# A Ray cluster for this job alone, that only a process with its token can use.
# (on MACHINES OPTIONS... COMMAND...: it replaces the process that runs it, and so has to be in the background.)
machines=$SLURM_JOB_NUM_NODES
mapfile -t names < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head=${names[0]}
port=$((20000 + SLURM_JOB_ID % 10000))
RAY_AUTH_TOKEN=$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN
on() { exec srun --overlap --nodes="$1" --ntasks="$1" --cpus-per-task="$SLURM_CPUS_ON_NODE" "${@:2}"; }

on 1 --nodelist="$head" ray start --head --block --port="$port" @count@ --include-dashboard=false \
    --temp-dir="/tmp/ray-$SLURM_JOB_ID" &
for _ in {1..300}; do
    if (: > "/dev/tcp/$head/$port") 2> /dev/null; then break; fi
    sleep 1
done
if ((machines > 1)); then
    on $((machines - 1)) --exclude="$head" ray start --block --address="$head:$port" @count@ &
fi

export RAY_ADDRESS="$head:$port"
@command@ &
run=$!
trap 'kill -TERM "$run"' TERM
code=0
wait "$run" || code=$?
while kill -0 "$run" 2> /dev/null; do # the trap ended the wait
    code=0
    wait "$run" || code=$?
done
if ((code == 143)); then queue_again; fi
mapfile -t others < <(jobs -p)
if ((${#others[@]})); then kill "${others[@]}" 2> /dev/null || true; fi
wait || true
exit "$code"
