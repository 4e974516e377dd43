#!/bin/busybox sh
# The first process of a machine that exists to run one test binary with a KVM of the SVM kind.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp TMPDIR=/tmp RUST_BACKTRACE=1
export CARLSBAD_REQUIRE=kvm,busybox CARLSBAD_SLOW=1 CARLSBAD_GUESTS=/guests
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
while read -r module; do
    insmod "/modules/$module" || echo "no $module"
done < /modules/list
cd /tmp
/test --test-threads=1
status=$?
[ $status = 0 ] || dmesg | tail -40
echo "CARLSBAD RESULT $status"
poweroff -f
