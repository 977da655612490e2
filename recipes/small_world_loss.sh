#!/usr/bin/env bash
# Does the tiny base model foresee held-out clips of a small world better than every baseline? The
# validation videos of both runs of recipes/motion_proof.sh, old tokens and new, are scored by
# evaluate.py loss; the table is printed as markdown. Exit code 1 where a baseline is not beaten.
#
#   bash recipes/small_world_loss.sh [--output DIR]
#
# DIR is the --output of recipes/motion_proof.sh, with tokens_old, tokens_new, run_old and run_new in it.
# Run it again and it goes on where it stopped.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT="motion_output"
while [ $# -gt 0 ]; do
    case "$1" in
        --output) OUTPUT="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --output DIR." >&2; exit 2 ;;
    esac
done
for part in tokens_old tokens_new run_old run_new; do
    if [ ! -d "$OUTPUT/$part" ]; then
        echo "error: $OUTPUT has no $part; run recipes/motion_proof.sh --output $OUTPUT first." >&2
        exit 2
    fi
done

export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"

# The runs' own split: its validation clips are the held-out ones, its training clips the baselines'.
for which in old new; do
    python evaluate.py loss --data_path "$OUTPUT/tokens_$which" --ar_model_dir "$OUTPUT/run_$which" \
        --split validation --micro_batch_size 4 --num_threads 1 --output "$OUTPUT/loss/$which.json"
done
python recipes/small_world_loss_table.py "$OUTPUT/loss/old.json" "$OUTPUT/loss/new.json"
