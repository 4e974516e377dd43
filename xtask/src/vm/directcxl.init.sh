#!/bin/busybox sh
# The first process of a machine that exists to run one test on emulated CXL devices.
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp TMPDIR=/tmp RUST_BACKTRACE=1
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
while read -r module; do
    insmod "/modules/$module" || echo "no $module"
done < /modules/list
export DIRECTCXL_VM=$(sed -n 's/.*carlsbad=\([a-z_]*\).*/\1/p' /proc/cmdline)
cd /tmp
/test "$DIRECTCXL_VM" --exact --nocapture --test-threads=1
status=$?
[ $status = 0 ] || dmesg | grep -iE 'cxl|dax|nd_|nvdimm|error|BUG' | tail -40
echo "CARLSBAD RESULT $status"
poweroff -f
