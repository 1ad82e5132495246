"""A model in three lines: what it makes is what the model's own decoding makes of documents laid out as in training."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import ringworld
from model.inference.generate import generate_frames
from pipelines.inference.loaded import LoadedModel
from pipelines.inference.media import frames_of
from pipelines.inference.prompt import open_frames, prompt_ids
from storage.errors import UserError
from tokenization.field_spec import FieldSpec
from tokenization.fields import build_tokens


def test_greedy_text_is_that_of_stock_transformers(model: LoadedModel, folder: str) -> None:
    prompts = ["the sea was", "a ship went slowly home while all"]
    tokenizer, stock = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    expected = []
    for prompt in prompts:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            for _ in range(6):
                logits = stock(ids).logits[0, -1, : model.vocabulary.text_size]
                ids = torch.cat((ids, logits.argmax()[None, None]), dim=1)
        expected.append(model.tokenizer.decode(ids[0, -6:].numpy()))
    assert model.generate(prompts, max_new_tokens=6) == expected
    assert model.generate(prompts[0], max_new_tokens=6) == expected[0]


def test_prompts_are_laid_out_as_documents_are(model: LoadedModel) -> None:
    codes = np.random.default_rng(0).integers(0, 64, (3, model.codec.config.codes_per_frame))
    record = {"caption": "the sea", "vision": codes}
    spec = FieldSpec.parse("caption,vision,caption")
    whole, _ = build_tokens(record, spec, model.tokenizer, model.vocabulary, add_eos=False)
    found = prompt_ids(["the sea", codes, "the sea"], model.tokenizer, model.vocabulary)
    np.testing.assert_array_equal(found, whole)
    opened = open_frames(["the sea"], codes[:2], model.tokenizer, model.vocabulary)
    assert opened[-1] == model.vocabulary.eof_id
    np.testing.assert_array_equal(opened[:-1], whole[: len(opened) - 1])


def test_pictures_and_films_depend_on_their_seed_alone(model: LoadedModel) -> None:
    one, two, other = (model.images("the sea", seed=seed)[0] for seed in (1, 1, 2))
    assert one.tobytes() == two.tobytes() != other.tobytes()
    assert len(model.images("the sea", n=3)) == 3
    seen: list[int] = []
    film = model.video("the sea", frames=3, seed=5, on_frame=seen.append)
    assert (film.frames.shape, film.fps, seen) == ((3, 16, 16, 3), 8.0, [0, 1, 2])
    np.testing.assert_array_equal(film.frames, model.video("the sea", frames=3, seed=5).frames)


def test_a_film_goes_on_from_the_last_frames_of_another(model: LoadedModel, film: str) -> None:
    codes = model.codec.encode(frames_of(film, 16, 100, model.fps)[-2:])
    made = model.video("the sea", frames=2, continues=film, given=2, guidance=1.0, temperature=0.0)
    np.testing.assert_array_equal(made.frames[:2], model.codec.decode(codes))
    prompt = open_frames(["the sea"], codes, model.tokenizer, model.vocabulary)
    expected = generate_frames(model.llama, model.vocabulary, prompt, 2, codes.shape[1], temperature=0.0)
    np.testing.assert_array_equal(made.frames[2:], model.codec.decode(expected))


def test_a_conversation_keeps_its_turns_and_the_pictures_shown(model: LoadedModel, picture: str, film: str) -> None:
    conversation = ringworld.Conversation(model, max_new_tokens=3)
    first = conversation.say("what is this?", [picture, film], frames=2)
    second = conversation.say("and then?")
    parts = ["You are a helpful assistant. USER: ", model.look(picture), model.look(film, 2)]
    ids = prompt_ids([*parts, "what is this?\nASSISTANT:"], model.tokenizer, model.vocabulary)
    (expected,) = model.continue_text([ids], 3)
    assert first == expected.strip()
    eos = [model.vocabulary.eos_id]
    turn = model.tokenizer.encode("USER: and then?\nASSISTANT:")
    ids = np.concatenate([ids, model.tokenizer.encode(expected), eos, turn])
    (expected,) = model.continue_text([ids], 3)
    assert second == expected.strip()


def test_what_does_not_fit_the_context_or_cannot_be_drawn_is_a_users_mistake(model: LoadedModel, film: str) -> None:
    with pytest.raises(UserError, match="the model's context is 512"):
        model.generate("the sea", max_new_tokens=600)
    with pytest.raises(UserError, match="the model's context is 512"):
        model.video("the sea", frames=100)
    with pytest.raises(UserError, match="sampling: top_k 0"):
        model.images("the sea", top_k=0)
    for asked in ({"frames": 0}, {"frames": 1, "continues": film, "given": 0}):
        with pytest.raises(UserError, match="0: ask for 1 at least"):
            model.video("the sea", **asked)
    with pytest.raises(UserError, match="max_new_tokens -1: ask for 1 at least"):
        model.generate("the sea", max_new_tokens=-1)
    with pytest.raises(UserError, match="frames 0: ask for 1 at least"):
        model.look(film, frames=0)
    with pytest.raises(UserError, match="n 0: ask for 1 at least"):
        model.images("the sea", n=0)
    with pytest.raises(UserError, match="dtype fp8"):
        ringworld.load(str(model.folder.store.path()), dtype="fp8")
    conversation = ringworld.Conversation(model, max_new_tokens=3)
    with pytest.raises(UserError, match="context"):
        conversation.say("and " * 600)
    assert conversation.say("the sea") == ringworld.Conversation(model, max_new_tokens=3).say("the sea")


def test_importing_it_needs_neither_torch_nor_ray() -> None:
    """Torch, transformers and Ray come with the first model that is loaded."""
    code = "import sys, ringworld; print({'torch', 'transformers', 'ray', 'diffusers'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
