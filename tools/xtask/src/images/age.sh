# Upgrades, installs again, removes and adds packages on an image. All mounts are in a namespace of this script.
image=$1 root=$2 sources=$3 options=$4 downloads=$5
mount -o loop "$image" "$root"
mount -t proc proc "$root/proc"
mount --rbind /dev "$root/dev"
mount --bind "$downloads" "$root/var/cache/apt/archives"
rm -f "$root"/etc/apt/sources.list.d/* "$root/etc/apt/sources.list"
cp "$sources" "$root/etc/apt/sources.list.d/debian.sources"
cp "$options" "$root/etc/apt/apt.conf.d/90corpus"
cp /etc/resolv.conf "$root/etc/resolv.conf"
printf '#!/bin/sh\nexit 101\n' >"$root/usr/sbin/policy-rc.d"
chmod 755 "$root/usr/sbin/policy-rc.d"
apt() {
    DEBIAN_FRONTEND=noninteractive chroot "$root" apt-get -qq -y --no-install-recommends \
        -o DPkg::Options::=--force-unsafe-io -o DPkg::Options::=--force-confold -o APT::Sandbox::User=root "$@"
}
apt update
apt install --reinstall git locales perl-modules-5.36 php8.2-common vim-runtime
apt purge certbot imagemagick
apt autoremove --purge
apt -t bookworm-backports upgrade
apt install build-essential postgresql-client
rm "$root/usr/sbin/policy-rc.d" "$root/etc/apt/apt.conf.d/90corpus"
umount "$root/var/cache/apt/archives"
umount -R "$root/dev"
umount "$root/proc"
umount "$root"
