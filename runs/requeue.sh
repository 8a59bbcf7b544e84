# Sourced by slurm.sh and slurm_sweep.sh.
#   or_requeue JOB COMMAND ...     runs the command; if a signal ended it, JOB is queued again
# Returns its status. SIGUSR1, which this shell gets before the time limit (sbatch --signal=B:USR1@120), is
# passed on to srun, and by srun to the tasks. The SIGTERM of a preemption the tasks get from SLURM itself.
# A job that was cancelled is not queued again, nor one that has failed by itself.
or_requeue() {
    local job="$1" child status signal='' again=1
    shift
    "$@" &
    child=$!
    trap 'signal=USR1 again=1; kill -USR1 "$child" 2>/dev/null || true' USR1
    trap 'signal=TERM again=1' TERM
    while [ -n "$again" ]; do # a signal to this shell ends wait, too
        again='' status=0
        wait "$child" || status=$?
    done
    trap - USR1 TERM
    case "$status" in
        0 | 2) return "$status" ;;          # done; or a key is wrong, which it would be again
        129 | 138 | 140 | 143) ;;           # 128 + SIGHUP, SIGUSR1, SIGUSR2, SIGTERM: it has saved
        *) [ "$signal" ] || return "$status" ;; # with a signal: killed before it had saved
    esac
    if scontrol show job "$job" | grep -q 'JobState=RUNNING'; then # else: cancelled
        echo "ended with status $status, job $job is queued again"
        scontrol requeue "$job"
    fi
    return "$status"
}
