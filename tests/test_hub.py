"""Checkpoints by name: fetched from a Hub on loopback, resumed, listed, removed; else one sentence with the remedy."""

import errno
import os
import shutil
import subprocess
import sys
import time
from collections import namedtuple

import pytest
from huggingface_hub import constants

from cabochon import hub
from cabochon.errors import AccessError, CheckpointError, InputError, NetworkError, UnknownModelError
from support.loopback_hub import COMMIT, loopback_hub
from support.speaking import save_speaking


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return save_speaking(tmp_path_factory.mktemp("speaking"))


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A loopback Hub with an empty cache pointed at it."""
    with loopback_hub() as running:
        monkeypatch.setattr(constants, "ENDPOINT", running.url)
        template = running.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)
        monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 100_000)
        yield running


def test_names():
    assert hub.parse("E2B") == ("google/gemma-4-E2B-it", "main", None)
    assert hub.parse("gemma4:e4b@v1") == ("google/gemma-4-E4B-it", "v1", None)
    assert hub.parse("me/mine@abc") == ("me/mine", "abc", None)
    assert hub.parse("me/mine/q4.gguf") == ("me/mine", "main", "q4.gguf")
    with pytest.raises(UnknownModelError, match="did you mean google/gemma-4-26B-A4B-it"):
        hub.parse("gemma-4-26b")
    with pytest.raises(UnknownModelError, match="see: cabochon models"):
        hub.parse("nothing-like-it")


def test_what_is_here_is_found(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    assert hub.locate(None) == hub.BUNDLED
    assert hub.locate(tmp_path) == tmp_path
    assert hub.locate(str(tmp_path)) == tmp_path
    for missing in ("./nowhere", "/no/such/folder", tmp_path / "nowhere"):
        with pytest.raises(UnknownModelError, match="no file or folder"):
            hub.locate(missing)
    with pytest.raises(UnknownModelError, match="fetch it with: cabochon pull E2B"):
        hub.locate("E2B")
    with pytest.raises(UnknownModelError, match="did you mean google/gemma-4-26B-A4B-it"):
        hub.locate("google/gemma-4-26b-it")


def test_pull_list_remove(server, checkpoint):
    server.repos["google/gemma-4-E2B-it"] = checkpoint
    seen = []
    folder = hub.pull("E2B", lambda done, total: seen.append((done, total)))
    assert {path.name for path in folder.iterdir()} == {path.name for path in checkpoint.iterdir()}
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    total = sum(path.stat().st_size for path in checkpoint.iterdir())
    assert seen[-1] == (total, total)
    assert seen == sorted(seen)
    assert hub.locate("E2B") == hub.locate(f"E2B@{COMMIT}") == folder
    (found,) = hub.cached()
    assert (found.repo, found.revision, found.complete) == ("google/gemma-4-E2B-it", COMMIT, True)
    assert found.size == total

    sent = server.sent
    assert hub.pull("E2B") == folder
    assert server.sent == sent, "what is here already was fetched again"

    assert hub.remove("E2B") == total
    assert hub.cached() == []
    with pytest.raises(UnknownModelError, match="isn't on this machine"):
        hub.remove("E2B")


def test_a_download_that_breaks_off_resumes_by_itself(server, checkpoint):
    server.repos["me/mine"] = checkpoint
    server.cuts = [1_000_000, 500_000]
    folder = hub.pull("me/mine")
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()
    assert server.cuts == []


def test_a_download_that_keeps_breaking_goes_on_with_the_next_pull(server, checkpoint):
    server.repos["me/mine"] = checkpoint
    size = (checkpoint / "model.safetensors").stat().st_size
    server.cuts = [1_000_000] + [0] * 10
    with pytest.raises(NetworkError, match=r"model.safetensors broke off; the same command again goes on"):
        hub.pull("me/mine")
    with pytest.raises(CheckpointError, match=r"only a part is on this machine \(model.safetensors is missing\)"):
        hub.locate("me/mine")
    assert [found.complete for found in hub.cached()] == [False]
    server.cuts, server.sent = [], 0
    folder = hub.pull("me/mine")
    assert size - 1_000_000 <= server.sent <= size - 900_000, "the part that was here was fetched again"
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_a_file_that_came_damaged_is_thrown_away(server, checkpoint):
    server.repos["me/mine"] = checkpoint
    server.damaged = True
    with pytest.raises(NetworkError, match=r"sha256 differs.*pull again"):
        hub.pull("me/mine")
    server.damaged = False
    folder = hub.pull("me/mine")
    assert (folder / "model.safetensors").read_bytes() == (checkpoint / "model.safetensors").read_bytes()


def test_the_cache_is_the_one_that_other_tools_read(server, checkpoint):
    from huggingface_hub import snapshot_download

    server.repos["me/mine"] = checkpoint
    folder = hub.pull("me/mine")
    assert snapshot_download("me/mine", cache_dir=constants.HF_HUB_CACHE, local_files_only=True) == str(folder)


def test_a_gated_repository(server, checkpoint, monkeypatch):
    server.repos["google/gemma-4-E2B-it"] = checkpoint
    server.gated.add("google/gemma-4-E2B-it")
    for token in (None, "hf_bad"):
        if token:
            monkeypatch.setenv("HF_TOKEN", token)
        with pytest.raises(AccessError, match=r"is gated: accept its licence at .*/google/gemma-4-E2B-it, .* HF_TOKEN"):
            hub.pull("E2B")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert hub.pull("E2B").is_dir()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("google/gemma-4-26b-it", "no repository google/gemma-4-26b-it; did you mean google/gemma-4-26B-A4B-it"),
        ("me/nothing", "no repository me/nothing; check the spelling, and HF_TOKEN"),
        ("me/mine@v7", "me/mine has no revision v7"),
        ("me/mine/other.gguf", "me/mine has no file other.gguf; it has config.json"),
        ("me/words", "me/words holds no safetensors; pull one of its GGUF files: me/words/a.gguf"),
    ],
)
def test_what_the_hub_does_not_have(server, checkpoint, tmp_path, name, words):
    server.repos["me/mine"] = checkpoint
    server.repos["me/words"] = tmp_path / "words"
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "a.gguf").write_bytes(b"GGUF")
    with pytest.raises(UnknownModelError, match=words):
        hub.pull(name)


def test_one_file_of_a_repository(server, tmp_path):
    server.repos["me/gemma"] = tmp_path / "words"
    (tmp_path / "words").mkdir()
    for name in ("a.gguf", "b.gguf"):
        (tmp_path / "words" / name).write_bytes(b"GGUF" + name.encode())
    path = hub.pull("me/gemma/b.gguf")
    assert path.read_bytes() == b"GGUFb.gguf"
    assert hub.locate("me/gemma/b.gguf") == path
    with pytest.raises(UnknownModelError, match="isn't on this machine"):
        hub.locate("me/gemma/a.gguf")


@pytest.mark.parametrize(
    ("status", "error", "words"),
    [
        (401, AccessError, "refuses access to me/mine .401.; set HF_TOKEN"),
        (403, AccessError, "refuses access to me/mine .403."),
        (500, NetworkError, "answered 500 for me/mine; try again later"),
    ],
)
def test_a_hub_that_refuses(server, checkpoint, status, error, words):
    server.repos["me/mine"] = checkpoint
    server.status = status
    with pytest.raises((error, UnknownModelError), match=words):
        hub.pull("me/mine")


def test_no_network(server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(NetworkError, match=r"http://127.0.0.1:9 can't be reached; check the network"):
        hub.pull("E2B")


def test_a_disk_that_is_too_full(server, checkpoint, monkeypatch):
    server.repos["me/mine"] = checkpoint
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 7, 3_000_000))
    with pytest.raises(InputError, match=r"need 0.0 GB, but only 0.0 GB are free .* HF_HOME"):
        hub.pull("me/mine")
    assert server.sent == 0


def test_a_disk_that_fills_up(server, checkpoint, monkeypatch):
    from huggingface_hub import file_download

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    server.repos["me/mine"] = checkpoint
    monkeypatch.setattr(file_download, "http_get", full)
    with pytest.raises(InputError, match="disk is full"):
        hub.pull("me/mine")


def test_a_cache_that_cannot_be_written(server, checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "cache"))
    server.repos["me/mine"] = checkpoint
    assert hub.cached() == []
    with pytest.raises(InputError, match=r"can't be written .* set HF_HOME"):
        hub.pull("me/mine")


def test_one_damaged_model_does_not_hide_the_others(server, checkpoint):
    server.repos["me/mine"] = checkpoint
    folder = hub.pull("me/mine")
    (folder / "model.safetensors.index.json").write_text("[]")
    assert [found.complete for found in hub.cached()] == [False]


def test_an_index_that_is_none(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(CheckpointError, match="isn't an index"):
        hub.missing_files(tmp_path)


def test_what_a_newcomer_types(checkpoint, tmp_path):
    """Two commands, each in a process of its own: pull, chat. Before that: without the licence."""

    def cabochon(*words, token="", text=""):
        env = os.environ | {
            "HF_HOME": str(tmp_path),
            "HF_ENDPOINT": running.url,
            "HF_TOKEN": token,
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-c", "from cabochon.cli import main; main()", *words]
        return subprocess.run(command, env=env, input=text, capture_output=True, text=True, timeout=120)

    with loopback_hub() as running:
        running.repos["google/gemma-4-E2B-it"] = checkpoint
        running.gated.add("google/gemma-4-E2B-it")
        early = cabochon("chat", "gemma4:e2b")
        assert (early.returncode, early.stdout) == (2, "")
        assert early.stderr.strip().endswith("isn't on this machine; fetch it with: cabochon pull gemma4:e2b")
        refused = cabochon("pull", "gemma4:e2b")
        assert refused.returncode == 2
        assert "accept its licence" in refused.stderr
        assert "Traceback" not in refused.stderr
        pulled = cabochon("pull", "gemma4:e2b", token=running.token)
        assert pulled.returncode == 0, pulled.stderr
        answered = cabochon("chat", "gemma4:e2b", "--max-tokens", "4", text="Hello\n")
        assert answered.returncode == 0, answered.stderr
        assert answered.stderr == ""
