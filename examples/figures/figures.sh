#!/usr/bin/env bash
# Every figure of the analysis (Fig. 2-7, Appendix D) and the ROC of the diagnosis, from the data sets to plots and claims.
# Usage: bash examples/figures/figures.sh OUTPUT [MODEL CLEAN_DIR MASK_DIR RESOLUTION]
# CLEAN_DIR and MASK_DIR hold a folder per concept, of images and of masks; without them: the pocket world.
# Plots and claims are committed in results/figures, those of version 0.1 in results/world-0.1/figures.
set -euo pipefail
output=$1
model=${2:-$(python -m szt_utils.pocket)}
resolution=${5:-128}
own=()
[ $# -gt 2 ] && own=(--clean_dir "$3" --mask_dir "$4")
here=examples/figures

python $here/make_data.py --pretrained_model_name_or_path "$model" --output_dir "$output/few" ${own[@]+"${own[@]}"} --resolution "$resolution"
# Fig. 4 wants hundreds of images: 25 more of every concept, which nothing is trained on.
more=()
if [ ${#own[@]} = 0 ]; then
  python $here/make_data.py --pretrained_model_name_or_path "$model" --output_dir "$output/more" --images 25 --seed 1 --train_steps 0
  more=("$output/more")
fi

# Only a U-Net has the cross-attention of Fig. 2.
figures="fig3 fig5 fig6 fig7 spectra"
[ -d "$model/transformer" ] || figures="fig2 $figures"
for figure in $figures; do
  python $here/$figure.py --pretrained_model_name_or_path "$model" --data_dir "$output/few" --output_dir "$output"
done
python $here/fig4.py --pretrained_model_name_or_path "$model" --data_dir "$output/few" ${more[@]+"${more[@]}"} --output_dir "$output"

# The diagnosis: clean images of one half calibrate it; the other half and its poisoned copies test it.
[ ${#own[@]} = 0 ] || exit 0
python examples/calibration.py --output_dir "$output/images"
diagnose() {
  python diagnose_images.py --pretrained_model_name_or_path "$model" --image_dir "$1" --output_dir "$2" "${@:3}"
}
diagnose "$output/images/test" "$output/diagnosis/clean" --clean_dir "$output/images/calibrate"
folders=()
for poison in adm+ adm- sds+ sds- ea da; do
  python poison_images.py --pretrained_model_name_or_path "$model" --image_dir "$output/images/test" \
    --output_dir "$output/images/$poison" --method $poison --resolution "$resolution" --batch_size 8
  diagnose "$output/images/$poison" "$output/diagnosis/$poison" \
    --calibration "$output/diagnosis/clean/calibration.json"
  folders+=("$output/diagnosis/$poison")
done
python $here/roc.py --clean "$output/diagnosis/clean" --poisoned "${folders[@]}" --output_dir "$output"
