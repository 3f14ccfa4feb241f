#!/bin/sh
# Build the wheel, install it into a clean environment, and try it from a folder where the sources are not in reach.
set -eu
bin=$(cd "$1" && pwd)
root=$(pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
"$bin/uv" build --quiet --wheel --python "$bin/python" --out-dir "$work/dist" "$root"
"$bin/python" -m venv --without-pip "$work/venv"
# torch alone is 5 GB: the wheel's own code is tried beside the libraries that are installed already.
"$bin/uv" pip install --quiet --no-deps --python "$work/venv/bin/python" "$work"/dist/*.whl
site=$("$bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
mkdir "$work/elsewhere" "$work/libraries"
# Everything but headrace itself: neither its metadata nor the editable install's hook.
for entry in "$site"/*; do
    case "$(basename "$entry")" in headrace* | __editable__* | *.pth) ;; *) ln -s "$entry" "$work/libraries/" ;; esac
done
cd "$work/elsewhere"
PYTHONPATH="$work/libraries" "$work/venv/bin/python" "$root/tests/try_wheel.py" "$work"
echo "wheel: installed into a clean environment and tried from another folder"
