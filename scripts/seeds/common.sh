# Sourced by the other scripts: paths, and the function that prints and runs a step.
#
#   DATA=FOLDER      real text, one folder per data set (see prepare.py); required
#   MODEL=FOLDER     a small model; default: all-MiniLM-L6-v2, by scripts/minilm.sh
#   OUTPUT=FOLDER    folder for all results; default: runs/seeds/NAME
#   BIN=FOLDER       folder of trainer and launch; default: target/release
#   PYTHON=…         default: python3
set -euo pipefail

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
data=${DATA:?must name the folder of real text}
model=${MODEL:-$("$root/scripts/minilm.sh")}
output=${OUTPUT:-$root/runs/seeds/$(basename "$0" .sh)}
bin=${BIN:-$root/target/release}
python=${PYTHON:-python3}
mkdir -p "$output"

step() {
    echo "== $*" >&2
    "$@"
}

prepared() { step "$python" "$root/scripts/seeds/prepare.py" --data "$data" --output "$output" "$1"; }
