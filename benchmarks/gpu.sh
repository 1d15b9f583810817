#!/usr/bin/env bash
# All checks that need a CUDA device, in parts: benchmarks/gpu.sh [tests] [layers] [cells] [decision] [depth]
# Without arguments, all of them. Compiling takes longer than measuring, so the processes of a part compile at once,
# on up to 16 cores, and measure one after the other when all are ready. Parts side by side disturb each other.
# PYTHON is the interpreter of an environment with torch and this package's dependencies; OUT the folder of the
# results; TURNS one for locks, CACHE one for compiled code; DEPTH the rows of depth.py, by default its whole grid.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-gpu-results}
turns=${TURNS:-$(mktemp -d)}
cache=${CACHE:-$turns/depth}
mkdir -p "$out" "$turns" "$cache"
declare -A started=()
failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# A process per setting compiles, so that none needs more of its own.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# torch finds the backend by the package's entry point.
"$python" -c 'import importlib.metadata as m, sys; sys.exit("highway" not in m.entry_points(group="torch_dynamo_backends").names)' ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, torch.cuda.get_device_name())"

in_turns() { # FILE PROCESSES SCRIPT ARGUMENTS...: in the background; measures when so many have compiled
    local file=$out/$1 turns=$turns/$1 processes=$2 script=benchmarks/$3
    shift 3
    "$python" "$script" --device cuda --turns "$turns" --processes "$processes" "$@" >>"$file" 2>>"$out/errors.txt" &
    started[$!]="$script $*"
}

all_done() {
    for process in "${!started[@]}"; do
        wait "$process" || { echo "FAILED: ${started[$process]}; see $out/errors.txt" && failed=1; }
    done
    started=()
}

tests() {
    "$python" -m pytest -q -m gpu tests/test_gpu.py -n "${TEST_WORKERS:-8}" 2>&1 | tee "$out/tests.txt"
}

layers() {
    rm -f "$turns"/layers.txt/ready-* # of an earlier call
    local few=(auto exact "k = 0" "k = 1" "k = 2" "k = 5" "k = 10" "groups of 8, k = 1")
    layer() {
        in_turns layers.txt 14 recurrent.py --repeats 7 --cuda-graphs --settings "${few[@]}" "$@"
    }
    for precision in tf32 bfloat16; do
        layer --kind gru --precision $precision --shape 4096 16 64 64
        layer --kind gru --precision $precision --shape 1024 128 3 64
        layer --kind gru --precision $precision --shape 256 128 512 512
        layer --kind lstm --precision $precision --shape 256 128 512 512
        layer --kind 3-gru --precision $precision --shape 256 128 512 512
        layer --kind gru --precision $precision --shape 4096 16 64 768
    done
    layer --kind gru --precision float32 --shape 4096 16 64 64
    in_turns layers.txt 14 recurrent.py --repeats 3 --kind gru --loops --settings auto exact --shape 1024 128 64 64
    all_done
}

cells() { # torch's own scan is measured for the shorter one only
    rm -f "$turns"/cells.txt/ready-*
    local few=(auto exact "k = 1" "k = 2" "groups of 8, k = 1")
    in_turns cells.txt 2 custom_cell.py --repeats 3 --shape 1024 16 64 64 --settings "${few[@]}"
    in_turns cells.txt 2 custom_cell.py --repeats 3 --shape 4096 16 64 64 --no-scan --settings "${few[@]}"
    all_done
}

decision() {
    rm -f "$turns"/decision.txt/ready-*
    for rows in "0 4" "4 8" "8 12" "12 15" "15 18" "18 21" "21 24" "24 26"; do
        # shellcheck disable=SC2086
        in_turns decision.txt 8 decision.py --repeats 5 --rows $rows
    done
    all_done
}

depth() {
    # shellcheck disable=SC2086
    for precision in ${PRECISIONS:-tf32}; do
        nice "$python" benchmarks/depth.py --device cuda --threads 1 --precision "$precision" --cache "$cache" --prepare ${DEPTH:-} \
            >>"$out/prepared.txt" 2>>"$out/errors.txt"
        "$python" benchmarks/depth.py --device cuda --threads 1 --precision "$precision" --cache "$cache" --turns "$turns" --jobs 3 \
            --cuda-graphs --save "$out/depth.jsonl" ${DEPTH:-} 2>>"$out/errors.txt" | tee -a "$out/depth.txt"
    done
}

for part in "${@:-tests layers cells decision depth}"; do
    for each in $part; do "$each"; done
done
exit $failed
