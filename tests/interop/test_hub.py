"""Models of the hub: the real client, a hub on this machine, and folders of transformers."""

import errno
import hashlib
import os
import pathlib
import shutil
import threading

import hub as hub_lib
import jax
import numpy as np
import pytest
import runs
import small
from hub import GPT1, Hub
from huggingface_hub import constants, snapshot_download
from huggingface_hub.utils import get_session
from refusals import fails

from gptjax.infer import predictor
from gptjax.interop import arrays, convert, hub, huggingface

MINE = "me/mine"
ADDRESS = f"hf://{MINE}"
SMALL = ["config.json", "merges.txt", "vocab.json"]
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return hub_lib.save_gpt1(tmp_path_factory.mktemp("gpt1"))


@pytest.fixture
def server(folder):
    with Hub() as server:
        server.add(MINE, folder)
        server.add(GPT1, folder)
        yield server


@pytest.fixture
def home(server, monkeypatch, tmp_path) -> pathlib.Path:
    """A new cache, and a client that asks the server."""
    hub_lib.use(monkeypatch, server, tmp_path / "home")
    return tmp_path / "home"


def blobs(home: pathlib.Path) -> dict[str, bytes]:
    """Name -> bytes of all files of the cache that hold contents."""
    found = {}
    for path in (home / "hub").glob("models--*/blobs/*"):
        found[path.name] = path.read_bytes()
    return found


def assert_whole(home: pathlib.Path, server: Hub) -> None:
    """Requires that a cache holds only whole files, and that the next start succeeds."""
    for digest, data in blobs(home).items():
        if not digest.endswith(".incomplete"):
            assert digest in (hashlib.sha256(data).hexdigest(), hub_lib.git_hash(data))
    server.faults.clear()
    commit = hub.pin(ADDRESS)
    place = home / "hub" / "models--me--mine" / "snapshots" / commit
    for name in (*SMALL, WEIGHTS):
        assert (place / name).read_bytes() == server.repositories[MINE].commits[commit][name]


def assert_is(found: hub.HubModel, folder: pathlib.Path) -> None:
    expected = huggingface.read(folder)
    assert found.meta == convert.meta_of(expected)
    params = arrays.flatten(found.load_params(small.mesh(1)))
    assert params.keys() == expected.arrays.keys()
    for name, array in expected.arrays.items():
        assert np.array_equal(params[name], array), name


def test_a_model_of_the_hub_is_its_folder_to_the_bit(server, home, folder, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", hub_lib.TOKEN)
    lines: list[str] = []
    found = hub.open_checkpoint("gpt1", say=lines.append)
    assert_is(found, folder)
    commit = server.repositories[GPT1].revisions["main"]
    assert found.path == f"hf://{GPT1}@{commit}"
    assert server.bodies() == sorted([*SMALL, WEIGHTS])
    size = (folder / WEIGHTS).stat().st_size / 1e6
    (line,) = lines
    assert line == (
        f"hf://{GPT1}: downloading {WEIGHTS} ({size:.1f} MB) to {constants.HF_HUB_CACHE}"
    )
    # The token is for the hub, not for the host with the large files.
    for request in server.requests:
        sent = request.headers.get("authorization", request.headers.get("Authorization"))
        assert (sent is None) == request.path.startswith("/cdn/"), request
    # The second start asks for the commit alone, and with the commit for nothing.
    for commit_given, count in (("", 1), (commit, 0)):
        server.requests.clear()
        assert_is(hub.open_checkpoint("gpt1", commit=commit_given), folder)
        assert len(server.requests) == count, server.requests
        assert server.bodies() == []


def test_the_library_reads_our_cache_and_we_read_the_librarys(server, home, folder, tmp_path):
    hub.open_checkpoint(ADDRESS)
    server.requests.clear()
    place = snapshot_download(MINE, allow_patterns=[*SMALL, WEIGHTS])
    assert server.bodies() == []
    for name in (*SMALL, WEIGHTS):
        assert pathlib.Path(place, name).read_bytes() == (folder / name).read_bytes()
    shutil.rmtree(home)
    snapshot_download(MINE)
    server.requests.clear()
    assert_is(hub.open_checkpoint(ADDRESS), folder)
    assert server.bodies() == []


def test_several_files_and_the_tokens_of_an_exported_model(server, home, tmp_path):
    import transformers

    written = tmp_path / "written"
    written.mkdir()
    task = small.task("multiple_choice")
    weights = arrays.Weights(
        task.model.config, arrays.flatten(task.params), small.small_tokenizer(), task.spec
    )
    huggingface.write(weights, written)
    server.add(MINE, written, "exported")
    assert_is(hub.open_checkpoint(f"{ADDRESS}@exported"), written)
    parts = tmp_path / "parts"
    model = transformers.OpenAIGPTLMHeadModel.from_pretrained(written)
    model.save_pretrained(parts, max_shard_size="20KB")
    shutil.copy(written / "tokenizer.json", parts)
    server.add(MINE, parts, "parts")
    assert_is(hub.open_checkpoint(f"{ADDRESS}@parts"), parts)
    # With a part missing in the cache, the model is not whole.
    place = home / "hub" / "models--me--mine" / "snapshots" / hub.pin(f"{ADDRESS}@parts")
    next(place.glob("model-*")).unlink()
    server.requests.clear()
    assert_is(hub.open_checkpoint(f"{ADDRESS}@parts"), parts)
    assert server.bodies() == []  # its blob was still there


def test_logits_are_those_of_transformers(server, home, folder):
    import torch
    import transformers

    found = hub.open_checkpoint(ADDRESS)
    ordinary = found.weights.num_ordinary_tokens
    ids = np.random.default_rng(0).integers(0, ordinary, (3, 12))
    model = transformers.OpenAIGPTLMHeadModel.from_pretrained(folder).eval()
    with torch.no_grad():
        theirs = model(torch.tensor(ids)).logits.numpy()
    ours = predictor.from_checkpoint(found).lm_logits(ids)[..., :ordinary]
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=2e-5 * np.abs(theirs).max())


def ranges(server: Hub) -> list[str]:
    """The ranges of the requests for the weights."""
    asked = (each.headers for each in server.requests if each.path.startswith("/cdn/"))
    return [headers.get("Range", headers.get("range", "")) for headers in asked]


def test_a_broken_connection_goes_on(server, home, folder, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    server.fault("/cdn/", cut=5500)
    server.fault("/cdn/", cut=9999)
    assert_is(hub.open_checkpoint(ADDRESS), folder)
    assert ranges(server) == ["", "bytes=5000-", "bytes=14000-"]


def stop_after(count: int):
    """A receiver of lines that ends the process, as Ctrl-C does, at the line of this number."""
    lines: list[str] = []

    def say(text: str) -> None:
        lines.append(text)
        if len(lines) == count:
            raise KeyboardInterrupt

    return say


def test_a_download_goes_on_after_an_interrupt(server, home, folder, monkeypatch):
    monkeypatch.setattr(hub, "_LINE_SECONDS", 0.0)  # a line for each piece of 1,000 bytes
    with pytest.raises(KeyboardInterrupt):
        hub.open_checkpoint(ADDRESS, say=stop_after(1 + len(SMALL) + 8))
    (partial,) = (home / "hub").glob("models--*/blobs/*.incomplete")
    arrived = partial.read_bytes()
    assert len(arrived) >= 7000
    assert (folder / WEIGHTS).read_bytes().startswith(arrived)
    server.requests.clear()
    lines: list[str] = []
    assert_is(hub.open_checkpoint(ADDRESS, say=lines.append), folder)
    assert ranges(server) == [f"bytes={len(arrived)}-"]
    assert f"going on after {len(arrived) / 1e6:.1f} MB" in lines[0]
    assert len(blobs(home)) == len(SMALL) + 1  # nothing else is left


def test_a_damaged_part_of_an_earlier_download_is_not_used(server, home, folder, monkeypatch):
    digest = hashlib.sha256((folder / WEIGHTS).read_bytes()).hexdigest()
    partial = home / "hub" / "models--me--mine" / "blobs" / f"{digest}.gptjax.incomplete"
    partial.parent.mkdir(parents=True)
    for size, expected in ((3000, ["bytes=3000-", ""]), (10**6, [""])):
        partial.write_bytes(bytes(size))
        assert_is(hub.open_checkpoint(ADDRESS), folder)
        assert ranges(server) == expected
        server.requests.clear()
        shutil.rmtree(home / "hub" / "models--me--mine" / "snapshots")
        (partial.parent / digest).unlink()


def test_two_at_once_download_once(server, home, folder):
    found: list[hub.HubModel] = []
    get_session()  # older versions of the library let each thread make one
    threads = [
        threading.Thread(target=lambda: found.append(hub.open_checkpoint(ADDRESS)))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    for each in found:
        assert_is(each, folder)
    assert server.bodies().count(WEIGHTS) == 1


def test_without_the_network_the_cache_is_read(server, home, folder, monkeypatch, tmp_path):
    other = hub_lib.save_gpt1(tmp_path / "other", seed=1)
    hub.open_checkpoint(ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    server.requests.clear()
    server.add(MINE, other)
    lines: list[str] = []
    assert_is(hub.open_checkpoint(ADDRESS, say=lines.append), folder)
    assert server.requests == []
    commit = hub.pin(ADDRESS)
    assert lines == [f"{ADDRESS}: HF_HUB_OFFLINE is set; commit {commit[:12]} is in the cache"]
    assert "HF_HUB_OFFLINE is set" in fails(hub.open_checkpoint, f"hf://{GPT1}")
    # What another program has downloaded of a model may lack files.
    (home / "hub" / "models--me--mine" / "snapshots" / commit / WEIGHTS).unlink()
    assert "does not hold the whole model" in fails(hub.open_checkpoint, ADDRESS)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The server is too busy for the question, but not for a commit that is in the cache.
    hub.open_checkpoint(ADDRESS, commit=commit)
    server.fault("/api/models/", status=503)
    assert_is(hub.open_checkpoint(ADDRESS, say=lines.append), folder)
    assert "the hub answers with the error 503; commit" in lines[-1]
    assert_is(hub.open_checkpoint(ADDRESS), other)


def test_a_damaged_file_of_the_cache_is_downloaded_again(server, home, folder, monkeypatch):
    commit = hub.pin(ADDRESS)
    for name in ("config.json", WEIGHTS):
        blob = (home / "hub" / "models--me--mine" / "snapshots" / commit / name).resolve()
        blob.write_bytes(blob.read_bytes()[:-1] + b"?")
        server.requests.clear()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
        assert "HF_HUB_OFFLINE" in fails(hub.open_checkpoint, ADDRESS)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        assert_is(hub.open_checkpoint(ADDRESS, commit=commit), folder)
        assert server.bodies() == [name]


FORM = "must be hf://OWNER/NAME, hf://OWNER/NAME@REVISION or gpt1"
REFUSED = {
    "no owner": ("hf://openai-gpt", FORM),
    "a path": ("hf://me/mine/model.safetensors", FORM),
    "no revision": ("hf://me/mine@", FORM),
    "a revision with dots": ("hf://me/mine@../../x", FORM),
    "no id": ("hf://me/-mine", FORM),
    "no model": ("hf://me/mime", "there is no such model, or it is private; check the name at"),
    "no model of that revision": (f"{ADDRESS}@v9", "has no revision v9; give a branch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_address_is_one_line(server, home, case):
    address, message = REFUSED[case]
    assert message in fails(hub.open_checkpoint, address, "init_from")
    assert fails(hub.open_checkpoint, address, "x").startswith(f"`x`={address}: ")
    assert not server.bodies()
    assert_whole(home, server)


def test_a_folder_of_the_name_gpt1_is_not_taken_for_the_model(server, home, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "gpt1").mkdir()
    message = fails(hub.open_checkpoint, "gpt1", "init_from")
    assert f"write hf://{GPT1} or ./gpt1" in message
    assert "no checkpoint there" in fails(hub.open_checkpoint, "./gpt1")
    assert server.requests == []


ACCESS = [
    # What the repository is, the token, the message.
    ("private", "", "it is private; check the name at", "set HF_TOKEN for a private model"),
    ("private", hub_lib.STRANGER, "your token may not read it; check the name at", "/me/mine"),
    ("private", "hf_nonsense", "the hub does not know your token", "or unset it"),
    ("private", hub_lib.TOKEN, "", ""),
    ("gated", "", "is gated; ask for access for your account at", "set HF_TOKEN to a token"),
    ("gated", hub_lib.STRANGER, "is gated; ask for access for the account of your token", "/me"),
    ("gated", hub_lib.TOKEN, "", ""),
]


@pytest.mark.parametrize("case", ACCESS, ids=lambda case: f"{case[0]} {case[1]}")
def test_a_model_that_is_not_for_everybody(server, home, folder, monkeypatch, case):
    kind, token, first, second = case
    setattr(server.repositories[MINE], kind, True)
    monkeypatch.setenv("HF_TOKEN", token)
    if not first:
        assert_is(hub.open_checkpoint(ADDRESS), folder)
        return
    message = fails(hub.open_checkpoint, ADDRESS)
    assert first in message
    assert second in message
    assert token not in message or not token
    monkeypatch.setenv("HF_TOKEN", hub_lib.TOKEN)
    assert_whole(home, server)


WRONG_FILES = {
    "a pickle": (lambda files: files.pop(WEIGHTS), "pytorch_model.bin only, a pickle", []),
    "no weights": (
        lambda files: [files.pop(WEIGHTS), files.pop("pytorch_model.bin")],
        "has no model.safetensors", [],
    ),
    "no config": (lambda files: files.pop("config.json"), "has no config.json", []),
    "another model": (
        lambda files: files.update({"config.json": b'{"model_type": "gpt2"}'}),
        "config.json: model_type must be openai-gpt, not gpt2", SMALL,
    ),
    "a part of the weights": (
        lambda files: files.update(
            {"model.safetensors.index.json": b'{"weight_map": {"a": "x.safetensors"}}'},
        ) or files.pop(WEIGHTS),
        "the repository has no x.safetensors", [*SMALL, "model.safetensors.index.json"],
    ),
    "no tokenizer": (
        lambda files: files.pop("vocab.json"), "has neither vocab.json and merges.txt nor", None,
    ),
    "a header": (
        lambda files: files.update({WEIGHTS: b"\xff" * 200}), "model.safetensors: is damaged", None,
    ),
    "another vocabulary": (
        lambda files: files.update({"vocab.json": b"{}"}), "vocab.json", None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG_FILES)
def test_a_repository_that_is_no_gpt1_is_one_line(server, home, folder, case):
    change, message, asked = WRONG_FILES[case]
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    change(files)
    server.add(MINE, files, "wrong")
    found = fails(hub.open_checkpoint, f"{ADDRESS}@wrong", "init_from")
    assert found.startswith(f"`init_from`={ADDRESS}@wrong: ")
    assert message in found
    assert str(home) not in found
    if asked is not None:  # the weights are not downloaded in vain
        assert server.bodies() == sorted(asked)
    assert_whole(home, server)


FAULTS = {
    "damaged weights": ("/cdn/", {"damage": True}, "model.safetensors has arrived damaged"),
    "damaged small file": ("/config.json", {"damage": True}, "config.json has arrived damaged"),
    "a short file": ("/cdn/", {"shorter": 100}, "has not arrived as the hub describes it"),
    "an error in the middle": ("/cdn/", {"status": 500}, "the hub answers with the error 500"),
    "an error": ("/api/models/", {"status": 502}, "the hub answers with the error 502"),
    "too many requests": (
        "/api/models/",
        {"status": 429, "headers": {"ratelimit": '"api";r=0;t=55', "retry-after": "55"}},
        "too many requests to the hub; wait some minutes, or set HF_TOKEN",
    ),
    "a lost file": (
        "/resolve/",
        {"status": 404, "method": "HEAD", "headers": {"X-Error-Code": "EntryNotFound"}},
        "the hub does not find a file that it lists",
    ),
    "no right": (
        "/resolve/", {"status": 403, "method": "HEAD"}, "check the rights of HF_TOKEN",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_failure_of_the_hub_leaves_the_cache_whole(server, home, case, capfd, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    path, changes, message = FAULTS[case]
    server.fault(path, times=99, **changes)
    assert message in fails(hub.open_checkpoint, ADDRESS)
    assert capfd.readouterr() == ("", "")
    assert_whole(home, server)


def test_a_server_that_is_no_hub_is_one_line(server, home, monkeypatch):
    server.fault("/api/models/", status=200)  # a JSON object without a commit
    assert "does not answer as the hub does" in fails(hub.open_checkpoint, ADDRESS)
    monkeypatch.setattr(constants, "ENDPOINT", "localhost:1")  # without http://
    assert "localhost:1 cannot be reached" in fails(hub.open_checkpoint, ADDRESS)
    monkeypatch.setattr(constants, "ENDPOINT", f"http://localhost:{runs.free_port()}")
    message = fails(hub.open_checkpoint, ADDRESS)
    assert "cannot be reached (ConnectError" in message
    assert "check the network, the proxy and HF_ENDPOINT" in message
    monkeypatch.setattr(constants, "ENDPOINT", server.endpoint)
    assert_whole(home, server)


def test_a_full_disk_and_a_cache_that_cannot_be_written(server, home, folder, monkeypatch):
    class Usage:
        free = 30_000

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: Usage)
        message = fails(hub.open_checkpoint, ADDRESS)
    assert "needs 0.1 MB, and the disk of" in message
    assert "or set HF_HOME to a folder on another disk" in message

    class Full:
        """A file on a disk that is full after 5,000 bytes."""

        def __init__(self, path, mode):
            self._file = open(path, mode)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self._file.close()

        def write(self, data):
            if self._file.tell() >= 5000:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return self._file.write(data)

    with monkeypatch.context() as patch:
        patch.setattr(hub, "open", Full, raising=False)
        message = fails(hub.open_checkpoint, ADDRESS)
    assert "cannot write the cache" in message
    assert "No space left on device; free space" in message
    assert not list((home / "hub").glob("models--*/blobs/*.incomplete"))
    assert_whole(home, server)
    shutil.rmtree(home)
    home.write_text("a file is in the place of the folder")
    message = fails(hub.open_checkpoint, ADDRESS)
    assert "cannot write the cache" in message
    assert "or set HF_HOME to another folder" in message
    home.unlink()
    assert_whole(home, server)


def test_each_device_gets_its_part(server, home, folder, eight_devices):
    found = hub.open_checkpoint(ADDRESS)
    whole = arrays.flatten(found.load_params(small.mesh(1)))
    params = found.load_params(small.mesh(2, 2, 1))
    for name, array in arrays.flatten(params).items():
        assert np.array_equal(array, whole[name]), name
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(params))


def test_a_configuration_names_a_commit_only_with_a_model_of_the_hub(tmp_path):
    commit = "0" * 40
    for flags, message in (
        ((f"--config.init_from_commit={commit}",), "is for a model of the hub"),
        (("--config.init_from=gpt1", "--config.init_from_commit=main"), "40 hexadecimal digits"),
    ):
        result = runs.main(*runs.TINY, *runs.files().finetune, *flags, f"--workdir={tmp_path}/w")
        assert message in result.error
