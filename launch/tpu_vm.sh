#!/usr/bin/env bash
# Trains on a Cloud TPU, from asking for one to deleting it: creates, waits, sets up, runs on all its hosts, follows the
# log, and begins anew with a fresh TPU where a spot one was taken away. launch/tpu_worker.sh is its hand on each host.
set -euo pipefail

usage="usage: launch/tpu_vm.sh --zone=ZONE --type=TYPE [options] --config=RECIPE --workdir=DIR [--config.key=value ...]
  --zone=ZONE       such as us-west4-a
  --type=TYPE       such as v5litepod-16, v5p-32, v6e-16
  --name=NAME       of the queued resource and its TPU (default daajax)
  --project=ID      (default: gcloud's own)
  --runtime=IMAGE   (default: the one for the type)
  --spot            a spot TPU: cheaper, may be taken away at any time; training goes on with the next
  --setup=COMMAND   run on every host before each start, such as the mount of a shared disk; it must bear repetition
  --keep            do not delete the TPU at the end
  --smoke           no recipe: 3 updates of a tiny random model on every chip, whose first loss must be ln 2; where the
                    TPU has several hosts, with --workdir=DIR too
  --dry-run         print every gcloud line
Everything else goes to \`python -m daajax.train\` on every host, in a copy of this checkout; DIR, and what else is read,
is gs://bucket/folder, or on a disk that all hosts share (--setup). The same line again goes on watching.
Variables: RESTARTS, how often a death or a stand-still is tried again (10) · POLL_SECONDS between two looks (30)
Exit codes: 0 done, 1 an error, 130 stopped from the keyboard (training goes on), else that of the training."

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
name=daajax zone="" type="" runtime="" setup=true keep=0 dry=0 module=daajax.train recipe=0
tier=() project=() arguments=()
poll=${POLL_SECONDS:-30}
remote=daajax # the checkout's copy, in the home folder of every host

say() { echo "launch/tpu_vm.sh: $1" >&2; }
fail() {
  say "$1"
  exit 1
}

for argument in "$@"; do
  case $argument in
    --zone=* | --type=* | --name=* | --runtime=* | --setup=*)
      option=${argument%%=*}
      printf -v "${option#--}" %s "${argument#*=}"
      ;;
    --project=*) project=("$argument") ;;
    --spot) tier=(--spot) ;;
    --keep) keep=1 ;;
    --smoke) module=demo.smoke ;;
    --dry-run) dry=1 ;;
    --help | -h)
      echo "$usage"
      exit 0
      ;;
    --zone | --type | --name | --runtime | --setup | --project) fail "$argument needs its value behind a =: $argument=..." ;;
    *)
      [[ $argument == --config || $argument == --config=* ]] && recipe=1
      arguments+=("$argument")
      ;;
  esac
done
[[ -n $zone && -n $type ]] || fail "--zone=ZONE and --type=TYPE are needed; --help says more."
[[ $module == demo.smoke ]] || ((recipe)) || fail "no recipe: --config=configs/dpo_llama.py, or --smoke to try the TPU."
[[ $module == demo.smoke || " ${arguments[*]}" == *" --workdir="* ]] || fail "--workdir=gs://bucket/folder is needed, or one on a disk that all hosts share."
if [[ -z $runtime ]]; then
  case $type in
    v4-*) runtime=tpu-ubuntu2204-base ;;
    v5litepod-*) runtime=v2-alpha-tpuv5-lite ;;
    v5p-*) runtime=v2-alpha-tpuv5 ;;
    v6e-*) runtime=v2-alpha-tpuv6e ;;
    *) fail "--type=$type: no runtime is known for it; name one with --runtime=IMAGE." ;;
  esac
fi
((dry)) || command -v gcloud >/dev/null || fail "there is no gcloud; https://cloud.google.com/sdk/docs/install has it."

where=("--zone=$zone" "${project[@]}" --quiet)
log=$root/runs/tpu_vm/$name.log

line() { # words as one could type them
  local word words=()
  for word in "$@"; do
    [[ $word =~ ^[[:alnum:]_./:=,@%+-]+$ ]] || word=${word@Q}
    words+=("$word")
  done
  echo "${words[*]}"
}

tpus() { # gcloud compute tpus GROUP VERB NAME ..., or the line alone
  local group=$1 verb=$2
  shift 2
  if ((dry)); then
    line gcloud compute tpus "$group" "$verb" "$@" "${where[@]}"
  else
    gcloud compute tpus "$group" "$verb" "$@" "${where[@]}"
  fi
}

create() {
  say "asking for a $type in $zone"
  tpus queued-resources create "$name" "--node-id=$name" "--accelerator-type=$type" "--runtime-version=$runtime" "${tier[@]}"
}

delete() { tpus queued-resources delete "$name" --force; }

look() { # sets state: that of the queued resource, NONE, or UNKNOWN with what gcloud says
  local said
  if ((dry)); then
    tpus queued-resources describe "$name" '--format=value(state.state)'
  elif said=$(tpus queued-resources describe "$name" '--format=value(state.state)' 2>"$log.gcloud"); then
    state=${said:-UNKNOWN}
  elif grep -qiE 'NOT_FOUND|not found' "$log.gcloud"; then
    state=NONE
  else
    state=UNKNOWN
  fi
}

on_hosts() { # WORKERS COMMAND
  tpus tpu-vm ssh "$name" "--worker=$1" --ssh-flag=-oServerAliveInterval=30 "--command=$2"
}

set_up() {
  local archive=daajax.tgz
  say "copying the checkout to all hosts and setting them up: minutes"
  if ((!dry)); then
    archive=$(mktemp -d)/daajax.tgz
    tar -C "$root" --exclude='./.venv*' --exclude=./.git --exclude=./.cache --exclude=./runs --exclude=__pycache__ -czf "$archive" .
  fi
  tpus tpu-vm scp "$archive" "$name:$remote.tgz" --worker=all
  on_hosts all "mkdir -p $remote && tar -xzf $remote.tgz -C $remote && $remote/launch/tpu_worker.sh set-up"
}

start() {
  say "starting on all hosts"
  ((dry)) || : >"$log.part"
  on_hosts all "{ $setup; } && $remote/launch/tpu_worker.sh start$(printf ' %q' "$module" "${arguments[@]}")"
}

follow() { # sets ended: the exit code of the training, NONE if there is no training, empty if the connection broke
  # Before the first set-up there is no such script: no training either.
  local ask="test ! -x $remote/launch/tpu_worker.sh && echo exit code NONE || $remote/launch/tpu_worker.sh follow"
  if ((dry)); then
    on_hosts 0 "$ask 0"
    return
  fi
  on_hosts 0 "$ask $(wc -l <"$log.part")" | tee -a "$log" "$log.part" | grep --line-buffered -v '^exit code ' || true
  ended=$(tail -n 1 "$log.part" | sed -n 's/^exit code //p')
  sed -i '/^exit code /d' "$log.part"
}

erred() { # whether a host's training ended with a clear error, which the other hosts know as its death alone
  local codes # all of them before any is looked for, also where a host does not answer
  codes=$(on_hosts all "$remote/launch/tpu_worker.sh code" 2>/dev/null || true)
  grep -qx 'exit code 1' <<<"$codes"
}

finish() { # CODE
  if ((keep)); then
    say "the TPU is kept; its end: gcloud compute tpus queued-resources delete $name --force ${where[*]}"
  else
    say "deleting the TPU"
    delete || say "it could not be deleted: do so yourself, or it goes on costing"
  fi
  exit "$1"
}

if ((dry)); then
  say() { :; }
  create && look && set_up && start && follow
  ((keep)) || delete
  exit 0
fi

mkdir -p "$(dirname "$log")"
touch "$log"
: >"$log.part"
trap 'say "training goes on: the same line again watches it; its end: gcloud compute tpus queued-resources delete $name --force ${where[*]}"; exit 130' INT TERM
restarts=0 unknown=0 lost=0 said="" state="" ended=""
while true; do
  look
  [[ $state == UNKNOWN ]] || unknown=0
  case $state in
    NONE) create || fail "the request was refused; gcloud said why." ;;
    ACTIVE)
      follow
      [[ -z $ended ]] || lost=0
      case $ended in
        0 | 1 | 130)
          say "the training ended with exit code $ended; its log: $log"
          finish "$ended"
          ;;
        NONE)
          set_up || fail "the hosts could not be set up; the TPU is still there: mend it and give the same line again."
          start || fail "the hosts did not start; the TPU is still there: mend it and give the same line again."
          ;;
        "")
          lost=$((lost + 1))
          ((lost < 20)) || fail "no connection to host 0 after $lost tries; the TPU is still there."
          sleep "$poll"
          ;;
        *)
          if [[ $ended != 42 ]]; then
            if erred; then
              say "the training of another host ended with an error; its log there: ~/daajax-run/log"
              finish 1
            fi
            restarts=$((restarts + 1))
            ((restarts <= ${RESTARTS:-10})) || finish "$ended"
          fi
          say "exit code $ended: starting again"
          start || true # a host may be gone: the next look tells
          ;;
      esac
      ;;
    SUSPENDED)
      say "the TPU was taken away: a new one is asked for"
      delete || sleep "$poll"
      ;;
    FAILED)
      tpus queued-resources describe "$name" || true
      delete || true
      fail "the request failed; above is why, and it was deleted."
      ;;
    UNKNOWN)
      cat "$log.gcloud" >&2
      unknown=$((unknown + 1))
      ((unknown < 20)) && [[ -n $said ]] || fail "gcloud does not answer; what it said is above."
      sleep "$poll"
      ;;
    *)
      [[ $said == "$state" ]] || say "$state"
      sleep "$poll"
      ;;
  esac
  said=$state
done
