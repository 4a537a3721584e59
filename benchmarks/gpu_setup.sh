#!/usr/bin/env bash
# Brings the engine onto a GPU machine that reaches no package index and takes limited transfers.
#
#   benchmarks/gpu_setup.sh pack FOLDER [REQUIREMENT...]      where an index answers, in a checkout that `make setup` has prepared
#   benchmarks/gpu_setup.sh install FOLDER [--no-te]          on the GPU machine, in a checkout, with FOLDER carried there
#
# pack: wheels of the plain dependencies in the versions of this checkout's .venv, megatron-core, Transformer Engine's core, the source of its torch
# part, and the contestants of gpu_table.py (peers.txt), as parts of at most 60 MiB with their SHA-256. REQUIREMENT: more of them, such as
# nvidia-dali-cuda130.
# install: joins the parts, makes .venv, which also sees the packages of the interpreter that holds torch, compiles Transformer Engine's torch part and
# csrc. The compiled wheel stays in FOLDER/built, so a second install, or another such machine, does not compile it again.
#
# Environment: PYTHON (pack: .venv/bin/python; install: python3, the one that has a CUDA build of torch), VENV (.venv), TARGET_PYTHON (3.12),
# CUDA (13.0; its major number chooses Transformer Engine's core), TE_VERSION (that of constraints.txt). Left out: torch, CUDA, cuDNN and NCCL.
set -euo pipefail
cd "$(dirname "$0")/.."

CUDA=${CUDA:-13.0}
VENV=${VENV:-.venv}
TARGET_PYTHON=${TARGET_PYTHON:-3.12}
TE_VERSION=${TE_VERSION:-$(sed -n 's/^transformer-engine==//p' constraints.txt)}
NAME=wheels.tar.part.

usage() {
    sed -n 's/^# \{0,1\}//; 2,5p' "$0" >&2
    exit "$1"
}

case ${1:-},${2:-} in -h,* | --help,*) usage 0 ;; *,-*) usage 2 ;; esac
[ $# -ge 2 ] || usage 2
mkdir -p "$2"
act=$1 folder=$(cd "$2" && pwd)
shift 2

pack() {
    local python=${PYTHON:-.venv/bin/python} wheels platforms=()
    wheels=$(mktemp -d)
    trap "rm -rf '$wheels'" EXIT
    # pip takes each of these by its exact name.
    for minor in $(seq 34 -1 5); do platforms+=(--platform "manylinux_2_${minor}_x86_64"); done
    for old in 2014 2010 1; do platforms+=(--platform "manylinux${old}_x86_64"); done
    "$python" -m pip --disable-pip-version-check download -q --no-deps --only-binary=:all: --dest "$wheels" \
        --implementation cp --python-version "$TARGET_PYTHON" "${platforms[@]}" \
        $(pinned "$python") "transformer-engine==$TE_VERSION" "transformer-engine-cu${CUDA%%.*}==$TE_VERSION" \
        onnx onnxscript onnx-ir ml-dtypes nvdlfw-inspect nvidia-cudnn-frontend \
        ninja -r benchmarks/peers.txt "$@"
    te_source "$python" "$wheels"
    rm -f "$folder/$NAME"* "$folder/SHA256SUMS"
    tar -C "$wheels" -cf - . | split -b 60M - "$folder/$NAME"
    (cd "$folder" && sha256sum "$NAME"* >SHA256SUMS)
    echo "$(ls "$wheels" | wc -l) packages in $(ls "$folder/$NAME"* | wc -l) parts of at most 60 MiB: carry $folder/$NAME* and $folder/SHA256SUMS"
}

# name==version of what the engine and its GPU tests need, as installed here; without torch and what comes with it.
pinned() {
    "$1" - <<'END'
import re
import tomllib
from importlib.metadata import PackageNotFoundError, distribution

from packaging.requirements import Requirement

project = tomllib.load(open("pyproject.toml", "rb"))["project"]
wanted = [*project["dependencies"], "pytest", "pytest-xdist", "hypothesis", "pybind11", "setuptools"]
found = {}
while wanted:
    need = Requirement(wanted.pop())
    name = re.sub(r"[-_.]+", "-", need.name).lower()
    if name in found or re.fullmatch(r"torch|triton|nvidia-.*|cuda-.*", name) or need.marker and not need.marker.evaluate({"extra": ""}):
        continue
    try:
        installed = distribution(name)
    except PackageNotFoundError:
        raise SystemExit(f"{name} is not installed here; run make setup first") from None
    found[name] = installed.version
    wanted += installed.requires or []
print(*(f"{name}=={version}" for name, version in sorted(found.items())))
END
}

# The source of Transformer Engine's torch part. pip asks its setup.py for metadata, which asks torch for its CUDA version; a stand-in answers.
te_source() {
    local stub=$2/stub
    mkdir -p "$stub/torch/utils"
    printf '__version__ = "0"\nclass version:\n    cuda = "%s"\n' "$CUDA" >"$stub/torch/__init__.py"
    touch "$stub/torch/utils/__init__.py"
    printf 'from setuptools import Extension as CppExtension\nfrom setuptools.command.build_ext import build_ext as BuildExtension\n' \
        >"$stub/torch/utils/cpp_extension.py"
    PYTHONPATH=$stub "$1" -m pip --disable-pip-version-check download -q --no-deps --no-build-isolation --no-binary transformer-engine-torch \
        --dest "$2" "transformer-engine-torch==$TE_VERSION"
    rm -rf "$stub"
}

install() {
    local with_te=yes host=${PYTHON:-python3} wheels=$folder/wheels python
    [ "${1:-}" = --no-te ] && with_te=no
    "$host" -c "import sys; v = '%d.%d' % sys.version_info[:2]; v == '$TARGET_PYTHON' or sys.exit(f'the parts are for Python $TARGET_PYTHON, and $host is {v}')"
    if [ $with_te = yes ]; then
        "$host" - <<'END'
import sys

try:
    import torch
except ImportError as error:
    sys.exit(f"{sys.executable}: {error}; PYTHON=... names the interpreter that holds a CUDA build of torch, --no-te goes without")
torch.version.cuda or sys.exit(f"{sys.executable}: torch {torch.__version__} is not a CUDA build; --no-te goes without")
END
        command -v nvcc >/dev/null || { echo "there is no nvcc, which Transformer Engine's torch part needs; --no-te goes without" >&2; exit 1; }
    fi
    (cd "$folder" && sha256sum --quiet -c SHA256SUMS)
    rm -rf "$wheels" && mkdir "$wheels"
    cat "$folder/$NAME"* | tar -C "$wheels" -xf -

    "$host" -m venv --clear "$VENV"
    python=$VENV/bin/python
    # Not --system-site-packages: an interpreter that is a venv itself would lend those of the Python below it.
    "$host" -c "import site, sysconfig; print(*dict.fromkeys([sysconfig.get_paths()['purelib'], *site.getsitepackages()]), sep='\n')" \
        >"$("$python" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/host.pth"
    lend_libraries "$host" "$python"
    local pip=("$python" -m pip --disable-pip-version-check install -q --no-index --no-deps)
    mapfile -t found < <(ls "$wheels"/*.whl | { [ $with_te = yes ] && cat || grep -v '/transformer_engine'; })
    "${pip[@]}" --ignore-installed "${found[@]}"
    [ $with_te = yes ] && te_torch "$python" "${pip[@]}"
    "${pip[@]}" --no-build-isolation -e .
    "$python" launch/doctor.py --folder "$folder" || true # it says what is still missing; benchmarks/gpu.sh counts it
}

# Transformer Engine looks for cuDNN and its like beside itself, where a torch from wheels has them beside it.
lend_libraries() { # HOST PYTHON
    local own lent
    own=$("$2" -c "import sysconfig; print(sysconfig.get_paths()['purelib'])")/nvidia
    "$1" -c "import glob, sys; print(*(p for s in sys.path for p in glob.glob(s + '/nvidia/*/')), sep='\n')" | while read -r lent; do
        [ -z "$lent" ] || { mkdir -p "$own" && ln -sfn "${lent%/}" "$own/$(basename "$lent")"; }
    done
}

te_torch() {
    local python=$1 pip=("${@:2}")
    if ! ls "$folder"/built/*.whl >/dev/null 2>&1; then
        # Headers of cuDNN and NCCL that come in wheels beside torch; those of the CUDA toolkit it finds by itself.
        CPATH=$("$python" -c "import glob, sys; print(':'.join(p for s in sys.path for p in glob.glob(s + '/nvidia/*/include')))")${CPATH:+:$CPATH}
        export CPATH
        # ninja, without which torch compiles one file after another, is in the same venv.
        PATH=$(cd "$VENV/bin" && pwd):$PATH NVTE_PYTORCH_FORCE_BUILD=TRUE NVTE_WITH_NCCL_EP=0 MAX_JOBS=$(nproc) "$python" -m pip --disable-pip-version-check wheel \
            --no-index --no-deps --no-build-isolation --wheel-dir "$folder/built" "$folder"/wheels/transformer_engine_torch-*.tar.gz
    fi
    "${pip[@]}" "$folder"/built/*.whl
}

case $act in pack) pack "$@" ;; install) install "$@" ;; *) usage 2 ;; esac
