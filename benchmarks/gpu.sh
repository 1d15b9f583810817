#!/usr/bin/env bash
# All checks that need a CUDA device, in parts: benchmarks/gpu.sh [tests] [layers] [cells] [decision] [depth]
# Without arguments, all of them. What each takes on an H200 with 16 cores, compilation included, stands beside it.
# PYTHON is the interpreter of an environment with torch and this package's dependencies; OUT the folder of the results.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-gpu-results}
mkdir -p "$out"
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH}
# torch finds the backend by the package's entry point.
"$python" -c 'import importlib.metadata as m, sys; sys.exit("highway" not in m.entry_points(group="torch_dynamo_backends").names)' ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, torch.cuda.get_device_name())"

layer() { # about 40 s: eight settings are compiled
    "$python" benchmarks/recurrent.py --device cuda --repeats 7 --cuda-graphs "$@" | tee -a "$out/layers.txt"
}

tests() { # 80 s with pytest-xdist
    "$python" -m pytest -q -m gpu tests/test_gpu.py ${TEST_WORKERS:+-n "$TEST_WORKERS"} 2>&1 | tee "$out/tests.txt"
}

layers() {
    # The most telling first: what is ready is kept if time runs out.
    local few=(auto exact "k = 0" "k = 1" "k = 2" "k = 5" "k = 10" "groups of 8, k = 1")
    for precision in tf32 bfloat16; do
        layer --kind gru --precision $precision --settings "${few[@]}" --shape 4096 16 64 64
        layer --kind gru --precision $precision --settings "${few[@]}" --shape 1024 128 3 64
        layer --kind gru --precision $precision --settings "${few[@]}" --shape 256 128 512 512
        layer --kind lstm --precision $precision --settings "${few[@]}" --shape 256 128 512 512
        layer --kind 3-gru --precision $precision --settings "${few[@]}" --shape 256 128 512 512
        layer --kind gru --precision $precision --settings "${few[@]}" --shape 4096 16 64 768
    done
    layer --kind gru --precision float32 --settings "${few[@]}" --shape 4096 16 64 64
    layer --kind gru --loops --settings auto exact --shape 1024 128 64 64
}

cells() { # a minute each
    for shape in "1024 16 64 64" "4096 16 64 64"; do
        # shellcheck disable=SC2086
        "$python" benchmarks/custom_cell.py --device cuda --repeats 3 --shape $shape \
            --settings auto exact "k = 1" "k = 2" "groups of 8, k = 1" | tee -a "$out/cells.txt"
    done
}

decision() { # 26 rows of about 15 s
    "$python" benchmarks/decision.py --device cuda --repeats 5 | tee "$out/decision.txt"
}

depth() { # 48 layers take about 50 s a setting to compile on one core, and 16 are compiled at once
    "$python" benchmarks/depth.py --device cuda --threads 1 --cache "$out/depth-cache" --prepare | tee "$out/depth.txt"
    "$python" benchmarks/depth.py --device cuda --threads 1 --cache "$out/depth-cache" --cuda-graphs \
        --save "$out/depth.jsonl" | tee -a "$out/depth.txt"
}

for part in "${@:-tests layers cells decision depth}"; do
    for each in $part; do "$each"; done
done
