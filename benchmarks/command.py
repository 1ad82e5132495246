"""`ringworld bench`: one subcommand a benchmark, which parses, measures and prints."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from storage.errors import UserError

_SEED = (
    "of the mix and of the tensors (default 3: of the lwm mixes 0 to 4 at 16384 the median in how much a mask hides)"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One subcommand a benchmark."""
    benchmarks = parser.add_subparsers(dest="benchmark", required=True, metavar="BENCHMARK")

    plan = benchmarks.add_parser("plan", help="work, keys received and modelled efficiency of our plans and of peers")
    plan.add_argument("--contexts", type=int, nargs="+", metavar="S", help="default: 32768 131072 1048576")
    plan.add_argument("--ranks", type=int, nargs="+", metavar="P", help="default: 8 64 512")
    plan.add_argument("--mixes", nargs="+", metavar="MIX", help="default: images clips lwm one")
    plan.add_argument("--sequences", type=int, default=8, metavar="N", help="seeded sequences a cell (default 8)")
    plan.add_argument("--heads", type=int, default=32)
    plan.add_argument("--kv-heads", type=int, default=8, help="default 8; LWM 7B has 32")
    plan.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    plan.set_defaults(bench=_plan)

    attention = benchmarks.add_parser(
        "attention", help="CPU seconds of every rank, forward and backward, in processes of one thread each"
    )
    attention.add_argument("--ranks", type=int, default=8)
    attention.add_argument("--context", type=int, default=16384, help="tokens of the packed sequence")
    attention.add_argument("--mix", default="lwm", help="images, clips, lwm (default) or one")
    attention.add_argument("--seed", type=int, default=3, help=_SEED)
    attention.add_argument("--heads", type=int, default=4)
    attention.add_argument("--kv-heads", type=int, default=4)
    attention.add_argument("--head-size", type=int, default=64)
    attention.add_argument("--rounds", type=int, default=3, help="those that count, after one that warms up")
    attention.add_argument(
        "--slow-exchange",
        type=float,
        metavar="SECONDS",
        help="instead: wall time of ours with the exchange slowed by so much in all, and without",
    )
    attention.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    attention.set_defaults(bench=_attention)

    gpu = benchmarks.add_parser("gpu", help="on a GPU: is it right there, how fast, and how long a context fits")
    gpu.add_argument("--minutes", type=float, default=9.0, help="the script ends well inside them (default 9)")
    gpu.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts or groups of them (default: all)")
    gpu.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    gpu.add_argument("--tiny", action="store_true", help="the smallest sizes: with --device cpu a rehearsal of it all")
    gpu.add_argument("--json", type=Path, metavar="FILE", help="the report, whole after every row")
    gpu.add_argument("--gather", type=Path, metavar="FOLDER", help="instead: fetch what a GPU's machine may lack")
    gpu.add_argument("--python", default="3.12", help="with --gather: of that machine (default 3.12)")
    gpu.add_argument("--also", nargs="+", default=[], metavar="PACKAGE", help="with --gather: further packages")
    gpu.set_defaults(bench=_gpu)

    train = benchmarks.add_parser("train", help="steps of the engine, beside plain transformers and torch")
    train.add_argument("--context", type=int, default=4096, help="tokens of a packed sequence (default 4096)")
    train.add_argument("--sequences", type=int, default=4, metavar="N", help="of a global batch (default 4)")
    train.add_argument("--hidden", type=int, default=256, metavar="D", help="of the model: its width, heads of 64")
    train.add_argument("--rounds", type=int, default=3, help="steps of each system, by turns; the fastest counts")
    train.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    train.set_defaults(bench=_train)

    loader = benchmarks.add_parser("loader", help="from shards to batches, beside webdataset on the same shards")
    loader.add_argument("--context", type=int, default=32768, help="tokens of a packed sequence (default 32768)")
    loader.add_argument("--sequences", type=int, default=1024, metavar="N", help="of a pass (default 1024: 270 MB)")
    loader.add_argument("--batch", type=int, default=8, help="sequences of a batch (default 8)")
    loader.add_argument("--rounds", type=int, default=5, help="passes of each system, by turns; the fastest counts")
    loader.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    loader.set_defaults(bench=_loader)

    store = benchmarks.add_parser("store", help="reading and writing an object on S3, beside s3fs")
    store.add_argument("--megabytes", type=int, default=200, help="of the object (default 200)")
    store.add_argument("--rounds", type=int, default=5, help="runs of each system, by turns; the best counts")
    store.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    store.set_defaults(bench=_store)

    manifest = benchmarks.add_parser("manifest", help="a checkpoint's COMMIT on many ranks, beside plain JSON")
    manifest.add_argument("--ranks", type=int, default=512, help="of ZeRO-3 (default 512)")
    manifest.add_argument("--rounds", type=int, default=3, help="of each way, by turns; the fastest counts")
    manifest.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    manifest.set_defaults(bench=_manifest)

    text = benchmarks.add_parser("text", help="from text on S3 to token documents, beside other tokenizers")
    text.add_argument("--corpora", nargs="+", default=["plays", "lines", "code"], metavar="NAME", help="default: all")
    text.add_argument("--megabytes", type=int, default=6, help="of each corpus at most (default 6)")
    text.add_argument("--rounds", type=int, default=3, help="runs of each system, by turns; the fastest counts")
    text.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    text.set_defaults(bench=_text)

    pack = benchmarks.add_parser("pack", help="documents a second and fill of packers on the same documents")
    pack.add_argument("--contexts", type=int, nargs="+", metavar="S", help="default: 8192 32768 1048576")
    pack.add_argument("--documents", type=int, default=1_000_000, metavar="N", help="default 1000000")
    pack.add_argument("--mix", default="lwm", help="images, clips or lwm (default)")
    pack.add_argument("--rounds", type=int, default=3, help="runs of each packer, by turns; the fastest counts")
    pack.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    pack.set_defaults(bench=_pack)

    corpus = benchmarks.add_parser(
        "corpus", help="what a corpus of a million objects takes, from its listing to loaders"
    )
    corpus.add_argument("--parts", nargs="+", default=[], metavar="NAME", help="default: all")
    corpus.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    corpus.set_defaults(bench=_corpus)

    tokenize = benchmarks.add_parser("tokenize", help="from video on S3 to codes: decoding, encoding, and the stage")
    tokenize.add_argument("--frames", type=int, default=264, help="encoded by the stage a round (default 264)")
    tokenize.add_argument("--hour", type=int, default=3600, metavar="SECONDS", help="of the long video (default 3600)")
    tokenize.add_argument("--rounds", type=int, default=3, help="runs of each system, by turns; the fastest counts")
    tokenize.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    tokenize.set_defaults(bench=_tokenize)

    inference = benchmarks.add_parser("inference", help="prefill and decoding at length, beside transformers")
    inference.add_argument("--contexts", type=int, nargs="+", default=[1024, 16384, 65536], metavar="S")
    inference.add_argument("--prefill", type=int, default=65536, metavar="S", help="of a prompt (default 65536)")
    inference.add_argument("--tokens", type=int, default=64, metavar="N", help="decoded a round (default 64)")
    inference.add_argument("--rounds", type=int, default=3, help="of each system, by turns; the fastest counts")
    inference.add_argument("--only", nargs="+", metavar="PART", help="decoding, prefill, ranks (default: all)")
    inference.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    inference.set_defaults(bench=_inference)

    cache = benchmarks.add_parser("cache", help="what a KV cache in int8 or fp8 changes of a trained model's answers")
    cache.add_argument(
        "model", type=Path, metavar="MODEL", help="a folder with the model, as `ringworld export` writes"
    )
    cache.add_argument("--context", type=int, default=2048, metavar="S", help="tokens before (default 2048)")
    cache.add_argument("--tokens", type=int, default=64, metavar="N", help="tokens compared (default 64)")
    cache.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    cache.set_defaults(bench=_cache)

    frames = benchmarks.add_parser("frames", help="frames a second, code by code and with codes drafted ahead")
    frames.add_argument("--model", metavar="DIR", help="also an exported model, such as the quickstart's")
    frames.add_argument("--ahead", type=int, nargs="+", default=[8, 16, 32, 64], metavar="N", help="codes drafted")
    frames.add_argument("--frames", type=int, default=6, metavar="N", help="drawn a prompt (default 6)")
    frames.add_argument("--rounds", type=int, default=3, help="of each, by turns; the fastest counts")
    frames.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    frames.set_defaults(bench=_frames)

    memory = benchmarks.add_parser("memory", help="the peak of a training step, measured beside what is predicted")
    memory.add_argument("--contexts", type=int, nargs="+", default=[8192, 16384, 32768], metavar="S")
    memory.add_argument("--ranks", type=int, nargs="+", default=[1, 2], metavar="P", help="that share a sequence")
    memory.add_argument("--json", type=Path, metavar="FILE", help="also write the report there")
    memory.set_defaults(bench=_memory)

    drawings = benchmarks.add_parser("drawings", help="make the drawings of docs/ring-attention.md")
    drawings.add_argument("--out", type=Path, default=Path("docs"), metavar="FOLDER")
    drawings.set_defaults(bench=_drawings)


def call(arguments: argparse.Namespace) -> int:
    """Run the benchmark; missed targets are printed and do not change the exit code."""
    return int(arguments.bench(arguments))


def _plan(arguments: argparse.Namespace) -> int:
    from benchmarks.mixes import MIXES
    from benchmarks.plan import CONTEXTS, RANKS, plan_report
    from benchmarks.tables import print_plan
    from model.attention.plan.hardware import AttentionShape, Hardware

    _at_least_one(arguments, "sequences", "heads", "kv_heads")
    if arguments.heads % arguments.kv_heads:
        raise UserError(f"--kv-heads {arguments.kv_heads} does not divide --heads {arguments.heads}")
    report = plan_report(
        arguments.contexts or CONTEXTS,
        arguments.ranks or RANKS,
        arguments.mixes or tuple(MIXES),
        arguments.sequences,
        AttentionShape(heads=arguments.heads, kv_heads=arguments.kv_heads),
        Hardware(),
    )
    print_plan(report)
    _write(report, arguments.json)
    return 0


def _attention(arguments: argparse.Namespace) -> int:
    from benchmarks.attention import Settings, attention_report, overlap_report
    from benchmarks.tables import print_attention, print_overlap

    _at_least_one(arguments, "ranks", "context", "heads", "kv_heads", "head_size", "rounds")
    settings = Settings(
        arguments.ranks,
        arguments.context,
        arguments.mix,
        arguments.seed,
        arguments.heads,
        arguments.kv_heads,
        arguments.head_size,
        arguments.rounds,
    )
    if arguments.slow_exchange is None:
        report = attention_report(settings)
        print_attention(report)
    else:
        report = overlap_report(settings, arguments.slow_exchange)
        print_overlap(report)
    _write(report, arguments.json)
    return 0


def _gpu(arguments: argparse.Namespace) -> int:
    if arguments.gather is not None:
        return _gather(arguments)
    from benchmarks.gpu.parts import chosen
    from benchmarks.gpu.report import failed, gpu_report, print_gpu

    parts = chosen(arguments.only)
    report = gpu_report(parts, arguments.device, arguments.tiny, arguments.minutes, arguments.json)
    print_gpu(report)
    return 1 if failed(report) else 0


def _gather(arguments: argparse.Namespace) -> int:
    from benchmarks.gpu.wheels import gather, how_to_use

    print(how_to_use(arguments.gather, gather(arguments.gather, arguments.python, arguments.also)))
    return 0


def _train(arguments: argparse.Namespace) -> int:
    from benchmarks.train import Settings, model_size, print_train, train_report

    _at_least_one(arguments, "sequences", "rounds")
    if arguments.context < 1024 or arguments.context % 2:
        raise UserError(f"--context {arguments.context}: give an even number of 1024 or more")
    if arguments.hidden < 64 or arguments.hidden % 64:
        raise UserError(f"--hidden {arguments.hidden}: give a multiple of 64")
    size = model_size(arguments.hidden)
    report = train_report(Settings(arguments.context, arguments.sequences, arguments.rounds, size=size))
    print_train(report)
    _write(report, arguments.json)
    return 0


def _loader(arguments: argparse.Namespace) -> int:
    from benchmarks.loader import Settings, loader_report, print_loader

    _at_least_one(arguments, "context", "sequences", "batch", "rounds")
    if arguments.context < 1024:
        raise UserError(f"--context {arguments.context} is less than 1024, too short for a mix of documents")
    if arguments.sequences % arguments.batch:
        raise UserError(f"--batch {arguments.batch} does not divide --sequences {arguments.sequences}")
    settings = Settings(arguments.context, arguments.sequences, batch=arguments.batch, rounds=arguments.rounds)
    report = loader_report(settings)
    print_loader(report)
    _write(report, arguments.json)
    return 0


def _store(arguments: argparse.Namespace) -> int:
    from benchmarks.store import print_store, store_report

    _at_least_one(arguments, "megabytes", "rounds")
    report = store_report(arguments.megabytes, arguments.rounds)
    print_store(report)
    _write(report, arguments.json)
    return 0


def _manifest(arguments: argparse.Namespace) -> int:
    from benchmarks.manifest import manifest_report, print_manifest

    _at_least_one(arguments, "ranks", "rounds")
    report = manifest_report(arguments.ranks, arguments.rounds)
    print_manifest(report)
    _write(report, arguments.json)
    return 0


def _text(arguments: argparse.Namespace) -> int:
    from benchmarks.text import print_text, text_report

    _at_least_one(arguments, "megabytes", "rounds")
    report = text_report(arguments.corpora, arguments.megabytes, arguments.rounds)
    print_text(report)
    _write(report, arguments.json)
    return 0


def _pack(arguments: argparse.Namespace) -> int:
    from benchmarks.pack import CONTEXTS, pack_report, print_pack

    _at_least_one(arguments, "documents", "rounds")
    if min(arguments.contexts or CONTEXTS) < 1024:
        raise UserError(f"--contexts {min(arguments.contexts)} is less than 1024, too short for a mix of documents")
    report = pack_report(arguments.contexts or CONTEXTS, arguments.documents, arguments.rounds, arguments.mix)
    print_pack(report)
    _write(report, arguments.json)
    return 0


def _corpus(arguments: argparse.Namespace) -> int:
    from benchmarks.corpus.report import corpus_report, print_corpus

    report = corpus_report(arguments.parts)
    print_corpus(report)
    _write(report, arguments.json)
    return 0


def _tokenize(arguments: argparse.Namespace) -> int:
    from benchmarks.tokenize import Settings, print_tokenize, tokenize_report

    _at_least_one(arguments, "frames", "hour", "rounds")
    report = tokenize_report(Settings(frames=arguments.frames, hour=arguments.hour, rounds=arguments.rounds))
    print_tokenize(report)
    _write(report, arguments.json)
    return 0


def _memory(arguments: argparse.Namespace) -> int:
    from benchmarks.memory import memory_report, print_memory

    if min(arguments.ranks) < 1 or len(set(arguments.contexts)) < 3:
        raise UserError("--contexts needs three different contexts, for a line through them, and --ranks 1 or more")
    if bad := [s for s in arguments.contexts if s < 1024 or any(s % p for p in arguments.ranks)]:
        raise UserError(f"--contexts {bad[0]} is less than 1024 or no multiple of every --ranks")
    report = memory_report(arguments.contexts, arguments.ranks)
    print_memory(report)
    _write(report, arguments.json)
    return 0


def _inference(arguments: argparse.Namespace) -> int:
    from benchmarks.inference import PARTS, Settings, inference_report, print_inference

    _at_least_one(arguments, "prefill", "tokens", "rounds")
    if min(arguments.contexts) < 1:
        raise UserError(f"--contexts {min(arguments.contexts)} is less than 1")
    parts = tuple(arguments.only or PARTS)
    if unknown := sorted({*parts} - {*PARTS}):
        raise UserError(f"--only {unknown[0]} is no part; choose of {', '.join(PARTS)}")
    contexts, sizes = tuple(arguments.contexts), (arguments.prefill, arguments.tokens)
    settings = Settings(contexts, *sizes, rounds=arguments.rounds, parts=parts)
    report = inference_report(settings)
    print_inference(report)
    _write(report, arguments.json)
    return 0


def _cache(arguments: argparse.Namespace) -> int:
    from benchmarks.cache_error import Settings, cache_report, print_cache

    _at_least_one(arguments, "context", "tokens")
    report = cache_report(Settings(arguments.model, arguments.context, arguments.tokens))
    print_cache(report)
    _write(report, arguments.json)
    return 0


def _frames(arguments: argparse.Namespace) -> int:
    from benchmarks.frames_ahead import Settings, frames_report, print_frames

    _at_least_one(arguments, "frames", "rounds")
    if min(arguments.ahead) < 1:
        raise UserError(f"--ahead {min(arguments.ahead)} is less than 1")
    windows = (0, *sorted(set(arguments.ahead)))
    report = frames_report(Settings(arguments.model, windows, arguments.frames, arguments.rounds))
    print_frames(report)
    _write(report, arguments.json)
    return 0


def _drawings(arguments: argparse.Namespace) -> int:
    from benchmarks.drawings import DRAWINGS

    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, (_, draw) in DRAWINGS.items():
        path = arguments.out / name
        path.write_text(draw(), encoding="utf-8")
        print(path)
    return 0


def _at_least_one(arguments: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(arguments, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(arguments, name)} is less than 1")


def _write(report: dict, path: Path | None) -> None:
    if path is not None:
        try:
            path.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            raise UserError(f"cannot write the report to {path}: {error.strerror}") from error
