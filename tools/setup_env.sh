#!/bin/sh
# Make .venv once: `tools/setup_env.sh run` for training, `tools/setup_env.sh test` for tests too.
# PYTHON: the interpreter to use (default: the first of python3, python3.13 ... python3.10 that fits).
# TORCH:  what pip installs as PyTorch (default torch==2.13.0), options included.
set -eu
cd "$(dirname "$0")/.."

TORCH=${TORCH:-torch==2.13.0}
kind=$1
case $kind in
    run) target=. ;;
    test) target='.[test]' ;;
    *) echo "usage: tools/setup_env.sh run|test" >&2; exit 2 ;;
esac

fail() {
    printf 'evenkeel: %s\n' "$@" >&2
    exit 1
}

fits() { # is this command a Python that works here? Otherwise says why in $reason
    version=$("$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null) || {
        reason="$1 is missing"
        return 1
    }
    case $version in
        3.10 | 3.11 | 3.12 | 3.13) ;;
        *) reason="$1 is Python $version"; return 1 ;;
    esac
    "$1" -c 'import ensurepip, venv' 2>/dev/null || {
        reason="$1 ($version) has no venv module: install it (on Debian and Ubuntu: apt install python$version-venv)"
        return 1
    }
}

find_python() {
    first=
    for candidate in ${PYTHON:-python3 python3.13 python3.12 python3.11 python3.10}; do
        if fits "$candidate"; then
            python=$candidate
            return
        fi
        first=${first:-$reason}
    done
    fail "$first" "needed: Python 3.10, 3.11, 3.12 or 3.13 with its venv module." \
        "Install one (on Debian and Ubuntu: apt install python3 python3-venv), or name it: make PYTHON=/path/to/python3.12 ..."
}

state="$(cat setup.cfg pyproject.toml constraints.txt | cksum) $TORCH"
for stamp in ".venv/evenkeel-$kind" .venv/evenkeel-test; do
    if [ -x .venv/bin/python ] && [ "$(cat "$stamp" 2>/dev/null)" = "$state" ]; then
        exit 0
    fi
done

command -v git >/dev/null 2>&1 ||
    echo "evenkeel: git is missing; nothing here needs it, but updates do (install git)" >&2
if ! .venv/bin/python -m pip --version >/dev/null 2>&1; then
    find_python
    echo "evenkeel: making .venv with $python ($version)"
    "$python" -m venv .venv || fail "the virtual environment .venv could not be made; remove it and try again"
elif ! fits .venv/bin/python; then
    fail "$reason, but Python 3.10 to 3.13 is needed; remove .venv and try again"
fi

pip() { .venv/bin/python -m pip --disable-pip-version-check "$@"; }

rm -f .venv/evenkeel-run .venv/evenkeel-test
echo "evenkeel: installing $TORCH into .venv (once; minutes on a slow line)"
# shellcheck disable=SC2086  # TORCH may hold options
pip install --quiet $TORCH
# From here on PyTorch is pinned to the build that is there, so that nothing replaces it.
pip freeze | grep '^torch==' >.venv/torch.txt || fail "TORCH ($TORCH) did not install torch"
echo "evenkeel: installing the other packages at the versions of constraints.txt"
pip install --quiet -c constraints.txt -c .venv/torch.txt --editable "$target"
echo "$state" >".venv/evenkeel-$kind"
