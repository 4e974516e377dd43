#!/bin/busybox sh
# The first process of a machine that exists to run one test on an emulated RDMA device.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp TMPDIR=/tmp RUST_BACKTRACE=1
export CARLSBAD_REQUIRE=root,shm,rdma
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
while read -r module; do
    insmod "/modules/$module" || echo "no $module"
done < /modules/list
ulimit -l unlimited
# By path: busybox's `ip` goes before it, and makes no virtual cable.
/usr/bin/ip link set lo up
/usr/bin/ip link add veth0 type veth peer name veth1
/usr/bin/ip address add 10.0.0.1/24 dev veth0
/usr/bin/ip link set veth0 up
/usr/bin/ip link set veth1 up
sleep 1
/usr/bin/rdma link add rxe0 type rxe netdev veth0
cd /tmp
if grep -q carlsbad=figures /proc/cmdline; then
    CARLSBAD_FIGURES=/tmp/figures /test --bench
else
    # Of a target that runs on every fabric, what runs on this one.
    case $(sed -n 's/.*carlsbad=\([a-z]*\).*/\1/p' /proc/cmdline) in
        shared) /test verbs:: --test-threads=1 ;;
        *) /test --test-threads=1 ;;
    esac
fi
status=$?
[ -e /tmp/figures ] && sed 's/^/@carlsbad figure /' /tmp/figures
[ $status = 0 ] || dmesg | tail -40
echo "CARLSBAD RESULT $status"
poweroff -f
