"""Other entries in the folder of checkpoints: deleted, or reported and ignored."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from jepa_dist.checkpoint import folder as folders
from jepa_dist.errors import UserError
from jepa_dist.run.lock import RunLock


def test_entries_named_like_staging_folders_are_deleted(tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "x").write_text("x")
    folder = tmp_path / "checkpoints"
    folder.mkdir()
    (folder / ".staging-file").write_text("x")
    (folder / ".staging-link").symlink_to(precious)
    (folder / ".deleting-dangling").symlink_to("nowhere")
    os.mkfifo(folder / ".deleting-fifo")
    (folder / ".staging-folder" / "inner").mkdir(parents=True)
    os.mkfifo(folder / ".staging-folder" / "fifo")
    assert folders.make_folder(folder) == []
    assert list(folder.iterdir()) == []
    assert (precious / "x").read_text() == "x"


def test_an_entry_that_cannot_be_deleted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".staging-x").mkdir()

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(folders, "delete", refuse)
    (message,) = folders.make_folder(tmp_path)
    assert message == f"{tmp_path / '.staging-x'}: cannot be deleted: Permission denied"


@pytest.mark.parametrize("kind", ["link", "file", "folder"])
def test_a_step_is_removed_whatever_its_file_type(tmp_path: Path, kind: str) -> None:
    step, precious = tmp_path / "step_00000001", tmp_path / "precious"
    precious.mkdir()
    if kind == "link":
        step.symlink_to(precious)
    elif kind == "file":
        step.write_text("x")
    else:
        step.mkdir()
    folders.remove(step)
    assert [path.name for path in tmp_path.iterdir()] == ["precious"]


def test_a_lock_that_is_a_dangling_link_is_taken_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.lock").symlink_to("nowhere")
    monkeypatch.setattr("jepa_dist.run.lock.STALE_SECONDS", 0.1)
    lock = RunLock(tmp_path)
    (message,) = lock.acquire()
    assert "taken over" in message
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_the_folder_is_created_again_but_not_the_run_directory(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "checkpoints"
    gone = pytest.raises(UserError, match="a folder above it, was removed or renamed")
    with gone, folders.writing(folder):
        folders.make_staging(folder, 1)
    assert not folder.parent.exists()
    folder.parent.mkdir()
    staging, messages = folders.make_staging(folder, 1)
    assert staging.is_dir()
    assert messages == [f"{folder}: was removed while the run used it; created again"]
    assert folders.make_staging(folder, 2)[1] == []
