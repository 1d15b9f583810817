#!/usr/bin/env bash
# Train a GPT and a ResNet with exact backpropagation and with Highway-BP, side by side; `./demo.sh --help` for options.
set -eu
cd "$(dirname "$0")"
. scripts/environment.sh examples
exec python examples/demo.py "$@"
