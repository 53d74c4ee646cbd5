"""The words that other tools, and RWKV-PEFT, have for the flags here: what was probably meant.

One need not read this to understand Bone. cli.py asks it about flags that a program does not have.
"""

import difflib
from collections.abc import Collection

# {a flag of some program here, or one with its value: other words for it}. A word may stand for
# flags of several programs: the one that the program has is meant.
MEANS = {
    # train.py
    "load_model": "model base base_model model_path model_name model_name_or_path "
    "pretrained_model pretrained_model_name_or_path checkpoint_path",
    "n_layer": "layers n_layers num_layers num_hidden_layers",
    "n_embd": "dim d_model n_embed embed_dim hidden_size",
    "vocab_size": "vocab padded_vocab_size",
    "my_testing": "rwkv_version model_version",
    "peft": "method finetuning_type peft_type peft_method lora pissa lisa miss",
    "bone_r": "r rank lora_r lora_rank bone_rank lisa_r",
    "bone_mode": "mode",
    "bone_load": "lora_load pissa_load lora_path lora_ckpt adapter adapter_path "
    "adapter_name_or_path",
    "bone_config": "lora_config pissa_config lisa_config peft_config",
    "train_parts": "lora_parts modules_to_save parts emb",
    "data_file": "data dataset dataset_name dataset_path data_path train_data train_file "
    "training_file train_dataset",
    "data_type": "dataset_type data_format file_type",
    "val_file": "val_data val_data_file valid_file validation_file eval_file eval_data "
    "eval_dataset test_file",
    "ctx_len": "context_length max_length max_len max_seq_length max_seq_len seq_len seq_length "
    "sequence_len cutoff_len block_size model_max_length",
    "dataload": "dataset_get",
    "data_shuffle": "datashuffle shuffle",
    "loss_mask qa": "train_on_inputs train_on_prompt mask_prompt mask_inputs "
    "assistant_only_loss completion_only_loss my_qa_mask",
    "proj_dir": "output output_dir output_path out out_dir save_dir save_path logging_dir",
    "epoch_count": "epochs epoch n_epochs num_epochs num_train_epochs max_epochs",
    "epoch_steps": "steps max_steps num_steps max_train_steps total_steps max_iters",
    "save_steps": "save_every save_interval save_freq checkpoint_interval",
    "keep": "save_total_limit",
    "resume": "resume_from resume_from_checkpoint continue continue_training",
    "train_type infctx": "infctx",
    "chunk_ctx": "chunk_len chunk_size",
    "micro_bsz": "bsz batch batch_size micro_batch_size train_batch train_batch_size "
    "per_device_batch_size per_device_train_batch_size",
    "accumulate_grad_batches": "gradient_accumulation_steps gradient_accumulation grad_accum "
    "grad_accum_steps accumulation_steps avg_loss",
    "random_seed": "seed data_seed",
    "wandb": "wandb_project project project_name use_wandb",
    "lr_init": "lr learning_rate base_lr max_lr peak_lr lr_max",
    "lr_final": "min_lr lr_min lr_end final_lr learning_rate_final",
    "warmup_steps": "warmup num_warmup_steps warmup_iters lr_warmup_steps",
    "optim": "optimizer optimizer_type",
    "beta1": "adam_beta1",
    "beta2": "adam_beta2",
    "adam_eps": "eps epsilon adam_epsilon",
    "weight_decay": "wd decay",
    "accelerator": "device use_gpu",
    "accelerator cpu": "cpu use_cpu no_cuda",
    "accelerator gpu": "gpu cuda",
    "devices": "gpus n_gpu n_gpus num_gpus num_devices num_processes nproc_per_node world_size",
    "num_nodes": "nodes nnodes num_machines",
    "strategy": "zero zero_stage deepspeed fsdp ddp",
    "precision": "dtype torch_dtype mixed_precision",
    "precision bf16": "bf16 bfloat16",
    "precision fp16": "fp16 float16 half",
    "precision fp32": "fp32 float32 no_half",
    "precision tf32": "tf32",
    "quant": "quantization quantization_bit quantize quant_type bnb_4bit_quant_type",
    "quant nf4": "bits 4bit nf4 int4 load_in_4bit qlora use_qlora",
    "quant int8": "8bit int8 load_in_8bit",
    "eval_steps": "eval_interval eval_every evaluation_steps val_interval val_check_interval",
    "val_split": "val_size validation_split val_ratio eval_ratio test_size val_set_size",
    "tensorboard": "tb tensorboard_dir use_tensorboard",
    "grad_cp": "gradient_checkpointing use_gradient_checkpointing activation_checkpointing "
    "grad_checkpoint grad_checkpointing",
    "fla": "use_fla fla_npu fused_kernel",
    "dry_run": "dryrun estimate estimate_memory",
    # merge.py
    "base_model": "base model load_model model_path model_name_or_path",
    "lora_checkpoint": "checkpoint ckpt bone bone_load bone_checkpoint lora lora_path lora_load "
    "peft_checkpoint disha_checkpoint miss_checkpoint pissa_checkpoint adapter adapter_path",
    "output": "out out_file output_dir output_path output_file save_path export_dir",
    # generate.py
    "model": "base base_model load_model model_path model_name_or_path",
    "bone": "bone_load bone_checkpoint checkpoint ckpt lora lora_path lora_checkpoint "
    "peft_checkpoint adapter adapter_path",
    "prompt": "text input instruction context",
    "length": "tokens n_tokens max_tokens max_new_tokens max_length num_tokens token_count",
    "temperature": "temp t",
    "top_p": "p nucleus",
    "seed": "random_seed",
    # data.py
    "jsonl": "input data_file dataset data file train_file",
    "prefix": "output output_prefix out output_dir",
}

# Hyphens, and what an editor makes of two of them.
DASHES = "-\u2013\u2014\u2212\uff0d"

DROP = "is not needed here, leave it out"
READ_FROM_BASE = f"{DROP}: the base model says it"
NO_DROPOUT = "is not there, as Bone has no dropout; leave it out"

# {words: what is to be said where no flag stands for them}
NOT_HERE = {
    "alpha lora_alpha lora_init pissa_init svd_niter lisa_k use_rslora use_dora": (
        "is not there: Bone has no such setting; leave it out"
    ),
    "target_modules lora_target lora_target_modules target": (
        "is not needed: Bone adapts every matrix of a block; --train_parts says what else is "
        "trained"
    ),
    "dropout lora_dropout hidden_dropout attention_dropout": NO_DROPOUT,
    "report_to tracker logger": (
        "is not there: --wandb PROJECT logs to Weights & Biases, --tensorboard to TensorBoard; "
        "loss.csv and loss.png are always written"
    ),
    "logging_steps log_every log_interval logging_strategy": (
        "is not needed: loss.csv has every step"
    ),
    "lr_schedule lr_scheduler lr_scheduler_type scheduler lr_decay_style": (
        "is not there: the rate goes from --lr_init to --lr_final, exponentially, after "
        "--warmup_steps"
    ),
    "warmup_ratio": "is not there: --warmup_steps takes a number of steps",
    "weight_decay_final": "is not there: --weight_decay stays as it is",
    "grad_clip max_grad_norm gradient_clip gradient_clip_val gradient_clipping": (
        f"{DROP}: gradients are always clipped to a norm of 1"
    ),
    "sft_field sft_split": (
        "is for a Hugging Face data set: write its texts into a .jsonl, and give that as "
        "--data_file"
    ),
    "state_tune state_checkpoint": "would train initial states; RWKV-PEFT does",
    "dim_att dim_ffn head_size_a head_size_divisor head_size": READ_FROM_BASE,
    "tiny_att_dim tiny_att_layer my_pos_emb my_att_shift my_ffn_shift": (
        "is a trial of RWKV-LM that no published model has; leave it out"
    ),
    "my_pile_version my_pile_stage my_pile_shift my_pile_edecay magic_prime my_random_steps "
    "my_sample_len my_exit my_exit_tokens": (
        "is for pretraining in RWKV-LM's stages; leave it out: --epoch_steps and --epoch_count "
        "say how long to train"
    ),
    "op": (
        f"{DROP}: the fastest form of WKV-6 that works here is taken (--fla takes that of "
        "flash-linear-attention)"
    ),
    "load_partial": "is not there: a base model must be whole",
    "l2warp_sparse": f"{DROP}: padding never counts in the L2 wrap",
    "ds_bucket_mb cuda_cleanup compile torch_compile num_workers dataloader_num_workers "
    "preprocessing_num_workers do_train trust_remote_code enable_progress_bar local_rank": DROP,
    "overwrite_output_dir": "is not there: no checkpoint is overwritten; give another --proj_dir",
    "device": f"{DROP}: merging needs no GPU, and generate.py takes one where there is one",
    "type": f"{DROP}: the checkpoint says what it is",
    "tokenizer tokenizer_path tokenizer_type vocab_file append_eod dataset_impl": (
        f"{DROP}: RWKV World's vocabulary is built in"
    ),
    "top_k": "is not there: --top_p and --temperature say how to choose",
}


def advice(word: str, flags: Collection[str], without_flag: Collection[str] = ()) -> str:
    """Say what an unknown flag probably means; "" where nothing is near.

    flags: the names that the program has; without_flag: of what it takes without one.
    """
    name = word.lstrip(DASHES).replace("-", "_").lower()
    for flag in flags:
        if flag.lower() == name:
            return f"did you mean --{flag}?"
    for meant, words in MEANS.items():
        if name not in words.split() and name != meant:
            continue
        if meant.split()[0] in flags:
            return f"did you mean --{meant}?"
        if meant in without_flag:
            return f"{meant} is given without a flag"
    for words, what in NOT_HERE.items():
        if name in words.split():
            return f"it {what}"
    # A slip of the fingers, and nothing farther away: --lr is not --fla.
    similar = difflib.get_close_matches(name, flags, 1, cutoff=0.75)
    if similar:
        return f"did you mean --{similar[0]}?"
    return ""
