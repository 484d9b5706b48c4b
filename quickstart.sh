#!/bin/sh
# From a fresh Debian 12 to an edited picture: installs the packages that the build needs, builds, and edits the
# sample picture with the built-in demo model. May be run again at any time; what is done is not done twice.
set -eu
cd "$(dirname "$0")"
. tools/packages.sh

input=demo/samples/mug.png
output=build/mug-purple.png

need_packages $BUILD_PACKAGES
[ -e build/qwen-edit ] || echo "building (a minute or two) ..."
build_in build qwen-edit
[ -e "$input" ] || {
    echo "the sample picture $input is missing: is this a complete copy of the repository?" >&2
    exit 1
}
build/qwen-edit edit --model demo --seed 7 -i "$input" -o "$output" \
    -p "把图片里的主体颜色改成紫色，并保持整体风格一致。" >/dev/null
cat <<END

The result:   $PWD/$output
The original: $PWD/$input

Your own picture:  build/qwen-edit edit -i photo.png -p "change the color of the subject to green" -o out.png
Everything else:   build/qwen-edit edit --help
END
