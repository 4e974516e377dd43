#!/bin/busybox sh
# The first process of a machine that exists to run one test binary with a KVM of the SVM kind.
# A kernel's first root cannot be left by pivot_root, which the backend `process` does.
if [ ! -e /moved ]; then
    /bin/busybox mkdir /new
    /bin/busybox mount -t tmpfs -o mode=755 tmpfs /new
    for name in /*; do
        [ "$name" = /new ] || /bin/busybox cp -a "$name" /new
    done
    : > /new/moved
    exec /bin/busybox switch_root /new /init
fi
/bin/busybox --install -s /bin
export PATH=/bin:/usr/bin HOME=/tmp TMPDIR=/tmp RUST_BACKTRACE=1
export CARLSBAD_REQUIRE=root,kvm,busybox,cgroups CARLSBAD_SLOW=1 CARLSBAD_GUESTS=/guests
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
# The unified hierarchy, with all that limits sandboxes.
mount -t cgroup2 cgroup2 /sys/fs/cgroup
echo '+memory +cpu +pids' > /sys/fs/cgroup/cgroup.subtree_control
while read -r module; do
    insmod "/modules/$module" || echo "no $module"
done < /modules/list
cd /tmp
/test --test-threads=1
status=$?
[ $status = 0 ] || dmesg | tail -40
echo "CARLSBAD RESULT $status"
poweroff -f
