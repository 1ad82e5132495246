"""A frame of another source hidden in a film: whether the model has seen it, at every depth of films of some lengths.

Without questions, which of several candidate frames was hidden is told by how much likelier the film has made each
(`video_needle_prompts`); with a file of multiple choice about images, those are hidden and asked about as in V-NIAH.
Films are a run's held-out videos, sampled evenly to the wanted number of frames. In each round one needle goes through
all depths and is then taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from pipelines.evaluate.cell import Cell
from pipelines.evaluate.job import EvaluateJob
from pipelines.evaluate.named_files import NamedFile, named_file
from pipelines.evaluate.question_media import codec_of, encoded, question_codes
from pipelines.evaluate.record import Row
from pipelines.evaluate.shared_prefill import prefilled
from pipelines.evaluate.tasks.question_lines import Question, read_questions
from pipelines.evaluate.tasks.question_prompts import TEMPLATE, question_prompt
from pipelines.evaluate.tasks.video_needle_prompts import film_prompt, gains, hidden_in
from pipelines.recipe.evaluation_tasks import VideoNeedle as Settings
from pipelines.sources.listing import MEDIA, Listing, SourceObject
from pipelines.sources.media import object_frames
from storage.errors import BadData, UserError
from storage.reach import PUBLIC_WEB
from tokenization.media.frame_sampling import FrameRequest, uniform_sample

if TYPE_CHECKING:
    from model.inference.answers import AnswerScores

TITLE = "Frame hidden in a film"
OBJECTS = 32
"""Held-out media that are looked through, evenly spread over the listing."""
_QUESTIONS = "evaluate.video_needle.questions"


def lacks(job: EvaluateJob) -> str | None:
    """See `task_table`."""
    if job.settings.video_needle is None:
        return "evaluate.video_needle is not there; set video_needle.frames"
    if not job.subject.has_codec:
        return "the model has no codec of frames; evaluate one that was trained on videos"
    if job.run is None or not job.run.objects(("video",), heldout=True):
        return "films are held-out videos of a recipe's sources; give one by --recipe that holds some out"
    return None


def check(job: EvaluateJob) -> None:
    """The films fit the context, and there is something to hide: questions about images, or media besides the film."""
    settings = _settings(job)
    assert job.run is not None
    vqgan, context = job.run.recipe.vqgan, job.run.recipe.curriculum[-1].context
    if vqgan is not None and (tokens := (max(settings.frames) + 2) * (vqgan.sizes.codes_per_frame + 1)) > context:
        raise UserError(
            f"evaluate.video_needle.frames: {max(settings.frames)} frames, the needle and a candidate are {tokens:,} "
            f"tokens, more than the last stage's context {context:,}; lower frames"
        )
    if settings.questions is not None:
        _questions(job, settings)
    elif len(job.run.objects(MEDIA, heldout=True)) < 2:
        raise UserError(
            "evaluate.video_needle: only one video is held out, so that no frame of another can be hidden in it; hold "
            "out another video or image, or set video_needle.questions"
        )


def cells(job: EvaluateJob) -> list[Cell]:
    """A length of the film and a round each."""
    settings = _settings(job)
    return [
        Cell(f"video-needle-{frames}-{number}", "video-needle", {"frames": frames, "round": number})
        for frames in settings.frames
        for number in range(settings.rounds)
    ]


def measure(job: EvaluateJob, cell: Cell) -> dict[str, Any]:
    """Hide one needle at all depths of one film. Raises BadData where no held-out video has so many frames."""
    settings = _settings(job)
    frames, number = cell.arguments["frames"], cell.arguments["round"]
    film, key = _film(job, frames, number)
    depths: list[float | None] = [*depths_of(settings), None]
    if settings.questions is not None:
        answers, of = _asked(job, settings, film, number, depths)
    else:
        answers, of = _recognised(job, settings, film, key, number, depths)
    answers = [{"round": number, "depth": depth, **answer} for depth, answer in zip(depths, answers)]
    return {"frames": frames, "film": key, "needle": of, "answers": answers}


def rows(job: EvaluateJob, results: Mapping[str, dict[str, Any]]) -> list[Row]:
    """A row a length of the film: a list over depths of each figure, means over the rounds that were measured."""
    settings = _settings(job)
    depths = depths_of(settings)
    found: list[Row] = []
    for frames in settings.frames:
        own = [result for result in results.values() if result["frames"] == frames]
        if not own:
            continue
        answers = [answer for result in own for answer in result["answers"]]

        def mean(depth: float | None, figure: str, answers: Sequence[Mapping[str, Any]] = answers) -> float | None:
            values = [answer[figure] for answer in answers if answer["depth"] == depth and figure in answer]
            return float(np.mean(values)) if values else None

        row: dict[str, Any] = {"frames": frames, "depths": depths, "rounds": len(own)}
        row["by"] = "recognition" if settings.questions is None else "questions"
        row["chance"] = float(np.mean([answer["chance"] for answer in answers]))
        row["accuracy"] = [mean(depth, "is_right") for depth in depths]
        row["accuracy_without"] = mean(None, "is_right")
        row["needle_gain"] = [mean(depth, "needle_gain") for depth in depths]
        row["others_gain"] = [mean(depth, "others_gain") for depth in depths]
        found.append({**row, "answers": answers})
    return found


def verdict(rows: Sequence[Row]) -> tuple[str, str]:
    """Of the mean over all lengths and depths, beside what a guess would get."""
    accuracy = float(np.mean([value for row in rows for value in row["accuracy"]]))
    chance = float(np.mean([row["chance"] for row in rows]))
    count = sum(row["rounds"] * len(row["depths"]) for row in rows)
    # Depths of one round share their needle, so that only rounds are independent of each other.
    rounds = sum(row["rounds"] for row in rows)
    above = accuracy > chance + 2 * (chance * (1 - chance) / rounds) ** 0.5
    grade = "good" if above and accuracy >= 0.9 else "fair" if above else "bad"
    what = "the hidden frame is told from others" if rows[0]["by"] == "recognition" else "the question is answered"
    longest = max(row["frames"] for row in rows)
    few = "" if above else f", which with {rounds} needle{'s' if rounds > 1 else ''} is not told from a guess"
    return grade, (
        f"A frame hidden in films of up to {longest:,} frames: {what} in {accuracy:.0%} of {count} cases; a guess gets "
        f"{chance:.0%}{few}."
    )


def depths_of(settings: Settings) -> list[float]:
    """0: before the film's first frame, 1: behind its last."""
    last = settings.depths - 1
    return [number / last for number in range(settings.depths)] if last else [0.5]


def _settings(job: EvaluateJob) -> Settings:
    assert job.settings.video_needle is not None
    return job.settings.video_needle


def _film(job: EvaluateJob, frames: int, number: int) -> tuple[np.ndarray, str]:
    """Codes [frames, n] of the number-th held-out video that has so many frames, in turn, and its key."""
    assert job.run is not None
    long_enough: list[tuple[SourceObject, np.ndarray]] = []
    for found in _some(job.run.objects(("video",), heldout=True)):
        shown = _frames_of(job, found, frames)
        if len(shown) == frames:
            long_enough.append((found, shown))
        if len(long_enough) > number:
            break
    if not long_enough:
        raise BadData(
            f"no held-out video has {frames} frames at {job.subject.fps:g} a second; lower evaluate.video_needle.frames"
        )
    found, shown = long_enough[number % len(long_enough)]
    return encoded(job, shown), found.key


def _recognised(
    job: EvaluateJob, settings: Settings, film: np.ndarray, key: str, number: int, depths: Sequence[float | None]
) -> tuple[list[dict[str, Any]], str]:
    """At each depth which candidate has gained most, without the needle none, and where the needle is from."""
    generator = np.random.default_rng([job.seed, number])
    candidates, names = _candidates(job, settings.candidates, key, generator)
    right = int(generator.integers(len(candidates)))
    tokenizer, vocabulary = job.subject.tokenizer(), job.vocabulary
    prompts = [film_prompt(hidden_in(film, candidates[right], depth), tokenizer, vocabulary) for depth in depths]
    choices = list(vocabulary["vision"].codes_to_ids(candidates))
    *seen, without = (one.log_probability for one in _scores(job, prompts, [choices] * len(prompts)))
    answers: list[dict[str, Any]] = []
    chance = 1 / len(candidates)
    for one in seen:
        gained = gains(one, without, film.shape[1])
        answers.append(
            {
                "chosen": int(np.argmax(gained)),
                "right": right,
                "is_right": int(np.argmax(gained)) == right,
                "needle_gain": float(gained[right]),
                "others_gain": float(np.delete(gained, right).mean()),
                "chance": chance,
            }
        )
    return [*answers, {"chance": chance}], names[right]


def _asked(
    job: EvaluateJob, settings: Settings, film: np.ndarray, number: int, depths: Sequence[float | None]
) -> tuple[list[dict[str, Any]], str]:
    """At each depth, and without the needle, the likeliest choice of a question about it, and the needle's name."""
    file, questions = _questions(job, settings)
    question = questions[number % len(questions)]
    needle = question_codes(job, file, question, 1, PUBLIC_WEB)
    assert needle is not None
    tokenizer, vocabulary = job.subject.tokenizer(), job.vocabulary
    prompts = [
        question_prompt(question, TEMPLATE, tokenizer, vocabulary, hidden_in(film, needle[0], depth))
        for depth in depths
    ]
    scores = _scores(job, [one.tokens for one in prompts], [one.choices for one in prompts])
    chance, right = 1 / len(question.choices), question.right
    chosen = [int(np.argmax(score.log_probability)) for score in scores]
    answers = [{"chosen": one, "right": right, "is_right": one == right, "chance": chance} for one in chosen]
    return answers, question.name


def _scores(
    job: EvaluateJob, prompts: Sequence[np.ndarray], choices: Sequence[Sequence[np.ndarray]]
) -> list[AnswerScores]:
    """Scores of the choices behind each prompt; what prompts share enters once."""
    from model.inference.answers import score_answers
    from model.llama.llama import inference

    model = job.subject.model(job.group)
    scores: list[AnswerScores] = []
    longest = model.config.max_position_embeddings
    if (most := max(map(len, prompts)) + max(len(one) for own in choices for one in own)) > longest:
        raise UserError(
            f"evaluate.video_needle.frames: {most:,} tokens with the needle are more than the model's context "
            f"{longest:,}; lower it"
        )
    with inference(model):
        decoders = prefilled(model, prompts, 0, job.group)
        for own in choices:
            decoder = next(decoders)
            scores += score_answers(decoder, [own])
            del decoder  # before the next one is filled
    return scores


def _candidates(job: EvaluateJob, count: int, but: str, generator: np.random.Generator) -> tuple[np.ndarray, list[str]]:
    """Codes [count, n] of different frames of other held-out media than the film, of as many as there are, and the
    keys of those. Raises BadData where there are too few.
    """
    assert job.run is not None
    others = [found for found in _some(job.run.objects(MEDIA, heldout=True)) if found.key != but]
    drawn = [others[number] for number in generator.permutation(len(others))]
    by_object = ([(found.key, frame) for frame in _shuffled(job, found, count, generator)] for found in drawn)
    pools = [pool for pool in by_object if pool]
    in_turn = [pool[turn] for turn in range(count) for pool in pools if turn < len(pool)]
    codes: dict[bytes, tuple[str, np.ndarray]] = {}
    for key, frame in in_turn:
        own = encoded(job, frame[None])[0]
        codes.setdefault(own.tobytes(), (key, own))
        if len(codes) == count:
            return np.stack([code for _, code in codes.values()]), [key for key, _ in codes.values()]
    raise BadData(
        f"held-out media other than {but} have only {len(codes)} different frames; lower "
        f"evaluate.video_needle.candidates, or hold out more"
    )


def _shuffled(
    job: EvaluateJob, found: SourceObject, count: int, generator: np.random.Generator
) -> Iterator[np.ndarray]:
    shown = _frames_of(job, found, count)
    return (shown[number] for number in generator.permutation(len(shown)))


def _frames_of(job: EvaluateJob, found: SourceObject, frames: int) -> np.ndarray:
    """uint8 [at most `frames`, size, size, 3]; none of what cannot be decoded."""
    assert job.subject.fps is not None
    size = codec_of(job.subject).config.resolution
    request = FrameRequest(fps=job.subject.fps, size=size, chunk=min(64, frames), max_frames=frames)
    try:
        chunks = [chunk.frames for chunk in object_frames(found, job.storage.options, request, job.limits)]
    except BadData:  # the tokenize stage has it in quarantine
        chunks = []
    return np.concatenate([np.zeros((0, size, size, 3), np.uint8), *chunks])


def _some(objects: Listing) -> list[SourceObject]:
    return [objects[int(number)] for number in uniform_sample(len(objects), OBJECTS)]


def _questions(job: EvaluateJob, settings: Settings) -> tuple[NamedFile, list[Question]]:
    """The questions about images. Raises UserError where there are none."""
    assert settings.questions is not None
    file = named_file(_QUESTIONS, settings.questions, job.storage)
    questions, bad = read_questions(file.lines(), "choice")
    about = [one for one in questions if one.medium and one.medium[0] == "image"]
    if not about:
        why = f"line {bad[0].line}: {bad[0].reason}" if bad else "no line names an image"
        raise UserError(f"{_QUESTIONS}: {settings.questions} has no question about an image ({why})")
    return file, about
