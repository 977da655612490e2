#!/usr/bin/env bash
# Text and video in, video out, in miniature on two CPU cores: renders clips of a small world in which
# the first nine frames are still and the caption alone says where the ball will go, encodes clips and
# captions, trains a tiny Video2World model with tensor parallelism over two processes, and generates
# two videos from the same first frames with two prompts. Run it again and it goes on where it stopped.
#
#   [QUICK=1] bash recipes/quickstart_video2world.sh [--output DIR]
#
# QUICK=1 runs every part in about a minute, with fewer clips and steps: it shows that all works; its
# model does not learn what captions mean.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

case "${QUICK:-0}" in
    0)
        OUTPUT="quickstart_output/video2world"
        NUM_TRAIN=2000 NUM_HELD_OUT=40
        STEPS=(--max_steps 500 --lr_warmup_steps 50 --save_every_n_steps 250)
        ;;
    1)
        OUTPUT="quickstart_output/video2world_quick"
        NUM_TRAIN=40 NUM_HELD_OUT=4
        STEPS=(--max_steps 20 --lr_warmup_steps 2 --save_every_n_steps 20)
        ;;
    *) echo "error: QUICK is $QUICK; use 1, or 0 for the whole quickstart." >&2; exit 2 ;;
esac
while [ $# -gt 0 ]; do
    case "$1" in
        --output) OUTPUT="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --output DIR." >&2; exit 2 ;;
    esac
done

export OMP_NUM_THREADS=1
TORCHRUN=(python -m torch.distributed.run --standalone --nproc-per-node 2)
INFER=("${TORCHRUN[@]}" infer.py --ar_model_dir "$OUTPUT/run" --tensor_model_parallel_size 2
    --num_input_frames 9 --temperature 0 --guidance_scale 2 --disable_diffusion_decoder)
WORLD="$OUTPUT/world"
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
mkdir -p "$OUTPUT"

step "1/5 render a small world: $NUM_TRAIN clips to train on, $NUM_HELD_OUT held out"
python -m cosmos_posttrain.toy_world --output "$WORLD" --level simple --still_frames 9 --seed 7 \
    --num_videos "$((NUM_TRAIN + NUM_HELD_OUT))" --num_val "$NUM_HELD_OUT" --num_test 0

step "2/5 encode clips and captions: DV8x16x16, 17 frames of 96x160 -> 3x6x10 tokens; the tiny T5"
"${TORCHRUN[@]}" prepare_dataset.py --input_jsonl "$WORLD/prompts_train.jsonl" \
    --output_dir "$OUTPUT/tokens" --height 96 --width 160 --num_context_frames 17 \
    --tokenizer_compression_factor 8,16,16 --encoder_path tiny --decoder_path tiny \
    --text_encoder_path tiny --batch_size 4 --num_workers 1

step "3/5 train a tiny Video2World model (tensor parallel over 2 processes)"
"${TORCHRUN[@]}" train_video2world.py --model_path random:tiny-video2world \
    --data_path "$OUTPUT/tokens" --log_dir "$OUTPUT/run" --tensor_model_parallel_size 2 \
    --split_string 98,2,0 --global_batch_size 8 --micro_batch_size 8 --lr 2e-3 --max_epochs 1000 \
    --num_condition_latents 2 --prompt_dropout 0.1 --num_threads 1 --keep_last_n 1 "${STEPS[@]}"

step "4/5 the same nine frames in, two prompts, eight frames out each"
mapfile -t CASE < <(python recipes/quickstart_video2world_figures.py --world "$WORLD" --choose)
for number in 1 2; do
    "${INFER[@]}" --input_image_or_video_path "${CASE[0]}" --prompt "${CASE[number]}" \
        --video_save_name "$OUTPUT/prompt_$number.mp4"
done

step "5/5 generate every held-out clip from its own caption, and compare"
"${INFER[@]}" --batch_input_path "$WORLD/prompts_val.jsonl" --video_save_folder "$OUTPUT/held_out"
python recipes/quickstart_video2world_figures.py --world "$WORLD" --output "$OUTPUT"

cat <<TXT

Done in $SECONDS s. Look at
  $OUTPUT/side_by_side.png   the same first frames, two prompts
  $OUTPUT/prompt_1.mp4       ${CASE[1]}
  $OUTPUT/prompt_2.mp4       ${CASE[2]}
  $OUTPUT/held_out           clips that the model never saw, from their captions
  $OUTPUT/run/default        checkpoints, metrics.jsonl, TensorBoard logs
TXT
