#!/usr/bin/env bash
# Run the tests in the environment .venv, making it first if need be; arguments are pytest's.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh dev
# Each of the workers has one thread, also for compiling: oversubscribed cores make OpenMP's barriers crawl.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TORCHINDUCTOR_COMPILE_THREADS=${TORCHINDUCTOR_COMPILE_THREADS:-1}
exec python -m pytest -n "${TEST_WORKERS:-2}" --durations=40 "$@"
