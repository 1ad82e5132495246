"""The model card of an exported model: what it is, how it is used, how it was trained and from what.

In: what was trained, with the manifests of all stages behind it. Out: Markdown with the front matter of the Hugging
Face Hub. URLs and the recipe come from places that have no credentials in them.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import yaml

from pipelines.dag.manifest import record_json
from pipelines.export.folder import Description
from pipelines.export.trained import TRAIN, Trained
from pipelines.report.numbers import context_name, count
from pipelines.sources.stage import SourcesStage
from tokenization.vocabulary import JointVocabulary

if TYPE_CHECKING:
    from transformers import LlamaConfig

Row = Sequence[Any]


def model_card(trained: Trained, description: Description, config: LlamaConfig, parameters: int) -> str:
    """The text of README.md. parameters: of the language model."""
    init = (trained.recipe or {}).get("model", {}).get("init")
    parts = [
        _front(),
        f"# {description.name}",
        _summary(trained, description, config, parameters) + (f" It started from `{init}`." if init else ""),
        "## Vocabulary",
        *_vocabulary(JointVocabulary.from_json(description.vocabulary), description),
        "## Use",
        *_use(description),
        "## Training",
        _table(
            ("stage", "context", "RoPE theta", "steps", "tokens", "first loss", "last loss", "mixture"),
            _trainings(trained),
        ),
        "Losses are nats a target token in training, of the first and the last step.",
        *_evaluation(trained),
        "## Data",
        *_data(trained),
        "## Lineage",
        _table(("stage", "fingerprint", "finished", "made by"), _lineage(trained)),
        "## Recipe",
        *_recipe(trained),
    ]
    return "\n\n".join(parts) + "\n"


def imported_card(description: Description, config: LlamaConfig, parameters: int) -> str:
    """The text of README.md of a model whose weights were imported. parameters: of the language model."""
    origin, rope = description.origin, config.rope_parameters or {}
    parts = [
        _front(),
        f"# {description.name}",
        f"A plain `LlamaForCausalLM` of {count(parameters)} parameters ({config.num_hidden_layers} layers of "
        f"{config.hidden_size}) for a context of {config.max_position_embeddings:,} tokens (RoPE theta "
        f"{rope.get('rope_theta'):g}), in {origin.precision}. Its weights are those of an LWM checkpoint "
        f"(arXiv 2402.08268), whose file has the sha256 `{origin.fingerprint}`.",
        "## Vocabulary",
        *_vocabulary(JointVocabulary.from_json(description.vocabulary), description),
        "## Use",
        *_use(description),
    ]
    return "\n\n".join(parts) + "\n"


def _front() -> str:
    front = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["ringworld", "llama"]}
    return f"---\n{yaml.safe_dump(front, sort_keys=False)}---"


def _summary(trained: Trained, description: Description, config: LlamaConfig, parameters: int) -> str:
    origin = description.origin
    stage = origin.stage.removeprefix(f"{TRAIN}-")
    what = f"the checkpoint of step {origin.step} of stage `{stage}`" if trained.checkpoint else f"stage `{stage}`"
    layers, width, rope = config.num_hidden_layers, config.hidden_size, config.rope_parameters or {}
    return (
        f"A plain `LlamaForCausalLM` of {count(parameters)} parameters ({layers} layers of {width}), trained by "
        f"Ringworld in {origin.precision} up to a context of {config.max_position_embeddings:,} tokens "
        f"(RoPE theta {rope.get('rope_theta'):g}). It is {what}."
    )


def _vocabulary(vocabulary: JointVocabulary, description: Description) -> Iterator[str]:
    rows = []
    for one in vocabulary.modalities:
        markers = ", ".join(f"`<{name}>` {one.marker(name)}" for name in one.markers)
        codec = description.codecs.get(one.name)
        made_by = f"{codec.kind} in `{codec.folder}`, {codec.fps:g} frames/s" if codec else ""
        made_by = "the text tokenizer" if one.name == "text" else made_by
        rows.append((one.name, f"{one.start} to {one.stop - 1}", one.n_codes, markers, made_by))
    yield _table(("modality", "ids", "codes", "markers", "made by"), rows)
    yield (
        f"BOS is {vocabulary.bos_id}, EOS {vocabulary.eos_id}. `<vision>` and `</vision>` are ordinary text; between "
        f"them each frame's codes end with `<eof>`, the last frame's with `<eov>`."
        if "vision" in vocabulary
        else f"BOS is {vocabulary.bos_id}, EOS {vocabulary.eos_id}."
    )


def _use(description: Description) -> Iterator[str]:
    yield _fenced(
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'tokenizer = AutoTokenizer.from_pretrained("DIR")\n'
        'model = AutoModelForCausalLM.from_pretrained("DIR")\n'
        'prompt = tokenizer("Once", return_tensors="pt")\n'
        "print(tokenizer.decode(model.generate(**prompt, max_new_tokens=50)[0]))",
        "python",
    )
    if description.codecs:
        yield "Frames need the codec and the ranges of the vocabulary, which Ringworld opens with the model:"
    else:
        yield "Ringworld opens it with its vocabulary:"
    yield _fenced(
        "from pipelines.export.folder import open_model\n\n"
        'folder = open_model("DIR")\n'
        "model, tokenizer, vocabulary = folder.llama(), folder.tokenizer, folder.vocabulary"
        + ("\nvqgan = folder.codec()" if description.codecs else ""),
        "python",
    )


def _trainings(trained: Trained) -> Iterator[Row]:
    for output in trained.earlier():
        yield _training(output.manifest.declaration.settings, record_json(output.record)["figures"])
    figures = {"steps": trained.step, **({} if trained.checkpoint else trained.record["figures"])}
    yield _training(trained.settings, figures)


def _training(settings: Mapping[str, Any], figures: Mapping[str, Any]) -> Row:
    stage = settings.get("stage", {})
    steps = figures["steps"]
    tokens = figures.get("tokens") or steps * stage.get("batch_tokens", 0)
    losses = [f"{figures[key]:.3f}" if figures.get(key) is not None else "" for key in ("first_loss", "last_loss")]
    mixture = ", ".join(f"{source} {share:g}" for source, share in stage.get("mixture", {}).items())
    context, theta = stage.get("context"), stage.get("rope_theta")
    named = [context_name(context) if context else "", f"{theta:g}" if theta else ""]
    return (stage.get("name", ""), *named, steps, count(tokens), *losses, mixture)


def _evaluation(trained: Trained) -> Iterator[str]:
    if not trained.heldout:
        return
    keys = ("source", "modality", "targets", "nats_per_token", "unigram_heldout")
    rows = [[f"{row[key]:.3f}" if isinstance(row[key], float) else row[key] for key in keys] for row in trained.heldout]
    yield "## Held-out loss"
    yield _table(("source", "modality", "targets", "nats a token", "unigram entropy of the same tokens"), rows)


def _data(trained: Trained) -> Iterator[str]:
    rows = []
    for output in trained.of_kind(SourcesStage.kind).values():
        for source, figures in record_json(output.record)["figures"].items():
            fields = trained.tokenize.manifest.declaration.settings.get("fields", {}).get(source, [])
            urls = ", ".join(f"`{url}`" for url in _urls(trained, source))
            rows.append(
                (source, figures.get("objects"), f"{count(figures.get('bytes', 0))}B", " or ".join(fields), urls)
            )
    yield _table(("source", "objects", "size", "fields", "where"), rows)
    figures = record_json(trained.tokenize.record)["figures"]
    said = f"{count(figures['documents'])} documents of {count(figures['tokens'])} tokens were made of them"
    yield said + f", {count(figures['frames'])} frames among them." if figures.get("frames") else said + "."
    kept = trained.tokenize.record.outputs.text_tokenizer
    if kept is not None:
        where = f"from `{kept.url}`" if kept.url else "the default one"
        yield f"The text tokenizer is {where}, sha256 `{kept.fingerprint}`."
    if trained.codec is not None:
        figures = trained.codec.record.figures
        how = f"trained for {figures['steps']:g} steps" if "steps" in figures else "imported"
        yield f"The VQGAN was {how}; fingerprint `{trained.codec.record.outputs.fingerprint}`."


def _urls(trained: Trained, source: str) -> list[str]:
    sources = (trained.recipe or {}).get("sources", {})
    return list(sources.get(source, {}).get("urls", []))


def _lineage(trained: Trained) -> Iterator[Row]:
    own = (trained.declaration.stage, trained.manifest)
    for name, manifest in [*((name, one.manifest) for name, one in trained.stages.items()), own]:
        made_by = ", ".join(f"{library} {version}" for library, version in sorted(manifest.made_by.items()))
        yield name, f"`{manifest.fingerprint[:16]}`", manifest.finished, made_by


def _recipe(trained: Trained) -> Iterator[str]:
    if trained.recipe is not None:
        yield "As training had it, without storage options and credentials."
        yield _fenced(yaml.safe_dump(dict(trained.recipe), sort_keys=False, allow_unicode=True), "yaml")
        return
    yield "No checkpoint is left that has the recipe; these are the settings that each stage declared."
    named = {name: dict(one.manifest.declaration.settings) for name, one in trained.stages.items()}
    settings = {**named, trained.declaration.stage: dict(trained.settings)}
    yield _fenced(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True), "yaml")


def _table(head: Row, rows: Iterator[Row] | Sequence[Row]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    text = f"{value:,}" if isinstance(value, int) else str(value)
    return " ".join(text.replace("|", "\\|").split())


def _fenced(text: str, language: str) -> str:
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"
