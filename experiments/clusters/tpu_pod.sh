#!/usr/bin/env bash
# One process per host of a TPU VM pod; the hosts know each other from their metadata server.
#   NAME=my-pod ZONE=us-east5-a experiments/clusters/tpu_pod.sh --config=... --workdir=gs://bucket/run
# The repository is installed on every host, in ~/flm_jax/.venv.
set -euo pipefail
: "${NAME:?name of the TPU VM}" "${ZONE:?its zone}"
on_all() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all \
    --command="cd ~/flm_jax && export PATH=\$PWD/.venv/bin:\$PATH && $(printf '%q ' "$@")"
}
on_all flm doctor --distributed "$@"
# Every host restarts its own process; they wait for each other for --join_within seconds.
on_all python -m experiments.clusters.restart flm train --distributed "$@"
