"""
A stand-in for the Hugging Face Hub on loopback, for tests: what the real `huggingface_hub` client asks for over HTTP
to create, fill, list and read model repositories, with large files on a second server, as on the Hub.

Nothing of the client is replaced. It reads its address when it is imported, so it runs in a process of its own:

```python
with HubStandIn() as hub:
    subprocess.run([sys.executable, "script.py"], env={**os.environ, **hub.environment(tmp_path / "home")})
    assert "model.safetensors" in hub.files("tester/model")
```
"""

from __future__ import annotations

import base64
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import unquote

import yaml

from support.large_files import Storage
from support.loopback import Refusal, Request, Response, Route, Server, Traffic
from support.repositories import Commit, File, Repository, upload_mode

#: May do everything in the namespace `tester`, only read there, or everything in the namespace `stranger`.
WRITE_TOKEN, READ_TOKEN, STRANGER_TOKEN = "hf_WriteTokenOfTheStandIn", "hf_ReadTokenOfTheStandIn", "hf_StrangersToken"
#: A token that nobody has.
BAD_TOKEN = "hf_TokenThatWasRevoked"


@dataclass(frozen=True)
class User:
    """Whose a token is, and whether it may write in the namespace of that name."""

    name: str
    writes: bool = True


_USERS = {
    WRITE_TOKEN: User("tester"),
    READ_TOKEN: User("tester", writes=False),
    STRANGER_TOKEN: User("stranger"),
}


class HubStandIn:
    """
    The servers and what they hold; a context manager that starts and stops them.

    Args:
        part_size (`int`, *optional*): Large files of more bytes are uploaded in parts of this size.

    Attributes:
        repositories (`dict[str, Repository]`): By `namespace/name`.
        traffic ([`Traffic`]): The requests so far, and `fail`, which makes later ones go wrong. A large file's upload
            is a `PUT` to `/namespace/name/upload/...`.
    """

    def __init__(self, part_size: int | None = None) -> None:
        self.repositories: dict[str, Repository] = {}
        self.traffic = Traffic()
        self._storage = Storage(self.repositories, self.traffic, part_size)
        self._server = Server(self._routes(), self.traffic)

    def __enter__(self) -> HubStandIn:
        self._server.start()
        self._storage.server.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._server.stop()
        self._storage.server.stop()

    # ---- For tests ----

    @property
    def url(self) -> str:
        return self._server.url

    def environment(self, home: Path, token: str | None = WRITE_TOKEN) -> dict[str, str]:
        """The variables under which a process takes this for the Hub; `home` is for its cache."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_CACHE": str(home / "hub"),
            "HF_TOKEN": token or "",
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1,localhost",
            "no_proxy": "127.0.0.1,localhost",
        }

    def create(self, repo_id: str, private: bool = False, gated: bool = False) -> Repository:
        """A new repository, without a request."""
        repository = self.repositories[repo_id] = Repository(repo_id, private, gated)
        return repository

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """The content of each file of a repository."""
        commit = self.repositories[repo_id].at(revision)
        assert commit is not None, f"{repo_id} has no revision {revision}"
        return {path: file.content for path, file in commit.files.items()}

    def contents(self) -> list[bytes]:
        """All that was ever uploaded, in every commit and outside of them."""
        files = [
            file for repo in self.repositories.values() for commit in repo.commits() for file in commit.files.values()
        ]
        large = [content for repo in self.repositories.values() for content in repo.large.values()]
        return [file.content for file in files] + large

    # ---- Rights ----

    def _user(self, request: Request) -> User | None:
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if not scheme:
            return None
        if token not in _USERS:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return _USERS[token]

    def _check_writer(self, request: Request, namespace: str) -> None:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        if not user.writes or user.name != namespace:
            raise Refusal(403, f'You don\'t have the rights to write under the namespace "{namespace}"')

    def _visible(self, request: Request, repo_id: str) -> Repository:
        user, repository = self._user(request), self.repositories.get(repo_id)
        owned = repository is not None and user is not None and user.name == repository.namespace
        if repository is None or (repository.private and not owned):
            raise Refusal(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repository

    def _readable(self, request: Request, repo_id: str) -> Repository:
        repository, user = self._visible(request, repo_id), self._user(request)
        if repository.gated and (user is None or user.name != repository.namespace):
            message = f"Access to model {repo_id} is restricted. You must have access to it."
            raise Refusal(401 if user is None else 403, message, "GatedRepo")
        return repository

    def _writable(self, request: Request, repo_id: str) -> Repository:
        repository = self._visible(request, repo_id)
        self._check_writer(request, repository.namespace)
        return repository

    def _commit(self, repository: Repository, revision: str) -> Commit:
        commit = repository.at(unquote(revision))
        if commit is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # ---- The Hub ----

    def _routes(self) -> list[Route]:
        repo = r"(?P<repo>[\w.-]+/[\w.-]+)"
        api = f"/api/models/{repo}"
        return [
            ("GET", "/api/whoami-v2", self._whoami),
            ("POST", "/api/repos/create", self._create),
            ("DELETE", "/api/repos/delete", self._delete),
            ("POST", "/api/validate-yaml", self._validate_card),
            ("GET", f"{api}(/revision/(?P<revision>[^/]+))?", self._info),
            ("GET", f"{api}/refs", self._refs),
            ("GET", f"{api}/tree/(?P<revision>[^/]+)(/(?P<folder>.+))?", self._tree),
            ("POST", f"{api}/branch/(?P<branch>[^/]+)", self._branch),
            ("POST", f"{api}/preupload/(?P<revision>[^/]+)", self._preupload),
            ("POST", f"{api}/commit/(?P<revision>[^/]+)", self._take_commit),
            ("POST", f"/{repo}\\.git/info/lfs/objects/batch", self._lfs_batch),
            ("POST", f"/{repo}\\.git/info/lfs/objects/verify", self._lfs_verify),
            ("GET", f"/{repo}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", self._resolve),
        ]

    def _whoami(self, request: Request) -> Response:
        user = self._user(request)
        if user is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "test", "role": "write" if user.writes else "read"}
        return Response({"type": "user", "name": user.name, "orgs": [], "auth": {"accessToken": token}})

    def _create(self, request: Request) -> Response:
        wanted, user = request.json, self._user(request)
        namespace = wanted.get("organization") or (user.name if user else "")
        self._check_writer(request, namespace)
        repo_id = f"{namespace}/{wanted['name']}"
        answer = {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if repo_id in self.repositories:
            return Response({"error": "You already created this model repo", **answer}, 409)
        self.create(repo_id, private=wanted.get("visibility") == "private" or bool(wanted.get("private")))
        return Response(answer)

    def _delete(self, request: Request) -> Response:
        wanted, user = request.json, self._user(request)
        repo_id = f"{wanted.get('organization') or (user.name if user else '')}/{wanted['name']}"
        self._writable(request, repo_id)
        del self.repositories[repo_id]
        return Response()

    def _validate_card(self, request: Request) -> Response:
        matter = re.match(r"---\n(.*?)\n---(\n|$)", request.json["content"], re.DOTALL)
        if matter is None:
            return Response({"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]})
        try:
            valid, message = isinstance(yaml.safe_load(matter[1]), dict), "metadata must be a mapping"
        except yaml.YAMLError as error:
            valid, message = False, str(error)
        return Response({"errors": [] if valid else [{"message": message}], "warnings": []}, 200 if valid else 400)

    def _info(self, request: Request, repo: str, revision: str | None) -> Response:
        repository = self._visible(request, repo)
        commit = self._commit(repository, revision or "main")
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        access = {"private": repository.private, "gated": "manual" if repository.gated else False, "disabled": False}
        named = {"id": repo, "modelId": repo, "author": repository.namespace, "sha": commit.oid, "tags": []}
        return Response({**named, **access, "siblings": siblings})

    def _refs(self, request: Request, repo: str) -> Response:
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": history[-1].oid}
            for name, history in self._visible(request, repo).branches.items()
        ]
        return Response({"branches": branches, "tags": [], "converts": []})

    def _tree(self, request: Request, repo: str, revision: str, folder: str | None) -> Response:
        commit = self._commit(self._visible(request, repo), revision)
        recursive = request.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        entries = commit.tree(unquote(folder or ""), recursive)
        if folder and not entries:
            raise Refusal(404, f"{folder} does not exist", "EntryNotFound")
        return Response(entries)

    def _branch(self, request: Request, repo: str, branch: str) -> Response:
        repository, branch = self._writable(request, repo), unquote(branch)
        if branch in repository.branches:
            raise Refusal(409, f"Reference already exists: {branch}")
        start = self._commit(repository, request.json.get("startingPoint", "main"))
        repository.branches[branch] = [start]
        return Response()

    def _preupload(self, request: Request, repo: str, revision: str) -> Response:
        commit = self._commit(self._writable(request, repo), revision)
        answers = []
        for item in request.json["files"]:
            path, present = item["path"], commit.files.get(item["path"])
            mode = upload_mode(path, item["size"], base64.b64decode(item["sample"]))
            etag = present.etag if present else None
            answers.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": etag})
        return Response({"files": answers, "commitOid": commit.oid})

    def _take_commit(self, request: Request, repo: str, revision: str) -> Response:
        repository = self._writable(request, repo)
        self._commit(repository, revision)
        title, added, deleted = "", {}, []
        for line in request.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                title = value["summary"]
            elif key == "file":
                added[value["path"]] = File(base64.b64decode(value["content"]))
            elif key == "lfsFile" and value["oid"] in repository.large:
                added[value["path"]] = File(repository.large[value["oid"]], lfs=True)
            elif key == "lfsFile":
                raise Refusal(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
            elif key in ("deletedFile", "deletedFolder"):
                deleted.append(value["path"].rstrip("/") + ("/" if key == "deletedFolder" else ""))
            else:
                raise Refusal(400, f"unknown operation {key}")
        commit = repository.commit(unquote(revision), title, added, deleted)
        url = f"{self.url}/{repo}/commit/{commit.oid}"
        return Response({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    def _lfs_batch(self, request: Request, repo: str) -> Response:
        repository, answers = self._writable(request, repo), []
        for wanted in request.json["objects"]:
            answer = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in repository.large:
                verify = {"href": f"{self.url}/{repo}.git/info/lfs/objects/verify", "header": {}}
                answer["actions"] = {"upload": self._storage.upload_action(repository, **wanted), "verify": verify}
            answers.append(answer)
        return Response({"transfer": "basic", "objects": answers})

    def _lfs_verify(self, request: Request, repo: str) -> Response:
        content = self._writable(request, repo).large.get(request.json["oid"])
        if content is None or len(content) != request.json["size"]:
            raise Refusal(404, "The object was not uploaded")
        return Response()

    def _resolve(self, request: Request, repo: str, revision: str, path: str) -> Response:
        repository = self._readable(request, repo)
        commit = self._commit(repository, revision)
        file = commit.files.get(unquote(path))
        if file is None:
            raise Refusal(404, "Entry not found", "EntryNotFound", X_Repo_Commit=commit.oid)
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{file.etag}"'}
        if not file.lfs:
            return Response(file.content, headers=headers)
        linked = {"X-Linked-ETag": f'"{file.etag}"', "X-Linked-Size": str(len(file.content))}
        return Response(b"", 302, {**headers, **linked, "Location": self._storage.address(repository, file.sha256)})


def run_script(
    hub: HubStandIn, script: Path, *arguments: object, home: Path, token: str | None = WRITE_TOKEN, **environment: str
) -> str:
    """
    Run a script that takes a stand-in for the Hub, and fail if it fails.

    Returns:
        `str`: All that it printed, errors and logs included.
    """
    paths = Path(__file__).parents[1:3]
    given = {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run(
        [sys.executable, str(script), *map(str, arguments)],
        env={**os.environ, **hub.environment(home, token), **given},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-8000:]
    return done.stdout
