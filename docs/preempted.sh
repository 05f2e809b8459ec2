#!/bin/bash
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@120
# Runs a command of this toolkit (its options with --output DIR) so that it may be interrupted and started again:
#     sbatch docs/preempted.sh python retrain.py --arch results/search --output /shared/run
# The first start begins the run, every other goes on with it. Asked to stop, the command writes a checkpoint and ends;
# the job then puts itself back into the queue.

asked=0
stop() { asked=$((asked + 1)); kill -TERM "$child" 2>/dev/null; }
trap stop TERM USR1

"$@" --resume auto &
child=$!
while true; do
    before=$asked
    wait "$child"
    code=$?
    [ "$asked" = "$before" ] && break # it was not a signal that ended the waiting
done

if [ "$asked" != 0 ] && [ "$code" != 0 ] && [ -n "$SLURM_JOB_ID" ]; then
    scontrol requeue "$SLURM_JOB_ID"
fi
exit "$code"
