#!/usr/bin/env bash
# Is motion predicted? A tiny base model learns a small world in which a ball goes straight on, then the
# tokens of another tokenizer; on held-out clips nine frames are given, and the ball's place in the last
# of the eight generated ones is compared with the truth. On two CPU cores; run it again and it goes on
# where it stopped.
#
#   bash recipes/motion_proof.sh [--output DIR]
#
# NUM_VIDEOS, STEPS_OLD and STEPS_NEW in the environment change the size of the experiment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT="motion_output"
while [ $# -gt 0 ]; do
    case "$1" in
        --output) OUTPUT="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --output DIR." >&2; exit 2 ;;
    esac
done
NUM_VIDEOS="${NUM_VIDEOS:-6200}"
STEPS_OLD="${STEPS_OLD:-2500}"
STEPS_NEW="${STEPS_NEW:-1500}"

export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
two() { python -m torch.distributed.run --standalone --nproc-per-node 2 "$@"; }
mkdir -p "$OUTPUT"

encode() {  # encode COMPRESSION FOLDER
    two prepare_dataset.py --input_jsonl "$OUTPUT/world/prompts_train.jsonl" \
        --output_prefix "$OUTPUT/$2" --tokenizer_compression_factor "$1" --encoder_path tiny \
        --decoder_path tiny --height 96 --width 160 --num_context_frames 17 \
        --batch_size 4 --num_workers 1
}

train() {  # train TOKENS RUN STEPS FLAGS...
    local tokens="$1" run="$2" steps="$3"
    shift 3
    two train_general.py --data_path "$OUTPUT/$tokens" --log_dir "$OUTPUT/$run" \
        --tensor_model_parallel_size 1 --split_string 99,1,0 --num_condition_latents 2 \
        --global_batch_size 8 --micro_batch_size 4 --lr 0.002 --lr_warmup_steps 100 \
        --max_steps "$steps" --max_epochs 1000 --save_every_n_steps 500 --keep_last_n 1 \
        --limit_val_batches 5 --num_threads 1 "$@"
}

step "1/6 render a world in which a ball goes straight on"
python -m cosmos_posttrain.toy_world --output "$OUTPUT/world" --level simple \
    --num_videos "$NUM_VIDEOS" --num_val 100 --num_test 100 --seed 8

step "2/6 encode it with the old tokenizer: DV8x16x16, 3x6x10 tokens a clip"
encode 8,16,16 tokens_old

step "3/6 train on what follows the first nine frames"
train tokens_old run_old "$STEPS_OLD" --model_path random:tiny

step "4/6 encode it with the new tokenizer: DV8x8x8, 3x12x20 tokens a clip"
encode 8,8,8 tokens_new

step "5/6 the swap: post-train on the new tokens"
python -m cosmos_posttrain.transfer --old_data_path "$OUTPUT/tokens_old" \
    --new_data_path "$OUTPUT/tokens_new" --output "$OUTPUT/cooccurrence.safetensors" \
    --split_string 99,1,0
train tokens_new run_new "$STEPS_NEW" --model_path "$OUTPUT/run_old" --embedding_init aligned \
    --cooccurrence_path "$OUTPUT/cooccurrence.safetensors"

step "6/6 continue 60 held-out clips"
python recipes/motion_proof.py --world "$OUTPUT/world" --output "$OUTPUT" \
    --runs "DV8x16x16=$OUTPUT/run_old" "DV8x8x8=$OUTPUT/run_new"

echo "Done in $SECONDS s: $OUTPUT/motion.md, motion.json and motion.jpg"
