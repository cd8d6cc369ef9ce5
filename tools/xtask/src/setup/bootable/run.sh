# Runs the script that lies on a disk of its own, with the console as its output, and switches off. The script may write
# "reboot" into /run/sapwood/ending. Where no disk holds a script, there is nothing to do.
exec </dev/null >/dev/console 2>&1
mkdir -p /run/sapwood
for disk in /sys/block/vd*; do
    disk=/dev/${disk##*/}
    if [ "$(head -c 10 "$disk" | tr -d '\0')" = "#sapwood 1" ]; then
        cat "$disk" >/run/sapwood/script.sh
    fi
done
[ -e /run/sapwood/script.sh ] || exit 0
echo poweroff >/run/sapwood/ending
echo SAPWOOD-BEGIN
/bin/sh /run/sapwood/script.sh
echo "SAPWOOD-RESULT $?"
# At once: no unit holds anything that unmounting does not bring to the disk.
systemctl --force "$(cat /run/sapwood/ending)"
