# Functions for scripts that run several commands in turn; use with: . tools/forward_signals.sh
#
#   run COMMAND [ARG ...]     run a command until it ends or the script is asked to stop
#
# A batch system may send a signal only to the script's shell. Without this file the shell would end, but the
# command would continue to run.

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
trap 'stop 1' HUP # no effect under nohup, because a shell cannot trap a signal that was ignored at its start
trap 'stop 10' USR1
run() {
    "$@" &
    child=$!
    wait "$child"
    child=
}
