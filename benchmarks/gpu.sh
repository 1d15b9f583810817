#!/usr/bin/env bash
# All checks that need a CUDA device: the tests marked gpu, then the benchmarks that run there.
# PYTHON is the interpreter of an environment with torch and this package's dependencies.
set -eu
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, torch.cuda.get_device_name())"
"$python" -m pytest -q -m gpu tests/test_gpu.py
for precision in tf32 bfloat16; do
    for kind in gru lstm; do
        "$python" benchmarks/recurrent.py --device cuda --kind $kind --precision $precision --repeats 7 \
            --shape 256 128 512 512 --shape 1024 128 64 64 --shape 4096 16 64 64 --shape 4096 16 64 768
    done
done
"$python" benchmarks/recurrent.py --device cuda --kind gru --loops --repeats 3 --shape 1024 128 64 64
"$python" benchmarks/decision.py --device cuda --repeats 5
"$python" benchmarks/custom_cell.py --device cuda
"$python" benchmarks/custom_cell.py --device cuda --shape 4096 16 64 64
cache=$(mktemp -d)
"$python" benchmarks/depth.py --device cuda --cache "$cache" --prepare
"$python" benchmarks/depth.py --device cuda --cache "$cache" --jobs 4 --cuda-graphs --save depth.jsonl
rm -r "$cache"
