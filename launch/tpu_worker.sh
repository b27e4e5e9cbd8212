#!/usr/bin/env bash
# Runs on one worker (host) of a TPU slice. launch/tpu_vm.sh copies it to each worker and calls it; do not run it
# by hand.
#
#   launch/tpu_worker.sh install [--nfs=IP:/SHARE] [--bucket=NAME]   install Python and packages, mount /mnt/nfs and
#                                                                    /mnt/bucket
#   launch/tpu_worker.sh start [--restarts=K] [--env=NAME=VALUE]... ARGUMENTS OF python -m jax_transfer.main
#   launch/tpu_worker.sh status                                      print one line: status: running | exit N | ...
#   launch/tpu_worker.sh stop                                        send SIGTERM: the study saves its state and exits
#
# The log is ~/jax_transfer.log.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source-path=SCRIPTDIR source=common.sh
source launch/common.sh

state=$HOME/.jax_transfer
log=$HOME/jax_transfer.log
python=${PYTHON:-$PWD/.venv/bin/python}

apt_install() { sudo apt-get -o DPkg::Lock::Timeout=600 install --yes --quiet "$@"; }

mount_nfs() {
  if mountpoint --quiet /mnt/nfs; then return; fi
  sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
  apt_install nfs-common
  sudo mkdir -p /mnt/nfs
  sudo mount -t nfs -o rw,hard,timeo=600 "$1" /mnt/nfs
  # A new Filestore share is owned by root.
  [[ -w /mnt/nfs ]] || sudo chmod go+rwx /mnt/nfs
}

mount_bucket() {
  if mountpoint --quiet /mnt/bucket; then return; fi
  local packages=https://packages.cloud.google.com/apt key=/usr/share/keyrings/cloud.google.asc
  curl --fail --silent --show-error "$packages/doc/apt-key.gpg" | sudo tee "$key" >/dev/null
  echo "deb [signed-by=$key] $packages gcsfuse-$(lsb_release -cs) main" |
    sudo tee /etc/apt/sources.list.d/gcsfuse.list >/dev/null
  sudo apt-get -o DPkg::Lock::Timeout=600 update --quiet
  apt_install gcsfuse
  sudo install --directory --owner="$(id -un)" /mnt/bucket
  gcsfuse --implicit-dirs "$1" /mnt/bucket
}

install_all() {
  local option
  for option in "$@"; do
    case $option in
      --nfs=*) mount_nfs "${option#*=}" ;;
      --bucket=*) mount_bucket "${option#*=}" ;;
      *) die "install: unknown option $option" ;;
    esac
  done
  # The image has Python 3.10; uv installs a newer one without changing the system's.
  python3 -m pip install --user --quiet --upgrade uv
  [[ -x .venv/bin/python ]] || python3 -m uv venv --quiet --python 3.11 .venv
  python3 -m uv pip install --quiet --python .venv/bin/python --requirement requirements-tpu.txt
}

running() { [[ -f $state/pid ]] && kill -0 "$(cat "$state/pid")" 2>/dev/null; }

start() {
  if running; then
    echo "already running; the log is $log on each worker"
    return
  fi
  mkdir -p "$state"
  rm -f "$state"/*
  # Its own session, so that it outlives the ssh connection.
  setsid "$PWD/launch/tpu_worker.sh" keep_running "$@" </dev/null >>"$log" 2>&1 &
  echo $! >"$state/pid"
  echo "started; the log is $log on each worker"
}

# Started in the background by `start`: runs the command with restarts, then stores its exit code.
keep_running() {
  local restarts=3 status=0
  while (($#)); do
    case $1 in
      --restarts=*) restarts=${1#*=} ;;
      --env=*) export "${1#*=}" ;;
      *) break ;;
    esac
    shift
  done
  run_with_restarts "$restarts" "$python" -m jax_transfer.main "$@" || status=$?
  echo "$status" >"$state/exit"
}

# `gone` means that the worker was rebooted, or that no study was started.
status() {
  if running; then
    echo "status: running"
  elif [[ -f $state/stopped ]]; then
    echo "status: stopped"
  elif [[ -f $state/exit ]]; then
    echo "status: exit $(cat "$state/exit")"
  else
    echo "status: gone"
  fi
}

stop() {
  if running; then
    touch "$state/stopped"
    kill -TERM "$(cat "$state/pid")"
  fi
}

verb=${1:-}
(($# == 0)) || shift
case $verb in
  install) install_all "$@" ;;
  start | keep_running | status | stop) "$verb" "$@" ;;
  *) help "$PWD/launch/tpu_worker.sh" ;;
esac
