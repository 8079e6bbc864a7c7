#!/usr/bin/env bash
# shellcheck disable=SC2317  # functions that traps call
# Runs one command as N processes on this machine, each with the GPU of its number, if there are any:
#   launch/local.sh 2 capjax train --config=cappa_b16 --workdir=runs/b16
# SIGTERM, SIGUSR1 and ^C go to all. When one fails, the others have GRACE seconds (60) to follow.
# The exit status is that of the first that failed. Needs bash 5.1.
set -uo pipefail
if (($# < 2)) || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
  echo "usage: launch/local.sh N COMMAND..." >&2
  exit 2
fi
count=$1
shift
export JAX_NUM_PROCESSES=$count
export JAX_COORDINATOR_ADDRESS=127.0.0.1:${JAX_COORDINATOR_PORT:-$((20000 + RANDOM % 12000))}

set -m # a process group for each: ^C comes once, from here
declare -A number
groups=()
for ((i = 0; i < count; i++)); do
  JAX_PROCESS_ID=$i JAX_LOCAL_DEVICE_IDS=$i "$@" &
  number[$!]=$i
  groups+=("-$!")
done
set +m

forward() {
  echo "launch: $1 to $count processes" >&2
  kill -s "$1" "${!number[@]}" 2>/dev/null
}
for name in TERM USR1 INT; do
  # shellcheck disable=SC2064
  trap "forward $name" "$name"
done
killer=
end() {
  trap - EXIT
  kill -KILL -- ${killer:+"-$killer"} "${groups[@]}" 2>/dev/null
}
trap end EXIT

first=0
while ((${#number[@]})); do
  unset ended
  wait -n -p ended "${!number[@]}"
  status=$?
  [[ -n ${ended:-} && -v number[$ended] ]] || continue # a signal came
  if ((status)); then
    echo "launch: process ${number[$ended]} of $count ended with status $status" >&2
  fi
  unset "number[$ended]"
  if ((status && !first)); then
    first=$status
    set -m # a group too: the sleep must not outlive this script with its output open
    (sleep "${GRACE:-60}"; kill -KILL -- "${groups[@]}") >/dev/null 2>&1 &
    set +m
    killer=$!
  fi
done
exit "$first"
