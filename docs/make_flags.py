"""Write docs/flags.md and docs/zh/flags.md from the options of train.py: `make docs`.

One need not read this to understand Bone. The English texts are the help in options.py; the Chinese
ones are here. A new flag needs a line in CHINESE_HELP.
"""

import dataclasses
import pathlib
import re
import sys
from collections.abc import Callable

DOCS = pathlib.Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from flags import CHANGEABLE, FIXED, Flag, default_text, value_name  # noqa: E402 (needs the path)
from options import flags, per_machine  # noqa: E402

# One line for each flag, however long (E501), with Chinese punctuation (RUF001).
# ruff: noqa: E501, RUF001
# fmt: off
CHINESE_HELP = {
    "load_model": "要微调的底模：已发布的 RWKV-6 或 RWKV-5 `.pth`。不给时按 `n_layer` 和 `n_embd` 从头训练一个新模型",
    "n_layer": "层数；只有新建模型时才需要，写了则与底模核对",
    "n_embd": "宽度；只有新建模型时才需要，写了则与底模核对",
    "vocab_size": "词表大小；0 表示自动：取底模的，否则取数据的（文本的字符数；`jsonl` 和 `binidx` 为 65536；否则为最大 token + 1）",
    "my_testing": "版本：`x060`（RWKV-6）或 `x052`（RWKV-5）；只有新建模型时才需要，不给时为 `x060`",
    "pre_ffn": "1：新建模型的第一个 block 用 channel mix 代替 time mix，有时更好",
    "head_qk": "N：新建模型带一个宽度为 N 的注意力，便于复制前文的 token；占用的内存/显存随 `ctx_len` 的平方增长",
    "peft": "微调方法；这里只有 Bone（`disha` 是它在 RWKV-PEFT 里后来的名字），`lora`、`pissa`、`state` 请用 RWKV-PEFT",
    "bone_r": "秩，即分块的边长；`bat` 要求它整除每一层的尺寸。32 训练和保存的参数是 64 的一半。不给时为 64，或取 `bone_load` 的",
    "bone_mode": "`bat`：block affine，即 RWKV-PEFT 教程所说的 Bone；`bone`：shard sharing，更简单，秩可任取。不给时为 `bat`，或取 `bone_load` 的",
    "bone_load": "从这个 Bone 检查点继续训练；秩、模式和量化方式都取自它",
    "bone_config": """RWKV-PEFT 的写法，一次给出以上三项：`'{"bone_load":"","bone_r":64}'`""",
    "disha_config": """同上，RWKV-PEFT 后来的写法：`'{"mode":"bone","load":"","r":64}'`""",
    "other_base": "`bone_load` 的检查点不是在这个底模上训练的，也照样继续训练",
    "train_parts": "名字中含有这些词的参数也一起训练，可选 `time` `ln` `emb` `head`；后面什么都不写则只训练 Bone。要学新词或新语言时可加 `emb` 和 `head`，内存/显存会多很多",
    "data_file": "文本或对话的 `.jsonl` 或 `.json`、binidx 前缀（`x` 指 `x.bin` 和 `x.idx`）、存有 token 的 `.npy`，或用于字符级模型的 `.txt`",
    "data_type": "`utf-8`（`.txt`）、`utf-16le`：文本，以字符为 token；`dummy`：自动生成的加法算式，以字符为 token；`numpy`（`.npy`）、`uint16`：裸 token。不给时由文件名判断",
    "val_file": "同类的留出数据；每个 epoch 之后测一次 loss，告诉你何时该停",
    "val_split": "代替 `val_file`：从 `data_file` 中留出这个比例的文档，例如 0.05；`random_seed` 相同，留出的文档就相同；0：不留",
    "eval_steps": "每隔多少步也测一次留出集 loss，并把最好的检查点保存为 `rwkv-best.pth`；0：只在每个 epoch 之后测",
    "ctx_len": "每行最多的 token 数，更长的文档会被截断，`train_type` 为 `infctx` 时除外。显存够就设为文档长度（显存需求用 `--dry_run` 查看）",
    "dataload": "`pad`：每行一篇文档；`only`：同样，但不填充，`micro_bsz` 为 1；`get`：随机窗口，适合长文本",
    "data_shuffle": "0：保持文件中的顺序，适合由浅入深排好的数据",
    "loss_mask": "哪些 token 计入 loss。`pad`：文档的；`none`：填充也计入；`qa`：只有行首的 `Assistant:` 之后、行首的 `User:` 之前的内容；`se`：同样，但用 `mask_id` 的标记",
    "mask_id": "`se` 的标记，用 `se` 时必须给出，可为任意文本：`mask1` 之后、`mask0` 之前的内容计入；以字母、汉字或数字开头的标记只在行首有效",
    "proj_dir": "存放检查点和日志的文件夹，每次训练一个；检查点从不被覆盖",
    "epoch_count": "epoch 数；只要留出集 loss 还在下降就可以增加",
    "epoch_begin": "第一个 epoch 的编号，与 `bone_load` 合用，接着编号；再训练 `epoch_count` 个 epoch；从 0 数起，学习率在第 `epoch_count` 个 epoch 结束时降到 `lr_final`，之后不变",
    "epoch_steps": "一个 epoch 的优化器步数；0：数据过一遍",
    "epoch_save": "每隔多少个 epoch 保存一次检查点，最后一个总会保存；0：只保存最后一个",
    "save_steps": "每隔多少步保存一次运行状态；每次保存检查点时也会保存；0：只在那时保存",
    "save_minutes": "距上次保存状态满这么多分钟时也保存一次，适合一步很慢的训练；0：不按时间保存",
    "keep": "保留几份状态；多留几份，可以退回到更早的时候",
    "resume": "从 `proj_dir` 里最后的状态精确地继续（与 `last` 相同），没写的参数取自其中的 `args.json`；`auto`：没有状态时从头开始，启动和重启用同一条命令",
    "train_type": "`infctx`：任意长度的行，只占用 `chunk_ctx` 个 token 的内存/显存，梯度是整行的",
    "chunk_ctx": "infctx 一次处理的 token 数；小则省内存/显存，大则更快",
    "bptt": "infctx 的梯度往回传多少块；0：全部，即精确梯度；1 快三分之一，但梯度不跨越块的边界",
    "micro_bsz": "一个微批的行数，即一次经过模型的数据；能放下多少就取多少：越大，每个 token 越快",
    "accumulate_grad_batches": "优化器每一步的微批数：N 个微批的一步与一个 N 倍大的批完全相同，而内存/显存只占一个微批的",
    "random_seed": "数据顺序和新建模型的随机种子",
    "wandb": "同时记录到 Weights & Biases 的这个项目（`pip install wandb`）",
    "tensorboard": "同时记录到 `proj_dir/tensorboard`，用 TensorBoard 查看（`pip install tensorboard`）；不带值即为 1",
    "lr_init": "起始学习率；loss 下降太慢时调高；新建的小模型用 6e-4",
    "lr_final": "`epoch_count` 个 epoch 之后的学习率；其间按指数变化，有一个为 0 时按线性变化",
    "warmup_steps": "学习率用多少步从五分之一升到全值；学习率较高时取 50 左右",
    "optim": "adamw8bit：AdamW 的两个矩用 8 位保存，只占四分之一的显存；每步略慢一点",
    "beta1": "梯度均值的衰减率；很少需要改",
    "beta2": "梯度平方均值的衰减率；接近收敛时用 0.999",
    "adam_eps": "加在分母上的数；很少需要改",
    "weight_decay": "矩阵和 Bone 的权重衰减，与 AdamW 相同；0.001 到 0.1 使权重保持较小",
    "layerwise_lr": "1：`time_decay` 的学习率加倍，time 参数都不衰减",
    "accelerator": "`auto`：有 GPU 就用；希望没有 GPU 时直接报错，就写 `gpu`",
    "devices": "GPU 的数目；没有 GPU 时为 CPU 进程数，每个启动一个进程",
    "num_nodes": "机器的数目；每台机器上运行同一条命令，并设好 `MASTER_ADDR` 和 `NODE_RANK`",
    "strategy": "多个设备如何分摊内存/显存。`auto`、`ddp`：每个都持有全部；`deepspeed_stage_1`：分摊 Adam 的动量；`2`：分摊所有被训练的部分；`3`：连冻结的权重也分摊；`offload`：分摊到的部分放在 CPU 内存",
    "precision": "矩阵乘法的精度，被训练的参数始终是 float32；没有 bf16 的 GPU 用 `fp16`（带梯度缩放）；`tf32` 是 GPU 上乘法更快的 fp32",
    "quant": "底模的大矩阵用 8 位或 4 位保存，内存/显存不够时用。不给时为 `none`，或与 `bone_load` 训练时相同",
    "grad_cp": "反向传播时重算多少前向计算，以节省内存/显存：1：全部重算；0：不重算，更快；0 与 1 之间：重算这一比例的矩阵乘积（不编译的 block 全部保留）；auto：在空闲内存/显存允许的范围内尽量少重算",
    "compile": "1：用 PyTorch 的编译器运行各个 block，只需编译一次，要一两分钟，之后每步更快；0：不编译；auto：训练够长、值得编译时才用",
    "fla": "在装有 flash-linear-attention 的 GPU 上用它的 Triton 算子计算 WKV-6；用不了时给出提示，并使用默认的 kernel",
    "dry_run": "只显示数据概况、会训练哪些参数、需要多少内存/显存和磁盘空间；除了把 jsonl 的分词结果存在它旁边，不写任何文件；每次正式训练前都值得先看",
}
# fmt: on


def as_markdown(help: str) -> str:
    """Return the help of a flag as Markdown, with names, suffixes and JSON as code."""
    code = r"'\{.*?\}'|\b\w+_\w+\b|(?<!\w)\.[a-z]{2,5}\b"
    return re.sub(code, r"`\g<0>`", help)


@dataclasses.dataclass(frozen=True)
class Language:
    """What differs between the English page and the Chinese one."""

    path: pathlib.Path
    # With {per_machine} and {tables} to fill in.
    page: str
    header: str
    # From name and flag to what stands in the table.
    describe: Callable[[str, Flag], str]
    # Of what options.py calls the groups, and what resuming may do.
    words: dict[str, str]


ENGLISH = Language(
    path=DOCS / "flags.md",
    page="""\
# Flags of train.py

[中文](zh/flags.md)

This page is written by `make docs` from [options.py](../options.py).

An empty default is taken from the model, checkpoint or data, or means off. Tokens without documents
(a text's characters, `numpy`, `uint16`) are cut into pieces of `ctx_len` tokens. A flag that is
mistyped, or another tool's (`--lr`, `--batch_size`), is an error that names the right one. merge.py, generate.py and data.py have few flags: see their
`--help`.

The last column is for [a run that is resumed](resume.md). **same**: another value is refused.
**may change**: another value is taken, and the log says so. Empty: the value is not compared (of
`load_model` and `data_file`, the contents are).

On [several machines](devices.md) these may differ, but not the contents of the files:
{per_machine}.
{tables}""",
    header="| flag | values | default | what it is for | resumed |",
    describe=lambda name, about: as_markdown(about.help),
    words={
        "model": "Model",
        "Bone": "Bone",
        "data": "Data",
        "training": "Training",
        "optimizer (Adam)": "Optimizer (Adam)",
        "machine": "Machine",
        FIXED: "same",
        CHANGEABLE: "may change",
    },
)

CHINESE = Language(
    path=DOCS / "zh" / "flags.md",
    page="""\
# train.py 的参数

[English](../flags.md)

本页由 `make docs` 根据 [options.py](../../options.py) 生成。

默认值留空：自动从模型、检查点或数据中读取，或默认关闭。没有文档划分的 token（文本的字符、`numpy`、`uint16`）按 `ctx_len` 个一段切开。
写错的参数和其他工具的参数名（如 `--lr`、`--batch_size`）会报错，并给出正确的参数名。merge.py、generate.py 和 data.py 的参数不多，见各自的 `--help`。

最后一列说的是[续训](resume.md)。**相同**：值不同则拒绝。**可改**：可以改，日志会注明。留空：不比较（`load_model` 和 `data_file` 比较的是内容）。

在[多台机器](devices.md)上可以不同的参数（但文件内容必须相同）：{per_machine}。
{tables}""",
    header="| 参数 | 取值 | 默认 | 说明 | 续训 |",
    describe=lambda name, about: CHINESE_HELP[name],
    words={
        "model": "模型",
        "Bone": "Bone",
        "data": "数据",
        "training": "训练",
        "optimizer (Adam)": "优化器（Adam）",
        "machine": "设备",
        FIXED: "相同",
        CHANGEABLE: "可改",
    },
)


def values(about: Flag) -> str:
    """Return what may follow a flag."""
    if about.default is False:
        return ""
    if about.choices:
        return " ".join(f"`{value}`" for value in about.choices)
    return f"`{value_name(about)}`"


def tables(language: Language) -> str:
    """Return a table for each group of flags."""
    lines = []
    for name, about in flags().items():
        if about.heading:
            title = f"## {language.words[about.heading]}"
            lines += ["", title, "", language.header, "|---|---|---|---|---|"]
        default = default_text(about.default)
        cells = [
            f"`--{name}`",
            values(about),
            f"`{default}`" if default else "",
            language.describe(name, about),
            language.words[about.resume] if about.resume else "",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def page(language: Language) -> str:
    """Return the whole page in a language."""
    names = ", ".join(f"`{name}`" for name in per_machine())
    return language.page.format(per_machine=names, tables=tables(language))


if __name__ == "__main__":
    for language in (ENGLISH, CHINESE):
        language.path.write_text(page(language), encoding="utf-8", newline="\n")
