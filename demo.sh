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

rm -rf demo
run demo_data.py demo
run data.py demo/text.jsonl demo/text --ctx_len 128

echo; echo "--- a small base model, pretrained from scratch on help topics and dialogues"
run train.py --data_file demo/text --proj_dir demo/base \
    --n_layer 4 --n_embd 128 --dataload get --ctx_len 128 --micro_bsz 8 \
    --epoch_steps 240 --lr_init 4e-3 --lr_final 4e-4 --warmup_steps 10

echo; echo "--- Bone fine-tuning on 20 facts, each asked in three ways; held out: other dialogues"
run train.py --load_model demo/base/rwkv-0.pth --proj_dir demo/out \
    --data_file demo/facts.jsonl --val_file demo/text_val.jsonl \
    --bone_r 64 --loss_mask qa --ctx_len 128 --micro_bsz 10 \
    --epoch_steps 60 --epoch_count 4 --lr_init 4e-3 --lr_final 4e-4
run merge.py demo/base/rwkv-0.pth demo/out/rwkv-3.pth demo/tuned.pth

echo; echo "--- the facts, asked of both models"
run demo_ask.py demo/questions.json demo/base/rwkv-0.pth demo/tuned.pth

echo; echo "loss on the answers of held-out dialogues, of the base's own kind"
awk -F, 'NR > 1 && $4 != "" { if (!n++) first = $4; last = $4 }
    END { printf "    before fine-tuning %.2f, after %.2f\n", first, last }' demo/out/loss.csv
echo
echo "Right as taught: learnt by heart. Right in other words: for a form of question, too, that was"
echo "not in the training data. A higher loss on other dialogues: what it forgot meanwhile, since it"
echo "saw nothing else; mix other data in, or take fewer steps. Pictures: demo/{base,out}/loss.png"
