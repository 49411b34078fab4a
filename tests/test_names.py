"""A name that is not known is refused with those that are, the nearest one told."""

import pytest

from gpt_jax import names

RULES = {"adamw": 1, "muon": 2, "lion": 3}


def test_a_table_gives_what_it_holds_and_a_list_the_name_itself():
    assert names.choose("optimizer.name", "muon", RULES) == 2
    assert names.choose("data.split", "documents", ("fraction", "documents")) == (
        "documents"
    )


def test_an_unknown_name_is_refused_with_all_known_and_the_nearest():
    told = "optimizer.name 'adam' is not one of: adamw, muon, lion; did you mean adamw?"
    with pytest.raises(ValueError) as error:
        names.choose("optimizer.name", "adam", RULES)
    assert str(error.value) == told


def test_where_no_name_is_near_none_is_told():
    assert names.did_you_mean("zzzz", RULES) == ""
    assert names.did_you_mean(None, RULES) == ""


def test_the_nearest_names_come_best_first_whatever_their_case():
    known = ["hyper.lr", "hyper.matrix_lr", "seed"]
    assert names.nearest("HYPER.LR", known, count=2) == ["hyper.lr", "hyper.matrix_lr"]


@pytest.mark.parametrize(
    "word, key",
    [
        ("lr", "hyper.lr"),
        ("hyper.learning_rate", "hyper.lr"),
        ("learning_rate", "hyper.lr"),
        ("model.n_layer", "model.n_layers"),
        ("modle.d_model", "model.d_model"),
        ("block_size", "model.context_length"),
        ("batchsize", "batch_size"),
        ("dropout", "hyper.dropout_residual"),
        ("max_iters", "steps"),
    ],
)
def test_the_nearest_key_is_found_by_its_last_part_and_by_its_names_elsewhere(
    word, key
):
    known = ["steps", "batch_size", "hyper.lr", "hyper.matrix_lr", "model.n_layers"]
    known += ["model.d_model", "model.context_length", "hyper.dropout_residual"]
    assert names.nearest(word, known) == [key]
