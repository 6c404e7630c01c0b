#!/bin/sh
# The test command of `make test` and .ci/run: two files at a time. Arguments go to pytest;
# -n 0: one test after the other.
cd "$(dirname "$0")/.." || exit 1
exec env OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 .venv/bin/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder "$@"
