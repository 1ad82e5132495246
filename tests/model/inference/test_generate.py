"""What LWM generates, and what its released sampler gets wrong.

The sequences of tests/data/lwm/generation.npz were drawn greedily by the released code. Of its bugs, two meet here and
are not repeated: it compares vision codes with the text EOS and stops a frame there, and it can draw a marker in the
midst of a frame.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from model.inference.generate import generate_frames, generate_text, stream_frames
from model.inference.kv_decoder import Decoder
from model.inference.sampling import Sampling, choose, guided
from model.llama.config import llama_config
from model.llama.llama import build_llama, inference
from tests.model.lwm_reference import TEXT, arrays, joint, load
from tokenization.vocabulary import JointVocabulary

ALL_CODES = 320  # V1's vision slice; the released sampler draws from all of it
V1 = JointVocabulary.for_codebook(TEXT, codebook_size=318, vision_size=ALL_CODES)


@pytest.fixture(scope="module")
def stored():
    return arrays("generation")


@pytest.fixture(scope="module")
def vision_model():
    return load("vision_V1")


def prompts(stored, case):
    """The prompts without their left padding, in joint ids."""
    ids, mask = stored[f"{case}/input_ids"], stored[f"{case}/attention_mask"] == 1
    is_vision = stored.get(f"{case}/vision_masks", np.zeros_like(mask))
    return [row[real] for row, real in zip(joint(ids, is_vision), mask)]


def greedy_codes(model, conditional_and_not, guidance, n):
    """The released sampler's loop without its bug: n codes over the whole vision slice, no marker between frames."""
    codes = []
    with inference(model):
        decoder = Decoder(model, conditional_and_not)
        for _ in range(n):
            code = choose(guided(decoder.logits(TEXT, TEXT + ALL_CODES), guidance), None, 0.0, None)
            codes.append(code)
            decoder.append((code + TEXT).repeat(2))
    return torch.stack(codes, dim=1).numpy()


def test_greedy_text_equals_the_released_code(stored):
    model, vocabulary = load("text_A"), JointVocabulary.of_text(TEXT)
    given = prompts(stored, "text_A")
    with inference(model):
        first = Decoder(model, given).logits(0, TEXT).numpy()
    np.testing.assert_allclose(first, stored["text_A/first_logits"], rtol=0, atol=1.5e-5)
    drawn = generate_text(model, vocabulary, given, 32, eos_id=-1)
    np.testing.assert_array_equal(np.stack(drawn), stored["text_A/sequences"][:, 24:])


def test_text_ends_at_eos_and_the_other_rows_go_on(stored):
    eos = int(stored["text_A/eos_token_id"])
    drawn = generate_text(load("text_A"), JointVocabulary.of_text(TEXT), prompts(stored, "text_A"), 32, eos_id=eos)
    assert [len(row) for row in drawn] == [7, 32, 32]
    for row, expected in zip(drawn, stored["text_A/sequences_with_eos"][:, 24:]):
        np.testing.assert_array_equal(row, expected[: len(row)])
        assert len(row) == 32 or expected[len(row)] == eos


def test_chat_about_frames_equals_the_released_code(stored, vision_model):
    drawn = generate_text(vision_model, V1, prompts(stored, "chat_V1"), 24)
    np.testing.assert_array_equal(np.stack(drawn), stored["chat_V1/sequences"][:, 48:])


@pytest.mark.parametrize("scale", [0, 1, 5])
def test_guided_codes_equal_the_released_code(stored, vision_model, scale):
    case = f"vision_V1_cfg{scale}"
    given = prompts(stored, case)
    with inference(vision_model):
        first = guided(Decoder(vision_model, given).logits(TEXT, TEXT + ALL_CODES), scale).numpy()
    # Guidance multiplies the difference of two logits, and with it their error.
    np.testing.assert_allclose(first, stored[f"{case}/first_cfg_logits"], rtol=0, atol=1.5e-5 * max(scale, 1))
    codes = greedy_codes(vision_model, given, scale, 60)
    np.testing.assert_array_equal(codes, stored[f"{case}/new_tokens"][:2])


def test_a_code_that_equals_the_text_eos_does_not_end_a_frame(stored, vision_model):
    """The released sampler wrote zeros once a code equalled the EOS id; ours draws what it drew without that trap."""
    trapped = stored["vision_V1_cfg5_eos_trap_single/new_tokens"][0]
    untrapped = stored["vision_V1_cfg5/new_tokens"][0]
    end = int(np.flatnonzero(trapped)[-1])
    assert end < 59
    vocabulary = JointVocabulary.for_codebook(TEXT, 318, ALL_CODES, eos_id=int(untrapped[end]))
    given, unconditional = prompts(stored, "vision_V1_cfg5_eos_trap_single")
    codes = generate_frames(vision_model, vocabulary, given, 1, 54, 5.0, None, 0.0, None, unconditional)
    np.testing.assert_array_equal(codes[0], untrapped[:54])
    assert trapped[end + 1 :].max() == 0


def test_no_marker_can_be_drawn_inside_a_frame(stored, vision_model):
    """The released greedy sequence holds 319, <eov>, as its 55th code; only codes can be drawn here."""
    given, unconditional = prompts(stored, "vision_V1_cfg5_eos_trap_single")
    assert stored["vision_V1_cfg5/new_tokens"][0, 54] == V1.eov_id - TEXT
    codes = generate_frames(vision_model, V1, given, 1, 60, 5.0, None, 0.0, None, unconditional)
    assert codes.dtype == np.int32
    assert codes.max() < V1["vision"].n_codes


def test_frames_are_what_the_whole_sequence_predicts_with_eof_between_them(vision_model):
    """Greedy frames, checked by one uncached forward over the finished stream `codes <eof> codes <eof> codes`."""
    prompt = np.array([1, 17, 40, 4])
    codes = generate_frames(vision_model, V1, prompt, 3, 5, temperature=0.0)
    assert codes.shape == (3, 5)
    stream = np.concatenate([np.append(V1["vision"].codes_to_ids(frame), V1.eof_id) for frame in codes])[:-1]
    sequence = torch.from_numpy(np.concatenate((prompt, stream))).long()
    with inference(vision_model):
        logits = vision_model(sequence[None]).logits[0, :, TEXT : TEXT + V1["vision"].n_codes]
    predicted = logits[len(prompt) - 1 :].argmax(dim=-1).numpy()
    at_codes = np.arange(len(predicted)) % 6 != 5
    np.testing.assert_array_equal(predicted[at_codes], codes.reshape(-1))


def test_a_continuation_goes_on_as_if_the_given_frames_had_been_generated(vision_model):
    prompt = np.array([1, 17, 40, 4])
    whole = generate_frames(vision_model, V1, prompt, 3, 5, temperature=0.0)
    given = np.concatenate((prompt, V1["vision"].codes_to_ids(whole[0]), [V1.eof_id]))
    np.testing.assert_array_equal(generate_frames(vision_model, V1, given, 2, 5, temperature=0.0), whole[1:])
    with pytest.raises(ValueError, match="<eov>"):
        generate_frames(vision_model, V1, np.append(given[:-1], V1.eov_id), 1, 5)


def test_first_frame_guided_and_rest_not_drops_the_unconditional_half(vision_model):
    """As LWM does video: the rest is what an unguided continuation of the guided first frame gives."""
    prompt, unconditional = np.array([1, 17, 40, 4]), np.array([1, 4])
    guided_first, plain = Sampling(5.0, temperature=0.0), Sampling(1.0, temperature=0.0)
    frames = list(stream_frames(vision_model, V1, prompt, 3, 6, guided_first, plain, unconditional))
    first = generate_frames(vision_model, V1, prompt, 1, 6, 5.0, None, 0.0, None, unconditional)
    np.testing.assert_array_equal(frames[0], first[0])
    given = np.concatenate((prompt, V1["vision"].codes_to_ids(frames[0]), [V1.eof_id]))
    rest = generate_frames(vision_model, V1, given, 2, 6, temperature=0.0)
    np.testing.assert_array_equal(np.stack(frames[1:]), rest)


def test_guided_rest_conditions_both_halves_on_the_frames_drawn(vision_model):
    prompt, unconditional = np.array([1, 17, 40, 4]), np.array([1, 4])
    whole = generate_frames(vision_model, V1, prompt, 2, 6, 3.0, None, 0.0, None, unconditional)
    frame = np.append(V1["vision"].codes_to_ids(whole[0]), V1.eof_id)
    longer = [np.concatenate((start, frame)) for start in (prompt, unconditional)]
    again = generate_frames(vision_model, V1, longer[0], 1, 6, 3.0, None, 0.0, None, longer[1])
    np.testing.assert_array_equal(again[0], whole[1])


def test_guidance_needs_an_unconditional_prompt(vision_model):
    with pytest.raises(ValueError, match="unconditional_ids"):
        generate_frames(vision_model, V1, np.array([1, 4]), 1, 5, guidance=5.0)


def test_sampling_repeats_with_its_seed_and_only_with_it(vision_model):
    def draw(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate_frames(vision_model, V1, np.array([1, 4]), 2, 8, top_k=50, generator=generator)

    torch.manual_seed(0)
    one = draw(3)
    torch.manual_seed(1)
    np.testing.assert_array_equal(one, draw(3))
    assert not np.array_equal(one, draw(4))


def test_text_is_drawn_from_text_ids_alone(vision_model):
    generator = torch.Generator().manual_seed(0)
    rows = generate_text(
        vision_model, V1, [np.array([1, 600])] * 3, 40, temperature=2.0, generator=generator, eos_id=-1
    )
    assert max(row.max() for row in rows) < TEXT
    assert rows[0].dtype == np.int32
    assert [len(row) for row in generate_text(vision_model, V1, [np.array([1])], 0)] == [0]


def test_choose_follows_temperature_and_top_k():
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.7]])).repeat(20_000, 1)
    generator = torch.Generator().manual_seed(0)

    def frequencies(top_k, temperature):
        drawn = choose(logits, top_k, temperature, generator)
        return torch.bincount(drawn, minlength=3) / len(drawn)

    torch.testing.assert_close(frequencies(None, 1.0), torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.015)
    torch.testing.assert_close(frequencies(2, 1.0), torch.tensor([0.0, 2 / 9, 7 / 9]), rtol=0, atol=0.015)
    sharper = torch.tensor([0.01, 0.04, 0.49]) / 0.54
    torch.testing.assert_close(frequencies(3, 0.5), sharper, rtol=0, atol=0.015)
    assert frequencies(None, 0.0)[2] == 1
    with pytest.raises(ValueError, match="negative"):
        choose(logits, None, -1.0, generator)


@pytest.mark.parametrize("chunk", [1, 3, 4096])
def test_prefill_in_chunks_and_a_cache_change_nothing(chunk):
    """Rows of different lengths, grouped-query attention: next-token logits as of each row alone, uncached."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = llama_config({**sizes, "num_key_value_heads": 2, "initializer_range": 0.2}, 64, 64, 1e4)
    model = build_llama(config, 0)
    rows = [np.arange(11) % 64, np.arange(4) + 7, np.arange(11) + 20]
    extra = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with inference(model):
        for group in (rows, rows[::2]):  # with padding and without
            decoder = Decoder(model, group, prefill_chunk=chunk)
            for step, ids in enumerate(extra):
                decoder.append(ids[: len(group)])
                for row, prompt in enumerate(group):
                    sequence = torch.cat((torch.from_numpy(prompt), extra[: step + 1, row])).long()
                    alone = model(sequence[None]).logits[0, -1]
                    torch.testing.assert_close(decoder.logits(0, 64)[row], alone, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="at least one token"):
        Decoder(model, [np.array([], dtype=np.int64)])
