# Debian packages that the build, the tests and the checks need; read by quickstart.sh, test.sh and .ci/run.
# need_packages NAME ... installs what is missing, as root or with sudo, and says nothing when nothing is.

BUILD_PACKAGES="cmake ninja-build gcc g++ libc6-dev pkg-config ca-certificates libdnnl-dev libssl-dev
    libjansson-dev libpng-dev libjpeg62-turbo-dev libwebp-dev libpcre2-dev libutf8proc-dev libcurl4-openssl-dev
    libmicrohttpd-dev libsqlite3-dev libseccomp-dev"
TEST_PACKAGES="python3 python3-venv"
# For the tests of the page, which are skipped where there is no browser.
BROWSER_PACKAGES="chromium chromium-driver fonts-noto-cjk"
LONG_PACKAGES="valgrind"
CHECK_PACKAGES="python3 clang-format clang-tidy binutils git"

need_packages() {
    command -v dpkg-query >/dev/null 2>&1 || {
        echo "this is no Debian system: install by hand what these packages hold: $*" >&2
        return 0
    }
    missing=
    for package in "$@"; do
        case $(dpkg-query -W -f '${db:Status-Abbrev}' "$package" 2>/dev/null || true) in
        ii*) ;;
        *) missing="$missing $package" ;;
        esac
    done
    [ -n "$missing" ] || return 0
    sudo=
    if [ "$(id -u)" -ne 0 ]; then
        command -v sudo >/dev/null 2>&1 || {
            echo "these packages are missing, and neither root nor sudo is here:$missing" >&2
            return 1
        }
        sudo=sudo
    fi
    echo "installing:$missing"
    packages_log=$(mktemp)
    # An index that cannot be refreshed (one mirror of several down) may still name what is needed.
    $sudo apt-get update -qq >"$packages_log" 2>&1 || true
    $sudo env DEBIAN_FRONTEND=noninteractive apt-get install -y -qq --no-install-recommends $missing \
        >>"$packages_log" 2>&1 || {
        tail -n 20 "$packages_log" >&2
        rm -f "$packages_log"
        echo "could not install the packages; what apt-get said is above" >&2
        return 1
    }
    rm -f "$packages_log"
}

# build_in FOLDER TARGET [CMAKE OPTION ...]: configure once, build, show the output only when it fails.
# TARGET may be "all".
build_in() {
    folder=$1 target=$2
    shift 2
    mkdir -p "$folder"
    log=$folder/build.log
    if [ ! -e "$folder/build.ninja" ]; then
        cmake -S . -B "$folder" -G Ninja "$@" >"$log" 2>&1 || {
            tail -n 30 "$log" >&2
            echo "cmake failed; its whole output is in $log" >&2
            return 1
        }
    fi
    cmake --build "$folder" --target "$target" >"$log" 2>&1 || {
        grep -E 'error|Error|FAILED|warning' "$log" | head -n 40 >&2
        echo "the build failed; its whole output is in $log" >&2
        return 1
    }
}
