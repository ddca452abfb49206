# The Linux kernel with several paths to a volume, whose owner is stopped under its writes and resumed when it has overwritten
# them elsewhere. What was left in the owner's sockets must not come back. Variables: SUBNQN, PORTS (NVMe/TCP, with
# spaces between them), ROUNDS.
set -e
step() { echo "guest: $*"; }
for port in $PORTS; do
  nvme connect -t tcp -a 10.0.2.2 -s "$port" -n "$SUBNQN" -i 1 -k 2 -l 600
done
name=
for _ in $(seq 200); do
  for subsystem in /sys/class/nvme-subsystem/*; do
    [ "$(cat "$subsystem/subsysnqn")" = "$SUBNQN" ] || continue
    for namespace in "$subsystem"/nvme*n*; do
      [ -b "/dev/$(basename "$namespace")" ] && name=/dev/$(basename "$namespace")
    done
  done
  [ -n "$name" ] && break
  sleep 0.1
done
nvme list-subsys
[ "$(cat /sys/module/nvme_core/parameters/multipath)" = Y ]
# Every block is written once by each pass, so what a pass finds of another one's is wrong.
pass() { # NAME SEED OPTION...
  pass=$1 seed=$2; shift 2
  fio --name="$pass" --filename="$name" --direct=1 --ioengine=io_uring --iodepth=32 --rw=randwrite --bs=4k --size=8m \
    --randseed="$seed" --verify=crc32c --verify_fatal=1 --minimal "$@" > "/tmp/$pass" || { cat "/tmp/$pass"; exit 11; }
  [ "$(cut -d';' -f5 "/tmp/$pass")" = 0 ]
}
for round in $(seq "$ROUNDS"); do
  step "writing $round"
  pass "first$round" $((round * 2)) --do_verify=0 --time_based --runtime=10
  pass "second$round" $((round * 2 + 1)) --do_verify=0
  step "overwritten $round"
  for _ in $(seq 4); do
    sleep 1
    pass "check$round" $((round * 2 + 1)) --verify_only
  done
done
! dmesg | grep -iE 'i/o error'
nvme disconnect -n "$SUBNQN"
step "multipath test passed on Linux $(uname -r)"
