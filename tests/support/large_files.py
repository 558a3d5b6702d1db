"""Where the Hub stand-in keeps large files: a server of its own, as the Hub's is, that knows no token."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from support.loopback import Refusal, Request, Response, Route, Server, Traffic
from support.repositories import File, Repository


@dataclass
class _Upload:
    """A large file on its way: where it belongs, and the parts that have arrived whole."""

    repository: Repository
    oid: str
    size: int
    parts: dict[int, bytes] = field(default_factory=dict)


class Storage:
    """
    Takes and hands out large files at addresses that are all it needs to know, as addresses that the Hub has signed.

    Args:
        repositories (mapping of `str` to [`Repository`]): By `namespace/name`.
        traffic ([`Traffic`]): Shared with the Hub.
        part_size (`int`, *optional*): Files of more bytes are uploaded in parts of this size.
    """

    def __init__(self, repositories: Mapping[str, Repository], traffic: Traffic, part_size: int | None) -> None:
        self.repositories = repositories
        self.part_size = part_size
        self._uploads: dict[str, _Upload] = {}
        upload = r"/(?P<repo>[^/]+/[^/]+)/upload/(?P<key>[\w-]+)"
        routes: list[Route] = [
            ("PUT", f"{upload}(/(?P<part>[0-9]+))?", self._take),
            ("POST", f"{upload}/complete", self._complete),
            ("GET", "/(?P<repo>[^/]+/[^/]+)/large/(?P<oid>[0-9a-f]+)", self._hand_out),
        ]
        # The Hub's storage has another name, by which clients tell where no token is to go.
        self.server = Server(routes, traffic, host="localhost")

    def address(self, repository: Repository, oid: str) -> str:
        """Where a file can be had."""
        return f"{self.server.url}/{repository.repo_id}/large/{oid}"

    def upload_action(self, repository: Repository, oid: str, size: int) -> dict[str, Any]:
        """What git-LFS is told of where to bring a file."""
        key = secrets.token_urlsafe()
        self._uploads[key] = _Upload(repository, oid, size)
        href = f"{self.server.url}/{repository.repo_id}/upload/{key}"
        if self.part_size is None or size <= self.part_size:
            return {"href": href, "header": {}}
        parts = {str(part + 1): f"{href}/{part + 1}" for part in range(math.ceil(size / self.part_size))}
        return {"href": f"{href}/complete", "header": {"chunk_size": str(self.part_size), **parts}}

    def _take(self, request: Request, repo: str, key: str, part: str | None) -> Response:
        _check_no_token(request)
        upload = self._uploads[key]
        upload.parts[int(part or 1)] = request.body
        if part is None:
            _store(upload)
        return Response(headers={"ETag": _part_etag(request.body)})

    def _complete(self, request: Request, repo: str, key: str) -> Response:
        _check_no_token(request)
        upload = self._uploads[key]
        claimed = [(item["partNumber"], item["etag"]) for item in request.json["parts"]]
        if claimed != [(number, _part_etag(body)) for number, body in sorted(upload.parts.items())]:
            raise Refusal(400, "InvalidPart")
        _store(upload)
        return Response()

    def _hand_out(self, request: Request, repo: str, oid: str) -> Response:
        _check_no_token(request)
        return Response(self.repositories[repo].large[oid], headers={"ETag": f'"{oid}"'})


def _store(upload: _Upload) -> None:
    file = File(b"".join(body for _, body in sorted(upload.parts.items())), lfs=True)
    if (file.sha256, len(file.content)) != (upload.oid, upload.size):
        raise Refusal(400, "BadDigest")
    upload.repository.large[upload.oid] = file.content


def _part_etag(body: bytes) -> str:
    return f'"{File(body).blob_id}"'


def _check_no_token(request: Request) -> None:
    # S3 says so too. Here it also shows that no token leaves for another server than the Hub.
    if "authorization" in request.headers:
        raise Refusal(400, "Only one auth mechanism allowed")
