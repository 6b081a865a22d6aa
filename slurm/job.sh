#!/bin/bash
{{header}}
{{options}}

# A signal may come at any moment: it is remembered, and passed on to the program if that runs already
signal='' program=''
take() {
  [ "$signal" = TERM ] || signal=$1
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

[ "$signal" != TERM ] || exit 143
code={{warned}}   # warned before the program began: there is nothing to save
if [ -z "$signal" ]; then
  # A second shell waits for the program, deaf to signals, and says how it ended; this one listens to both.
  # (One shell for everything would not do: `wait` can lose the exit code of a program that ends while a signal comes.)
  exec 3>&1
  exec 4< <(
    trap : USR2 TERM
    (
      echo "$BASHPID"
      exec {{program}} >&3 3>&-
    )
    echo "$?"
  )
  read -r program <&4
  [ -z "$signal" ] || kill -s "$signal" "$program" 2>/dev/null   # one that came in this moment
  while read -r -t 1 code <&4; [ "$?" -gt 128 ]; do :; done   # in pieces of a second: an old bash hears no signal while it reads
  program='' code=${code:-255}
fi

# 128 and more: killed, without a chance to close its record (but 143 is the program's own word for TERM)
if [ "$code" -ge 128 ] && [ "$code" -ne 143 ]; then
  {{close}} "$code"
  answer=$?
  case $answer in 0 | 85) code=$answer ;; esac
fi

# 85: everything is saved, and the rest can be done later. A requeue sends TERM to this shell too, which says no more
trap '' USR2 TERM
if [ "$code" -eq 85 ]; then
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
