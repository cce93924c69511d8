#!/bin/bash
# Compares our FUSE transport with nbdfuse + losetup --direct-io=on, on the same nbdkit memory server, in one run.
# Prints IOPS of fio (4 KiB random reads and writes, 16 in flight) and the ratio, which should be 1.5 or more.
# Needs root, fio, nbdkit, nbdfuse and a release build (cargo build --release --example fuse_path).
#   SECONDS_EACH=5 ROUNDS=2 CONNECTIONS=4 scripts/bench-fuse.sh
set -euo pipefail
cd "$(dirname "$0")/.."
seconds=${SECONDS_EACH:-5} rounds=${ROUNDS:-2} connections=${CONNECTIONS:-4}
ours=${OURS:-target/release/examples/fuse_path}
work=$(mktemp -d)
nbdkit_pid='' front_pid='' loop='' mounted=''
stop_front() {
    if [ -n "$loop" ]; then losetup -d "$loop"; loop=''; fi
    if [ -n "$front_pid" ]; then
        exec 3>&-
        if [ "$mounted" = nbdfuse ]; then umount "$work/mnt"; fi
        wait "$front_pid" || true
        front_pid=''
    fi
}
cleanup() {
    stop_front || true
    umount "$work/mnt" 2>/dev/null || true
    if [ -n "$nbdkit_pid" ]; then kill "$nbdkit_pid" || true; fi
    rm -rf "$work"
}
trap cleanup EXIT
mkdir "$work/mnt"
mkfifo "$work/hold"
nbdkit -f -U "$work/nbd.sock" memory size=1G &
nbdkit_pid=$!
for _ in $(seq 100); do [ -S "$work/nbd.sock" ] && break; sleep 0.05; done

start() { # kind
    mounted=$1
    if [ "$1" = nbdfuse ]; then
        nbdfuse "$work/mnt" --unix "$work/nbd.sock" &
        front_pid=$!
        exec 3>/dev/null
        file=$work/mnt/nbd
    else
        "$ours" "$work" "" "$work/mnt" "$connections" <"$work/hold" >"$work/out" &
        front_pid=$!
        exec 3>"$work/hold"
        file=$work/mnt/disk
    fi
    for _ in $(seq 100); do [ -s "$file" ] && break; sleep 0.05; done
    loop=$(losetup -f --show --direct-io=on "$file")
}
iops() { # rw
    fio --name=bench --filename="$loop" --rw="$1" --bs=4k --iodepth=16 --ioengine=libaio --direct=1 \
        --time_based --runtime="$seconds" --ramp_time=1 --randrepeat=1 --output-format=json |
        python3 -c 'import json,sys; j=json.load(sys.stdin)["jobs"][0]; print(int(j["read"]["iops"]+j["write"]["iops"]))'
}
ticks() { awk '{ print $14 + $15 }' /proc/$front_pid/stat; }
declare -A sum
for round in $(seq "$rounds"); do
    for kind in nbdfuse ours; do
        start $kind
        dd if=/dev/urandom of="$loop" bs=1M oflag=direct status=none || true
        for rw in randread randwrite; do
            before=$(ticks)
            n=$(iops $rw)
            # CPU time of the front end alone, with fio's ramp-up second in it.
            each=$(awk -v t=$(($(ticks) - before)) -v n=$((n * (seconds + 1))) 'BEGIN { printf "%.1f", t * 10000 / n }')
            echo "round $round $kind $rw $n IOPS, $each us of CPU each, $(grep -c . <(ls /proc/$front_pid/task)) threads"
            sum[$kind-$rw]=$((${sum[$kind-$rw]:-0} + n))
        done
        if [ $kind = ours ]; then grep -E 'VmRSS|RssAnon|RssShmem|RssFile|Threads' "/proc/$front_pid/status" | tr '\n' ' '; echo; fi
        stop_front
    done
done
for rw in randread randwrite; do
    awk -v rw=$rw -v a="${sum[nbdfuse-$rw]}" -v b="${sum[ours-$rw]}" -v n="$rounds" \
        'BEGIN { printf "%-10s nbdfuse %d IOPS, ours %d IOPS, ratio %.2f\n", rw, a/n, b/n, b/a }'
done
