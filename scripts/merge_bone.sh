# Merge what run_bone.sh trained into its base. Edit the paths, then: sh scripts/merge_bone.sh
# How the base was quantized in training is read from the checkpoint.
# If an editor or git gave this file Windows line ends, say so. (The # hide them from these lines.)
if grep -q "$(printf '\r')" "$0"; then #
    printf '%s\n' "error: $0 has Windows line ends; mend it: sed -i 's/\r\$//' $0" >&2 #
    exit 2 #
fi #

base_model='base.pth'
bone_checkpoint='out/rwkv-4.pth'
output='tuned.pth'


python merge.py --base_model "$base_model" \
--lora_checkpoint "$bone_checkpoint" \
--output "$output" "$@"
