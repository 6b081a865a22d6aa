#!/bin/bash
# {{header}}
{{options}}

# A signal may come at any moment: it is remembered, and passed on to the program if that runs already
signal='' count=0 program=''
take() {
  [ "$signal" = TERM ] || signal=$1
  count=$((count + 1))
  [ -z "$program" ] || kill -s "$1" "$program" 2>/dev/null
}
fail() {
  [ "$signal" != TERM ] || exit 143
  printf 'caption-nb: %s (on %s)\n' "$1" "${HOSTNAME:-this node}" >&2
  exit 1
}
trap 'take USR2' USR2   # the time limit, or a preemption, is near
trap 'take TERM' TERM   # the job is being ended

{{setup}}
set -u   # not before: activation scripts of others use what is not set

# bash heeds signals only between two commands: so the program runs beside the shell, which waits
[ "$signal" != TERM ] || exit 143
code={{warned}}   # warned before the program began: there is nothing to save
if [ -z "$signal" ]; then
  {{program}} &
  program=$!
  [ -z "$signal" ] || kill -s "$signal" "$program" 2>/dev/null   # one that came in this moment
  heard=''
  while [ "$heard" != "$count" ]; do   # a signal ends `wait` early: wait again
    heard=$count
    wait "$program"
    code=$?
  done
  program=''
fi

# 128 and more: killed, without a chance to close its record (but 143 is the program's own word for TERM)
if [ "$code" -ge 128 ] && [ "$code" -ne 143 ]; then
  {{close}} "$code"
  answer=$?
  case $answer in 0 | 85) code=$answer ;; esac
fi

# 85: everything is saved, and the rest can be done later. A requeue sends TERM to this shell too
if [ "$code" -eq 85 ]; then
  trap '' TERM
  # of an array, this task alone: the job id of its last task is that of the whole array
  job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
  for pause in 1 2 3 4 5; do
    answer=$(scontrol requeue "${job:-$SLURM_JOB_ID}" 2>&1) && break
    case $answer in *'pending execution'*) break ;; esac   # SLURM was faster
    printf 'caption-nb: cannot requeue: %s\n' "$answer" >&2
    sleep "$pause"
  done
fi
exit "$code"
