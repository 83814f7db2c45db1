#!/bin/sh
# The kernels under the sanitisers of addresses and undefined behaviour: builds them into build/sanitised, and runs there the
# tests that call them (or what is given as arguments, for pytest).
#
# The sanitisers have to be loaded before Python, and an editable install puts itself before any path: so an environment of
# its own, beside whose copy of the package the packages of $PYTHON lie.
set -eu
PYTHON=${PYTHON:-$PWD/.venv/bin/python}  # absolute: CMake would take another
ROOT=build/sanitised
FLAGS="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
[ $# -gt 0 ] || set -- tests/test_kernels.py tests/test_fused.py tests/test_packing.py tests/test_tower_kernels.py tests/test_tiles.py

cmake -S . -B $ROOT/kernels -DPython_EXECUTABLE="$PYTHON" -DCABOCHON_EMULATE_AMX=ON \
    -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS_RELEASE=-O1 "-DCMAKE_CXX_FLAGS=$FLAGS"  # -O3 compiles for many minutes
cmake --build $ROOT/kernels --parallel 2
rm -rf $ROOT/package $ROOT/venv
mkdir $ROOT/package
cp -r src/cabochon $ROOT/package/
rm -f $ROOT/package/cabochon/ops/_cpu*.so
cp $ROOT/kernels/_cpu*.so $ROOT/package/cabochon/ops/
"$PYTHON" -m venv --without-pip $ROOT/venv
for site in $ROOT/venv/lib/python*/site-packages; do
    "$PYTHON" -c "import pathlib, torch; print(pathlib.Path('$ROOT/package').resolve(), pathlib.Path(torch.__file__).parents[1], sep='\n')" > "$site/beside.pth"
done
LD_PRELOAD="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)" ASAN_OPTIONS=detect_leaks=0 \
    $ROOT/venv/bin/python -m pytest -p no:cacheprovider "$@"
