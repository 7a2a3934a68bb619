"""Probing: what it finds, that nothing else is moved by it, and what is refused."""

import copy

import pytest
import torch
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainerCallback

from safedelta_hf import Ridge, SafeDeltaCallback
from safedelta_hf.distributed.open_model import open_model
from safedelta_hf.errors import ArchitectureError, ConfigurationError, NumericalError
from safedelta_hf.training import SafetyProbeConfig, with_safety_probe
from safedelta_hf.training.preferences import LOSSES, log_likelihoods
from safedelta_hf.training.safety_probe import SafetyProbe, chosen_layers
from tests.fixtures import tiny
from tests.training.test_preferences import PLAIN

Probing = with_safety_probe(Trainer)


def config(**changes):
    return SafetyProbeConfig(**{"pairs": PLAIN, "batch_size": 2} | changes)


def dropping(model):
    """With dropout, so that a pass that draws other masks is another pass."""
    for layer in model.model.layers:
        layer.mlp.down_proj = nn.Sequential(layer.mlp.down_proj, nn.Dropout(0.3))
    return model


def trainer(folder, model, probe=None, kind=None, **changes):
    settings = {"per_device_train_batch_size": 2, "num_train_epochs": 1, "max_grad_norm": 0.1, **changes}
    more = {} if probe is None else {"probe": probe}
    return (kind or (Trainer if probe is None else Probing))(
        model=model,
        args=tiny.arguments(folder, **settings),
        train_dataset=tiny.rows(40, seed=2),
        data_collator=DataCollatorForSeq2Seq(tiny.tokenizer()),
        processing_class=tiny.tokenizer(),
        **more,
    )


def lora(model):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], lora_dropout=0.3))


def trained(folder, model, probe=None, **changes):
    run = trainer(folder, model, probe, **changes)
    run.train()
    return tiny.weights(run.model), run


OFF = {"beta": {"beta": 0.0}, "epsilon": {"epsilon": 0.0}, "too_small_to_be_added": {"beta": 1e-30}}


@pytest.mark.parametrize("off", OFF)
@pytest.mark.parametrize("make", [tiny.llama, lambda: lora(tiny.llama())], ids=["full", "lora"])
def test_at_strength_zero_a_run_is_the_plain_one_bit_for_bit(off, make, tmp_path):
    steps = {"gradient_accumulation_steps": 4, "num_train_epochs": 4}
    plain, run = trained(tmp_path, dropping(make()) if make is tiny.llama else make(), **steps)
    probed, other = trained(tmp_path, dropping(make()) if make is tiny.llama else make(), config(**OFF[off]), **steps)
    assert run.state.global_step == 20 and tiny.same(plain, probed)
    assert [log.get("loss") for log in run.state.log_history] == [log.get("loss") for log in other.state.log_history]


def test_a_probed_run_is_another_one(tmp_path):
    plain, _ = trained(tmp_path, tiny.llama())
    probed, _ = trained(tmp_path, tiny.llama(), config())
    assert not tiny.same(plain, probed)


class Steps(TrainerCallback):
    """Looks on at each optimiser step."""

    def __init__(self, look):
        self.look = look

    def on_pre_optimizer_step(self, args, state, control, model, **kwargs):
        self.look(model, state.global_step)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_are_bit_identical_where_the_optimiser_does_nothing(dtype, tmp_path):
    model = dropping(tiny.llama()).to(dtype)
    before = copy.deepcopy(model.state_dict())
    trained(tmp_path, model, config(epsilon=0.3), learning_rate=0.0)
    assert tiny.same(before, model.state_dict())


class Looking(SafetyProbe):
    """Keeps what it found."""

    def __init__(self, *args):
        super().__init__(*args)
        self.found = []

    def offsets(self, *args):
        self.found.append(super().offsets(*args))
        return self.found[-1]


def step_of(folder, model, probe, **changes):
    """One training step, without the Trainer's loop: what was added, the loss, and the gradients."""
    run = trainer(folder, model, probe, max_grad_norm=0.0, **changes)
    run.safety_probe = Looking(probe, run.processing_class)
    run.create_optimizer_and_scheduler(10)
    run.current_gradient_accumulation_steps = 1
    batch = next(iter(run.get_train_dataloader()))
    loss = run.training_step(run.model, batch, run._get_num_items_in_batch([batch], run.args.device))
    gradients = {name: one.grad.clone() for name, one in run.model.named_parameters() if one.grad is not None}
    return run, batch, run.safety_probe.found[-1], loss, gradients


def harmful_move(model, probe, batch):
    """Step 1 to 3 of the algorithm, written down once more."""
    pairs = SafetyProbe(probe, tiny.tokenizer())._batch(0, 1) if batch is None else batch
    chosen, rejected = log_likelihoods(model, pairs)
    loss = LOSSES[probe.loss](chosen / probe.temperature, rejected / probe.temperature, pairs)
    trained = [one for one in model.parameters() if one.requires_grad]
    gradients = torch.autograd.grad(loss, trained, allow_unused=True)
    gradients = [torch.zeros_like(one) if g is None else g for one, g in zip(trained, gradients, strict=True)]
    size = torch.sqrt(sum(g.square().sum() for g in gradients))
    norm = torch.sqrt(sum(one.detach().square().sum() for one in trained))
    return [probe.epsilon * norm * g / size for g in gradients]


def useful_loss(model, batch, offsets):
    """The loss with something added to what layers return."""
    hooks = [layer.register_forward_hook(lambda _, __, out, layer=layer: out + offsets[layer]) for layer in offsets]
    items = batch.get("num_items_in_batch", (batch["labels"][:, 1:] != -100).sum())
    try:
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits[:, :-1]
        # transformers takes the loss in float32, which finite differences cannot be taken of.
        losses = nn.functional.cross_entropy(logits.transpose(1, 2), batch["labels"][:, 1:], reduction="sum")
        return losses / items
    finally:
        for hook in hooks:
            hook.remove()


def moved_copy(model, move):
    with torch.no_grad():
        for one, by in zip([p for p in model.parameters() if p.requires_grad], move, strict=True):
            one.add_(by)


@pytest.mark.parametrize("normalise", ["rms", "none"])
@pytest.mark.parametrize("loss", ["contrastive", "difference"])
def test_offsets_are_those_of_finite_differences_in_float64(loss, normalise, tmp_path):
    probe = config(epsilon=0.1, loss=loss, normalise=normalise, temperature=2.0, layers=[0, 1])
    model = tiny.llama().double()
    run, batch, found, _, _ = step_of(tmp_path, model, probe)
    layers = list(model.model.layers)
    assert list(found) == layers

    def rise(offsets):
        plain = useful_loss(model, batch, offsets)
        move = harmful_move(model, probe, None)
        saved = copy.deepcopy(model.state_dict())
        moved_copy(model, move)
        after = useful_loss(model, batch, offsets)
        model.load_state_dict(saved)
        return float((after - plain).detach())

    for layer in layers:
        expected = torch.zeros(16, dtype=torch.float64)
        for place in range(16):
            sides = []
            for by in (1e-4, -1e-4):
                offset = torch.zeros(16, dtype=torch.float64)
                offset[place] = by
                sides.append(rise({layer: offset}))
            expected[place] = (sides[0] - sides[1]) / 2e-4
        scale = expected.square().mean().sqrt() if normalise == "rms" else 1.0
        torch.testing.assert_close(found[layer], 0.05 * expected / scale, rtol=2e-3, atol=1e-7)


def test_the_offsets_raise_what_the_harmful_move_costs(tmp_path):
    probe = config(epsilon=1e-2, beta=1e-3, layers=[0])
    model = tiny.llama().double()
    _, batch, found, _, _ = step_of(tmp_path, model, probe)
    moved = copy.deepcopy(model)
    moved_copy(moved, harmful_move(model, probe, None))
    (offset,) = found.values()
    costs = []
    for added in (offset, torch.zeros_like(offset)):
        after, before = (useful_loss(one, batch, {one.model.layers[0]: added}) for one in (moved, model))
        costs.append(float((after - before).detach()))
    assert costs[0] > costs[1]


class Linear(nn.Module):
    """`1/2 |W (x + v) - y|^2`, with the layer that v is added to in front."""

    def __init__(self, weight):
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])
        self.head = nn.Linear(*weight.shape[::-1], bias=False)
        self.head.weight = nn.Parameter(weight)

    def forward(self, x):
        return self.head(self.layers[0](x))


def test_of_a_linear_model_the_rise_has_a_closed_form():
    generator = torch.Generator().manual_seed(0)
    weight, move, x, y = (
        torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (3, 4), (4,), (3,))
    )
    model = Linear(weight.clone())
    probe = SafetyProbe(config(beta=1.0, normalise="none"), tiny.tokenizer())
    probe._layers = [model.layers[0]]

    def loss():
        return 0.5 * (model(x) - y).square().sum()

    before = probe._gradients(model, loss)[0]
    with torch.no_grad():
        model.head.weight.add_(move)
    after = probe._gradients(model, loss)[0]
    moved = weight + move
    expected = moved.T @ (moved @ x - y) - weight.T @ (weight @ x - y)
    torch.testing.assert_close(after - before, expected)
    assert model.head.weight.requires_grad and model.head.weight.grad is None


def test_gradients_are_those_of_the_loss_with_the_offsets(tmp_path):
    model = tiny.llama().double()
    _, batch, found, loss, gradients = step_of(tmp_path, model, config(epsilon=1e-2))
    twin = copy.deepcopy(model)
    twin.zero_grad()
    expected = useful_loss(twin, batch, dict(zip(twin.model.layers, found.values(), strict=True)))
    expected.backward()
    torch.testing.assert_close(loss.double(), expected.detach())
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad, rtol=1e-4, atol=1e-8)


def test_gradients_of_micro_batches_add_up(tmp_path):
    seen = []
    run = trainer(tmp_path, tiny.llama().double(), config(epsilon=1e-2), gradient_accumulation_steps=4, max_steps=1)
    run.safety_probe = Looking(run.safety_probe.config, run.processing_class)
    run.add_callback(Steps(lambda model, step: seen.append({n: p.grad.clone() for n, p in model.named_parameters()})))
    run.args.max_grad_norm = 0.0
    twin = copy.deepcopy(run.model)
    batches = []
    compute_loss = run.compute_loss

    def watched(model, inputs, **kwargs):
        batches.append((dict(inputs), kwargs["num_items_in_batch"]))
        return compute_loss(model, inputs, **kwargs)

    run.compute_loss = watched
    run.train()
    assert len(run.safety_probe.found) == 4 and len(batches) == 12
    assert run.safety_probe.found[0] is not run.safety_probe.found[1]
    for found, (inputs, items) in zip(run.safety_probe.found, batches[2::3], strict=True):
        offsets = dict(zip(twin.model.layers, found.values(), strict=True))
        useful_loss(twin, inputs | {"num_items_in_batch": items}, offsets).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(seen[0][name], parameter.grad, rtol=1e-4, atol=1e-8)


def test_what_is_found_does_not_depend_on_accumulation(tmp_path):
    alone, accumulated = (
        trainer(tmp_path, tiny.llama().double(), config(normalise="none"), gradient_accumulation_steps=steps)
        for steps in (1, 4)
    )
    found = []
    for run in (alone, accumulated):
        run.safety_probe = Looking(run.safety_probe.config, run.processing_class)
        run.add_callback(Steps(lambda model, step: (_ for _ in ()).throw(KeyboardInterrupt)))
        with pytest.raises(KeyboardInterrupt):
            run.train()
        found.append(run.safety_probe.found[0])
    for one, other in zip(*(offsets.values() for offsets in found), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_passes_draw_the_same_dropout_masks(tmp_path):
    # The authors' code draws others: then the difference of the passes is noise, 2,500 times as large.
    sizes = {}
    for share in (0.0, 0.3):
        model = tiny.llama()
        model.config.attention_dropout = share
        for layer in model.model.layers:
            layer.self_attn.attention_dropout = share
        model = dropping(model) if share else model
        _, _, found, _, _ = step_of(tmp_path, model, config(normalise="none", beta=1.0))
        sizes[share] = max(float(offset.norm()) for offset in found.values())
    assert sizes[0.3] < 20 * sizes[0.0]


@pytest.mark.parametrize("failing", [0, 1, 2, 3], ids=["safety", "moved", "unmoved", "step"])
def test_an_exception_in_any_pass_leaves_everything_as_it_was(failing, tmp_path):
    model = dropping(tiny.llama())
    run = trainer(tmp_path, model, config(epsilon=0.3))
    run.create_optimizer_and_scheduler(10)
    run.current_gradient_accumulation_steps = 2
    batches = iter(run.get_train_dataloader())
    run.training_step(model, next(batches), None)
    weights, gradients = tiny.weights(model), {name: p.grad.clone() for name, p in model.named_parameters()}
    buffers = copy.deepcopy(dict(model.named_buffers()))
    passes, state = [], torch.get_rng_state()

    def fail(*_):
        passes.append(torch.rand(3))
        if len(passes) == failing + 1:
            raise MemoryError

    hook = model.lm_head.register_forward_hook(fail)
    with pytest.raises(MemoryError):
        run.training_step(model, next(batches), None)
    hook.remove()
    assert tiny.same(weights, tiny.weights(model)) and tiny.same(buffers, dict(model.named_buffers()))
    assert tiny.same(gradients, {name: p.grad for name, p in model.named_parameters()})
    assert all(p.requires_grad for p in model.parameters())
    assert not any(layer._forward_hooks for layer in model.modules())
    if failing < 3:  # the step itself draws masks, as a plain one does
        assert torch.equal(state, torch.get_rng_state())


def test_between_probed_steps_stand_plain_ones(tmp_path):
    run = trainer(tmp_path, tiny.llama(), config(every_n_steps=3), max_steps=7)
    run.safety_probe = Looking(run.safety_probe.config, run.processing_class)
    run.train()
    assert [bool(found) for found in run.safety_probe.found] == [True, False, False, True, False, False, True]


class Drawing(Looking):
    """Keeps which pairs it read."""

    def _batch(self, *args):
        batch = super()._batch(*args)
        self.found.append(batch)
        return batch

    def offsets(self, *args):
        return SafetyProbe.offsets(self, *args)


def test_a_resumed_run_goes_on_with_the_next_pairs_and_ends_with_the_same_weights(tmp_path):
    def run(name, model, **changes):
        made = trainer(
            tmp_path / name, model, config(), max_steps=8, gradient_accumulation_steps=2, save_strategy="steps",
            save_steps=4, **changes,
        )  # fmt: skip
        made.safety_probe = Drawing(made.safety_probe.config, made.processing_class)
        return made

    whole = run("whole", dropping(tiny.llama()))
    whole.train()
    rest = run("rest", dropping(tiny.llama()))
    rest.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert len(whole.safety_probe.found) == 16 and whole.safety_probe.found[8:] == rest.safety_probe.found
    assert tiny.same(tiny.weights(whole.model), tiny.weights(rest.model))


def test_it_works_beside_the_callback(tmp_path):
    callback = SafeDeltaCallback(tiny.rows(8, seed=1), Ridge(strength=1.0))
    run = trainer(tmp_path, tiny.llama(), config(), max_steps=2)
    run.add_callback(callback)
    run.train()
    assert callback.report.changed_anything


def test_gradient_checkpointing_finds_the_same_offsets(tmp_path):
    found = [
        step_of(tmp_path, dropping(tiny.llama()), config(), gradient_checkpointing=checkpointing)[2:]
        for checkpointing in (False, True)
    ]
    for one, other in zip(found[0][0].values(), found[1][0].values(), strict=True):
        torch.testing.assert_close(one, other)
    for name, gradient in found[0][2].items():
        torch.testing.assert_close(gradient, found[1][2][name])


def test_in_bf16_autocast_the_probe_is_found_in_float32(tmp_path):
    plain, cast = (step_of(tmp_path, tiny.llama(), config(), bf16=bf16)[2] for bf16 in (False, True))
    for one, other in zip(plain.values(), cast.values(), strict=True):
        assert torch.equal(one, other)


def test_trl_trains_with_it_and_counts_each_token_once(tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    logs = []
    for kind, more in ((SFTTrainer, {}), (with_safety_probe(SFTTrainer), {"probe": config()})):
        run = kind(
            model=tiny.llama(),
            args=SFTConfig(
                output_dir=str(tmp_path), max_steps=2, logging_steps=1, report_to="none", use_cpu=True, bf16=False,
                save_strategy="no", disable_tqdm=True, learning_rate=0.0, per_device_train_batch_size=2,
            ),
            train_dataset=Dataset.from_list(tiny.conversations()),
            processing_class=tiny.tokenizer(),
            **more,
        )  # fmt: skip
        run.train()
        logs.append(run.state.log_history)
    assert type(run).__name__ == "SafetyProbeSFTTrainer"
    assert [log["num_tokens"] for log in logs[0][:2]] == [log["num_tokens"] for log in logs[1][:2]]
    assert logs[0][0]["loss"] != logs[1][0]["loss"]


def quantised(model):
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    for parameter in model.parameters():
        parameter.requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: name.endswith("k_proj"))
    return lora(model)


@pytest.mark.parametrize(
    ("make", "changes", "said"),
    [
        (lambda: tiny.llama().bfloat16(), {}, "is trained in torch.bfloat16"),
        (lambda: quantised(tiny.llama()), {}, "is quantised"),
        (lambda: lora(tiny.llama().bfloat16()), {}, "set epsilon to at least 0.078"),
        (tiny.llama, {"torch_compile": True}, "torch.compile"),
        (
            tiny.llama,
            {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
            "reentrant",
        ),
    ],
)
def test_what_cannot_be_probed_is_refused_by_name(make, changes, said, tmp_path):
    with pytest.raises(ConfigurationError, match=said):
        trainer(tmp_path, make(), config(), **changes).train()


def test_above_a_coarse_base_a_long_move_is_allowed(tmp_path):
    trainer(tmp_path, lora(tiny.llama().bfloat16()), config(epsilon=0.1), max_steps=1).train()


def test_a_gradient_that_is_no_number_is_named(tmp_path):
    model = tiny.llama()
    with torch.no_grad():
        model.lm_head.weight[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="safety loss"):
        trainer(tmp_path, model, config()).train()


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ({"beta": -1}, "beta=-1"),
        ({"epsilon": float("inf")}, "epsilon=inf"),
        ({"temperature": 0}, "temperature=0"),
        ({"every_n_steps": 0}, "every_n_steps=0"),
        ({"batch_size": 1.5}, "batch_size=1.5"),
        ({"max_length": 0}, "max_length=0"),
        ({"normalise": "l2"}, "normalise='l2'"),
        ({"loss": "dpo"}, "loss='dpo'"),
        ({"layers": "all"}, "layers='all'"),
        ({"layers": []}, r"layers=\[\]"),
    ],
)
def test_a_setting_out_of_range_is_named(setting, said):
    with pytest.raises(ConfigurationError, match=said):
        config(**setting)


def test_the_middle_is_that_of_the_paper():
    model = tiny.llama(num_hidden_layers=32)
    layers = list(model.model.layers)
    assert [layers.index(one) for one in chosen_layers(model, "middle")] == list(range(11, 21))
    assert chosen_layers(model, [3, 1]) == [layers[1], layers[3]]
    with pytest.raises(ConfigurationError, match="32"):
        chosen_layers(model, [32])
    for count in range(1, 9):
        assert chosen_layers(tiny.llama(num_hidden_layers=count), "middle")


def test_layers_that_do_not_run_are_named(tmp_path):
    model = tiny.llama()
    probe = SafetyProbe(config(), tiny.tokenizer())
    probe._model = open_model(model)
    probe._layers = [model.model.layers[0], nn.Identity()]
    with pytest.raises(ArchitectureError, match="1 of the 2"):
        probe._gradients(model, lambda: model(torch.ones(1, 4, dtype=torch.long)).logits.sum())


def test_only_trainers_can_be_given_a_probe():
    with pytest.raises(ConfigurationError, match="no subclass"):
        with_safety_probe(dict)


def test_pairs_of_another_kind_are_named_before_training(tmp_path):
    with pytest.raises(ConfigurationError, match="SafetyProbeConfig"):
        trainer(tmp_path, tiny.llama(), {"pairs": PLAIN})
