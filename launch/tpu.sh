#!/usr/bin/env bash
# Trains on a Cloud TPU slice, through preemptions, and fetches the trained model.
#
#   launch/tpu.sh --name NAME --zone ZONE --type TYPE --version RUNTIME
#                 --config configs/FILE [--data gs://FOLDER] --out gs://FOLDER
#                 [--export FOLDER] [--spot] [--project PROJECT] [--restarts N] [--delete]
#                 [--dry_run] [-- ARGUMENT...]
#
#   --name NAME          the slice, a queued resource; one of this name is used if there is one
#   --zone ZONE          as in us-west4-a
#   --type TYPE          the accelerator type, as in v5litepod-8
#   --version RUNTIME    the slice's software: v2-alpha-tpuv5-lite, v2-alpha-tpuv6e, ...
#   --spot               on spare capacity, which is cheaper and can be taken away
#   --project PROJECT    if not gcloud's present one
#   --config FILE        the run's configuration, see configs/
#   --data gs://FOLDER   what the run reads as data/; each host copies it to its disk, once
#   --out gs://FOLDER    where the run keeps its checkpoints
#   --export FOLDER      fetch the trained model into this new folder here
#   --restarts N         how often to go on after a preemption or a lost connection, 10 unless told
#   --delete             delete the slice at the end, also of a run that failed
#   --dry_run            print what would run, with a slice that comes up and is not preempted
#   ARGUMENT...          further arguments of launch.train, such as --set optim.lr=2e-4
#
# Interrupting this script leaves slice and training alone. The same command again ships the code
# as it then is, lets the run save and stop, and goes on from there.
# Status: 0 done, 1 failed, 2 wrong usage, 75 restarts used up: start it again to go on.

set -euo pipefail

if [[ ! -f launch/job.sh ]]; then
  echo "tpu.sh: start this from the repository's folder" >&2
  exit 2
fi
arguments=() dry_run="" name="" zone="" type="" version="" spot="" project=""
config="" data="" out="" export="" restarts=10 delete=""
source launch/job.sh
parse_flags "name zone type version project config data out export restarts" \
  "spot delete dry_run" "$@"
require name zone type version config out
require_config
require_data
require_number restarts
[[ $name =~ ^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$ ]] ||
  die "--name $name: up to 63 lower-case letters, digits and dashes, a letter first"
[[ $config == configs/* ]] || die "--config $config: only what is in configs/ reaches the hosts"
[[ $out == gs://?* ]] || die "--out $out: hosts come and go, give a folder as gs://BUCKET/FOLDER"
[[ ! -e $export ]] || die "--export $export: is there already, and would be mixed up with the new"
[[ -z $export || -d $(dirname "$export") ]] || die "--export $export: make its parent folder first"
[[ -n $dry_run ]] || type -P gcloud > /dev/null || die "no gcloud: install the Google Cloud CLI"

where=(--zone="$zone" ${project:+"--project=$project"} --quiet)
queue=(gcloud compute tpus queued-resources)
vm=(gcloud compute tpus tpu-vm)

train=(.venv/bin/python -m launch.train --distributed --config "$config" --set "out=$out")
[[ -z $export ]] || train+=(--export export)
train+=(${arguments[@]+"${arguments[@]}"})

# What runs on each host. gcloud runs a command anew when its connection fails, so all three can be
# repeated. Whatever fails there for good is status 70: 1 and 255 are gcloud's and ssh's own.

# A run from before is told to save and stop. The images' own Python can be too old.
# shellcheck disable=SC2016
install='if [ -f twig_jax/pid ] && kill -- -"$(cat twig_jax/pid)" 2> /dev/null; then
  while kill -0 -- -"$(cat twig_jax/pid)" 2> /dev/null; do sleep 1; done
fi
{ rm -rf twig_jax && mkdir twig_jax && tar -xzf twig_jax.tgz -C twig_jax && cd twig_jax &&
  { [ -x ~/.local/bin/uv ] || curl -LsSf https://astral.sh/uv/install.sh | sh; } &&
  ~/.local/bin/uv venv --python 3.12 .venv &&
  ~/.local/bin/uv pip install --python .venv ".[tpu,data]"
} || exit 70'
# Beside the code, which goes at each restart.
[[ -z $data ]] || install+="
{ mkdir -p ~/twig_jax_data && gcloud storage rsync --recursive $(quote "$data") ~/twig_jax_data &&
  ln -s ~/twig_jax_data data; } || exit 70"

# In a session of its own, so that it outlives the connection, whose log and status are files.
# A host that shuts down signals the inner shell too: it must outlive the run to write its status.
start="cd twig_jax || exit 70
mkdir started 2> /dev/null || exit 0
: > train.log
PYTHONUNBUFFERED=1 setsid bash -c 'trap : TERM; \"\$@\" >> train.log 2>&1; echo \$? > status' run \\
  $(quote "${train[@]}") > /dev/null 2>&1 < /dev/null &
echo \$! > pid"

# A run without a status went down with its host.
# shellcheck disable=SC2016
follow='cd twig_jax || exit 70
tail -n +1 -f --pid="$(cat pid)" train.log
status=$(cat status 2> /dev/null || echo 75)
[ "$status" = 0 ] || [ "$status" = 75 ] || { echo "status $status"; exit 70; }
exit "$status"'

on_all() {
  run "${vm[@]}" ssh "$name" --worker=all "${where[@]}" --ssh-flag=-oServerAliveInterval=60 \
    --command="$1"
}

# What fails the first time is a mistake to be mended; what worked before is tried again.
die_of_gcloud() {
  say "gcloud failed, see above; nothing was started"
  exit 1
}

# Sets `state`: the queued resource's, or nothing if there is none. A dry run assumes one.
assumed="" looked=""
look() {
  until state=$(run "${queue[@]}" list "${where[@]}" --filter="name~/$name\$" \
    --format="value(state.state)"); do
    [[ -n $looked ]] || die_of_gcloud
    again "gcloud does not know the slice's state"
  done
  looked=yes
  [[ -z $dry_run ]] || state=$assumed
}

remove() { run "${queue[@]}" delete "$name" --force "${where[@]}"; }

# finish STATUS: ends here, and says what becomes of the slice.
finish() {
  if [[ -n $delete ]]; then
    remove || say "deleting the slice failed, see above: it may still cost"
  else
    note "The slice stays: --delete deletes it."
    [[ -n $dry_run ]] || say "the slice stays and costs: $(quote "${queue[@]}" delete "$name" \
      --force "${where[@]}")"
  fi
  exit "$1"
}

# again REASON: counts a restart and pauses, longer each time.
restarted=0
again() {
  if ((restarted == restarts)); then
    say "$1; all $restarts restarts are used up, the same command again goes on"
    finish 75
  fi
  restarted=$((restarted + 1))
  local pause=$((10 * 2 ** (restarted < 7 ? restarted - 1 : 6)))
  say "$1; restart $restarted of $restarts in $pause seconds"
  run sleep "$pause"
}

# Returns when the slice is there, which can take as long as the zone is full.
provide() {
  local told=""
  while true; do
    look
    [[ -n $dry_run || $state == "$told" ]] || say "the slice is ${state:-not there yet}"
    told=$state
    case $state in
      ACTIVE) return ;;
      "")
        if run "${queue[@]}" create "$name" --node-id="$name" --accelerator-type="$type" \
          --runtime-version="$version" ${spot:+--spot} "${where[@]}"; then
          assumed=ACTIVE
        elif ((restarted)); then
          again "the slice cannot be created"
        else
          die_of_gcloud
        fi
        ;;
      SUSPENDED | FAILED)
        again "the slice is $state"
        remove || say "deleting it failed, see above"
        ;;
      *) sleep 30 ;;
    esac
  done
}

train_on_it() {
  run "${vm[@]}" scp "build/$name.tgz" "$name:twig_jax.tgz" --worker=all "${where[@]}" &&
    on_all "$install" &&
    on_all "$start" &&
    on_all "$follow" &&
    { [[ -z $export ]] || run "${vm[@]}" scp --recurse "$name:twig_jax/export" "$export" \
      --worker=0 "${where[@]}"; }
}

trap 'say "interrupted; slice and training, if started, go on"; exit 130' INT
run mkdir -p build
run tar -czf "build/$name.tgz" --exclude=__pycache__ \
  pyproject.toml README.md LICENSE NOTICE configs launch twig_jax
note "Status 75, or a slice that is gone: from here again, up to --restarts $restarts times."
while true; do
  provide
  status=0
  train_on_it || status=$?
  case $status in
    0) finish 0 ;;
    70)
      # Where one host went first, the others may have failed for the lack of it.
      look
      if [[ $state == ACTIVE ]]; then
        say "training failed, see above; the hosts have it in twig_jax/train.log"
        finish 1
      fi
      again "the slice is ${state:-gone}"
      ;;
    75) again "training was preempted" ;;
    *) again "gcloud lost the slice, with status $status" ;;
  esac
  [[ -z $export ]] || rm -rf "$export" # What a fetch that broke off has left.
done
