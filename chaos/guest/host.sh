# The Linux kernel as a host of a Weft volume: connect, nvme list, id-ctrl, mkfs, fio with verify, disconnect,
# reconnect, fsck. Variables: SUBNQN, PORT (NVMe/TCP), DISCOVERY_PORT.
set -e
step() { echo "guest: $*"; }
device() { # the block device of SUBNQN's namespace 1, by name and not by number
  for subsystem in /sys/class/nvme-subsystem/*; do
    [ "$(cat "$subsystem/subsysnqn")" = "$SUBNQN" ] || continue
    for namespace in "$subsystem"/nvme*n*; do
      [ -e "$namespace" ] && basename "$namespace" && return 0
    done
  done
  return 1
}
wait_device() {
  for _ in $(seq 200); do
    name=$(device) && [ -b "/dev/$name" ] && return 0
    sleep 0.1
  done
  echo "guest: no device of $SUBNQN"; return 1
}
step "discover"
nvme discover -t tcp -a 10.0.2.2 -s "$DISCOVERY_PORT" | tee /tmp/discovery
grep -q "$SUBNQN" /tmp/discovery
step "connect"
nvme connect -t tcp -a 10.0.2.2 -s "$PORT" -n "$SUBNQN" -i 2 -k 5 -l 60
wait_device
nvme list
step "id-ctrl"
controller=$(ls -d /sys/class/nvme/nvme* | head -n1)
nvme id-ctrl "/dev/$(basename "$controller")" | head -n 30
step "id-ns"
nvme id-ns "/dev/$name" | head -n 12
step "fio with verify"
fio --name=verify --filename="/dev/$name" --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite --bsrange=4k-64k \
  --size=24m --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal > /tmp/fio || { cat /tmp/fio; exit 11; }
step "write zeroes and discard"
blkdiscard -o 0 -l 1048576 "/dev/$name" 2>/dev/null || nvme dsm "/dev/$name" -n 1 -d -s 0 -b 256
cmp -n 1048576 "/dev/$name" /dev/zero
step "mkfs.ext4"
mkfs.ext4 -q -F "/dev/$name"
mount -t ext4 "/dev/$name" /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null
sha256sum /mnt/file | cut -d' ' -f1 > /tmp/sum
umount /mnt
step "disconnect and reconnect"
nvme disconnect -n "$SUBNQN"
nvme connect -t tcp -a 10.0.2.2 -s "$PORT" -n "$SUBNQN" -i 2 -k 5 -l 60 -g -G
wait_device
step "fsck"
e2fsck -f -n "/dev/$name"
mount -t ext4 -o ro "/dev/$name" /mnt
[ "$(sha256sum /mnt/file | cut -d' ' -f1)" = "$(cat /tmp/sum)" ]
umount /mnt
nvme disconnect -n "$SUBNQN"
step "host test passed on Linux $(uname -r)"
