"""Facts about how a run is drawn from where nobody says otherwise."""

import json

import pytest

from gpt_jax import generation, sampling


def of(folder, **found):
    (folder / "generation_config.json").write_text(json.dumps(found))
    return generation.of(folder)


def test_a_run_without_the_file_has_the_habit_of_the_project(tmp_path):
    assert generation.of(tmp_path) == generation.OWN
    assert generation.OWN.settings == {**sampling.OFF, "temperature": 0.8}
    assert not generation.OWN.published


@pytest.mark.parametrize(
    "found, wanted",
    [
        # As Qwen 2.5 has it, and what of it is no sampling.
        (
            {
                **{"bos_token_id": 3, "pad_token_id": 3, "eos_token_id": [5, 3]},
                **{"do_sample": True, "repetition_penalty": 1.05, "temperature": 0.7},
                **{"top_p": 0.8, "top_k": 20, "transformers_version": "4.45.0"},
            },
            {"repetition_penalty": 1.05, "temperature": 0.7, "top_p": 0.8, "top_k": 20},
        ),
        ({"do_sample": False, "max_new_tokens": 2048}, {"temperature": 0}),
        ({"do_sample": False, "top_p": 0.9}, {"temperature": 0, "top_p": 0.9}),
        ({"do_sample": True}, {}),
        ({"do_sample": True, "temperature": None, "min_p": 0.05}, {"min_p": 0.05}),
        ({"temperature": 1}, {}),
        ({"do_sample": None, "top_k": 7}, {"top_k": 7}),
    ],
)
def test_what_the_file_says_is_taken_and_the_rest_is_off(tmp_path, found, wanted):
    drawn = of(tmp_path, **found)
    assert drawn.settings == {**sampling.OFF, **wanted}
    assert drawn.published and not drawn.told
    sampling.check(0, **drawn.settings)


def test_a_file_that_says_nothing_of_sampling_changes_nothing(tmp_path):
    said = {"_from_model_config": True, "eos_token_id": 2, "max_length": 4096}
    off = {"num_beams": 1, "typical_p": 1.0, "no_repeat_ngram_size": 0, "top_p": None}
    off |= {"bad_words_ids": None, "suppress_tokens": [], "use_cache": False}
    assert of(tmp_path, **said, **off) == generation.OWN


def test_what_would_change_texts_and_is_not_done_is_told_by_name(tmp_path):
    strange = {"no_repeat_ngram_size": 4, "bad_words_ids": [[4]], "num_beams": 2}
    drawn = of(tmp_path, do_sample=True, temperature=0.5, **strange)
    assert drawn.settings["temperature"] == 0.5
    named = "no_repeat_ngram_size 4, bad_words_ids [[4]], num_beams 2, which nothing"
    assert named in drawn.told
    assert "typical_p 0.9" in of(tmp_path, typical_p=0.9).told


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("temperature", -1, "-1 but must be 0 or more"),
        ("temperature", "hot", "'hot' but must be 0 or more"),
        ("temperature", True, "True but must be 0 or more"),
        ("top_p", 0, "0 but must be above 0 and at most 1"),
        ("top_k", 5.5, "5.5 but must be 0 or more"),
        ("do_sample", "yes", "'yes' but must be true or false"),
    ],
)
def test_a_setting_that_cannot_be_is_refused_with_the_file(
    tmp_path, name, value, words
):
    with pytest.raises(ValueError) as refused:
        of(tmp_path, **{name: value})
    assert f"generation_config.json: {name} is {words}" in str(refused.value)
