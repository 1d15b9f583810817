#!/usr/bin/env bash
# Train a GPT, a ResNet and two GRUs with exact backpropagation and with Highway-BP, side by side; `./demo.sh --help` for options.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh examples
# OpenMP's threads wait for work briefly and then sleep: endless spinning is no faster for small models, and on a
# machine that does something else as well it makes each step many times slower.
export GOMP_SPINCOUNT=${GOMP_SPINCOUNT:-10000}
exec python examples/demo.py "$@"
