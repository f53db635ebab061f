"""The loss of a step at supervised positions, compared with all logits and with naive reductions."""

import pytest
import torch
import torch.nn.functional as F
from toy_corpus import component_gradients, make_corpus, make_model, make_processor, make_samples

from sailvit import SAILVLProcessor
from sailvit.train.collate import Pack, collate, read_pack
from sailvit.train.loss import answer_weights, pack_loss


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> SAILVLProcessor:
    return make_processor(tmp_path_factory.mktemp("tokenizers") / "toy")


@pytest.fixture(scope="module")
def pack(processor, tmp_path_factory: pytest.TempPathFactory) -> Pack:
    return read_pack(make_corpus(make_samples(5), processor, tmp_path_factory.mktemp("cache")), range(5))


def all_losses(model: torch.nn.Module, pack: Pack) -> list[torch.Tensor]:
    """Return the cross entropies of the answer tokens of every sample, from all logits."""
    logits = model(**{name: value for name, value in pack.inputs.items() if name != "labels"}).logits
    losses = F.cross_entropy(logits[0, :-1], pack.inputs["labels"][0, 1:], reduction="none")
    is_answer = pack.inputs["labels"][0, 1:] != -100
    starts = [sum(pack.lengths[:index]) for index in range(len(pack.lengths))]
    spans = [slice(max(start - 1, 0), start + length - 1) for start, length in zip(starts, pack.lengths, strict=True)]
    return [losses[span][is_answer[span]] for span in spans]


NAIVE = {
    "token": lambda losses: torch.cat(losses).mean(),
    "sample": lambda losses: torch.stack([sample.mean() for sample in losses]).mean(),
    "square": lambda losses: (
        sum(sample.sum() / len(sample) ** 0.5 for sample in losses) / sum(len(sample) ** 0.5 for sample in losses)
    ),
}


@pytest.mark.parametrize("reduction", NAIVE)
def test_reductions_equal_naive_ones_from_all_logits(processor, pack, reduction):
    model = make_model(processor)
    expected = NAIVE[reduction](all_losses(model, pack))
    expected.backward()
    gradients = component_gradients(model)
    model.zero_grad()
    weights = answer_weights(pack, reduction)
    assert len(weights) == pack.num_labels and len(set(weights.tolist())) == (1 if reduction == "token" else 5)
    loss = pack_loss(model, pack.inputs, weights, True)[0] / weights.sum()
    loss.backward()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    for name, gradient in component_gradients(model).items():
        torch.testing.assert_close(gradient, gradients[name], rtol=1e-4, atol=1e-6)


def test_the_loss_of_tokens_is_that_of_the_model(processor, pack):
    model = make_model(processor)
    expected = model(**pack.inputs).loss
    loss = pack_loss(model, pack.inputs, answer_weights(pack, "token"), True)[0] / pack.num_labels
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_logits_are_computed_at_the_positions_of_answers_only(processor, pack):
    model, shapes = make_model(processor), []
    model.language_model.lm_head.register_forward_hook(lambda module, inputs, output: shapes.append(output.shape))
    pack_loss(model, pack.inputs, answer_weights(pack, "token"), True)
    assert shapes == [(1, pack.num_labels, model.config.text_config.vocab_size)]
    assert pack.num_labels < pack.inputs["input_ids"].shape[1] / 3


def test_a_language_model_without_logits_to_keep_computes_all_logits(processor, pack):
    model = make_model(processor)
    expected = model(**pack.inputs).loss
    forward = model.language_model.forward
    model.language_model.forward = lambda inputs_embeds, attention_mask, position_ids, labels, use_cache: forward(
        inputs_embeds=inputs_embeds, position_ids=position_ids, use_cache=use_cache
    )
    assert not model._supports_logits_to_keep()
    loss = pack_loss(model, pack.inputs, answer_weights(pack, "token"), False)[0] / pack.num_labels
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_an_empty_pack_has_a_loss_of_0_and_all_gradients(processor):
    model = make_model(processor)
    model.always_run_vision = True
    empty = collate([])
    weights = answer_weights(empty, "sample")
    loss, _ = pack_loss(model, empty.inputs, weights, True)
    loss.backward()
    assert loss.item() == 0 and weights.shape == (0,)
    assert all(torch.equal(p.grad, torch.zeros_like(p)) for p in model.parameters())


def test_an_unknown_reduction_is_an_error(pack):
    with pytest.raises(ValueError, match="loss_reduction: expected one of token, sample, square, got 'mean'"):
        answer_weights(pack, "mean")
