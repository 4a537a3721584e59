#!/usr/bin/env bash
# One command on a GPU machine: what is installed, the GPU's tests, the speed table, the planner beside the truth. Everything it says is kept in a folder.
#
#   benchmarks/gpu.sh [FOLDER [PART...]]       # FOLDER: gpu_results; PART: doctor, tests, table, planner (all)
#   TABLE=--tiny PLANNER=--tiny benchmarks/gpu.sh FOLDER doctor table planner      # rehearsal on a CPU: shows that the parts run
#
# PYTHON chooses the interpreter (default .venv/bin/python), TABLE further options of gpu_table.py, such as TABLE="--only gpt_1.7b,loss", PLANNER those of
# planner.py, PYTEST_ADDOPTS those of pytest ("-n 6 -k fp8"). A part that fails does not stop the next; the exit code is 1 then, and where a GPU is there
# but Transformer Engine or DALI is not, whose tests are then skipped: WITHOUT="Transformer Engine,DALI" says that they are known to be missing. Written:
# doctor.json, doctor.txt, tests.txt, tests.xml, table.md, table.txt, planner.txt, and revision.txt, which says what was measured.
# Left out: installing (docs/gpu.md; gpu_setup.sh where no network is).
set -uo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n 's/^# \{0,1\}//; 2,11p' "$0"; }
case ${1:-} in
    -h | --help) usage; exit 0 ;;
    -*) usage >&2; exit 2 ;;
esac
python=${PYTHON:-.venv/bin/python}
folder=${1:-gpu_results}
case $folder in doctor | tests | table | planner) echo "$folder is a part; the folder comes first: benchmarks/gpu.sh FOLDER $*" >&2; exit 2 ;; esac
[ $# -gt 0 ] && shift
parts=("$@")
[ $# -eq 0 ] && parts=(doctor tests table planner)
for part in "${parts[@]}"; do
    case $part in doctor | tests | table | planner) ;; *) echo "no part is called $part; there are doctor, tests, table and planner" >&2; exit 2 ;; esac
done
command -v "$python" >/dev/null || { echo "there is no $python; PYTHON=... names another interpreter, docs/gpu.md says how to install" >&2; exit 2; }
mkdir -p "$folder" || exit 2

failed=()
ran() { # NAME COMMAND...: its output on the screen and in NAME.txt
    echo "== $1 ($(date -u +%H:%M:%S))"
    "${@:2}" 2>&1 | tee "$folder/$1.txt" || failed+=("$1")
}

doctor() {
    "$python" launch/doctor.py --folder "$folder" --json >"$folder/doctor.json" 2>/dev/null
    "$python" launch/doctor.py --folder "$folder" || return 1
    "$python" - "$folder/doctor.json" "${WITHOUT:-}" <<'END'
import json
import sys

import torch

states = {finding["name"]: finding["state"] for finding in json.load(open(sys.argv[1]))["findings"]}
known = {name.strip() for name in sys.argv[2].split(",")}
missing = [name for name in ("Transformer Engine", "DALI") if states[name] != "ok" and name not in known]
if torch.cuda.is_available() and missing:
    sys.exit(f"missing: {', '.join(missing)}: what needs them is not tried; WITHOUT=\"{','.join(missing)}\" takes that as it is")
END
}

# A suite whose every test was skipped proves nothing, so it counts as failed.
tests() {
    "$python" -m pytest tests/gpu -m gpu -v -rs -p no:cacheprovider --junit-xml="$folder/tests.xml" || return 1
    "$python" - "$folder/tests.xml" <<'END'
import sys
import xml.etree.ElementTree as xml

suite = next(xml.parse(sys.argv[1]).iter("testsuite"))
skipped = int(suite.get("skipped"))
ran = int(suite.get("tests")) - skipped
print(f"{ran} GPU tests ran, {skipped} were skipped")
sys.exit(0 if ran else "no GPU test could run here")
END
}

table() {
    # shellcheck disable=SC2086 (TABLE is a list of words)
    "$python" benchmarks/gpu_table.py --output "$folder/table.md" ${TABLE:-}
}

planner() {
    # shellcheck disable=SC2086
    "$python" benchmarks/planner.py several ${PLANNER:-}
}

{
    date -u +%Y-%m-%dT%H:%M:%SZ
    git describe --always --dirty 2>/dev/null || echo "not a git checkout"
    nvidia-smi 2>&1 || true
} >"$folder/revision.txt"
for part in "${parts[@]}"; do ran "$part" "$part"; done

if [ ${#failed[@]} -gt 0 ]; then
    echo "failed: ${failed[*]}; what they said is in $folder"
    exit 1
fi
echo "done: $folder"
