#!/bin/sh
# Builds the program and its tests twice (as it ships, and with the address and undefined-behaviour sanitizers) and
# runs both suites; the last lines are the summary of the test runner.
#   sh test.sh          what every change must pass
#   sh test.sh --long   also the thread sanitizer on the lower layers and the service, valgrind on the demo edit,
#                       longer fuzzing
set -eu
cd "$(dirname "$0")"
. tools/packages.sh

long=0
for argument in "$@"; do
    case $argument in
    --long) long=1 ;;
    *)
        echo "usage: sh test.sh [--long]" >&2
        exit 2
        ;;
    esac
done

need_packages $BUILD_PACKAGES $TEST_PACKAGES
need_packages $BROWSER_PACKAGES || echo "no browser can be installed: the tests of the page are skipped"
[ "$long" -eq 0 ] || need_packages $LONG_PACKAGES

say() { printf '== %s\n' "$*"; }

say "building build/"
build_in build all -DQIE_TESTS=ON
say "building build-asan/"
build_in build-asan all -DQIE_TESTS=ON -DQIE_SANITIZE=address,undefined
folders="build build-asan"

if [ "$long" -eq 1 ]; then
    say "building build-tsan/"
    build_in build-tsan all -DQIE_TESTS=ON -DQIE_SANITIZE=thread
    export QIE_TEST_LONG=1
fi

# One run over all folders, so that there is one summary: a test named NAME runs once in each.
mkdir -p build/all
: >build/all/CTestTestfile.cmake
for folder in $folders; do
    printf 'subdirs("%s")\n' "$PWD/$folder" >>build/all/CTestTestfile.cmake
done
if [ "$long" -eq 1 ]; then
    # libgomp is not built for the thread sanitizer, so only what does not enter it is run there.
    cat >>build/all/CTestTestfile.cmake <<END
foreach(name $(ls build-tsan/tests 2>/dev/null | grep -E '^test_(base|cli|hub|text|plan)_' | grep -v parallel | tr '\n' ' '))
    add_test(tsan_\${name} "$PWD/build-tsan/tests/\${name}")
    set_tests_properties(tsan_\${name} PROPERTIES WORKING_DIRECTORY "$PWD" TIMEOUT 1800 SKIP_RETURN_CODE 77)
endforeach()
# The master; its worker is that of the plain build.
foreach(name service service_queue service_http service_worker service_state service_ops service_kill service_schema
        service_lora client)
    add_test(tsan_\${name} python3 "$PWD/tests/api/test_\${name}.py" "$PWD/build-tsan/qwen-edit"
             "$PWD/build-tsan/tests/fakeworker")
    set_tests_properties(tsan_\${name} PROPERTIES WORKING_DIRECTORY "$PWD/build-tsan" TIMEOUT 3600 SKIP_RETURN_CODE 77
                         ENVIRONMENT "QIE_TEST_WORKER=$PWD/build/qwen-edit;TSAN_OPTIONS=halt_on_error=1")
endforeach()
add_test(valgrind_demo_edit sh "$PWD/tests/fault/valgrind_edit.sh" "$PWD/build/qwen-edit")
set_tests_properties(valgrind_demo_edit PROPERTIES WORKING_DIRECTORY "$PWD" TIMEOUT 3600 SKIP_RETURN_CODE 77)
END
fi

# Leaks count as failures. detect_stack_use_after_return stays off: gcc stores whole AVX-512 vectors into arrays on the
# stack as if they were aligned to 64 bytes, and the frames that this option makes are not (gcc bug 110027).
export ASAN_OPTIONS="${ASAN_OPTIONS:-detect_leaks=1}"
export LSAN_OPTIONS="${LSAN_OPTIONS:-suppressions=$PWD/tests/lib/lsan.supp:print_suppressions=0}"
export UBSAN_OPTIONS="${UBSAN_OPTIONS:-print_stacktrace=1}"

[ "$long" -eq 1 ] || say "left out without --long: thread sanitizer, valgrind, long fuzzing"
say "testing ($folders)"
ctest --test-dir build/all --output-on-failure --timeout 900 -j "${QIE_TEST_JOBS:-2}"
