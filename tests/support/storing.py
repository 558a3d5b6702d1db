"""What the tests run in a process that takes a stand-in for the Hub: the plain client, without any trainer."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest
from huggingface_hub import CommitOperationDelete, HfApi, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from support.stand_in import BAD_TOKEN, READ_TOKEN, STRANGER_TOKEN

REPO = "tester/files"
#: Text, files of several parts and of one, one under a name that must be quoted, and an empty one.
CONTENTS = {
    "README.md": b"---\nlicense: mit\n---\n# Files\n",
    "large.safetensors": random.Random(0).randbytes(200_000),
    "nested/deep/small.bin": b"\0\1\2",
    "nested/with space.txt": "é".encode(),
    "nested/empty.txt": b"",
}


def store_and_read(api: HfApi, folder: Path) -> None:
    assert api.whoami()["name"] == "tester"
    assert api.create_repo("files", exist_ok=True).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError, match="already created"):
        api.create_repo(REPO)

    for path, content in CONTENTS.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *CONTENTS}
    assert {entry.path for entry in api.list_repo_tree(REPO, "nested")} == {
        "nested/deep",
        "nested/with space.txt",
        "nested/empty.txt",
    }
    whole = Path(snapshot_download(REPO))
    assert {path: (whole / path).read_bytes() for path in CONTENTS} == CONTENTS

    # What is there already makes no commit; what is taken away stays in the commits before.
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    deletions = [CommitOperationDelete("nested/deep/"), CommitOperationDelete("README.md")]
    second = api.create_commit(REPO, deletions, commit_message="Less")
    assert api.model_info(REPO).sha == second.oid != first.oid
    assert set(api.list_repo_files(REPO)) == {".gitattributes", *CONTENTS} - {"README.md", "nested/deep/small.bin"}
    assert set(api.list_repo_files(REPO, revision=first.oid)) == {".gitattributes", *CONTENTS}

    api.create_branch(REPO, branch="other/one")
    api.upload_file(path_or_fileobj=b"there", path_in_repo="new.txt", repo_id=REPO, revision="other/one")
    assert {branch.name for branch in api.list_repo_refs(REPO).branches} == {"main", "other/one"}
    assert api.file_exists(REPO, "new.txt", revision="other/one") and not api.file_exists(REPO, "new.txt")
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        api.upload_file(path_or_fileobj=b"---\n[\n---\n", path_in_repo="README.md", repo_id=REPO)


def be_refused(api: HfApi) -> None:
    stranger = HfApi(token=STRANGER_TOKEN)
    api.create_repo("hidden", private=True)
    assert api.model_info("tester/hidden").private
    for repo_id in ("tester/hidden", "tester/missing"):
        for asking in (stranger, HfApi(token=False)):
            with pytest.raises(RepositoryNotFoundError):
                asking.hf_hub_download(repo_id, "config.json")
    with pytest.raises(GatedRepoError):
        stranger.hf_hub_download("tester/gated", ".gitattributes")
    assert Path(api.hf_hub_download("tester/gated", ".gitattributes")).is_file()
    with pytest.raises(RevisionNotFoundError):
        api.hf_hub_download(REPO, "README.md", revision="missing")
    with pytest.raises(EntryNotFoundError):
        api.hf_hub_download(REPO, "missing")
    for token, reason in ((BAD_TOKEN, "401"), (READ_TOKEN, "403"), (STRANGER_TOKEN, "403")):
        with pytest.raises(HfHubHTTPError, match=reason):
            HfApi(token=token).upload_file(path_or_fileobj=b"", path_in_repo="new.txt", repo_id=REPO)
    api.delete_repo("tester/hidden")
    assert not api.repo_exists("tester/hidden")


def main(folder: Path) -> None:
    api = HfApi()
    store_and_read(api, folder)
    be_refused(api)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
