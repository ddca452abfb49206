# A volume that follows its guest. First boot: DRIVES drives, then one more comes (PORT, by hot-plug), and gets larger
# while it is mounted; what is written is told as a sum. Second boot, on another node: the sum is the same.
# Variables: BOOT, SERIAL (of the volume), BYTES (what it grows to), SUM.
set -e
step() { echo "guest: $*"; }
device() {
  grep -l "$SERIAL" /sys/class/nvme/nvme*/serial 2>/dev/null | head -n1 | cut -d/ -f5 | grep .
}
wait_for() {
  for _ in $(seq 1200); do
    "$@" && return 0
    sleep 0.1
  done
  echo "guest: never: $*"
  return 1
}
has_volume() { device > /tmp/device && [ -b "/dev/$(cat /tmp/device)n1" ]; }
has_first() { ls /dev/nvme*n1 > /dev/null 2>&1; }
has_grown() { [ $(($(cat "/sys/block/${name}/size") * 512)) = "$BYTES" ]; }
if [ "$BOOT" = 1 ]; then
  wait_for has_first
  has_volume && exit 13
  step "ready for a drive"
  wait_for has_volume
  name=$(cat /tmp/device)n1
  step "a drive was added: $name"
  mkfs.ext4 -q -F "/dev/$name"
  mount -t ext4 "/dev/$name" /mnt
  dd if=/dev/urandom of=/mnt/file bs=1M count=4 2>/dev/null
  sync
  step "ready for a larger drive"
  wait_for has_grown
  step "the drive has grown to $BYTES"
  umount /mnt
  # The last MiB is past where the old end was.
  dd if=/dev/urandom of=/tmp/end bs=1M count=1 2>/dev/null
  dd if=/tmp/end of="/dev/$name" bs=1M seek=$((BYTES / 1048576 - 1)) oflag=direct 2>/dev/null
  dd if="/dev/$name" bs=1M skip=$((BYTES / 1048576 - 1)) iflag=direct 2>/dev/null | cmp - /tmp/end
  step "sum $(sha256sum < "/dev/$name" | cut -d' ' -f1)"
else
  wait_for has_volume
  name=$(cat /tmp/device)n1
  [ "$(sha256sum < "/dev/$name" | cut -d' ' -f1)" = "$SUM" ]
  e2fsck -f -n "/dev/$name"
  step "the volume came along unchanged"
fi
if dmesg | grep -iE 'nvme.*(i/o error|timeout|fatal)'; then exit 12; fi
