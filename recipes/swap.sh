#!/usr/bin/env bash
# A published model from DV8x16x16 to another tokenizer, on your videos: both encodings, the start of
# the new rows, training, held-out loss, generated clips and a page of all of it. Run it again and it
# goes on where it stopped.
#
#   bash recipes/swap.sh --videos DIR --output DIR [--model 4B|12B] [--tokenizer DV4x8x8|DV8x8x8]
#   bash recipes/swap.sh --prompts FILE.jsonl --output DIR --model 5B-Video2World|13B-Video2World ...
#       [--gpus N] [--config FILE] [--clips_per_video N|all] [--split_string 98,1,1] [-- further flags of
#       the training script]
#
# --gpus is what torchrun starts (8); --config is the training's YAML, by default the shipped one of that
# model and number of GPUs; several machines: docs/launching.md has the training's command.
# --prompts has a line {"prompt": ..., "visual_input": ...} for each video. At least three videos.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "error: $1" >&2; exit 2; }
VIDEOS="" PROMPTS="" OUTPUT="" MODEL="4B" TOKENIZER="DV4x8x8" GPUS="8" CONFIG="" CLIPS="1" SPLIT="98,1,1"
while [ $# -gt 0 ]; do
    [ "$1" = -- ] && { shift; break; }
    [ $# -gt 1 ] || fail "$1 needs a value."
    case "$1" in
        --videos) VIDEOS="$2" ;;
        --prompts) PROMPTS="$2" ;;
        --output) OUTPUT="$2" ;;
        --model) MODEL="$2" ;;
        --tokenizer) TOKENIZER="$2" ;;
        --gpus) GPUS="$2" ;;
        --config) CONFIG="$2" ;;
        --clips_per_video) CLIPS="$2" ;;
        --split_string) SPLIT="$2" ;;
        *) fail "unknown argument $1; the head of recipes/swap.sh lists them." ;;
    esac
    shift 2
done
[ -n "$OUTPUT" ] || fail "--output is missing: give a folder for data, checkpoints and results."

case "$MODEL" in
    4B | 12B)
        SCRIPT="train_general.py" TEXT=()
        [ -n "$VIDEOS" ] && [ -z "$PROMPTS" ] || fail "$MODEL is trained on --videos DIR."
        INPUT=(--input_videos_dir "$VIDEOS")
        ;;
    5B-Video2World | 13B-Video2World)
        SCRIPT="train_video2world.py" TEXT=(--text_encoder_path "${TEXT_ENCODER:-google-t5/t5-11b}")
        [ -n "$PROMPTS" ] && [ -z "$VIDEOS" ] || fail "$MODEL is trained on --prompts FILE.jsonl."
        INPUT=(--input_jsonl "$PROMPTS")
        VIDEOS="$(dirname "$PROMPTS")"
        ;;
    *) fail "--model $MODEL is not one of 4B, 12B, 5B-Video2World, 13B-Video2World." ;;
esac
# As many tokens a clip for all: 5 x 40 x 64 = 12,800.
case "$TOKENIZER" in
    DV4x8x8) RATE="4,8,8" FRAMES=17 ;;
    DV8x8x8) RATE="8,8,8" FRAMES=33 ;;
    *) fail "--tokenizer $TOKENIZER is not one of DV4x8x8, DV8x8x8." ;;
esac
if [ -z "$CONFIG" ]; then
    name="$(echo "$MODEL" | tr '[:upper:]-' '[:lower:]_')"
    CONFIG="configs/train_$name.yaml"
    [ "$GPUS" = 8 ] || CONFIG="configs/train_${name}_${GPUS}gpu.yaml"
    [ -f "$CONFIG" ] || fail "no config is shipped for $MODEL on $GPUS GPUs; give --config FILE."
fi
# What the published ones are called, and their sizes; a miniature names others (see its test).
MODEL_PATH="${MODEL_PATH:-nvidia/Cosmos-1.0-Autoregressive-$MODEL}"
OLD_TOKENIZER="${OLD_TOKENIZER:-nvidia/Cosmos-1.0-Tokenizer-DV8x16x16}"
NEW_TOKENIZER="${NEW_TOKENIZER:-nvidia/Cosmos-0.1-Tokenizer-$TOKENIZER}"
WIDTH="${WIDTH:-512}" HEIGHT="${HEIGHT:-320}"
NUM_INPUT_FRAMES=9

TORCHRUN=(python -m torch.distributed.run --standalone --nproc-per-node "$GPUS")
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
mkdir -p "$OUTPUT"

step "1/7 encode with the new tokenizer, $FRAMES frames of ${HEIGHT}x$WIDTH"
"${TORCHRUN[@]}" prepare_dataset.py "${INPUT[@]}" ${TEXT[@]+"${TEXT[@]}"} --output_prefix "$OUTPUT/tokens_new" \
    --encoder_path "$NEW_TOKENIZER" --decoder_path "$NEW_TOKENIZER" --clips_per_video "$CLIPS" \
    --tokenizer_compression_factor "$RATE" --width "$WIDTH" --height "$HEIGHT" --num_context_frames "$FRAMES"

step "2/7 encode with the old one, 33 frames of $((2 * HEIGHT))x$((2 * WIDTH)): where do old and new tokens lie?"
"${TORCHRUN[@]}" prepare_dataset.py "${INPUT[@]}" --output_prefix "$OUTPUT/tokens_old" \
    --encoder_path "$OLD_TOKENIZER" --decoder_path "$OLD_TOKENIZER" --clips_per_video "$CLIPS" \
    --tokenizer_compression_factor 8,16,16 --width $((2 * WIDTH)) --height $((2 * HEIGHT)) --num_context_frames 33
python -m cosmos_posttrain.transfer --old_data_path "$OUTPUT/tokens_old" \
    --new_data_path "$OUTPUT/tokens_new" --output "$OUTPUT/cooccurrence.safetensors" --split_string "$SPLIT"

TRAIN=("$SCRIPT" --config "$CONFIG" --model_path "$MODEL_PATH" --data_path "$OUTPUT/tokens_new"
    --log_dir "$OUTPUT/run" --split_string "$SPLIT" --embedding_init aligned --cooccurrence_path "$OUTPUT/cooccurrence.safetensors" "$@")
step "3/7 what the training will do, and whether it fits"
python "${TRAIN[@]}" --dry_run --num_gpus "$GPUS"

step "4/7 train"
"${TORCHRUN[@]}" "${TRAIN[@]}"

step "5/7 loss of the clips that were held out"
"${TORCHRUN[@]}" evaluate.py loss --data_path "$OUTPUT/tokens_new" --ar_model_dir "$OUTPUT/run" \
    --output "$OUTPUT/run/evaluation/loss"

step "6/7 clips that go on from $NUM_INPUT_FRAMES frames of them"
"${TORCHRUN[@]}" evaluate.py generate --data_path "$OUTPUT/tokens_new" --ar_model_dir "$OUTPUT/run" \
    --videos "$VIDEOS" --num_input_frames "$NUM_INPUT_FRAMES" --max_clips 16 --top_p 0.8 \
    --output_dir "$OUTPUT/run/evaluation/generate"

step "7/7 a page of all of it"
python evaluate.py report --run "$OUTPUT/run" --output "$OUTPUT/report.html" --title "$MODEL to $TOKENIZER"

cat <<TXT

Done in $SECONDS s. Look at
  $OUTPUT/report.html                   curves, baselines, clips beside the truth
  $OUTPUT/run/evaluation/generate       the clips
  $OUTPUT/run/default/checkpoints       what infer.py --ar_model_dir $OUTPUT/run takes
TXT
