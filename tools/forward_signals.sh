# Sourced by launchers of several steps. A signal that reaches the launcher's shell alone, as a batch
# system's does, must stop the step under way too: the shell would end, and the step run on.
#
#   run COMMAND [ARG ...]     the command, until it ends or the launcher is asked to stop

child=
stop() {
    trap '' INT TERM HUP USR1
    if [ -n "$child" ]; then
        kill -TERM "$child" 2>/dev/null || :
        wait "$child" || :
    fi
    exit $((128 + $1))
}
trap 'stop 2' INT
trap 'stop 15' TERM
trap 'stop 1' HUP # not under nohup: what is ignored at the start stays ignored
trap 'stop 10' USR1
run() {
    "$@" &
    child=$!
    wait "$child"
    child=
}
