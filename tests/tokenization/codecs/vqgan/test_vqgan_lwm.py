"""LWM's VQGAN: the released JAX code's own numbers, and its file read without running it."""

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from storage.errors import UserError
from tokenization.codecs.vqgan.config import VQGANConfig
from tokenization.codecs.vqgan.import_lwm import diffusers_name, load_lwm_vqgan, read_lwm_parameters
from tokenization.codecs.vqgan.model import VQGAN, build_vqgan, nearest_codes

DATA = Path(__file__).parents[3] / "data" / "vqgan"


@pytest.fixture(scope="module")
def parameters() -> dict[str, np.ndarray]:
    """A small VQGAN's flax parameters, fp32 bit for bit; the file keeps the four bytes apart because they compress
    so.
    """
    shapes = json.loads((DATA / "lwm_small_shapes.json").read_text())
    planes = np.load(DATA / "lwm_small_parameters.npz")["byte_planes"]
    flat = np.ascontiguousarray(planes.T).view("<f4").ravel()
    ends = np.cumsum([int(np.prod(shape)) for shape in shapes.values()])
    return {name: part.reshape(shape) for (name, shape), part in zip(shapes.items(), np.split(flat, ends[:-1]))}


@pytest.fixture(scope="module")
def reference() -> dict[str, np.ndarray]:
    """What the released JAX code made of two frames with those parameters."""
    with np.load(DATA / "lwm_small_io.npz") as file:
        return dict(file)


def nested(parameters: dict[str, np.ndarray]) -> dict:
    """The released file's structure: a dict for each module."""
    tree: dict = {}
    for name, value in parameters.items():
        *path, leaf = name.split("/")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree


@pytest.fixture(scope="module", params=["pickle", "npz"])
def vqgan(request: pytest.FixtureRequest, parameters: dict, tmp_path_factory: pytest.TempPathFactory) -> VQGAN:
    path = tmp_path_factory.mktemp("lwm") / "vqgan"
    with path.open("wb") as file:
        if request.param == "pickle":
            # The released file was written by numpy 1, which calls this module numpy.core.
            file.write(pickle.dumps(nested(parameters), protocol=4))
        else:
            np.savez(file, **parameters)
    return load_lwm_vqgan(path, resolution=64)


def test_sizes_are_read_off_the_parameters(vqgan: VQGAN) -> None:
    assert vqgan.config == VQGANConfig(
        resolution=64, channels=(32, 64), res_blocks=1, latent_channels=16, embed_dim=8, codebook_size=64
    )


def test_latents_and_codes_equal_the_released_code(vqgan: VQGAN, reference: dict) -> None:
    pixels = torch.from_numpy(reference["pixel_values"]).permute(0, 3, 1, 2)
    latents = vqgan.model.encode(pixels).latents
    np.testing.assert_allclose(latents.permute(0, 2, 3, 1).numpy(), reference["pre_quant"], atol=1e-5)
    np.testing.assert_array_equal(nearest_codes(latents, vqgan.codebook).numpy(), reference["codes"][:1])


@pytest.mark.parametrize(("codes", "reconstruction"), [("codes", "recon"), ("random_codes", "random_recon")])
def test_reconstructions_equal_the_released_code(
    vqgan: VQGAN, reference: dict, codes: str, reconstruction: str
) -> None:
    pixels = vqgan.decode_pixels(torch.from_numpy(reference[codes][:1]).long().flatten(1))
    np.testing.assert_allclose(pixels.permute(0, 2, 3, 1).numpy(), reference[reconstruction], atol=1e-5, rtol=1e-5)


def test_decoded_bytes_equal_the_released_code(vqgan: VQGAN, reference: dict) -> None:
    frames = vqgan.decode(reference["codes"].reshape(2, -1))
    # Truncation to bytes turns a last-bit difference at a whole number into a step of one: 3 of 24,576 bytes.
    difference = np.abs(frames.astype(int) - reference["recon_uint8"])
    assert difference.max() <= 1
    assert np.count_nonzero(difference) <= 10


def test_full_lwm_vqgan_maps_one_to_one_onto_diffusers() -> None:
    shapes = json.loads((DATA / "lwm_full_shapes.json").read_text())
    with torch.device("meta"):
        state = build_vqgan(VQGANConfig.lwm()).state_dict()
    assert sum(value.numel() for value in state.values()) == 146_244_675
    assert len(shapes) == 277

    def layout(shape: list[int]) -> tuple[int, ...]:
        return (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else tuple(shape)

    mapped = {diffusers_name(name): layout(shape) for name, shape in shapes.items()}
    assert mapped == {name: tuple(value.shape) for name, value in state.items()}


def test_full_lwm_sizes() -> None:
    config = VQGANConfig.lwm()
    assert (config.resolution, config.grid, config.codes_per_frame, config.codebook_size) == (256, 16, 256, 8192)


class Hostile:
    """Writes a file when a careless reader unpickles it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_a_pickle_that_runs_code_is_refused_and_does_not_run(tmp_path: Path, protocol: int) -> None:
    mark = tmp_path / "mark"
    path = tmp_path / "vqgan"
    path.write_bytes(pickle.dumps({"encoder": Hostile(mark)}, protocol=protocol))
    with pytest.raises(UserError, match="only numpy arrays"):
        read_lwm_parameters(path)
    assert not mark.exists()
    pickle.loads(path.read_bytes())
    assert mark.exists(), "the pickle was harmless, the test shows nothing"


@pytest.mark.parametrize(
    "program",
    [
        b"cbuiltins\neval\n(S'1'\ntR.",
        b"cos\nsystem\n(S'true'\ntR.",
        b"cnumpy\nload\n(S'x'\ntR.",
        b"cnumpy._core.multiarray\ndtype.__class__\n(S'x'\ntR.",
        b"\x80\x04\x8c\x05numpy\x8c\x10ctypeslib.ctypes\x93.",
    ],
)
def test_other_callables_are_refused(tmp_path: Path, program: bytes) -> None:
    path = tmp_path / "vqgan"
    path.write_bytes(program)
    with pytest.raises(UserError, match="only numpy arrays"):
        read_lwm_parameters(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no LWM VQGAN file"),
        (b"not a pickle", "no LWM VQGAN file"),
        (pickle.dumps({"encoder": "a string"}), "holds a str"),
        (pickle.dumps({"encoder": np.array(["x"])}), "holds a ndarray"),
        (pickle.dumps([1, 2]), "top level holds a list"),
    ],
)
def test_other_files_are_a_user_error(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "vqgan"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_lwm_parameters(path)


def test_missing_file_and_missing_parts_are_user_errors(tmp_path: Path, parameters: dict) -> None:
    with pytest.raises(UserError, match=r"vqgan\.weights"):
        load_lwm_vqgan(tmp_path / "absent")
    for lost in ("quantize/embeddings", "decoder/Conv_1/bias"):
        path = tmp_path / "vqgan.npz"
        np.savez(path, **{name: value for name, value in parameters.items() if name != lost})
        with pytest.raises(UserError, match=r"not LWM's VQGAN|lacks"):
            load_lwm_vqgan(path, resolution=64)


def test_arrays_of_every_pickle_protocol_with_bytes_are_read(tmp_path: Path) -> None:
    for protocol in range(3, pickle.HIGHEST_PROTOCOL + 1):
        stream = io.BytesIO()
        value = np.arange(6, dtype=np.float32).reshape(2, 3)
        pickle.dump({"params": {"quant_conv": {"kernel": value}}}, stream, protocol=protocol)
        path = tmp_path / f"{protocol}"
        path.write_bytes(stream.getvalue())
        np.testing.assert_array_equal(read_lwm_parameters(path)["quant_conv/kernel"], value)
