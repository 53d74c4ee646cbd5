# Fine-tune with Bone, by the flags of RWKV-PEFT. Edit the paths and sizes, then: sh scripts/run_bone.sh
# Flags written after that win, as in: sh scripts/run_bone.sh --accelerator cpu --quant nf4
# If an editor or git gave this file Windows line ends, say so. (The # hide them from these lines.)
if grep -q "$(printf '\r')" "$0"; then #
    printf '%s\n' "error: $0 has Windows line ends; mend it: sed -i 's/\r\$//' $0" >&2 #
    exit 2 #
fi #

load_model='base.pth'
proj_dir='out'
data_file='data/lora-test'

n_layer=32
n_embd=2560

micro_bsz=1
epoch_save=1
epoch_steps=500
ctx_len=512

bone_config='{"bone_load":"","bone_r":64}'


python train.py --load_model "$load_model" \
--proj_dir "$proj_dir" --data_file "$data_file" \
--data_type binidx --vocab_size 65536 \
--ctx_len $ctx_len --epoch_steps $epoch_steps --epoch_count 5 --epoch_begin 0 --epoch_save $epoch_save --micro_bsz $micro_bsz \
--n_layer $n_layer --n_embd $n_embd \
--pre_ffn 0 --head_qk 0 --lr_init 2e-5 --lr_final 2e-5 --warmup_steps 0 --beta1 0.9 --beta2 0.99 --adam_eps 1e-8 \
--accelerator gpu --devices 1 --precision bf16 --strategy deepspeed_stage_1 --grad_cp 1 \
--my_testing "x060" \
--dataload pad --loss_mask pad \
--peft bone --bone_config "$bone_config" "$@"
