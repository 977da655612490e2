#!/usr/bin/env bash
# Does the tiny base model foresee held-out clips of a small world better than every baseline? The
# validation videos of both runs of recipes/motion_proof.sh, old tokens and new, are scored by
# evaluate.py loss; the table is printed as markdown. Exit code 1 where a baseline is not beaten.
#
#   bash recipes/small_world_loss.sh [--proof DIR] [--output DIR]
#
# DIR of --proof is the output of recipes/motion_proof.sh: world/, tokens_old, tokens_new, run_old and
# run_new. Run it again and it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

PROOF="motion_output"
OUTPUT=""
while [ $# -gt 0 ]; do
    case "$1" in
        --proof) PROOF="$2"; shift 2 ;;
        --output) OUTPUT="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --proof DIR and --output DIR." >&2; exit 2 ;;
    esac
done
OUTPUT="${OUTPUT:-$PROOF/loss}"
for part in tokens_old tokens_new run_old run_new; do
    if [ ! -d "$PROOF/$part" ]; then
        echo "error: $PROOF has no $part; run recipes/motion_proof.sh --output $PROOF first." >&2
        exit 2
    fi
done

export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# The runs' own split: its validation clips are the held-out ones, its training clips the baselines'.
for which in old new; do
    python evaluate.py loss --data_path "$PROOF/tokens_$which" --ar_model_dir "$PROOF/run_$which" \
        --split validation --micro_batch_size 4 --num_threads 1 --output "$OUTPUT/$which.json"
done
python recipes/small_world_loss_table.py "$OUTPUT/old.json" "$OUTPUT/new.json"
