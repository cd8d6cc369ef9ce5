# Runs the test's script with a serial port as its output, says how it ended, powers off. The port is
# sapwood.output on the kernel's command line; the kernel's own messages are on the first one.
run=/run/sapwood
box=$run/busybox
export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LC_ALL=C
port=/dev/$($box sed -n 's/.*sapwood\.output=\([a-zA-Z0-9]*\).*/\1/p' /proc/cmdline)
exec </dev/null >"$port" 2>&1
$box stty -F "$port" raw
$box mkdir -p /dev/shm /dev/pts
$box mount -t tmpfs tmpfs /dev/shm
$box mount -t devpts devpts /dev/pts

limit=$($box sed -n 's/.*sapwood\.limit=\([0-9]*\).*/\1/p' /proc/cmdline)
(
    $box sleep "$limit"
    echo SAPWOOD-TIMEOUT
    $box poweroff -f
) &
watchdog=$!

echo SAPWOOD-BEGIN
/bin/sh -c ". $run/lib.sh; . $run/script.sh"
status=$?
$box kill $watchdog
cd /
$box sync
# The result is said after the file systems are clean: whoever reads it may stop the machine.
$box umount -a -r 2>/dev/null
$box mount -o remount,ro / 2>/dev/null
echo "SAPWOOD-RESULT $status"
# Setting a terminal's mode waits until everything written to it has left.
$box stty -F "$port" raw
$box poweroff -f
