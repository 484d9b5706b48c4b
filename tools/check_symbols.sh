#!/bin/sh
# Every symbol that libqie.so offers starts with qie_: whoever links it must not meet our other names.
# usage: tools/check_symbols.sh [BUILD_FOLDER]
set -eu
library=${1:-build}/libqie.so
[ -e "$library" ] || { echo "check_symbols: $library is not built" >&2; exit 1; }
names=$(nm -D --defined-only "$library" | awk '{print $NF}' | sed 's/@.*//')
foreign=$(printf '%s\n' "$names" | grep -v '^qie_' | grep -v '^$' || true)
if [ -n "$foreign" ]; then
    printf '%s: does not start with qie_\n' $foreign
    exit 1
fi
printf "%s\n" "$names" | grep -qx qie_engine_edit || { echo "check_symbols: $library does not offer its own interface" >&2; exit 1; }
echo "check_symbols: $(printf '%s\n' "$names" | grep -c '^qie_') symbols, 0 problems"
