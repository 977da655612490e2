#!/usr/bin/env bash
# Does the prompt matter? A tiny Video2World model learns a small world in which the first nine frames
# are still and the caption alone says where the ball will go; on held-out clips the generated motion is
# compared with the caption, with a random other clip's caption, and at three guidance scales. On two CPU
# cores; run it again and it goes on where it stopped.
#
#   bash recipes/video2world_proof.sh [--output DIR]
#
# NUM_VIDEOS and STEPS in the environment change the size of the experiment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT="video2world_output"
while [ $# -gt 0 ]; do
    case "$1" in
        --output) OUTPUT="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --output DIR." >&2; exit 2 ;;
    esac
done
NUM_VIDEOS="${NUM_VIDEOS:-4000}"
STEPS="${STEPS:-1200}"

export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
mkdir -p "$OUTPUT"

step "1/4 render a world: nine still frames, then eight in which the ball goes where the caption says"
python -m cosmos_posttrain.toy_world --output "$OUTPUT/world" --level simple --still_frames 9 \
    --num_videos "$NUM_VIDEOS" --num_val 100 --num_test 100 --seed 7

step "2/4 encode clips and captions: DV8x16x16, 17 frames of 96x160 -> 3x6x10 tokens"
python -m torch.distributed.run --standalone --nproc-per-node 2 prepare_dataset.py \
    --input_jsonl "$OUTPUT/world/prompts_train.jsonl" --output_prefix "$OUTPUT/tokens" \
    --tokenizer_compression_factor 8,16,16 --encoder_path tiny --decoder_path tiny \
    --text_encoder_path tiny --height 96 --width 160 --num_context_frames 17 \
    --batch_size 4 --num_workers 1

step "3/4 train on what follows the still frames; one clip in ten without its caption, for guidance"
python -m torch.distributed.run --standalone --nproc-per-node 2 train_video2world.py \
    --data_path "$OUTPUT/tokens" --model_path random:tiny-video2world --log_dir "$OUTPUT/run" \
    --tensor_model_parallel_size 1 --split_string 99,1,0 --num_condition_latents 2 \
    --prompt_dropout 0.1 --global_batch_size 8 --micro_batch_size 4 --lr 0.002 \
    --lr_warmup_steps 60 --max_steps "$STEPS" --max_epochs 1000 --save_every_n_steps 300 \
    --keep_last_n 1 --limit_val_batches 5 --num_threads 1

step "4/4 generate 60 held-out clips, with their own and with other captions, at guidance 1, 2 and 4"
python recipes/video2world_proof.py --world "$OUTPUT/world" --run "$OUTPUT/run" \
    --temperature 0 --output "$OUTPUT"

echo "Done in $SECONDS s: $OUTPUT/video2world.md, video2world.json and video2world.jpg"
