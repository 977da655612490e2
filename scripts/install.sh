#!/usr/bin/env bash
# Installs cosmos_posttrain into the Python environment that is active, as the container image does.
#
# Where torch is already there (an NVIDIA image), nothing that belongs to its GPU stack is replaced,
# numpy and megatron-core included: megatron-core (where it is missing) and this package go in without
# their dependencies, the others are resolved against the installed versions, and the script fails if
# one of the protected packages changed after all. Where torch is not there, everything comes from
# constraints.txt. PyAV may fail to install where a torchcodec is there that can read videos in its place.
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

# With the pins of constraints.txt; where they do not fit what is here (an older numpy, constraints of
# the image's own), with the protected versions alone. What else pip fails with stays a failure.
resolve() {
    local code=0
    "$python" -m pip install --constraint "$work/constraints.txt" "$@" 2> "$work/errors.txt" || code=$?
    cat "$work/errors.txt" >&2
    [ "$code" -ne 0 ] || return 0
    grep -q -e ResolutionImpossible -e "No matching distribution" "$work/errors.txt" || return "$code"
    echo "install: the pins of constraints.txt do not fit what is here; once more without them" >&2
    "$python" -m pip install --constraint "$work/before.txt" "$@"
}

load_torchcodec='
import sys
from cosmos_posttrain.errors import UserError
from cosmos_posttrain.video import choice
try:
    print(choice.loaded("torchcodec").label())
except UserError as error:
    sys.exit(str(error))
'

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
if ! "$python" -m pip install --no-deps --constraint "$work/constraints.txt" \
        --requirement "$work/megatron.txt"; then
    if plan has megatron-core; then
        echo "install: needs $(cat "$work/megatron.txt"), and what is here stays: take a newer image" >&2
    fi
    exit 1
fi

plan requirements > "$work/requirements.txt"
resolve --requirement "$work/requirements.txt"
plan requirements av > "$work/video.txt"
if ! resolve --only-binary av --requirement "$work/video.txt"; then
    # The package's own test of it: an old one, or one without FFmpeg's libraries, reads nothing.
    if ! codec=$(PYTHONPATH="$root" "$python" -c "$load_torchcodec" 2> "$work/errors.txt"); then
        echo "install: PyAV could not be installed, so torchcodec is to read videos, but:" \
            "$(tail -n 1 "$work/errors.txt")" >&2
        exit 1
    fi
    echo "install: PyAV could not be installed; $codec, which is here, reads videos"
fi
"$python" -m pip install --no-deps --editable .

plan protected > "$work/after.txt"
replaced=$(comm -23 "$work/before.txt" "$work/after.txt" | tr '\n' ' ')
if [ -n "$replaced" ]; then
    echo "install: the image's GPU stack must stay as it is, but these were replaced: $replaced" >&2
    exit 1
fi
echo "install: done"
