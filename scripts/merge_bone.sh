# Merge what run_bone.sh trained into its base. Edit the paths, then: sh scripts/merge_bone.sh
# How the base was quantized in training is read from the checkpoint.

base_model='base.pth'
bone_checkpoint='out/rwkv-4.pth'
output='tuned.pth'


python merge.py --base_model "$base_model" \
--lora_checkpoint "$bone_checkpoint" \
--output "$output" "$@"
