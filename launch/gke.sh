#!/usr/bin/env bash
# Trains in a Kubernetes cluster: fills in launch/gke_gpu_job.yaml or launch/gke_tpu_jobset.yaml and applies it.
set -euo pipefail

usage="usage: launch/gke.sh gpu|tpu --image=IMAGE --claim=CLAIM [options] --config=RECIPE --workdir=/shared/DIR ...
  --image=IMAGE        built from launch/Dockerfile, in a registry that the cluster reads
  --claim=CLAIM        PersistentVolumeClaim, ReadWriteMany: mounted at /shared on every node
  --name=NAME          of what is made (default daajax)
  --dry-run            print what would be applied, and apply nothing
  --smoke              no recipe: 3 updates of a tiny random model on every device, whose first loss must be ln 2
 gpu:
  --nodes=N            (default 1)
  --gpus=N             of a node (default 8)
  --gpu=LABEL          of the nodes, cloud.google.com/gke-accelerator (default nvidia-h100-80gb)
 tpu:
  --topology=AxB       of the slice, such as 4x4; needed
  --tpu=LABEL          of the nodes, cloud.google.com/gke-tpu-accelerator (default tpu-v6e-slice)
  --chips=N            of a host (default 4)
Everything else goes to \`python -m daajax.train\`. kubectl's context and namespace are where it goes."

fail() {
  echo "launch/gke.sh: $1" >&2
  exit 1
}

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
kind=${1:-}
case $kind in
  gpu) template=$root/launch/gke_gpu_job.yaml label=batch.kubernetes.io/job-name ;;
  tpu) template=$root/launch/gke_tpu_jobset.yaml label=jobset.sigs.k8s.io/jobset-name ;;
  --help | -h)
    echo "$usage"
    exit 0
    ;;
  *) fail "gpu or tpu comes first, not ${kind:-nothing}; --help says more." ;;
esac
shift

declare -A value=([NAME]=daajax [NODES]=1 [GPUS]=8 [GPU]=nvidia-h100-80gb [TPU]=tpu-v6e-slice [CHIPS]=4 [MODULE]=daajax.train)
dry=0 recipe=0 workdir=0 arguments=()
for argument in "$@"; do
  case $argument in
    --image=?* | --claim=?* | --name=?* | --nodes=?* | --gpus=?* | --gpu=?* | --topology=?* | --tpu=?* | --chips=?*)
      option=${argument%%=*} option=${option#--}
      value[${option^^}]=${argument#*=}
      ;;
    --dry-run) dry=1 ;;
    --smoke) value[MODULE]=demo.smoke ;;
    --help | -h)
      echo "$usage"
      exit 0
      ;;
    *)
      [[ $argument == --config || $argument == --config=* ]] && recipe=1
      [[ $argument == --workdir=* ]] && workdir=1
      arguments+=("$argument")
      ;;
  esac
done

for option in IMAGE CLAIM; do
  [[ -n ${value[$option]:-} ]] || fail "--${option,,}= is needed; --help says more."
done
if [[ ${value[MODULE]} == demo.smoke ]]; then
  ((workdir)) || arguments+=("--workdir=/shared/runs/smoke-${value[NAME]}-$(date +%Y%m%d-%H%M%S)")
else
  ((recipe)) || fail "no recipe: --config=configs/dpo_llama.py, or --smoke to try the cluster."
  ((workdir)) || fail "--workdir=/shared/DIR or gs://bucket/folder is needed: what lies in a pod is gone with it."
fi
[[ ${value[NAME]} =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] || fail "--name=${value[NAME]}: up to 40 of a-z, 0-9 and -, a letter first."
for option in NODES GPUS CHIPS; do
  [[ ${value[$option]} =~ ^[1-9][0-9]*$ ]] || fail "--${option,,}=${value[$option]}: a whole number of at least 1 is needed."
done
value[DEATHS]=$((20 * value[NODES]))
if [[ $kind == tpu ]]; then
  [[ ${value[TOPOLOGY]:-} =~ ^[1-9][0-9]*(x[1-9][0-9]*)+$ ]] || fail "--topology=${value[TOPOLOGY]:-} is needed, such as 4x4."
  all=$((${value[TOPOLOGY]//x/*}))
  ((all % value[CHIPS] == 0)) || fail "--topology=${value[TOPOLOGY]} has $all chips, no multiple of --chips=${value[CHIPS]}."
  value[HOSTS]=$((all / value[CHIPS]))
fi

# A word as JSON, which YAML reads as it is.
json() {
  local word=$1
  [[ $word != *[[:cntrl:]]* ]] || fail "an argument holds a control character: ${word@Q}."
  word=${word//\\/\\\\}
  printf '"%s"' "${word//\"/\\\"}"
}
list=""
for argument in "${arguments[@]}"; do
  list+="${list:+, }$(json "${argument//\$/\$\$}")" # Kubernetes takes $$ for $, and $(A) for a variable
done
value[IMAGE]=$(json "${value[IMAGE]}")

rendered=$(<"$template")
for option in "${!value[@]}"; do
  rendered=${rendered//"\${$option}"/"${value[$option]}"}
done
rendered=${rendered//"\${ARGUMENTS}"/"[$list]"} # last: they may look like any of the others
if ((dry)); then
  echo "$rendered"
  exit 0
fi
command -v kubectl >/dev/null || fail "there is no kubectl; https://kubernetes.io/docs/tasks/tools has it."
kubectl apply -f - <<<"$rendered"
echo "the log: kubectl logs --follow --selector=$label=${value[NAME]} --prefix"
