# Sourced by tests/run and tests/acceptance/run, in bash, from the root of the tree.

# Tests that start no process: what they find cannot depend on what runs at the same time.
pure_tests=(tests/protocol tests/transparency tests/handlers tests/test_pipeline*.py tests/test_imports.py
    tests/test_names.py tests/test_document_paths.py tests/test_words.py tests/test_settings.py tests/test_errors.py
    tests/test_retry_policy.py)

# The tests that failed among others and passed alone, one a line with the date. .ci/run prints it.
flaky_tests=.flaky-tests
flaky_found=
scratch=

say() { printf '\n== %s\n' "$*"; }

end_of_run() {
    [ -z "$flaky_found" ] || say "FLAKY: failed among others, passed alone (also in $flaky_tests)" "$flaky_found"
    [ -z "$scratch" ] || rm -rf "$scratch"
}
trap end_of_run EXIT

# Put what tests write into memory, where there is room: a file system on disk has more work with a database for each
# test than PostgreSQL.
in_memory() {
    local place=/dev/shm free
    free=$(df --output=avail -k "$place" 2>/dev/null | tail -n 1) || return 0
    [ "${free:-0}" -ge 4000000 ] && scratch=$(mktemp -d "$place/redox-receiver.XXXXXX" 2>/dev/null) || return 0
    # Root's tests run servers under other accounts, and run programs that they have written.
    chmod 755 "$scratch"
    printf '#!/bin/sh\n' > "$scratch/program" && chmod 755 "$scratch/program" && "$scratch/program" 2>/dev/null || return 0
    export TMPDIR=$scratch
}

# retry_failed_serially PYTEST...: run it, three tests at a time, and run what failed once more, one test at a time. What
# fails again is broken. What passes is flaky: it is named at the end of the run and in $flaky_tests. A flaky test that is
# pure fails the run, because other tests' load is no excuse for it.
retry_failed_serially() {
    local status=0 failed flaky each pure
    rm -f .pytest_cache/v/cache/lastfailed
    # Native tracebacks: to show source, pytest parses it, and CPython 3.11 can fail at that after deep recursion
    # ("AST constructor recursion depth mismatch"), which ends the whole run.
    "$@" -n 3 --dist worksteal --tb native || status=$?
    [ "$status" -eq 1 ] || return "$status"
    say "what failed among others, once more and alone"
    failed=$(last_failed)
    status=0
    "$@" --last-failed --last-failed-no-failures none || status=$?
    flaky=$(LC_ALL=C comm -23 <(printf '%s\n' "$failed") <(last_failed))
    [ -n "$flaky" ] || return "$status"
    flaky_found+=$'\n'$flaky
    sed "s/^/$(date -u +%F) /" <<< "$flaky" >> "$flaky_tests"
    while IFS= read -r each; do
        for pure in "${pure_tests[@]}"; do
            case $each in
                "$pure/"* | "$pure::"*)
                    say "$each starts no process, and must not depend on what runs beside it"
                    status=1
                    ;;
            esac
        done
    done <<< "$flaky"
    return "$status"
}

# The tests that pytest remembers as failed, one a line, sorted.
last_failed() {
    sed -n 's/^  "\(.*\)": true,\{0,1\}$/\1/p' .pytest_cache/v/cache/lastfailed 2>/dev/null | LC_ALL=C sort
}
