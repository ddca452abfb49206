# The Linux nvme driver on emulated controllers, whose volumes are the drives. Variables: DRIVES (how many), BOOT (1 or 2).
# In the first boot a storage node is killed when this says that it writes; the second finds what the first left.
set -e
step() { echo "guest: $*"; }
for _ in $(seq 600); do
  [ "$(ls -d /sys/class/nvme/nvme*/nvme*n1 2>/dev/null | wc -l)" = "$DRIVES" ] && break
  sleep 0.1
done
nvme list
[ "$(ls /dev/nvme*n1 | wc -l)" = "$DRIVES" ]
# By serial number, which is the volume's, and not by the order of discovery.
first=$(grep -l "$SERIAL" /sys/class/nvme/nvme*/serial | head -n1 | cut -d/ -f5)
if [ "$BOOT" = 2 ]; then
  step "fsck and compare"
  e2fsck -f -n "/dev/${first}n1"
  mount -t ext4 -o ro "/dev/${first}n1" /mnt
  (cd /mnt && sha256sum -c sum)
  umount /mnt
  step "guest with drives passed its second boot"
  exit 0
fi
step "identify"
nvme id-ctrl "/dev/$first" | head -n 12
nvme id-ns "/dev/${first}n1" | head -n 6
# The drive whose doorbells are mapped has no Doorbell Buffer Config (OACS bit 8), so that its driver rings registers.
[ "$(for name in /dev/nvme*n1; do nvme id-ctrl "${name%n1}" | grep '^oacs'; done | grep -c ': 0$')" = 1 ]
step "reset of a controller and of a function"
echo 1 > "/sys/class/nvme/$first/reset_controller"
echo 1 > "/sys/class/nvme/$first/device/reset"
dd if="/dev/${first}n1" of=/dev/null bs=64k count=16 iflag=direct 2>/dev/null
step "writing"
for name in $(ls /dev/nvme*n1); do
  fio --name="$(basename "$name")" --filename="$name" --direct=1 --ioengine=io_uring --iodepth=16 --rw=randwrite \
    --bsrange=4k-128k --size=16m --loops=2 --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal > "/tmp/$(basename "$name")" &
  jobs="$jobs $!"
done
for job in $jobs; do wait "$job"; done
fio --name=depth1 --filename="/dev/${first}n1" --direct=1 --ioengine=io_uring --iodepth=1 --rw=randrw --bs=4k --size=2m \
  --verify=crc32c --do_verify=1 --verify_fatal=1 --minimal > /tmp/depth1
for name in $(ls /dev/nvme*n1); do [ "$(cut -d';' -f5 "/tmp/$(basename "$name")")" = 0 ]; done
if dmesg | grep -iE 'nvme.*(i/o error|timeout|fatal)'; then exit 12; fi
step "discard and mkfs.ext4"
blkdiscard -o 0 -l 1048576 "/dev/${first}n1"
cmp -n 1048576 "/dev/${first}n1" /dev/zero
mkfs.ext4 -q -F "/dev/${first}n1"
mount -t ext4 "/dev/${first}n1" /mnt
dd if=/dev/urandom of=/mnt/file bs=1M count=8 2>/dev/null
(cd /mnt && sha256sum file > sum)
umount /mnt
step "guest with drives passed its first boot"
