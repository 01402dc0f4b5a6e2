"""Artifacts: sealing, verifying, and manifests that lie."""

import hashlib
import json

import pytest

from afina import artifact, durable
from afina.artifact import FORMAT, MANIFEST, folder_digest, open_artifact, parent, seal, sha256
from afina.errors import AfinaError, OutputError


@pytest.fixture
def sealed(tmp_path):
    folder = tmp_path / "thing"
    (folder / "deep").mkdir(parents=True)
    (folder / "one.txt").write_text("one")
    (folder / "deep" / "two.bin").write_bytes(b"\0\1")
    (folder / "deep" / MANIFEST).write_text("{}")
    (folder / f".x{durable.PARTIAL}-1-2-3").write_text("half")
    return seal(folder, "run", parents=[parent("base", "00", "base")], seed=7)


def test_what_is_sealed_can_be_read_back(sealed):
    opened = open_artifact(sealed.folder, "run")
    assert opened.manifest == sealed.manifest
    assert (opened.kind, opened.manifest["seed"], opened.manifest["format"]) == ("run", 7, FORMAT)
    assert opened.manifest["parents"] == [{"role": "base", "name": "base", "sha256": "00"}]
    assert set(opened.manifest["files"]) == {"one.txt", "deep/two.bin", f"deep/{MANIFEST}"}
    assert opened.manifest["files"]["deep/two.bin"]["bytes"] == 2
    assert opened.manifest["versions"]["python"].startswith("3.")
    assert opened.manifest["versions"]["torch"]
    opened.verify()


def test_the_digest_names_the_manifest(sealed):
    assert sealed.digest == sha256(sealed.folder / MANIFEST)


def changed(folder):
    (folder / "one.txt").write_text("eno")


def removed(folder):
    (folder / "deep" / "two.bin").unlink()


def made_a_folder(folder):
    (folder / "one.txt").unlink()
    (folder / "one.txt").mkdir()


def relinked(folder):
    (folder.parent / "elsewhere").write_text("one")  # the same bytes, but not in this folder
    (folder / "one.txt").unlink()
    (folder / "one.txt").symlink_to(folder.parent / "elsewhere")


@pytest.mark.parametrize(
    ("tamper", "name"),
    [(changed, "one.txt"), (removed, "deep/two.bin"), (made_a_folder, "one.txt"), (relinked, "one.txt")],
)
def test_tampering_is_named(sealed, tamper, name):
    tamper(sealed.folder)
    with pytest.raises(OutputError, match=name) as caught:
        open_artifact(sealed.folder).verify()
    assert caught.value.hint


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"[]",
        b"null",
        b"{}",
        b'{"files": []}',
        b'{"files": {}}',
        b'{"files": {}, "format": 2}',
        b'{"files": {}, "format": "1"}',
        b"[" * 200_000,
        b'{"a": ' * 200_000,
    ],
    ids=lambda content: content[:16].decode(errors="replace") + f"-{len(content)}",
)
def test_a_manifest_that_is_none_is_one_error(tmp_path, content):
    (tmp_path / MANIFEST).write_bytes(content)
    with pytest.raises(AfinaError) as caught:
        open_artifact(tmp_path)
    assert caught.value.file == str(tmp_path / MANIFEST)


def test_a_manifest_without_end_is_not_read(tmp_path):
    with (tmp_path / MANIFEST).open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(AfinaError, match="larger"):
        open_artifact(tmp_path)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../secret", "."])
def test_a_manifest_does_not_lead_out_of_its_folder(tmp_path, name):
    """Naming a file outside, even with its true hash, is a mismatch and never a way to learn whether it is there."""
    folder = tmp_path / "thing"
    folder.mkdir()
    (tmp_path / "secret").write_text("s")
    files = {name: {"sha256": sha256(tmp_path / "secret"), "bytes": 1}}
    (folder / MANIFEST).write_text(json.dumps({"format": FORMAT, "kind": "run", "files": files}))
    with pytest.raises(OutputError):
        open_artifact(folder).verify()


@pytest.mark.parametrize("entry", [None, "x", [], {}, {"sha256": 3}])
def test_an_entry_of_another_shape_is_a_mismatch(sealed, entry):
    manifest = json.loads((sealed.folder / MANIFEST).read_text())
    manifest["files"]["one.txt"] = entry
    (sealed.folder / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(OutputError, match=r"one\.txt"):
        open_artifact(sealed.folder).verify()


def test_the_wrong_kind_is_named(sealed):
    with pytest.raises(AfinaError, match="of the kind run, not export"):
        open_artifact(sealed.folder, "export")


def test_an_unfinished_folder_is_no_artifact(tmp_path):
    with pytest.raises(AfinaError, match=r"no manifest\.json"):
        open_artifact(tmp_path)
    with pytest.raises(AfinaError, match=r"no manifest\.json"):
        open_artifact(tmp_path / "nowhere")


def test_the_digest_of_a_folder_is_of_names_and_contents(tmp_path):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        folder.mkdir()
        (folder / "x").write_text("1")
        (folder / "y").write_text("2")
    assert folder_digest(first) == folder_digest(second)
    (second / "y").rename(second / "z")
    assert folder_digest(first) != folder_digest(second)
    (second / "z").rename(second / "y")
    (second / "x").write_text("2")
    assert folder_digest(first) != folder_digest(second)


def test_facts_that_are_no_json_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        seal(tmp_path, "run", loss=float("nan"))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("size", [0, 1, 4095, 4096, 4097, 12288, 20001])
def test_a_file_is_hashed_in_parts(tmp_path, monkeypatch, size):
    monkeypatch.setattr(artifact, "AT_ONCE", 4096)
    (tmp_path / "file").write_bytes(bytes(number % 251 for number in range(size)))
    assert sha256(tmp_path / "file") == hashlib.sha256((tmp_path / "file").read_bytes()).hexdigest()
