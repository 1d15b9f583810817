# Sourced by demo.sh, test.sh and .ci/run: `. scripts/environment.sh EXTRA` makes and enters the virtual environment
# .venv, with torch and this package (editable) with the optional dependencies EXTRA. What is there already is kept.
#
# PYTHON   the interpreter to make it with (default: the first of python3, python3.13 ... python3.11 that is >= 3.11)
# TORCH    the torch to install, as pip takes it (default: torch==2.13.0)

make_environment() {
    local extra=$1 torch=${TORCH:-torch==2.13.0} python stamp wanted
    stamp=.venv/installed-$extra
    wanted="$torch $(cksum <pyproject.toml)"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        if [ ! -x .venv/bin/python ]; then
            python=$(find_python) || return 1
            echo "Making the virtual environment .venv with $python"
            "$python" -m venv .venv || {
                echo "python -m venv failed; on Debian, install python3-venv." >&2
                return 1
            }
        fi
        echo "Installing $torch and this package with [$extra] into .venv"
        # torch by itself first, so that no other constraint takes part in choosing its build.
        .venv/bin/python -m pip install --disable-pip-version-check --quiet "$torch" &&
            .venv/bin/python -m pip install --disable-pip-version-check --quiet -e ".[$extra]" || return 1
        echo "$wanted" >"$stamp"
    fi
    PATH=$PWD/.venv/bin:$PATH
    if ! command -v "${CXX:-g++}" >/dev/null; then
        echo "There is no C++ compiler; torch.compile needs one to generate code (Debian: apt install g++)." >&2
    fi
}

find_python() {
    local each
    for each in ${PYTHON:-python3 python3.13 python3.12 python3.11}; do
        if "$each" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            echo "$each"
            return
        fi
    done
    echo "No Python >= 3.11 found; set PYTHON to one." >&2
    return 1
}

make_environment "$1"
