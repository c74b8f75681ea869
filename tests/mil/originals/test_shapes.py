"""Tensors that fit no original, several, or the one that they are said to be of."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bagscope.errors import ConfigError
from bagscope.mil.aggregators.registry import aggregator_entry
from bagscope.mil.originals import ORIGINALS
from bagscope.mil.originals.shapes import SIZES, fit, recognise, without_prefix
from tests.mil.originals.published import PUBLISHED, random_weights


def weights_of(name: str) -> dict[str, Tensor]:
    return random_weights(PUBLISHED[name][1].shapes)


def test_every_original_s_aggregator_is_read_off_its_shapes() -> None:
    assert {original.aggregator for original in ORIGINALS.values()} <= set(SIZES)


@pytest.mark.parametrize("source", ORIGINALS)
def test_what_an_original_chose_are_options_of_its_aggregator(source: str) -> None:
    original = ORIGINALS[source]
    assert set(original.options) <= set(SIZES[original.aggregator].untold)


@pytest.mark.parametrize("aggregator", SIZES)
def test_rows_speak_of_options_that_there_are(aggregator: str) -> None:
    known = set(aggregator_entry(aggregator).options.model_fields)
    assert {*SIZES[aggregator].options, *SIZES[aggregator].untold} <= known


def test_weights_that_two_originals_share_are_left_to_the_user() -> None:
    weights = {
        "head.0.weight": torch.zeros(8, 16),
        "head.0.bias": torch.zeros(8),
        "head.3.weight": torch.zeros(2, 8),
        "head.3.bias": torch.zeros(2),
    }
    with pytest.raises(ConfigError, match="fit mambamil-max and mambamil-mean alike"):
        recognise(weights)
    fitted = fit("mambamil-mean", weights)
    assert (fitted.aggregator, fitted.features, fitted.outputs) == ("mean", 16, 2)
    assert fitted.options["hidden"] == 8


def test_strange_tensors_are_of_no_original() -> None:
    with pytest.raises(ConfigError, match=r"conv1\.weight, .* are of no original .*clam-sb"):
        recognise({"conv1.weight": torch.zeros(2, 3), "fc.weight": torch.zeros(2, 2)})


def test_the_nearest_original_is_named_with_what_is_wrong() -> None:
    weights = weights_of("clam-sb-small")
    del weights["attention_net.3.attention_b.0.bias"]
    wanted = r"nearest: clam-sb: .*attention_net\.3\.attention_b\.0\.bias \(256,\) is missing"
    with pytest.raises(ConfigError, match=wanted):
        recognise(weights)


def test_an_unfitting_tensor_is_named_with_both_shapes() -> None:
    weights = weights_of("clam-mb-small")
    weights["attention_net.3.attention_b.0.weight"] = torch.zeros(128, 512)
    wanted = r"attention_b\.0\.weight is \(128, 512\), expected \(256, 512\)"
    with pytest.raises(ConfigError, match=wanted):
        fit("clam-mb", weights)


def test_a_layer_that_is_turned_around_is_refused() -> None:
    weights = weights_of("hippo-gated")
    name = "attention_weights.attention_U.0.weight"
    weights[name] = weights[name].T.contiguous()
    with pytest.raises(ConfigError, match=r"is \(512, 384\), expected \(384, 512\)"):
        fit("hippo-gated", weights)


def test_only_the_first_few_faults_are_listed() -> None:
    weights = weights_of("mambamil-sr")
    with pytest.raises(ConfigError, match=r"expected .*, and \d+ more$"):
        fit("mambamil", weights, {"hidden": 256})


def test_an_option_that_the_aggregator_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"unknown option 'hiden'.*did you mean 'hidden'"):
        fit("clam-sb", weights_of("clam-sb-small"), {"hiden": 4})


def test_extra_tensors_are_refused_but_for_those_that_hold_nothing_learned() -> None:
    weights = weights_of("clam-sb-small")
    extra = {**weights, "instance_loss_fn.labels": torch.arange(2)}
    assert fit("clam-sb", extra).features == 1024
    with pytest.raises(ConfigError, match=r"ema\.decay has no place in aggregator clam_sb"):
        fit("clam-sb", {**weights, "ema.decay": torch.tensor(0.9)})


def test_members_of_a_list_have_one_shape() -> None:
    weights = weights_of("clam-mb-small")
    weights["classifiers.1.weight"] = torch.zeros(1, 256)
    with pytest.raises(ConfigError, match=r"classifier\.weight are \(1, 512\), \(1, 256\)"):
        fit("clam-mb", weights)


def test_a_prefix_is_taken_off_where_it_is_not_the_original_s_own() -> None:
    original = ORIGINALS["mambamil-mean"]
    tensors = {
        "model.module.head.0.weight": torch.zeros(1),
        "model.module.head.3.weight": torch.zeros(1),
    }
    assert list(without_prefix(original, tensors)) == ["head.0.weight", "head.3.weight"]
    other = {**tensors, "epoch": torch.zeros(1)}
    assert without_prefix(original, other) == other


def test_tensors_go_by_the_names_that_their_authors_gave_them() -> None:
    said = ORIGINALS["mambamil"].their_name
    assert said("mixers.1.cores.1.conv1d.weight") == "layers.1.1.conv1d_b.weight"
    assert said("mixers.0.cores.1.A_log") == "layers.0.1.A_b_log"
    assert ORIGINALS["clam-mb"].their_name("classifier.bias") == "classifiers.0.bias"
    multihead = ORIGINALS["acmil-mha"].their_name
    assert multihead("branches.each.norm_weight") == "sub_attention.0.layer_norm.weight"
    assert multihead("branches.scores.query") == "q"
    assert multihead("of.nobody") == "of.nobody"
