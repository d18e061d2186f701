#!/usr/bin/env bash
# Trains on three hosts, which are network namespaces connected by a bridge. One host is disconnected during
# the training: the others must notice it within the timeout and name it. When it is connected again, the run
# must resume and end with the losses of one rank.
#
#   tests/hosts/run.sh [FOLDER OF THE PROGRAMS [launch|mpi]]      default: target/debug launch; as root
#
# `launch`: the launcher of each host restarts its rank by itself. `mpi`: mpirun starts the ranks from the
# first host, twice.
set -euo pipefail
cd "$(dirname "$0")/../.."

programs=$(cd "${1:-target/debug}" && pwd)
way=${2:-launch}
# In continuous integration a missing tool is an error.
skip() {
    echo "skipped: several hosts, because $1"
    [ "${CI:-}" != true ] || exit 1
    exit 0
}
[ "$(id -u)" = 0 ] || skip "namespaces need root"
for tool in ip python3; do
    command -v $tool >/dev/null 2>&1 || skip "there is no $tool (Debian: iproute2)"
done
id=ls$$
ip netns add $id-probe 2>/dev/null || { echo "skipped: several hosts, because this machine forbids namespaces, even to root"; exit 0; }
ip netns del $id-probe
if [ $way = mpi ]; then
    command -v mpirun >/dev/null 2>&1 || skip "there is no mpirun (Debian: openmpi-bin)"
    ! OMPI_COMM_WORLD_RANK=0 OMPI_COMM_WORLD_SIZE=2 "$programs/trainer" train - 2>&1 | grep -q "features mpi" ||
        skip "the programs were built without MPI"
fi

place=$(mktemp -d)
hosts="0 1 2"
launchers=()
finish() {
    status=$?
    [ ${#launchers[@]} = 0 ] || kill -9 "${launchers[@]}" 2>/dev/null || true
    for host in $hosts; do
        # Processes that mpirun can no longer reach would stay.
        ip netns pids $id-$host 2>/dev/null | xargs -r kill -9 2>/dev/null || true
        ip netns del $id-$host 2>/dev/null || true
    done
    ip link del $id 2>/dev/null || true
    if [ $status != 0 ]; then
        for log in "$place"/*.log; do
            echo "--- $log"
            tail -n 40 "$log"
        done
    fi
    rm -rf "$place"
}
trap finish EXIT
fail() { echo "hosts: $1" >&2; exit 1; }

ip link add $id type bridge
ip link set $id up
for host in $hosts; do
    ip netns add $id-$host
    ip link add $id-$host type veth peer name eth0 netns $id-$host
    ip link set $id-$host master $id up
    ip -n $id-$host addr add 10.253.77.$((host + 1))/24 dev eth0
    ip -n $id-$host link set eth0 up
    ip -n $id-$host link set lo up
done

golden=$PWD/tests/golden/bert
configuration() {
    cat >"$place/$1.yaml" <<YAML
output: $place/$1
model: {path: $golden, dropout: 0.1, max_query_length: 16, max_document_length: 16}
data: {train: [{path: $golden/rows.jsonl}], negatives: 2}
lora: {rank: 4, alpha: 8, dropout: 0.1}
training: {epochs: 100, batch_size: 4, learning_rate: 1.0e-4}
checkpoint: {every: 20}
YAML
}
configuration whole
configuration parts
"$programs/launch" --cpus 1 --quiet "$place/whole.yaml"

timeout=4
LODESTONE_TOKEN=$(od -An -N16 -tx1 /dev/urandom | tr -d ' \n')
export LODESTONE_TOKEN LODESTONE_TIMEOUT=$timeout RAYON_NUM_THREADS=1

# Runs a command on a host, with its host name.
cat >"$place/on" <<SH
#!/bin/sh
host=\$1
shift
exec ip netns exec $id-\$host unshare --uts sh -c 'hostname host-\$0 && exec "\$@"' \$host "\$@"
SH
# Stands for ssh in mpirun: its arguments are an address and the words of a command line.
cat >"$place/agent" <<SH
#!/bin/sh
host=\$((\${1##*.} - 1))
shift
exec "$place/on" \$host sh -c "\$*"
SH
chmod +x "$place/on" "$place/agent"

start_launch() {
    for host in $hosts; do
        "$place/on" $host "$programs/launch" --cpus 1 --quiet --restarts 5 --timeout $timeout --nodes 3 --node $host \
            --rendezvous 10.253.77.1:29400 "$place/parts.yaml" >/dev/null 2>"$place/host-$host.log" &
        launchers+=($!)
    done
}
start_mpi() {
    "$place/on" 0 mpirun --allow-run-as-root --bind-to none --mca plm_rsh_agent "$place/agent" --mca btl tcp,self \
        --mca btl_tcp_if_include eth0 --mca oob_tcp_if_include eth0 -np 3 \
        --host 10.253.77.1:1,10.253.77.2:1,10.253.77.3:1 -x LODESTONE_TIMEOUT -x RAYON_NUM_THREADS \
        "$programs/trainer" train --quiet --resume "$place/parts.yaml" >/dev/null 2>>"$place/host-0.log" &
    launchers+=($!)
}
start_$way

steps() { grep -c '"loss"' "$place/parts/metrics.jsonl" 2>/dev/null || true; }
reach() {
    for _ in $(seq 2400); do
        [ "$(steps)" -ge "$1" ] 2>/dev/null && return
        sleep 0.05
    done
    fail "step $1 was not reached; there are $(steps) steps"
}
reach 100
ip link set $id-2 down
echo "disconnected host 10.253.77.3 after step $(steps)"
cut=$(date +%s%N)
case $way in
launch) named="rank 2: on 10.253.77.3 has made no progress for $timeout s" ;;
mpi) named="rank 2: on host-2 has sent nothing for $timeout s" ;;
esac
for _ in $(seq 200); do
    grep -q "$named" "$place/host-0.log" && break
    sleep 0.1
done
grep -q "$named" "$place/host-0.log" || fail "host 0 does not name the lost host"
noticed=$((($(date +%s%N) - cut) / 1000000))
echo "host 0 named the lost host after $noticed ms, with a timeout of $timeout s"
[ $noticed -lt $(((timeout + 6) * 1000)) ] || fail "that took too long"
case $way in
launch)
    for host in 1 2; do
        grep -q "no progress\|restarting from the newest checkpoint" "$place/host-$host.log" || sleep $((timeout + 2))
        grep -q "no progress\|restarting from the newest checkpoint" "$place/host-$host.log" || fail "host $host did not notice"
    done
    ip link set $id-2 up
    ;;
mpi)
    # mpirun cannot end processes on a host that it cannot reach, so it must end once the host is back.
    ip link set $id-2 up
    for _ in $(seq 300); do
        kill -0 "${launchers[0]}" 2>/dev/null || break
        sleep 0.1
    done
    ! kill -0 "${launchers[0]}" 2>/dev/null || fail "mpirun did not end"
    wait "${launchers[0]}" && fail "mpirun reported success"
    launchers=()
    echo "mpirun ended; starting it again after step $(steps)"
    start_mpi
    ;;
esac
for launcher in "${launchers[@]}"; do
    wait "$launcher" || fail "a launcher ended with $?"
done
launchers=()
python3 - "$place" <<'PYTHON'
import json, sys

def losses(run):
    lines = map(json.loads, open(f"{sys.argv[1]}/{run}/metrics.jsonl"))
    return [line["loss"] for line in lines if "loss" in line]

whole, parts = losses("whole"), losses("parts")
assert len(whole) == len(parts) == 1000, (len(whole), len(parts))
worst = max(abs(a - b) / max(abs(b), 1e-2) for a, b in zip(parts, whole))
assert worst < 1e-4, worst
print(f"hosts: {len(parts)} losses within {worst:.1e} of those of one rank")
PYTHON
