# Sourced by the others: where things are, and how a step is told.
#
#   DATA=FOLDER      real text, one folder a set (see prepare.py); required
#   MODEL=FOLDER     a small model; default: scripts/minilm.sh fetches all-MiniLM-L6-v2
#   OUTPUT=FOLDER    where everything is written; default: runs/seeds/NAME
#   BIN=FOLDER       where trainer and launch are; default: target/release
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
