#!/usr/bin/env bash
# Tests scripts/slurm/nodes.sbatch on a real SLURM: a cluster of two nodes on this host. A run on both nodes
# is preempted and requeued, then signalled by USR1 and requeued, and must end with the losses of an
# uninterrupted run. Another run is cancelled and must not be requeued.
#
#   tests/slurm/run.sh [FOLDER OF THE PROGRAMS]      default: target/debug; as root, on Debian
#
# It needs slurmctld, slurmd and munged (Debian: slurm-wlm, munge), and adds the nodes to /etc/hosts while it
# runs.
set -euo pipefail
cd "$(dirname "$0")/../.."

programs=$(cd "${1:-target/debug}" && pwd)
# In continuous integration a missing tool is an error.
skip() {
    echo "skipped: SLURM, because $1"
    [ "${CI:-}" != true ] || exit 1
    exit 0
}
for tool in slurmctld slurmd munged mungekey sbatch python3; do
    command -v $tool >/dev/null 2>&1 || skip "there is no $tool (Debian: slurm-wlm, munge)"
done
[ "$(id -u)" = 0 ] || skip "its daemons need root"

place=$(mktemp -d)
chmod 755 "$place"
mkdir "$place/state"
export SLURM_CONF=$place/slurm.conf
daemons=()
cp /etc/hosts "$place/hosts"
finish() {
    status=$?
    scancel --user root >/dev/null 2>&1 || true
    [ ${#daemons[@]} = 0 ] || kill "${daemons[@]}" 2>/dev/null || true
    cat "$place/hosts" >/etc/hosts
    if [ $status != 0 ]; then
        for log in "$place"/*.log; do
            echo "--- $log"
            tail -n 40 "$log"
        done
    fi
    wait
    rm -rf "$place"
}
trap finish EXIT
fail() { echo "slurm: $1" >&2; exit 1; }

echo "127.0.0.1 lodestone-n1 lodestone-n2" >>/etc/hosts
mungekey --create --force --keyfile "$place/munge.key"
chmod 400 "$place/munge.key"
munged --foreground --force --key-file "$place/munge.key" --socket "$place/munge.socket" --pid-file "$place/munged.pid" \
    --log-file "$place/munged.log" --seed-file "$place/munged.seed" >/dev/null 2>&1 &
daemons+=($!)
cat >"$SLURM_CONF" <<CONF
ClusterName=lodestone
SlurmctldHost=$(hostname)(127.0.0.1)
SlurmctldPort=26817
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$place/munge.socket
CredType=cred/munge
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
ReturnToService=2
SwitchType=switch/none
SelectType=select/linear
SchedulerType=sched/backfill
SchedulerParameters=bf_interval=1,sched_min_interval=200000
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
KillWait=20
MinJobAge=600
StateSaveLocation=$place/state
SlurmctldPidFile=$place/slurmctld.pid
SlurmctldLogFile=$place/slurmctld.log
SlurmdSpoolDir=$place/spool.%n
SlurmdPidFile=$place/slurmd.%n.pid
SlurmdLogFile=$place/slurmd.%n.log
NodeName=lodestone-n1 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=27001 CPUs=$(nproc) State=UNKNOWN
NodeName=lodestone-n2 NodeHostname=$(hostname) NodeAddr=127.0.0.1 Port=27002 CPUs=$(nproc) State=UNKNOWN
PartitionName=low Nodes=lodestone-n[1-2] Default=YES MaxTime=60 PriorityTier=1 PreemptMode=REQUEUE GraceTime=30 State=UP
PartitionName=high Nodes=lodestone-n[1-2] MaxTime=60 PriorityTier=9 PreemptMode=OFF State=UP
CONF
for _ in $(seq 50); do [ -S "$place/munge.socket" ] && break; sleep 0.1; done
slurmctld -D >"$place/slurmctld.out.log" 2>&1 &
daemons+=($!)
for node in lodestone-n1 lodestone-n2; do
    mkdir -p "$place/spool.$node"
    slurmd -D -N $node >"$place/$node.out.log" 2>&1 &
    daemons+=($!)
done
for _ in $(seq 300); do
    [ "$(sinfo --noheader --states=idle --format=%D 2>/dev/null | head -1)" = 2 ] && break
    sleep 0.1
done
sinfo 2>/dev/null | grep -q idle || fail "the nodes did not become idle"

golden=$PWD/tests/golden/bert
configuration() {
    cat >"$place/$1.yaml" <<YAML
output: $place/$1
model: {path: $golden, dropout: 0.1, max_query_length: 16, max_document_length: 16}
data: {train: [{path: $golden/rows.jsonl}], negatives: 2}
lora: {rank: 4, alpha: 8, dropout: 0.1}
training: {epochs: 300, batch_size: 4, learning_rate: 1.0e-4}
checkpoint: {every: 1000000}
YAML
}
configuration whole
configuration parts
configuration cancelled
"$programs/launch" --cpus 1 --quiet "$place/whole.yaml"

run=parts
steps() { grep -c '"loss"' "$place/$run/metrics.jsonl" 2>/dev/null || true; }
reach() {
    for _ in $(seq 1200); do
        [ "$(steps)" -ge "$1" ] 2>/dev/null && return
        sleep 0.05
    done
    fail "step $1 was not reached; there are $(steps) steps"
}
state() { squeue --noheader --jobs "$job" --states all --format %T 2>/dev/null; }
restarts() { scontrol show job "$job" | grep -o 'Restarts=[0-9]*' | cut -d= -f2; }
started_again() {
    # SLURM delays a requeued job by two minutes, and its daemons need a few seconds to clean up the last
    # start.
    sleep 3
    for _ in $(seq 300); do
        [ "$(restarts)" = "$1" ] && [ "$(state)" = RUNNING ] && return
        [ "$(state)" != FAILED ] || break
        [ "$(state)" != PENDING ] || scontrol update jobid="$job" starttime=now >/dev/null 2>&1 || true
        sleep 0.3
    done
    fail "the job was not restarted: $(state), $(restarts) restarts"
}

submit() {
    LAUNCH=$programs/launch OPTIONS="--cpus 2 --quiet" sbatch --parsable --partition low --gpus-per-node=0 --cpus-per-task=1 \
        --time 30 --output "$place/$run.job.log" scripts/slurm/nodes.sbatch "$place/$run.yaml"
}
job=$(submit)
reach 50
echo "job $job trains on two nodes, with $(ls "$place/parts/logs" | wc -l) ranks"
sbatch --parsable --partition high --nodes 2 --output /dev/null --wrap "sleep 1" >/dev/null
started_again 1
before=$(steps)
reach $((before + 50))
echo "preempted and restarted after step $before"
scancel --signal USR1 --batch "$job"
started_again 2
echo "signalled by USR1 and restarted after step $(steps)"
for _ in $(seq 1200); do
    [ "$(state)" = RUNNING ] || break
    sleep 0.1
done
[ "$(state)" = COMPLETED ] || fail "the job ended as $(state)"
# Each restart resumed from a checkpoint.
resumed=$(grep -c 'resumed after step' "$place/parts/logs/rank-0.log" || true)
[ "$resumed" = "$(restarts)" ] || fail "of $(restarts) restarts, $resumed resumed from a checkpoint"
python3 - "$place" <<'PYTHON'
import json, sys

def losses(run):
    lines = map(json.loads, open(f"{sys.argv[1]}/{run}/metrics.jsonl"))
    return [line["loss"] for line in lines if "loss" in line]

whole, parts = losses("whole"), losses("parts")
assert len(whole) == len(parts) == 3000, (len(whole), len(parts))
worst = max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(parts, whole))
assert worst < 1e-4, worst
print(f"slurm: {len(parts)} losses within {worst:.1e} of those of an uninterrupted run on one rank")
PYTHON

run=cancelled
job=$(submit)
reach 50
scancel "$job"
for _ in $(seq 600); do
    case $(state) in RUNNING | COMPLETING) sleep 0.1 ;; *) break ;; esac
done
# A requeue would take less than this.
sleep 5
[ "$(state)" = CANCELLED ] && [ "$(restarts)" = 0 ] || fail "the cancelled job is $(state), with $(restarts) restarts"
ls "$place"/cancelled/checkpoints/*/DONE >/dev/null 2>&1 || fail "the cancelled job has no checkpoint"
echo "cancelled after step $(steps) with a checkpoint, and not requeued"
