#!/bin/sh
# The first process of a machine that exists to run one test binary.
export PATH=/bin:/usr/bin HOME=/tmp TMPDIR=/tmp RUST_BACKTRACE=1 CARLSBAD_REQUIRE=root,namespaces,shm,tmpfs-mount
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/shm /etc
mount -t tmpfs tmpfs /dev/shm
mount -t tmpfs tmpfs /tmp
echo 'root:x:0:0::/tmp:/bin/sh' > /etc/passwd
echo 'nobody:x:65534:65534::/tmp:/bin/sh' >> /etc/passwd
cd /tmp
/test
echo "CARLSBAD RESULT $?"
poweroff -f
