#!/usr/bin/env bash
# What --embedding_init does at a swap of tokenizers: a tiny model knows the tokens of DV8x16x16 and
# learns those of DV8x8x8, on clips of a small world that it has not seen, each at most once; and, with
# --videos, those of DV4x8x8 on real clips. One process trains at a time; run it again and it goes on
# where it stopped.
#
#   bash recipes/embedding_transfer.sh [--output DIR] [--base DIR] [--videos DIR] [--figure FILE]
#
# --base is a folder of recipes/motion_proof.sh, whose steps 1 to 3 (world, old tokens, old model) are
# done here where they are missing. --videos holds at least three videos; without it there are no real
# clips. SEEDS, ARMS and the numbers below in the environment change the size of the experiment.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

OUTPUT="embedding_transfer_output"
BASE=""
VIDEOS=""
FIGURE=""
while [ $# -gt 0 ]; do
    case "$1" in
        --output) OUTPUT="$2"; shift 2 ;;
        --base) BASE="$2"; shift 2 ;;
        --videos) VIDEOS="$2"; shift 2 ;;
        --figure) FIGURE="$2"; shift 2 ;;
        *) echo "error: unknown argument $1; use --output DIR, --base DIR, --videos DIR, --figure FILE." >&2
           exit 2 ;;
    esac
done
BASE="${BASE:-$OUTPUT/base}"
SEEDS="${SEEDS:-1 2 3}"
ARMS="${ARMS:-keep aligned fresh ceiling omp aligned_first keep_first digits reset}"
REAL_ARMS="${REAL_ARMS:-keep aligned fresh}"
NUM_VIDEOS="${NUM_VIDEOS:-6200}"            # of the old model's world, 200 of them held out
SWAP_VIDEOS="${SWAP_VIDEOS:-1560}"          # of the new one, 60 of them to be generated
OLD_STEPS="${OLD_STEPS:-2500}"
LONG_STEPS="${LONG_STEPS:-1500}"            # of the run whose rows the ceiling has
STEPS="${STEPS:-240}"
FIRST_STEPS="${FIRST_STEPS:-10}"            # of *_first, in which rows alone are trained
REAL_OLD_STEPS="${REAL_OLD_STEPS:-500}"
REAL_STEPS="${REAL_STEPS:-80}"
NUM_GENERATED="${NUM_GENERATED:-30}"
GENERATED_ARMS="${GENERATED_ARMS:-ceiling aligned keep omp fresh}"

export OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
SECONDS=0
step() { printf '\n== %s  (%d s)\n' "$1" "$SECONDS"; }
SMALL="$OUTPUT/small"
REAL="$OUTPUT/real"
mkdir -p "$SMALL" "$BASE"

is_complete() { compgen -G "$1/default/checkpoints/epoch=*-step=$(($2 - 1))/context" > /dev/null; }

encode() {  # encode COMPRESSION FOLDER FLAGS...
    local compression="$1" folder="$2"
    shift 2
    python prepare_dataset.py --output_prefix "$folder" --encoder_path tiny --decoder_path tiny \
        --tokenizer_compression_factor "$compression" --height 96 --width 160 --num_context_frames 17 \
        --batch_size 4 --num_workers 1 "$@"
}

train() {  # train RUN STEPS FLAGS...: unless the run is complete
    local run="$1" steps="$2"
    shift 2
    if is_complete "$run" "$steps"; then
        echo "$run is complete"
        return
    fi
    python train_general.py --log_dir "$run" --max_steps "$steps" --max_epochs 1000 --lr 0.002 \
        --tensor_model_parallel_size 1 --save_every_n_steps 500 --keep_last_n 1 --num_threads 1 "$@"
}

swap() {  # swap ARM SEED TOKENS FOLDER OLD_RUN SPLIT STEPS FLAGS...
    local arm="$1" seed="$2" tokens="$3" folder="$4" old="$5" split="$6" steps="$7"
    shift 7
    local model=(--model_path "$old" --embedding_init "${arm%_*}")
    case "$arm" in
        fresh) model=(--model_path random:tiny) ;;
        ceiling) model=(--model_path "$folder/ceiling_model") ;;
        aligned* | omp)
            model+=(--cooccurrence_path "$folder/cooccurrence_$seed.safetensors") ;;
    esac
    case "$arm" in
        *_first) model+=(--freeze_body_steps "$FIRST_STEPS") ;;
    esac
    # In the small world the clip shows the same picture on a grid twice as fine. A constant rate makes
    # the loss after n steps that of a run of n steps.
    train "$folder/seed_$seed/$arm" "$steps" "${model[@]}" --seed "$seed" "model.seed=$seed" \
        --data_path "$tokens" --split_string "$split" --rope_scaling interpolate \
        --global_batch_size 2 --micro_batch_size 2 --lr_warmup_steps 10 --lr_decay_style constant \
        --val_check_interval 20 --limit_val_batches 10 "$@"
}

align() {  # align SEED OLD_TOKENS NEW_TOKENS FOLDER SPLIT
    python -m cosmos_posttrain.transfer --old_data_path "$2" --new_data_path "$3" \
        --output "$4/cooccurrence_$1.safetensors" --split_string "$5" --seed "$1"
}

# As in recipes/motion_proof.sh: world, old tokens, old model; and, for the ceiling, the same swap for
# long on the old model's own clips.
train_base() {  # train_base TOKENS RUN STEPS FLAGS...
    train "$BASE/$2" "$3" --data_path "$BASE/$1" --split_string 99,1,0 --num_condition_latents 2 \
        --global_batch_size 8 --micro_batch_size 4 --lr_warmup_steps 100 --limit_val_batches 5 "${@:4}"
}

if ! is_complete "$BASE/run_old" "$OLD_STEPS"; then
    step "the old model: world, tokens and $OLD_STEPS steps"
    python -m cosmos_posttrain.toy_world --output "$BASE/world" --level simple \
        --num_videos "$NUM_VIDEOS" --num_val 100 --num_test 100 --seed 8
    encode 8,16,16 "$BASE/tokens_old" --input_jsonl "$BASE/world/prompts_train.jsonl"
    train_base tokens_old run_old "$OLD_STEPS" --model_path random:tiny
fi
if [[ " $ARMS " == *" ceiling "* ]]; then
    step "rows that a long run ended with"
    if ! is_complete "$BASE/run_new" "$LONG_STEPS"; then
        encode 8,8,8 "$BASE/tokens_new" --input_jsonl "$BASE/world/prompts_train.jsonl"
        python -m cosmos_posttrain.transfer --old_data_path "$BASE/tokens_old" \
            --new_data_path "$BASE/tokens_new" --output "$BASE/cooccurrence.safetensors" \
            --split_string 99,1,0
        train_base tokens_new run_new "$LONG_STEPS" --model_path "$BASE/run_old" \
            --embedding_init aligned --cooccurrence_path "$BASE/cooccurrence.safetensors"
    fi
    python convert_checkpoint.py --source "$BASE/run_old" --target "$SMALL/old_model" \
        --target_format safetensors
    python recipes/rows_of_another_run.py --model "$SMALL/old_model" --rows "$BASE/run_new" \
        --output "$SMALL/ceiling_model"
fi

step "new clips of the same world, by both tokenizers"
python -m cosmos_posttrain.toy_world --output "$SMALL/swap_world" --level simple \
    --num_videos "$SWAP_VIDEOS" --num_val 0 --num_test 60 --seed 9
encode 8,16,16 "$SMALL/swap_old" --input_jsonl "$SMALL/swap_world/prompts_train.jsonl"
encode 8,8,8 "$SMALL/swap_new" --input_jsonl "$SMALL/swap_world/prompts_train.jsonl"
for SEED in $SEEDS; do
    align "$SEED" "$SMALL/swap_old" "$SMALL/swap_new" "$SMALL" 96,4,0
done

for ARM in $ARMS; do
    for SEED in $SEEDS; do
        step "small world, seed $SEED: learn the new tokens, $ARM"
        swap "$ARM" "$SEED" "$SMALL/swap_new" "$SMALL" "$BASE/run_old" 96,4,0 "$STEPS" \
            --num_condition_latents 2
    done
done

if [ -n "$VIDEOS" ]; then
    step "real clips: DV8x16x16 of 192x320 and DV4x8x8 of 96x160, both 3x12x20 tokens a clip"
    mkdir -p "$REAL"
    encode 8,16,16 "$REAL/tokens_old" --input_videos_dir "$VIDEOS" --height 192 --width 320 \
        --clips_per_video 16
    encode 4,8,8 "$REAL/tokens_new" --input_videos_dir "$VIDEOS" --num_context_frames 9 \
        --clips_per_video 12
    for SEED in $SEEDS; do
        step "real clips, seed $SEED: learn the old tokens"
        train "$REAL/seed_$SEED/old" "$REAL_OLD_STEPS" --model_path random:tiny --seed "$SEED" \
            "model.seed=$SEED" --data_path "$REAL/tokens_old" --split_string 3,1,0 \
            --global_batch_size 1 --micro_batch_size 1 --lr_warmup_steps 20
        align "$SEED" "$REAL/tokens_old" "$REAL/tokens_new" "$REAL" 3,1,0
    done
    for ARM in $REAL_ARMS; do
        for SEED in $SEEDS; do
            step "real clips, seed $SEED: learn the new tokens, $ARM"
            swap "$ARM" "$SEED" "$REAL/tokens_new" "$REAL" "$REAL/seed_$SEED/old" 3,1,0 "$REAL_STEPS"
        done
    done
fi

for SEED in $SEEDS; do
    step "small world, seed $SEED: generate held-out clips"
    RUNS=()
    for ARM in $GENERATED_ARMS; do
        if [[ " $ARMS " == *" $ARM "* ]]; then RUNS+=("$ARM=$SMALL/seed_$SEED/$ARM"); fi
    done
    if [ ${#RUNS[@]} -gt 0 ]; then
        python recipes/motion_proof.py --world "$SMALL/swap_world" --num_videos "$NUM_GENERATED" \
            --output "$SMALL/generated_$SEED" --runs "${RUNS[@]}"
    fi
done

step "tables and figure"
python recipes/embedding_transfer_figures.py --output "$OUTPUT" \
    --figure "${FIGURE:-$OUTPUT/embedding_transfer.png}"
echo "Done in $SECONDS s"
