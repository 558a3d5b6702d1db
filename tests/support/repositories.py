"""What the stand-in for the Hub keeps in memory: repositories with branches, commits and files, as git would."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

#: What the Hub's `.gitattributes` of a new repository stores as large files, of what comes up here.
LFS_SUFFIXES = (".bin", ".onnx", ".pt", ".pth", ".safetensors", ".npz")
#: The largest file that is stored as text, in bytes.
LARGEST_REGULAR = 10 * 1024 * 1024


@dataclass(frozen=True)
class File:
    """One file of a commit: its whole content, and whether git only keeps a pointer to it."""

    content: bytes
    lfs: bool = False

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def pointer(self) -> bytes:
        header = "version https://git-lfs.github.com/spec/v1"
        return f"{header}\noid sha256:{self.sha256}\nsize {len(self.content)}\n".encode()

    @property
    def blob_id(self) -> str:
        """What git calls it: of a large file, the name of its pointer."""
        blob = self.pointer if self.lfs else self.content
        return hashlib.sha1(b"blob %d\0" % len(blob) + blob).hexdigest()

    @property
    def etag(self) -> str:
        return self.sha256 if self.lfs else self.blob_id

    def described(self, path: str) -> dict[str, Any]:
        """As the Hub's listing of a tree has it."""
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(self.content), "oid": self.blob_id}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.pointer)}
        return entry


@dataclass(frozen=True)
class Commit:
    """A state of a whole repository."""

    oid: str
    title: str
    files: Mapping[str, File]

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        """What lies in a folder (`""`: the root), folders first; empty where there is no such folder."""
        prefix = f"{folder}/" if folder else ""
        inside = {path.removeprefix(prefix): file for path, file in self.files.items() if path.startswith(prefix)}
        folders = {
            "/".join(parts[:depth])
            for parts in (path.split("/") for path in inside)
            for depth in range(1, len(parts) if recursive else min(len(parts), 2))
        }
        shown = [path for path in inside if recursive or "/" not in path]
        return [
            {"type": "directory", "path": prefix + path, "size": 0, "oid": hashlib.sha1(path.encode()).hexdigest()}
            for path in sorted(folders)
        ] + [inside[path].described(prefix + path) for path in sorted(shown)]


@dataclass
class Repository:
    """
    A model repository.

    Args:
        repo_id (`str`): `namespace/name`.
        private (`bool`): Whether only its namespace's owner sees it.
        gated (`bool`): Whether anybody else sees that it is there, but gets no file.
    """

    repo_id: str
    private: bool = False
    gated: bool = False
    branches: dict[str, list[Commit]] = field(default_factory=dict)
    #: The contents of large files by their SHA-256; a commit may name only what is here.
    large: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        attributes = "".join(f"*{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
        self.commit("main", "initial commit", {".gitattributes": File(attributes.encode())})

    @property
    def namespace(self) -> str:
        return self.repo_id.partition("/")[0]

    def commit(self, branch: str, title: str, added: Mapping[str, File], deleted: Iterable[str] = ()) -> Commit:
        """A new commit on a branch. `deleted` are files, or folders with a slash at the end."""
        history = self.branches.setdefault(branch, [])
        files = dict(history[-1].files) if history else {}
        for gone in deleted:
            files = {path: file for path, file in files.items() if path != gone and not _lies_in(path, gone)}
        files.update(added)
        parent = history[-1].oid if history else self.repo_id
        named = "".join(f"{path} {files[path].blob_id}\n" for path in sorted(files))
        commit = Commit(hashlib.sha1(f"{parent}\n{title}\n{named}".encode()).hexdigest(), title, files)
        history.append(commit)
        return commit

    def at(self, revision: str) -> Commit | None:
        """The commit that a branch or a commit's name means; `None`: neither."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((commit for commit in self.commits() if commit.oid == revision), None)

    def commits(self) -> list[Commit]:
        """Those of all branches, each branch's oldest first."""
        return [commit for history in self.branches.values() for commit in history]


def upload_mode(path: str, size: int, sample: bytes) -> str:
    """`"lfs"` for files that are large, binary or named by the Hub's `.gitattributes`, else `"regular"`."""
    large = path.endswith(LFS_SUFFIXES) or size > LARGEST_REGULAR or b"\0" in sample
    return "lfs" if large else "regular"


def _lies_in(path: str, folder: str) -> bool:
    return folder.endswith("/") and path.startswith(folder)
