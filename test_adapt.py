"""Bone in any PyTorch model: which layers get one, what it computes there, saving and merging."""

import copy

import pytest
import torch
from torch import nn

from adapt import add_bone, bone_layers, bone_state, load_bone_state, merge_bone
from bone import BoneLinear
from quant import quantize


def encoder():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(32, 4, dim_feedforward=64, batch_first=True, dropout=0.1)
    return nn.TransformerEncoder(layer, 2).eval()


def llama():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
        attention_bias=True,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for name, p in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(p)
    return model


def logits(model, idx):
    return model(idx).logits


def fill_bones(model, seed=1):
    torch.manual_seed(seed)
    for layer in bone_layers(model).values():
        nn.init.normal_(layer.bone, std=0.02)
    return model


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 16))


# ---- which layers ------------------------------------------------------------------------------


def test_every_linear_layer_but_an_output_head_gets_one_and_nothing_else_is_trained():
    model = add_bone(llama(), 16)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trained) == 2 * 7
    assert all(name.endswith(".bone") for name in trained)
    assert type(model.lm_head) is nn.Linear


def test_a_model_without_a_dot_in_its_names_is_one_too():
    assert list(bone_layers(add_bone(mlp(), 16))) == ["0", "2"]


def test_names_choose_the_layers():
    model = add_bone(llama(), 16, names=r".*\.(q|v)_proj|lm_head", mode="bone")
    assert {name.rpartition(".")[2] for name in bone_layers(model)} == {
        "q_proj",
        "v_proj",
        "lm_head",
    }


def test_what_multiplies_by_the_weight_itself_gets_none():
    model = add_bone(encoder(), 16)
    assert {name.rpartition(".")[2] for name in bone_layers(model)} == {"linear1", "linear2"}


@pytest.mark.parametrize(
    "model, names, words",
    [
        (nn.Sequential(nn.LayerNorm(4)), None, "no layer .* linear layers of this model: none"),
        (mlp(), "3", "no layer .*: 0, 2"),
        (nn.ModuleDict({"lm_head": nn.Linear(8, 8)}), None, "no layer .*: lm_head"),
        (nn.Linear(8, 8), None, "itself a linear layer"),
        (nn.Sequential(nn.LazyLinear(8)), None, "0 is a LazyLinear whose weight"),
        (add_bone(mlp(), 16), None, "has bones already; merge_bone"),
        (nn.Sequential(nn.Linear(8, 6)), None, r"does not divide 0 \(6 x 8\)"),
    ],
)
def test_what_cannot_be_adapted_is_refused_and_left_as_it_was(model, names, words):
    before = [(name, p.requires_grad) for name, p in model.named_parameters()]
    with pytest.raises(ValueError, match=words):
        add_bone(model, 8, names=names)
    assert [(name, p.requires_grad) for name, p in model.named_parameters()] == before


# ---- what it computes --------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["bat", "bone"])
@pytest.mark.parametrize("make", [mlp, encoder, llama])
def test_new_bones_change_nothing_and_the_merged_model_is_the_adapted_one(make, mode):
    plain = make()
    adapted = add_bone(copy.deepcopy(plain), 16, mode)
    x = torch.randint(100, (2, 9)) if make is llama else torch.randn(2, 9, 32)

    def output(model):
        with torch.no_grad():  # nn.TransformerEncoderLayer has a way past its layers then
            return model(x).logits if make is llama else model(x)

    torch.testing.assert_close(output(adapted), output(plain))
    fill_bones(adapted)
    changed = output(adapted)
    assert (changed - output(plain)).abs().max() > 1e-3
    merged = merge_bone(adapted)
    assert not bone_layers(merged)
    assert [*merged.state_dict()] == [*plain.state_dict()]
    torch.testing.assert_close(output(merged), changed, rtol=1e-4, atol=1e-5)


def test_a_layer_with_two_names_stays_one():
    shared = nn.Linear(32, 32)
    model = fill_bones(add_bone(nn.Sequential(shared, nn.ReLU(), shared), 16))
    assert model[0] is model[2]
    x = torch.randn(5, 32)
    y = model(x)
    merged = merge_bone(model)
    assert merged[0] is merged[2]
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-5)


def test_padded_rows_pass_through_an_encoder():
    plain = encoder()
    adapted = add_bone(copy.deepcopy(plain), 16)
    x = torch.randn(2, 9, 32)
    padding = torch.arange(9) >= torch.tensor([[9], [5]])
    y, expected = (m(x, src_key_padding_mask=padding) for m in (adapted, plain))
    torch.testing.assert_close(y[~padding], expected[~padding], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("mode", ["bat", "bone"])
def test_no_tokens_at_all_are_no_problem(mode):
    model = add_bone(mlp(), 16, mode)
    model(torch.randn(0, 32)).sum().backward()
    assert model[0].bone.grad.count_nonzero() == 0


def test_biases_are_kept_and_frozen():
    plain = mlp()
    layer = add_bone(copy.deepcopy(plain), 16)[0]
    assert layer.bias.equal(plain[0].bias)
    assert not layer.bias.requires_grad
    assert repr(layer) == "BoneLinear(32, 64, r=16, mode=bat)"


def test_shard_mode_is_what_peft_calls_miss():
    peft = pytest.importorskip("peft")
    ours = fill_bones(add_bone(llama(), 16, "bone"))
    targets = list(bone_layers(ours))
    theirs = peft.inject_adapter_in_model(peft.MissConfig(r=16, target_modules=targets), llama())
    blocks = {n: p for n, p in theirs.named_parameters() if "miss_block" in n}
    assert len(blocks) == len(targets)
    with torch.no_grad():
        for name, bone in bone_state(ours).items():
            blocks[name.replace(".bone", ".miss_block.default")].copy_(bone)
    idx = torch.randint(100, (2, 9))
    torch.testing.assert_close(logits(ours, idx), logits(theirs, idx), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["int8", "nf4"])
def test_quantized_layers_get_bones_and_merge_into_plain_ones(kind):
    model = nn.Sequential(quantize(torch.randn(64, 64), kind), nn.Linear(64, 64, bias=False))
    fill_bones(add_bone(model, 16))
    x = torch.randn(5, 64)
    y = model(x)
    merged = merge_bone(model)
    assert type(merged[0]) is nn.Linear
    torch.testing.assert_close(merged(x), y, rtol=1e-4, atol=1e-4)


def test_in_bfloat16_under_autocast_and_compiled_it_is_the_same_layer():
    model = fill_bones(add_bone(mlp(), 16))
    x = torch.randn(7, 32)
    exact = model(x)
    in_bfloat16 = copy.deepcopy(model).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = model(x)
    assert in_bfloat16.dtype == under_autocast.dtype == torch.bfloat16
    for y in (in_bfloat16, under_autocast):
        assert (y - exact).norm() < 0.02 * exact.norm()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), exact)
    gradients = [torch.autograd.grad(m(x).sum(), model[0].bone) for m in (model, compiled)]
    torch.testing.assert_close(*gradients)


def in_rank(rank, init_method, path):
    """Save the bones' gradient of one of two ranks, each with half of the rows."""
    torch.distributed.init_process_group("gloo", init_method, rank=rank, world_size=2)
    model = fill_bones(add_bone(mlp(), 16))
    with pytest.raises(ValueError, match="wrap after add_bone"):
        add_bone(nn.parallel.DistributedDataParallel(mlp()), 16)
    wrapped = nn.parallel.DistributedDataParallel(model)
    wrapped(torch.arange(128.0).view(4, 32).cos()[2 * rank : 2 * rank + 2]).mean().backward()
    torch.save([layer.bone.grad for layer in bone_layers(model).values()], path / f"{rank}.pth")
    torch.distributed.destroy_process_group()


def test_ranks_take_the_mean_of_their_gradients(tmp_path):
    arguments = (f"file://{tmp_path}/store", tmp_path)
    torch.multiprocessing.spawn(in_rank, arguments, nprocs=2)
    model = fill_bones(add_bone(mlp(), 16))
    model(torch.arange(128.0).view(4, 32).cos()).mean().backward()
    for rank in range(2):
        gradients = torch.load(tmp_path / f"{rank}.pth")
        for layer, gradient in zip(bone_layers(model).values(), gradients, strict=True):
            torch.testing.assert_close(gradient, layer.bone.grad)


# ---- saving and loading ------------------------------------------------------------------------


def test_saved_bones_come_back_and_others_are_refused():
    model, other = fill_bones(add_bone(mlp(), 16)), add_bone(mlp(), 16)
    load_bone_state(other, bone_state(model))
    assert all(layer.bone.equal(other[i].bone) for i, layer in enumerate(model) if i != 1)

    before = {name: bone.clone() for name, bone in bone_state(other).items()}
    state = bone_state(model)
    for wrong, words in (
        ({"0.bone": state["0.bone"]}, "2.bone is missing in the state"),
        (state | {"1.bone": torch.ones(2)}, "1.bone is missing in the model"),
        (state | {"2.bone": torch.ones(2)}, r"2.bone: torch.Size\(\[2\]\) in the state"),
    ):
        with pytest.raises(ValueError, match=words):
            load_bone_state(other, wrong)
    assert all(bone.equal(before[name]) for name, bone in bone_state(other).items())


def test_it_trains():
    model = add_bone(mlp(), 16)
    target = mlp()
    with torch.no_grad():
        target[0].weight += 0.1 * torch.randn(64, 32)
    x = torch.randn(256, 32)
    wanted = target(x).detach()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2)
    losses = []
    for _ in range(100):
        loss = (model(x) - wanted).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]
    assert isinstance(model[0], BoneLinear)
