#!/usr/bin/env bash
# Install modular-lm on a cluster, from a clone of it on a file system that the compute nodes share.
#
#   cluster/install.sh                    on a node with internet: a virtual environment in $VENV
#   cluster/install.sh wheelhouse DIR     on a machine with internet: fetch all packages into DIR
#   cluster/install.sh from DIR           on a node without internet: the environment out of DIR
#
# PYTHON (default python3) is the interpreter, 3.11 or newer; for a wheelhouse the same version and
# platform as on the cluster. VENV (default .venv in the clone) is the environment to make; give it to
# the launcher as venv=DIR. EXTRAS (e.g. eval,s3) are extras of the package.
set -euo pipefail

clone=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
python=${PYTHON:-python3}
venv=${VENV:-$clone/.venv}
package=$clone${EXTRAS:+[$EXTRAS]}

fail() {
    echo "error: $*" >&2
    exit 2
}

usage() {
    sed -n '2,/^set/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
}

check_python() {
    command -v "$python" >/dev/null || fail "PYTHON=$python: no such command; load a module or name one"
    "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        fail "PYTHON=$python is $("$python" --version), needed is 3.11 or newer"
}

make_venv() {
    [ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
}

# In place, so that an update of the clone is enough. The build needs setuptools, and is not isolated,
# for an isolated one would look for it on the index.
install() {
    "$venv/bin/python" -m pip install --quiet "$@" 'setuptools>=77'
    "$venv/bin/python" -m pip install --quiet "$@" --no-build-isolation --editable "$package"
    "$venv/bin/python" -c 'import modular_lm, ray, torch; print("installed: torch", torch.__version__, "ray", ray.__version__)'
    echo "use it: python -m cluster.slurm venv=$venv ..., or source $venv/bin/activate"
}

case "${1:-}" in
"")
    check_python
    make_venv
    install
    ;;
wheelhouse)
    [ $# = 2 ] || fail "wheelhouse: name one folder"
    check_python
    mkdir -p "$2"
    # Wheels of everything, our own included, and what builds it on the other side.
    "$python" -m pip wheel --quiet --wheel-dir "$2" 'setuptools>=77' pip "$package"
    rm -f "$2"/modular_lm-*.whl
    echo "fetched $(find "$2" -name '*.whl' | wc -l) packages, $(du -sh "$2" | cut -f1): copy $2 to the cluster, there: cluster/install.sh from DIR"
    ;;
from)
    [ $# = 2 ] || fail "from: name one folder"
    [ -n "$(find "$2" -name '*.whl' -print -quit 2>/dev/null)" ] || fail "from $2: holds no wheels; make it with: cluster/install.sh wheelhouse DIR"
    check_python
    make_venv
    install --no-index --find-links "$2"
    ;;
-h | --help | help)
    usage
    ;;
*)
    usage >&2
    fail "$1: expected nothing, wheelhouse DIR or from DIR"
    ;;
esac
