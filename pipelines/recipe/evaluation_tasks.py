"""Settings of the evaluation at length and of that about a user's questions, each beside what it checks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipelines.recipe.base import Config, Name, user_error_as_value_error
from storage.reach import PUBLIC_WEB
from storage.setting_types import AtLeast2, Positive, Text

RulerTask = Literal[
    "niah_single_1",
    "niah_single_2",
    "niah_single_3",
    "niah_multikey_1",
    "niah_multikey_2",
    "niah_multikey_3",
    "niah_multivalue",
    "niah_multiquery",
    "vt",
    "cwe",
    "fwe",
]
ALL_RULER_TASKS: list[RulerTask] = list(RulerTask.__args__)  # type: ignore[attr-defined]


class HiddenAndAsked(Config):
    """A case of several needles."""

    hidden: Annotated[Positive, Field(le=55)]
    """Needles in the text, at drawn depths. There are 55 cities to tell them apart."""
    asked: Positive
    """How many of them one question asks for."""

    @model_validator(mode="after")
    def _asks_what_is_hidden(self) -> HiddenAndAsked:
        if self.asked > self.hidden:
            raise ValueError(f"asked {self.asked} is more than the {self.hidden} hidden; lower it")
        return self


class MultiNeedle(Config):
    """Several needles in one haystack of held-out text, some of which are asked for together."""

    contexts: list[Positive] = Field(min_length=1)
    cases: list[HiddenAndAsked] = Field(
        default=[
            HiddenAndAsked(hidden=2, asked=2),
            HiddenAndAsked(hidden=4, asked=1),
            HiddenAndAsked(hidden=4, asked=2),
            HiddenAndAsked(hidden=8, asked=1),
        ],
        min_length=1,
    )
    rounds: Positive = 10


class Ruler(Config):
    """RULER (arXiv 2404.06654): thirteen tasks of which eleven are generated."""

    contexts: list[Positive] = Field(min_length=1)
    tasks: list[RulerTask] = ALL_RULER_TASKS
    examples: Positive = 20
    """Of each task at each context; the paper has 500."""
    squad: Text | None = None
    """URL of a JSON file of SQuAD's form, from which `qa_1` is made."""
    hotpotqa: Text | None = None
    """URL of a JSON file of HotpotQA's form, from which `qa_2` is made."""


class Perplexity(Config):
    """Loss of held-out text by position, in bins that double."""

    context: Positive
    windows: Positive = 8
    """Windows of so many tokens, each of one document, that are scored at most."""


class Questions(Config):
    """Questions of a JSONL file about text, images or videos; `docs/evaluation.md` says its fields."""

    file: Text
    """URL, relative to storage.data."""
    frames: Positive = 8
    """Of a video so many are shown at most, evenly spaced."""
    at_most: Positive | None = None
    """Of more questions so many are asked, evenly spaced."""
    media_from: list[Text] = Field(default_factory=lambda: list(PUBLIC_WEB))
    """As of a source: URL prefixes from which lines may name media, beside the file's own folder, bucket or host."""
    template: Text | None = None
    """The prompt, with {vision}, {context}, {question} and {choices} where those go; None: the task's own."""


class Choice(Questions):
    """Multiple choice: the likeliest answer counts."""

    letters: bool = False
    """The choices are listed and answered by their letters; else each is scored as a whole."""

    @model_validator(mode="after")
    def _has_a_template(self) -> Choice:
        _check(self.template, self.letters)
        return self


class ShortAnswers(Questions):
    """Questions that are answered in a few words, greedily."""

    answer_tokens: Positive = 32

    @model_validator(mode="after")
    def _has_a_template(self) -> ShortAnswers:
        _check(self.template, letters=False)
        return self


class VideoNeedle(Config):
    """A frame of another source hidden in a film."""

    frames: list[Positive] = Field(min_length=1)
    """Frames of the film."""
    depths: Positive = 5
    rounds: Positive = 2
    """Films with a needle of its own each."""
    candidates: AtLeast2 = 4
    """Frames of which one was hidden."""
    questions: Text | None = None
    """URL of a JSONL file of multiple choice about images (V-NIAH): its images are the needles. None: recognition."""


NamedChoices = Annotated[dict[Name, Choice], Field(min_length=1)]
NamedShortAnswers = Annotated[dict[Name, ShortAnswers], Field(min_length=1)]


def _check(template: str | None, letters: bool) -> None:
    if template is not None:
        from pipelines.evaluate.tasks.question_prompts import check_template

        with user_error_as_value_error():
            check_template("template", template, letters)
