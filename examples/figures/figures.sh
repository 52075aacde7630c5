#!/usr/bin/env bash
# Every figure of the analysis (Fig. 2-7, Appendix D) and the diagnosis' ROC, from nothing to pictures and claims.
# Usage: bash examples/figures/figures.sh OUTPUT [MODEL CLEAN_DIR MASK_DIR RESOLUTION]
# CLEAN_DIR and MASK_DIR hold a folder per concept, of pictures and of masks; without them: the pocket world.
set -euo pipefail
output=$1
model=${2:-$(python -m szt_utils.pocket)}
resolution=${5:-128}
own=${3:+--clean_dir $3 --mask_dir $4}
here=examples/figures

python $here/world.py --pretrained_model_name_or_path "$model" --output_dir "$output/few" $own --resolution "$resolution"
# Fig. 4 wants hundreds of pictures: 25 more of every concept, which nothing is trained on.
more=()
if [ -z "$own" ]; then
  python $here/world.py --output_dir "$output/more" --pictures 25 --seed 1 --train_steps 0
  more=("$output/more")
fi

for figure in fig2 fig3 fig5 fig6 fig7 spectra; do
  python $here/$figure.py --pretrained_model_name_or_path "$model" --data_dir "$output/few" --output_dir "$output"
done
python $here/fig4.py --pretrained_model_name_or_path "$model" --data_dir "$output/few" "${more[@]}" --output_dir "$output"

# The diagnosis: clean pictures of one half calibrate, the other half and its poisoned copies are told apart.
[ -n "$own" ] && exit
python examples/calibration.py --output_dir "$output/pictures"
diagnose() {
  python sensitivity_maps.py --pretrained_model_name_or_path "$model" --diagnose "$1" --output_dir "$2" "${@:3}"
}
diagnose "$output/pictures/test" "$output/diagnosis/clean" --clean_dir "$output/pictures/calibrate"
folders=()
for poison in adm+ adm- sds+ sds- ea da; do
  python poison_images.py --pretrained_model_name_or_path "$model" --image_dir "$output/pictures/test" \
    --output_dir "$output/pictures/$poison" --method $poison --resolution "$resolution" --batch_size 8
  diagnose "$output/pictures/$poison" "$output/diagnosis/$poison" \
    --calibration "$output/diagnosis/clean/calibration.json"
  folders+=("$output/diagnosis/$poison")
done
python $here/roc.py --clean "$output/diagnosis/clean" --poisoned "${folders[@]}" --output_dir "$output"
