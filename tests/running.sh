# Sourced by tests/run and tests/acceptance/run, in bash.

# Has what tests write stand in memory, where there is room: of a database for each test, a disk's file system has more
# work than PostgreSQL.
in_memory() {
    local place=/dev/shm free
    free=$(df --output=avail -k "$place" 2>/dev/null | tail -n 1) || return 0
    [ "${free:-0}" -ge 4000000 ] && place=$(mktemp -d "$place/redox-receiver.XXXXXX" 2>/dev/null) || return 0
    # shellcheck disable=SC2064
    trap "rm -rf '$place'" EXIT
    # Tests of root's run servers as others, and run programs that they have written.
    chmod 755 "$place"
    printf '#!/bin/sh\n' > "$place/program" && chmod 755 "$place/program" && "$place/program" 2>/dev/null || return 0
    export TMPDIR=$place
}

# once_more PYTEST...: runs it, three tests at once. What could not keep its deadline beside the others, and their
# servers, on a machine that others use too, is told, and asked once more alone. What is really broken fails again.
once_more() {
    local status=0
    # Native tracebacks: to show source, pytest parses it, and CPython 3.11 can fail at that after deep recursion
    # ("AST constructor recursion depth mismatch"), which ends the whole run.
    "$@" -n 3 --dist worksteal --tb native || status=$?
    [ "$status" -eq 1 ] || return "$status"
    printf '\n== %s\n' "what failed beside the others, once more and alone"
    "$@" --last-failed --last-failed-no-failures none
}
