#!/usr/bin/env bash
# The paper's setting (Sec. 5.1.2) on Stable Diffusion 1.5, 512 px: poison a folder, then train with and without the defence.
# The images and masks must be square: poisons are made of their central squares.
# Usage: bash examples/sd15.sh IMAGES MASKS OUTPUT "<token>" word
set -euo pipefail
images=$1 masks=$2 output=$3 token=$4 word=$5
model=stable-diffusion-v1-5/stable-diffusion-v1-5

python poison_images.py --pretrained_model_name_or_path $model --image_dir "$images" --output_dir "$output/poisoned" \
  --method adm+ --eps 16 --step_size 1 --steps 100 --mixed_precision bf16

for defence in "" szt; do
  flags=()
  [ -n "$defence" ] && flags=(--szt --loss_mask_dir "$masks")
  accelerate launch textual_inversion_szt.py --pretrained_model_name_or_path $model \
    --train_data_dir "$output/poisoned" --output_dir "$output/learned${defence:+-$defence}" \
    --placeholder_token "$token" --initializer_token "$word" --resolution 512 --train_batch_size 1 \
    --learning_rate 5e-4 --max_train_steps 5000 --mixed_precision bf16 --seed 0 ${flags[@]+"${flags[@]}"}
done
