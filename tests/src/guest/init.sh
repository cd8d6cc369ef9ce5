#!/bin/busybox sh
# The guest's first process: loads the drivers, finds the disks, enters the root file system.
# The kernel's command line says what to do: sapwood.root (a device, or "none"), sapwood.disks
# (how many virtio disks must appear), sapwood.modules (a further list of drivers: "kvm").
/bin/busybox --install -s /bin
export PATH=/bin:/usr/sbin:/usr/bin:/sbin
mount -t devtmpfs dev /dev
mount -t proc proc /proc
mount -t sysfs sys /sys

option() {
    for word in $(cat /proc/cmdline); do
        case $word in "sapwood.$1="*) echo "${word#*=}" ;; esac
    done
}

modules=/modules/order
[ -z "$(option modules)" ] || modules="$modules /modules/order.$(option modules)"
for module in $(cat $modules); do
    insmod "/modules/$module.ko" || echo "init: cannot load $module"
done

tries=0
while [ "$(ls -d /sys/block/vd* 2>/dev/null | wc -l)" -lt "$(option disks)" ]; do
    tries=$((tries + 1))
    [ "$tries" -gt 300 ] && echo "init: a disk is missing" && break
    sleep 0.1
done

root=$(option root)
if [ "$root" = none ]; then
    mount -t tmpfs tmpfs /run
    mkdir -p /run/sapwood /mnt /tmp
    cp /bin/busybox /sapwood/* /run/sapwood
    exec /run/sapwood/busybox sh /run/sapwood/start.sh
fi
if ! mount -t ext4 -o noatime "$root" /newroot; then
    echo "init: cannot mount $root"
    poweroff -f
fi
mount -t tmpfs tmpfs /newroot/run
mount -t tmpfs tmpfs /newroot/tmp
mkdir -p /newroot/run/sapwood
cp /bin/busybox /sapwood/* /newroot/run/sapwood
for place in dev proc sys; do
    mount --move "/$place" "/newroot/$place"
done
exec switch_root /newroot /run/sapwood/busybox sh /run/sapwood/start.sh
