# The Linux kernel's nvmet as a third-party target: one namespace, backed by a file in memory, on port 4420. Runs until the
# machine outside connects to port 4421 and says so. Variables: SUBNQN, RESERVATIONS (1: the namespace supports them), SIZE_MIB.
set -e
mount -t tmpfs -o size=90% none /tmp
truncate -s "${SIZE_MIB}M" /tmp/drive
loop=$(losetup -f)
losetup "$loop" /tmp/drive
cd /sys/kernel/config/nvmet
mkdir "subsystems/$SUBNQN"
echo 1 > "subsystems/$SUBNQN/attr_allow_any_host"
mkdir "subsystems/$SUBNQN/namespaces/1"
cd "subsystems/$SUBNQN/namespaces/1"
echo "$loop" > device_path
[ "$RESERVATIONS" = 1 ] && echo 1 > resv_enable
echo 1 > enable
cd /sys/kernel/config/nvmet
mkdir ports/1
echo tcp > ports/1/addr_trtype
echo ipv4 > ports/1/addr_adrfam
echo 10.0.2.15 > ports/1/addr_traddr
echo 4420 > ports/1/addr_trsvcid
ln -s "/sys/kernel/config/nvmet/subsystems/$SUBNQN" "ports/1/subsystems/$SUBNQN"
echo "guest: nvmet ready, reservations $RESERVATIONS"
nc -l -p 4421 > /dev/null
echo "guest: nvmet told to stop"
