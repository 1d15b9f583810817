#!/usr/bin/env bash
# All checks that need a CUDA device, in parts: benchmarks/gpu.sh [tests] [layers] [cells] [decision] [depth]
# Without arguments, all of them. Compiling takes longer than measuring, so the processes of all parts compile at once,
# and measure one after the other when all are ready; a core and 4 GB each are enough. Then follow tests and depth.
# PYTHON is the interpreter of an environment with torch and this package's dependencies; OUT the folder of the
# results; TURNS one for locks, CACHE one for compiled code; LAYERS a pattern of the arguments of recurrent.py, by default
# all; DECISION ranges of the rows of decision.py, as "0,4 8,9"; DEPTH the rows of depth.py, by default its whole grid.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
out=${OUT:-gpu-results}
turns=${TURNS:-$(mktemp -d)}
cache=${CACHE:-$turns/depth}
mkdir -p "$out" "$turns" "$cache"
waiting=()
declare -A started=()
failed=0
export PYTHONPATH=$PWD${PYTHONPATH:+:$PYTHONPATH} PYTHONUNBUFFERED=1
# A process per setting compiles, so that none needs more of its own.
export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
# torch finds the backend by the package's entry point.
"$python" -c 'import importlib.metadata as m, sys; sys.exit("highway" not in m.entry_points(group="torch_dynamo_backends").names)' ||
    "$python" -m pip install --quiet --no-deps --no-build-isolation -e .
"$python" -c "import torch, triton; print('torch', torch.__version__, 'triton', triton.__version__, torch.cuda.get_device_name())"

in_turns() { # FILE SCRIPT ARGUMENTS...: in a process of its own, once all parts have said what they measure
    waiting+=("$(printf '%q ' "$@")")
}

measure_in_turns() {
    local turns command
    turns=$(mktemp -d "$turns/run-XXXXXX")
    for command in "${waiting[@]}"; do
        (
            eval "set -- $command"
            # Rates that another process has measured may be from when it was not alone.
            HWBP_COMPILE_CALIBRATION=0 "$python" "benchmarks/$2" --device cuda --turns "$turns" --processes "${#waiting[@]}" "${@:3}" \
                >>"$out/$1" 2>>"$out/errors.txt" && exit
            touch "$turns/ready-without-$BASHPID" # the others need not wait for it
            exit 1
        ) &
        started[$!]=$command
    done
    for process in "${!started[@]}"; do
        wait "$process" || { echo "FAILED: ${started[$process]}; see $out/errors.txt" && failed=1; }
    done
}

tests() {
    "$python" -m pytest -q -m gpu tests/test_gpu.py -n "${TEST_WORKERS:-8}" 2>&1 | tee "$out/tests.txt"
}

layers() {
    # Not auto: it would decide while others compile.
    local few=(exact "k = 0" "k = 1" "k = 2" "k = 5" "k = 10" "groups of 8, k = 1")
    layer() {
        [[ ! "$*" =~ ${LAYERS:-.} ]] ||
            in_turns layers.txt recurrent.py --repeats 7 --cuda-graphs "$@" --settings "${few[@]}"
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
    few=(exact)
    layer --kind gru --loops --shape 1024 128 64 64
}

cells() { # torch's own scan takes long to compile
    local few=(exact "k = 1" "k = 2" "groups of 8, k = 1")
    in_turns cells.txt custom_cell.py --repeats 3 --shape 1024 16 64 64 --settings exact
    in_turns cells.txt custom_cell.py --repeats 3 --shape 1024 16 64 64 --no-scan --settings "${few[@]}"
    in_turns cells.txt custom_cell.py --repeats 3 --shape 4096 16 64 64 --no-scan --settings "${few[@]}"
}

decision() {
    local rows
    for rows in ${DECISION:-0,4 4,8 8,12 12,15 15,18 18,21 21,24 24,26 26,28 28,30 30,32 32,35}; do
        in_turns decision.txt decision.py --repeats 5 --rows "${rows%,*}" "${rows#*,}"
    done
}

depth() {
    # shellcheck disable=SC2086
    for precision in ${PRECISIONS:-tf32}; do
        nice "$python" benchmarks/depth.py --device cuda --threads 1 --precision "$precision" --cache "$cache" --shared --prepare ${DEPTH:-} \
            >>"$out/prepared.txt" 2>>"$out/errors.txt" || return
        "$python" benchmarks/depth.py --device cuda --threads 1 --precision "$precision" --cache "$cache" --shared --turns "$turns" --jobs 3 \
            --cuda-graphs --save "$out/depth.jsonl" ${DEPTH:-} 2>>"$out/errors.txt" | tee -a "$out/depth.txt" || return
    done
}

wanted=" ${*:-tests layers cells decision depth} "
for part in $wanted; do
    [[ $part =~ ^(tests|layers|cells|decision|depth)$ ]] || { echo "no such part: $part" && exit 2; }
done
for part in layers cells decision; do
    [[ $wanted != *" $part "* ]] || "$part"
done
((${#waiting[@]} == 0)) || measure_in_turns
for part in tests depth; do
    [[ $wanted != *" $part "* ]] || "$part" || failed=1
done
exit $failed
