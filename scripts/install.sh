#!/usr/bin/env bash
# Installs cosmos_posttrain into the Python environment that is active, as the container image does.
#
# Where torch is already there (an NVIDIA image), nothing that belongs to its GPU stack is replaced:
# megatron-core and this package go in without their dependencies, the others are resolved against
# the installed versions, and the script fails if one of the protected packages changed after all.
# Where it is not, everything comes from constraints.txt.
#
#   PYTHON           interpreter to install for (default: python3)
#   EXTRAS           extras of pyproject.toml, comma separated (default: none)
#   TORCH_INDEX_URL  package index for torch alone, used only where torch is missing (default: pip's own)
set -euo pipefail
export LC_ALL=C  # one order for Python's sort and comm

python=${PYTHON:-python3}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$root"

plan() { "$python" "$root/scripts/install_plan.py" "$@"; }

plan check-python
plan protected > "$work/before.txt"
plan constraints > "$work/constraints.txt"

if plan has torch; then
    echo "install: torch is already here; kept as they are: $(tr '\n' ' ' < "$work/before.txt")"
else
    "$python" -m pip install ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} \
        --constraint "$work/constraints.txt" torch
    plan protected > "$work/before.txt"
    plan constraints > "$work/constraints.txt"
fi

# megatron-core asks for torch>=2.6.0, which an image's pre-release 2.6.0a0+... does not satisfy.
plan requirements megatron-core > "$work/megatron.txt"
"$python" -m pip install --no-deps --constraint "$work/constraints.txt" --requirement "$work/megatron.txt"

plan requirements > "$work/requirements.txt"
"$python" -m pip install --constraint "$work/constraints.txt" --requirement "$work/requirements.txt"
"$python" -m pip install --no-deps --editable .

plan protected > "$work/after.txt"
replaced=$(comm -23 "$work/before.txt" "$work/after.txt" | tr '\n' ' ')
if [ -n "$replaced" ]; then
    echo "install: the image's GPU stack must stay as it is, but these were replaced: $replaced" >&2
    exit 1
fi
echo "install: done"
