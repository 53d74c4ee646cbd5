#!/usr/bin/env bash
# The whole job, from nothing, with the real programs: make texts, pretrain a small base model,
# fine-tune it with Bone, merge, and compare the answers of both models.
# If an editor or git gave this file Windows line ends, say so. (The # hide them from these lines.)
if grep -q "$(printf '\r')" "$0"; then #
    printf '%s\n' "error: $0 has Windows line ends; mend it: sed -i 's/\r\$//' $0" >&2 #
    exit 2 #
fi #
set -euo pipefail
python=${1:-python}

# Print a command, then run it.
run() {
    printf '\n$ python %s\n' "$(printf '%q ' "$@" | sed "s/\\\\ / /g; s/ $//")"
    "$python" "$@"
}

ask() {
    run generate.py "$1" --prompt "$2" --length 40 --temperature 0.5
}

rm -rf demo
run demo_data.py demo
run data.py demo/docs.jsonl demo/docs --ctx_len 128

echo; echo "--- a small base model, pretrained from scratch on Python's help topics"
run train.py --data_file demo/docs --proj_dir demo/base \
    --n_layer 4 --n_embd 128 --dataload get --ctx_len 128 --micro_bsz 8 \
    --epoch_steps 130 --lr_init 4e-3 --lr_final 4e-4 --warmup_steps 10 --grad_cp 0

echo; echo "--- Bone fine-tuning on dialogues (emb and head too: their words are new to this base)"
run train.py --load_model demo/base/rwkv-0.pth --proj_dir demo/out \
    --data_file demo/chat.jsonl --val_file demo/chat_val.jsonl \
    --bone_r 64 --train_parts time ln emb head --loss_mask qa --ctx_len 128 --micro_bsz 16 \
    --epoch_count 2 --lr_init 4e-3 --lr_final 4e-4
run merge.py demo/base/rwkv-0.pth demo/out/rwkv-1.pth demo/tuned.pth

echo; echo "--- the same questions to the base and to the tuned model"
for prompt in $'User: What is your favorite food?\n\nAssistant:' $'User: 你是谁\n\nAssistant:'; do
    ask demo/base/rwkv-0.pth "$prompt"
    ask demo/tuned.pth "$prompt"
done

echo; echo "--- held-out loss: before fine-tuning, after each epoch (picture: demo/out/loss.png)"
awk -F, 'NR > 1 && $4 != "" { printf "step %5d   %.4f\n", $1, $4 }' demo/out/loss.csv
