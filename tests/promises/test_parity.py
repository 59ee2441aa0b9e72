"""Parity: in fp32 a model under Outsize trains as it does in plain PyTorch.

The same first loss to 1e-6, and after 5 steps of AdamW every tensor within 1e-6 of plain PyTorch's, relative to the
larger of its norm and what a tensor of its size has in this model.
"""

import contextlib
import copy
import os

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from transformers.pytorch_utils import Conv1D

import outsize
from outsize import Pins
from outsize.engine.layer import Layer
from outsize.errors import UsageError
from tests.running import adamw, assert_same_losses, assert_same_weights, opened, train, values_of
from tests.seams import points_of, source_of
from tests.zoo import ZOO, plain_batch, plain_stack, seeded

STEPS = 5


def pair(name, tmp_path, prepare=lambda plain: None, pins=None, **changes):
    """The specimen in plain PyTorch and under Outsize, everything streamed from disk."""
    plain = ZOO[name].build(**changes).train()
    prepare(plain)
    pins = pins or Pins(weight_slots=2, gradient_slots=1)
    return opened(plain, disk=tmp_path, home="disk", pins=pins), plain


def batches(name, rows=3, length=12, count=STEPS):
    return [ZOO[name].batch(rows=rows, length=length, seed=seed) for seed in range(count)]


def assert_trains_alike(model, plain, data, optimizers=None, **options):
    ours, theirs = optimizers or (adamw(model), adamw(plain))
    losses = train(model, data, ours, **options)
    expected = train(plain, data, theirs, **options)
    assert_same_losses(losses, expected)
    assert_same_weights(model, plain)


# -- every architecture ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "tile_rows"),
    [
        (name, tile_rows)
        for index, name in enumerate(ZOO)
        for tile_rows in ((None, 1, 2) if os.environ.get("OUTSIZE_SOAK") else (None, 1 + index % 2))
    ],
)
def test_every_architecture_trains_as_in_plain_pytorch(name, tile_rows, tmp_path):
    pins = Pins(weight_slots=2, gradient_slots=1, tile_rows=tile_rows)
    model, plain = pair(name, tmp_path, pins=pins)
    assert_trains_alike(model, plain, batches(name, rows=4))
    assert outsize.report(model).off_plan == ()
    assert outsize.report(model).bytes_written > 0


def noting_rows(forward, seen):
    def noted(*args, **kwargs):
        seen.add(args[0].shape[0])
        return forward(*args, **kwargs)

    return noted


def rows_seen(model, batch):
    """How many rows (or multiples of one) the linear layers inside of layers are given at once."""
    seen = set()
    for point in points_of(model):
        if isinstance(point, Layer):
            for child in point.module.modules():
                if isinstance(child, nn.Linear | nn.Conv1d | Conv1D) and child is not point.module:
                    child.forward = noting_rows(
                        child.forward, seen
                    )  # a hook would keep the layer from being cut
    model(**batch).loss.backward()
    return seen


@pytest.mark.parametrize("name", ZOO)
def test_pinned_tiles_are_the_tiles_that_run(name, tmp_path):
    model, _ = pair(name, tmp_path, pins=Pins(tile_rows=1))
    batch = ZOO[name].batch(rows=4, length=10)
    if "attention_mask" in batch:
        batch["attention_mask"][:, 8:] = 0
    model(**batch).loss.backward()  # a rehearsal has its own batch sizes
    assert rows_seen(model, batch) <= {1, 10}  # linear layers of some see [B*S, h]


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "llava"])
def test_padding_in_a_few_rows_does_not_turn_tiling_off(name, tmp_path):
    model, _ = pair(name, tmp_path, pins=Pins(tile_rows=1))
    batch = ZOO[name].batch(rows=4, length=10)
    assert 0 < (batch["attention_mask"] == 0).any(1).sum() < 4
    model(**batch).loss.backward()
    assert rows_seen(model, batch) <= {1, 10}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_padding_in_a_later_batch_does_not_turn_tiling_off(name, tmp_path):
    model, _ = pair(name, tmp_path, pins=Pins(tile_rows=1))
    batch = ZOO[name].batch(rows=4, length=10)
    model(**{**batch, "attention_mask": torch.ones_like(batch["attention_mask"])}).loss.backward()
    batch["attention_mask"][:, 8:] = 0
    model(**batch).loss.backward()
    assert rows_seen(model, batch) == {1}


@pytest.mark.parametrize("home", ["host", None])
def test_resident_state_trains_as_in_plain_pytorch(home, tmp_path):
    plain = ZOO["llama_tied"].build().train()
    model = opened(plain, home=home, disk=tmp_path if home is None else None)
    assert_trains_alike(model, plain, batches("llama_tied"))
    assert outsize.report(model).bytes_written == 0


@pytest.mark.parametrize(
    ("name", "rows", "length"),
    [
        ("mpt", 4, 12),  # alibi [heads, 1, S]: batch == heads
        ("bloom", 4, 12),  # alibi [B*heads, 1, S]
        ("bloom", 8, 8),
        ("llama", 8, 8),  # rows == length == head dimension
        ("llama", 32, 8),  # rows == hidden size
        ("mixtral", 4, 4),  # rows == length == experts
        ("t5", 4, 7),  # rows == heads == decoder length
        ("gemma3", 8, 8),  # 3 x 3 has two labels: PyTorch by rows misses the bound against itself by 2.6
    ],
)
def test_sizes_that_coincide_are_not_mistaken(name, rows, length, tmp_path):
    model, plain = pair(name, tmp_path, pins=Pins(tile_rows=1))
    assert_trains_alike(model, plain, batches(name, rows, length, count=2))


# -- the optimizer ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama_tied", "t5"])
@pytest.mark.parametrize("by_torch", [False, True])
def test_clipping(name, by_torch, tmp_path):
    model, plain = pair(name, tmp_path)
    ours, theirs = adamw(model, max_grad_norm=None if by_torch else 0.1), adamw(plain)
    norms, expected = [], []
    clip = torch.nn.utils.clip_grad_norm_

    def clip_ours(step):
        if by_torch:
            norms.append(float(clip(model.parameters(), 0.1)))

    losses = train(model, batches(name), ours, before_step=clip_ours)
    if not by_torch:
        assert isinstance(ours, outsize.AdamW)
        assert ours.grad_norm is not None
        norms = [ours.grad_norm]
    plain_losses = train(
        plain,
        batches(name),
        theirs,
        before_step=lambda step: expected.append(float(clip(plain.parameters(), 0.1))),
    )
    assert_same_losses(losses, plain_losses)
    assert_same_weights(model, plain)
    assert min(expected) > 0.2, "nothing was clipped"
    assert norms == pytest.approx(expected[-len(norms) :], rel=1e-5)


def test_a_clipped_gradient_that_is_kept_is_added_to(tmp_path):
    model, plain = pair("llama", tmp_path)
    data = batches("llama")
    for subject, optimizer in ((model, adamw(model)), (plain, adamw(plain))):
        train(
            subject,
            data,
            optimizer,
            before_step=lambda step, s=subject: torch.nn.utils.clip_grad_norm_(s.parameters(), 0.1),
            zero_grad=False,
        )
    assert_same_weights(model, plain)


@pytest.mark.parametrize("name", ["llama", "qwen3", "t5"])
def test_accumulation(name, tmp_path):
    model, plain = pair(name, tmp_path)
    data = [[ZOO[name].batch(seed=3 * step + part) for part in range(3)] for step in range(STEPS)]
    assert_trains_alike(model, plain, data)


def test_gradients_that_are_not_zeroed_add_up(tmp_path):
    model, plain = pair("llama_tied", tmp_path)
    assert_trains_alike(model, plain, batches("llama_tied"), zero_grad=False)


def test_groups_have_their_own_settings(tmp_path):
    model, plain = pair("gpt2", tmp_path)

    def groups(subject):
        parameters = list(subject.parameters())
        return [
            {
                "params": [p for p in parameters if p.dim() > 1],
                "weight_decay": 0.5,
                "lr": 3e-3,
                "betas": (0.8, 0.9),
            },
            {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0, "eps": 1e-3},
        ]

    optimizers = adamw(model, groups(model)), adamw(plain, groups(plain))
    assert_trains_alike(model, plain, batches("gpt2"), optimizers)


def test_parameters_that_the_optimizer_was_not_given_stay(tmp_path):
    model, plain = pair("llama", tmp_path)
    before = values_of(model)

    def some(subject):
        return [p for n, p in subject.named_parameters() if "layers.1" in n]

    assert_trains_alike(
        model, plain, batches("llama"), (adamw(model, some(model)), adamw(plain, some(plain)))
    )
    after = values_of(model)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        n for n in before if "layers.1" in n
    }


def test_schedulers_of_torch(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        schedule = torch.optim.lr_scheduler.SequentialLR(
            optimizer,
            [
                torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=2),
                torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3),
            ],
            milestones=[2],
        )
        for batch in batches("llama"):
            train(subject, [batch], optimizer)
            schedule.step()
    assert_same_weights(model, plain)


def test_zero_grad_before_step_drops_gradients(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        first, second, third = batches("llama", count=3)
        train(subject, [first], optimizer)
        subject(**second).loss.backward()
        optimizer.zero_grad()
        optimizer.step()
        subject(**second).loss.backward()
        subject.zero_grad()
        optimizer.step()
        train(subject, [third], optimizer)
    assert_same_weights(model, plain)


def test_a_single_gradient_set_to_none_is_skipped(tmp_path):
    model, plain = pair("llama_tied", tmp_path)

    def drop(subject):
        def run(step):
            if step != 1:
                subject.model.layers[1].mlp.up_proj.weight.grad = None
                subject.model.embed_tokens.weight.grad = None

        return run

    for subject in (model, plain):
        train(subject, batches("llama_tied"), before_step=drop(subject))
    assert_same_weights(model, plain)


def test_a_step_without_gradients_changes_nothing(tmp_path):
    model, _plain = pair("llama", tmp_path)
    optimizer = adamw(model)
    optimizer.step()
    before = values_of(model)
    model(**batches("llama")[0]).loss.backward()
    optimizer.zero_grad()
    optimizer.step()
    after = values_of(model)
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_closure_is_run_with_gradients(tmp_path):
    model, plain = pair("llama", tmp_path)
    returned = []
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches("llama", count=3):

            def closure(subject=subject, optimizer=optimizer, batch=batch):
                optimizer.zero_grad()
                loss = subject(**batch).loss
                loss.backward()
                return loss

            with torch.no_grad():
                returned.append(float(optimizer.step(closure).detach()))
    assert returned[:3] == pytest.approx(returned[3:], rel=1e-6)
    assert_same_weights(model, plain)


def test_an_update_that_no_visit_applied_is_applied_at_the_next_step(tmp_path):
    """`zero_grad` is omitted: two steps in a row use the same gradient twice, as in torch."""
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        subject(**batches("llama")[0]).loss.backward()
        for _ in range(3):
            optimizer.step()
    assert_same_weights(model, plain)


def test_zero_grad_after_step_does_not_touch_what_is_pending(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        subject(**batches("llama")[0]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert all(parameter.grad is None for parameter in subject.parameters())
    assert_same_weights(model, plain)


# -- what trains -----------------------------------------------------------------------------------------------------


FREEZES = {
    "embeddings": lambda name: "embed" not in name,
    "lower half": lambda name: "layers.2" in name or "norm." in name or "lm_head" in name,
    "upper half": lambda name: "layers.0" in name,
    "all but vectors": lambda name: "norm" in name,
    "all but the head": lambda name: "lm_head" in name,
    "every other parameter": lambda name: "q_proj" in name or "down_proj" in name,
}


@pytest.mark.parametrize("what", FREEZES)
@pytest.mark.parametrize("after_wrapping", [False, True])
def test_frozen_parameters(what, after_wrapping, tmp_path):
    def freeze(subject):
        for name, parameter in subject.named_parameters():
            parameter.requires_grad_(FREEZES[what](name))

    plain = ZOO["llama"].build().train()
    if not after_wrapping:
        freeze(plain)
    model = opened(plain, disk=tmp_path, home="disk", pins=Pins(weight_slots=1, gradient_slots=1))
    if after_wrapping:
        freeze(plain)
        freeze(model)
    before = values_of(plain)
    assert_trains_alike(model, plain, batches("llama"))
    after = values_of(model)
    assert all(torch.equal(before[n], after[n]) is not FREEZES[what](n) for n in before)


def test_only_biases_train(tmp_path):
    def freeze(plain):
        for name, parameter in plain.named_parameters():
            parameter.requires_grad_(name.endswith("bias"))

    assert_trains_alike(*pair("gpt2", tmp_path, prepare=freeze), batches("gpt2"))


def test_frozen_embedding_tied_to_a_head_that_is_not_asked(tmp_path):
    def freeze(plain):
        plain.model.embed_tokens.requires_grad_(False)

    model, plain = pair("llama_tied", tmp_path, prepare=freeze)
    assert_trains_alike(model, plain, batches("llama_tied"))


def test_frozen_in_the_middle_of_a_run(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        train(subject, batches("llama", count=2), optimizer)
        subject.model.layers[0].requires_grad_(False)
        subject.model.embed_tokens.requires_grad_(False)
        train(subject, batches("llama", count=3), optimizer)
    assert_same_weights(model, plain)


# -- the call --------------------------------------------------------------------------------------------------------


def test_caches_are_off_while_gradients_are_on(tmp_path):
    for name in ("llama", "gpt2", "opt", "gemma3"):
        folder = tmp_path / name
        folder.mkdir()
        model, plain = pair(name, folder)
        assert plain.config.use_cache
        data = [{**batch, "use_cache": True} for batch in batches(name, count=2)]
        assert_trains_alike(model, plain, data)


def test_autocast_is_that_of_the_forward_when_a_block_is_computed_again(tmp_path):
    plain = plain_stack()
    model = opened(plain, disk=tmp_path, home="disk")
    types = []
    model.layers[1][0].register_forward_hook(lambda module, args, output: types.append(output.dtype))
    for subject in (model, plain):
        optimizer = adamw(subject)
        for seed in range(STEPS):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = subject(**plain_batch(seed=seed))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert set(types[-2:]) == {torch.bfloat16}
    assert_same_weights(model, plain)


def test_autocast_of_a_language_model(tmp_path):
    model, plain = pair("llama", tmp_path)
    gradients, losses = [], []
    for subject in (model, plain):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = subject(**batches("llama")[0]).loss
        loss.backward()
        losses.append(float(loss.detach()))
        gradients.append({n: p.grad.clone() for n, p in subject.named_parameters()})
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    for name, expected in gradients[1].items():
        error = float((gradients[0][name] - expected).norm() / expected.norm())
        assert error < 0.02, (name, error)


DROPOUT = {
    "gpt2": {"resid_pdrop": 0.2, "embd_pdrop": 0.2, "attn_pdrop": 0.2},
    "llama": {"attention_dropout": 0.3, "attn_implementation": "eager"},
    "t5": {"dropout_rate": 0.2},
    "opt": {"dropout": 0.2, "attention_dropout": 0.1},
}


@pytest.mark.parametrize("name", DROPOUT)
def test_dropout_has_the_masks_of_plain_pytorch(name, tmp_path):
    model, plain = pair(name, tmp_path, **DROPOUT[name])
    states, losses = [], []
    for subject in (model, plain):
        optimizer = adamw(subject)
        torch.manual_seed(7)
        losses.append(train(subject, batches(name), optimizer))
        states.append(torch.get_rng_state())
    assert_same_losses(*losses)
    assert_same_weights(model, plain)
    assert torch.equal(*states)


class Dropping(nn.Module):
    """Layers with dropout that can run a batch row by row, as tiles do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 8), nn.Dropout(0.4), nn.Tanh()) for _ in range(3)
        )
        self.rows_at_once = None

    def forward(self, x, y):
        for layer in self.layers:
            parts = x.split(self.rows_at_once) if self.rows_at_once else [x]
            x = torch.cat([layer(part) for part in parts])
        return F.mse_loss(x[:, :1], y)


def dropping(tmp_path, tile_rows):
    with seeded(0):
        plain = Dropping().train()
    return opened(plain, disk=tmp_path, home="disk", pins=Pins(tile_rows=tile_rows)), plain


@pytest.mark.parametrize("tile_rows", [1, 3])
def test_dropout_in_tiles_has_the_same_masks_when_computed_again(tile_rows, tmp_path):
    model, plain = dropping(tmp_path, tile_rows)
    plain.rows_at_once = tile_rows
    for subject in (model, plain):
        torch.manual_seed(3)
        train(subject, [plain_batch(5, seed) for seed in range(STEPS)])
    assert_same_weights(model, plain)


@pytest.mark.parametrize(
    "rows_between",
    [
        2,
        4,
        5,
    ],
)
def test_tiles_of_a_forward_are_those_of_its_backward_whatever_is_called_between(rows_between, tmp_path):
    model, plain = dropping(tmp_path, 1)
    plain.rows_at_once = 1
    for subject in (model, plain):
        optimizer = adamw(subject)
        torch.manual_seed(3)
        train(subject, [plain_batch(4, 9)], optimizer)
        loss = subject(**plain_batch(4, 0))
        with torch.no_grad():
            subject(**plain_batch(rows_between, 1))
        loss.backward()
        optimizer.step()
    assert_same_weights(model, plain)


def test_router_losses_reach_the_router(tmp_path):
    model, plain = pair("mixtral", tmp_path, pins=Pins(tile_rows=1), router_aux_loss_coef=0.5)
    outputs = [subject(**batches("mixtral", rows=4)[0]) for subject in (model, plain)]
    assert torch.allclose(outputs[0].aux_loss, outputs[1].aux_loss, rtol=1e-6)
    for output in outputs:
        output.aux_loss.backward()
    gradients = [subject.model.layers[0].mlp.gate.weight.grad for subject in (model, plain)]
    assert float(gradients[1].norm()) > 1e-4
    assert torch.allclose(gradients[0].clone(), gradients[1], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@pytest.mark.parametrize(
    "variant", ["num_items", "num_items_tensor", "shift_labels", "ignored_row", "no_mask"]
)
def test_variants_of_the_loss(name, variant, tmp_path):
    model, plain = pair(name, tmp_path)
    data = []
    for batch in batches(name):
        match variant:
            case "num_items":
                batch["num_items_in_batch"] = 57
            case "num_items_tensor":
                batch["num_items_in_batch"] = torch.tensor(57)
            case "shift_labels":
                batch["shift_labels"] = torch.roll(batch["labels"], -3, 1)
            case "ignored_row":
                batch["labels"][1] = -100
            case "no_mask":
                del batch["attention_mask"]
        data.append(batch)
    assert_trains_alike(model, plain, data)


def test_ignore_index(tmp_path):
    model, plain = pair("llama", tmp_path)
    data = [{**b, "labels": b["labels"].clamp(min=7), "ignore_index": 7} for b in batches("llama")]
    assert_trains_alike(model, plain, data)


def test_a_batch_with_nothing_to_learn_has_the_loss_of_torch(tmp_path):
    model, plain = pair("llama", tmp_path)
    batch = batches("llama")[0]
    batch["labels"][:] = -100
    for count in (None, 5):
        losses = [s(**batch, num_items_in_batch=count).loss.detach() for s in (model, plain)]
        assert torch.equal(losses[0].isnan(), losses[1].isnan())
        assert torch.allclose(*losses, equal_nan=True)


def test_a_loss_of_ones_own_from_logits(tmp_path):
    model, plain = pair("qwen3", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches("qwen3"):
            ids = batch["input_ids"]
            logits = subject(input_ids=ids).logits
            F.cross_entropy(
                logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), label_smoothing=0.1
            ).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_logits_beside_a_tiled_loss(tmp_path):
    model, plain = pair("llama", tmp_path)
    batch = batches("llama")[0]
    ours, theirs = model(**batch), plain(**batch)
    assert ours.logits.shape == theirs.logits.shape and ours.logits.dtype is theirs.logits.dtype
    with pytest.raises(UsageError, match="logits were not computed"):
        ours.logits.sum()
    with torch.no_grad():
        assert torch.allclose(ours.logits + 0, theirs.logits, atol=1e-6)
        assert torch.equal(ours.logits.argmax(-1), theirs.logits.argmax(-1))


@pytest.mark.parametrize("name", ["llama", "gemma2", "vit"])
def test_hidden_states_are_handed_out(name, tmp_path):
    model, plain = pair(name, tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches(name):
            output = subject(**batch, output_hidden_states=True)
            (output.loss + output.hidden_states[1].square().mean()).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_gradients_of_inputs(tmp_path):
    model, plain = pair("llama", tmp_path, pins=Pins(tile_rows=1))
    gradients = []
    for subject in (model, plain):
        with seeded(0):
            embeds = torch.randn(3, 12, 32, requires_grad=True)
        subject(inputs_embeds=embeds, labels=batches("llama")[0]["labels"]).loss.backward()
        gradients.append(embeds.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)


def test_a_wholly_frozen_model_hands_gradients_through(tmp_path):
    model, plain = pair("llama", tmp_path, prepare=lambda plain: plain.requires_grad_(False))
    gradients = []
    for subject in (model, plain):
        with seeded(0):
            prompt = torch.randn(3, 12, 32, requires_grad=True)
        subject(inputs_embeds=prompt, labels=batches("llama")[0]["labels"]).loss.backward()
        gradients.append(prompt.grad)
    assert torch.allclose(*gradients, rtol=1e-5, atol=1e-8)


def test_two_forwards_before_one_backward(tmp_path):
    model, plain = pair("llama_tied", tmp_path, pins=Pins(tile_rows=1))
    for subject in (model, plain):
        optimizer = adamw(subject)
        for seed in range(STEPS):
            data = [ZOO["llama"].batch(rows=rows, seed=seed) for rows in (4, 3)]
            (subject(**data[0]).loss + 2 * subject(**data[1]).loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_a_graph_that_is_kept_can_be_gone_back_twice(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches("llama"):
            loss = subject(**batch).loss
            loss.backward(retain_graph=True)
            (3 * loss).backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_a_graph_that_is_dropped_does_not_disturb(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches("llama"):
            subject(**batch)
            train(subject, [batch], optimizer)
    assert_same_weights(model, plain)


def test_checkpointing_of_transformers_may_be_on(tmp_path):
    model, plain = pair("llama", tmp_path)
    model.gradient_checkpointing_enable()
    assert_trains_alike(model, plain, batches("llama"))


def test_batches_may_change_their_shape(tmp_path):
    model, plain = pair("llama", tmp_path, pins=Pins(tile_rows=2))
    data = [
        ZOO["llama"].batch(rows, length, 0) for rows, length in ((4, 12), (1, 12), (3, 5), (2, 11), (4, 2))
    ]
    assert_trains_alike(model, plain, data)


# -- between steps ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_evaluating_and_generating_between_steps(name, tmp_path):
    model, plain = pair(name, tmp_path)
    optimizers = adamw(model), adamw(plain)
    for seed in range(3):
        results = []
        for subject, optimizer in zip((model, plain), optimizers, strict=True):
            batch = ZOO[name].batch(seed=seed)
            train(subject, [batch], optimizer)
            subject.eval()
            with torch.no_grad():
                loss = subject(**batch).loss
                logits = subject(input_ids=batch["input_ids"]).logits
            tokens = subject.generate(
                batch["input_ids"][:, :5], max_new_tokens=6, do_sample=False, pad_token_id=0
            )
            subject.train()
            results.append((loss, logits, tokens))
        (loss, logits, tokens), (plain_loss, plain_logits, plain_tokens) = results
        assert float(loss) == pytest.approx(float(plain_loss), rel=1e-6)
        assert torch.allclose(logits, plain_logits, atol=1e-5)
        assert torch.equal(tokens, plain_tokens)
    assert_same_weights(model, plain)


@pytest.mark.parametrize("name", ["llama", "gpt2", "mamba", "t5"])
@pytest.mark.parametrize("is_called_before", [True, False])
def test_generating(name, is_called_before, tmp_path):
    model, plain = pair(name, tmp_path)
    if is_called_before:
        model(**ZOO[name].batch())
    ids = ZOO[name].batch()["input_ids"]
    tokens = [
        s.eval().generate(ids, max_new_tokens=5, do_sample=False, pad_token_id=0) for s in (model, plain)
    ]
    assert torch.equal(*tokens)


def test_an_encoder_decoder_generates_first_and_trains_then(tmp_path):
    model, plain = pair("t5", tmp_path)
    optimizers = adamw(model), adamw(plain)
    ids = ZOO["t5"].batch()["input_ids"]
    tokens = [s.eval().generate(ids, max_new_tokens=5, do_sample=False) for s in (model, plain)]
    assert torch.equal(*tokens)
    for subject in (model, plain):
        subject.train()
    assert_trains_alike(model, plain, batches("t5"), optimizers)


def test_evaluating_between_forward_and_backward(tmp_path):
    model, plain = pair("llama", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches("llama"):
            loss = subject(**batch).loss
            with torch.no_grad(), contextlib.nullcontext(subject.eval()):
                subject(**batch)
            subject.train()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_reading_weights_and_gradients_between_backwards(tmp_path):
    model, plain = pair("llama_tied", tmp_path)
    for subject in (model, plain):
        optimizer = adamw(subject)
        for batch in batches("llama_tied"):
            for _ in range(2):
                subject(**batch).loss.backward()
                float(subject.model.embed_tokens.weight.grad.norm())
                subject.model.layers[1].mlp.up_proj.weight.detach().clone()
            optimizer.step()
            subject.model.norm.weight.detach().clone()
            optimizer.zero_grad()
    assert_same_weights(model, plain)


def test_a_new_optimizer_takes_over_nothing_silently(tmp_path):
    model, _ = pair("llama", tmp_path)
    train(model, batches("llama", count=1))
    with pytest.raises(UsageError, match="has an optimizer"):
        adamw(model)


def test_unfreezing_in_the_middle_trains_or_is_refused(tmp_path):
    model, plain = pair("llama", tmp_path, prepare=lambda p: p.model.layers[0].requires_grad_(False))
    optimizers = adamw(model, list(model.parameters())), adamw(plain, list(plain.parameters()))
    assert_trains_alike(model, plain, batches("llama", count=1), optimizers)
    for subject in (model, plain):
        subject.model.layers[0].requires_grad_(True)
    try:
        assert_trains_alike(model, plain, batches("llama", count=2), optimizers)
    except UsageError as refusal:
        assert "layers.0" in str(refusal) or "L00" in str(refusal)


def test_the_original_module_is_not_needed(tmp_path):
    plain = ZOO["llama"].build()
    model = opened(plain, disk=tmp_path, home="disk")
    twin = copy.deepcopy(plain)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.fill_(7.0)
    train(model, batches("llama", count=2))
    train(twin, batches("llama", count=2))
    assert_same_weights(model, twin)
    assert source_of(model) is None
