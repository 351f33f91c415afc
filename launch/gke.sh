#!/usr/bin/env bash
# Trains on a TPU slice of a GKE cluster, as a JobSet with a pod a host, through preemptions.
#
#   launch/gke.sh --name NAME --image IMAGE --accelerator LABEL --topology AxB
#                 --config FILE [--data gs://FOLDER] --out gs://FOLDER [--export gs://FOLDER]
#                 [--chips N] [--spot] [--restarts N] [--dry_run] [-- ARGUMENT...]
#
#   --name NAME          the JobSet's name
#   --image IMAGE        built from launch/Dockerfile and pushed
#   --accelerator LABEL  the nodes' cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice, ...
#   --topology AxB       the slice's chips, as in 4x4 or 2x2x4
#   --chips N            chips of a host, 4 unless told
#   --spot               on Spot nodes
#   --config FILE        the run's configuration, see configs/; the image's copy is read
#   --data gs://FOLDER   what the run reads as data/; mounted with Cloud Storage FUSE
#   --out gs://FOLDER    where the run keeps its checkpoints
#   --export gs://FOLDER write the trained model there at the end
#   --restarts N         how often to start again after a preemption, 10 unless told
#   --dry_run            print the command and its manifest, and start nothing
#   ARGUMENT...          further arguments of launch.train, such as --set optim.lr=2e-4
#
# The cluster needs JobSet (https://jobset.sigs.k8s.io) and its pods access to the bucket.

set -euo pipefail

if [[ ! -f launch/job.sh ]]; then
  echo "gke.sh: start this from the repository's folder" >&2
  exit 2
fi
arguments=() dry_run="" name="" image="" accelerator="" topology="" chips=4 spot=""
config="" data="" out="" export="" restarts=10
source launch/job.sh
parse_flags "name image accelerator topology chips config data out export restarts" \
  "spot dry_run" "$@"
require name image accelerator topology config out
require_config
require_data
require_number chips restarts
[[ $name =~ ^[a-z]([-a-z0-9]{0,38}[a-z0-9])?$ ]] ||
  die "--name $name: up to 40 lower-case letters, digits and dashes, a letter first"
[[ $topology =~ ^[1-9][0-9]{0,2}(x[1-9][0-9]{0,2}){1,2}$ ]] ||
  die "--topology $topology: not AxB or AxBxC"
[[ $out == gs://?* ]] || die "--out $out: pods keep no files, give a folder as gs://BUCKET/FOLDER"
[[ -z $export || $export == gs://?* ]] ||
  die "--export $export: pods keep no files, give a folder as gs://BUCKET/FOLDER"
[[ $config != /* ]] || die "--config $config: the image's copy is read, name it as in this folder"
((chips > 0)) || die "--chips 0: a host has chips"
total=$((${topology//x/ * }))
((total % chips == 0)) ||
  die "--topology $topology: its $total chips are not hosts of --chips $chips"
hosts=$((total / chips))

# A string of the manifest, which Kubernetes shall not expand.
string() {
  local text=${1//\\/\\\\}
  text=${text//\"/\\\"}
  text=${text//$'\n'/\\n}
  text=${text//$'\t'/\\t}
  printf '"%s"' "${text//\$/\$\$}"
}

train=(python -m launch.train --distributed --config "$config" --set "out=$out")
[[ -z $export ]] || train+=(--export "$export")
train+=(${arguments[@]+"${arguments[@]}"})
command=""
for word in "${train[@]}"; do
  command+="
                    - $(string "$word")"
done

# A bucket has folders by its objects' names alone, unless they were made: implicit-dirs.
annotations="" mounts="" volumes=""
if [[ -n $data ]]; then
  path=${data#gs://}
  bucket=${path%%/*}
  folder=${path#"$bucket"}
  folder=${folder#/}
  annotations="
            metadata:
              annotations:
                gke-gcsfuse/volumes: \"true\""
  mounts="
                  volumeMounts:
                    - name: data
                      mountPath: /twig_jax/data
                      readOnly: true"
  volumes="
              volumes:
                - name: data
                  csi:
                    driver: gcsfuse.csi.storage.gke.io
                    readOnly: true
                    volumeAttributes:
                      bucketName: $(string "$bucket")
                      mountOptions: $(string "implicit-dirs${folder:+,only-dir=$folder}")"
fi

# One slice is one Job whose pods live and die together: a pod that ends early fails the Job, and
# the JobSet starts all of them again, unless the Job failed by its podFailurePolicy.
manifest="apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: $name
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: $restarts
    rules:
      - name: failed_for_good
        action: FailJobSet
        onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
    - name: slice
      template:
        spec:
          parallelism: $hosts
          completions: $hosts
          backoffLimit: 0
          podFailurePolicy:
            rules:
              # Its node was taken away: counts, so that all start again.
              - action: Count
                onPodConditions:
                  - type: DisruptionTarget
                    status: \"True\"
              # What launch.train ends with where it would only fail again. 75 was told to stop;
              # where one host is lost, the others' processes are aborted, with 134.
              - action: FailJob
                onExitCodes:
                  containerName: train
                  operator: In
                  values: [1]
          template:$annotations
            spec:
              restartPolicy: Never
              terminationGracePeriodSeconds: 300
              nodeSelector:
                cloud.google.com/gke-tpu-accelerator: $(string "$accelerator")
                cloud.google.com/gke-tpu-topology: $topology${spot:+
                cloud.google.com/gke-spot: \"true\"}
              containers:
                - name: train
                  image: $(string "$image")
                  command:$command$mounts
                  resources:
                    limits:
                      google.com/tpu: $chips$volumes"

if [[ -n $dry_run ]]; then
  printf "kubectl create --filename=- <<'EOF'\n%s\nEOF\n" "$manifest"
else
  run kubectl create --filename=- <<< "$manifest"
  say "kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=$name --container=train --follow" \
    "--tail=-1 --prefix --max-log-requests=$hosts shows its output"
fi
