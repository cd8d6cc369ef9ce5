# What a test's script may call. A failing command ends the script with its status.
set -eu

# mark NAME: a point that the host waits for.
mark() {
    echo "SAPWOOD-MARK $1"
}

# value KEY WORDS...: something the host reads from the report.
value() {
    echo "SAPWOOD-VALUE $*"
}

# quietly COMMAND...: runs it and shows its output only when it fails.
quietly() {
    if "$@" >/tmp/quietly.log 2>&1; then
        return 0
    else
        quietly_status=$?
        echo "failed with $quietly_status: $*"
        tail -n 40 /tmp/quietly.log
        return "$quietly_status"
    fi
}
