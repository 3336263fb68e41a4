"""A stand-in of the Hugging Face hub's HTTP API on loopback: repositories, branches, commits, large files, downloads.

It keeps commits in memory and checks what the hub checks: the token, the namespace, a card's metadata, that a large
file arrived before the commit that names it. `answers` makes it fail: path fragment -> status.
"""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import close_session, constants

TOKEN, USER = "hf_loopback", "me"
LICENCES = {"apache-2.0", "mit", "other"}
TASKS = {"text-generation", "text-classification"}
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """branches: name -> commit; commits: hash -> path -> content."""

    private: bool = False
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, files: dict[str, bytes], branch: str, message: str) -> str:
        oid = hashlib.sha1(f"{len(self.commits)} {branch} {message}".encode()).hexdigest()
        self.commits[oid], self.branches[branch] = files, oid
        self.messages.append(message)
        return oid

    def files(self, revision: str = "main") -> dict[str, bytes] | None:
        return self.commits.get(self.branches.get(revision, revision))


class LoopbackHub(ThreadingHTTPServer):
    """Serves on a free port of 127.0.0.1 while `running`."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.answers: dict[str, int] = {}
        self.requests: list[str] = []

    def add(self, repo_id: str, private: bool = False) -> Repository:
        repository = self.repositories[repo_id] = Repository(private)
        repository.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "main", "initial commit")
        return repository


@contextmanager
def running():
    with LoopbackHub() as hub:
        thread = Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def metadata_errors(card: str) -> list[str]:
    """What the hub's validation of a model card says, for the fields that ours uses."""
    parts = card.split("---\n")
    if len(parts) < 3 or parts[0]:
        return ["no metadata"]
    fields, errors = yaml.safe_load(parts[1]), []
    if "license" in fields and fields["license"] not in LICENCES:
        errors.append(f'"license" must be one of {sorted(LICENCES)}')
    if "pipeline_tag" in fields and fields["pipeline_tag"] not in TASKS:
        errors.append(f'"pipeline_tag" must be one of {sorted(TASKS)}')
    for name in ("tags", "datasets"):
        if not all(isinstance(item, str) for item in fields.get(name, [])):
            errors.append(f'"{name}" must be an array of strings')
    for name in [*fields.get("datasets", []), *([fields["base_model"]] if "base_model" in fields else [])]:
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            errors.append(f'"{name}" is not the name of a repository')
    for model in fields.get("model-index", []):
        for result in model["results"]:
            if not result["task"].get("type") or not {"type", "name"} <= result["dataset"].keys():
                errors.append('"model-index": a result needs a task type, a dataset type and a dataset name')
            if not all(metric.get("type") and metric.get("value") is not None for metric in result["metrics"]):
                errors.append('"model-index": a metric needs a type and a value')
    return errors


class Handler(BaseHTTPRequestHandler):
    """Routes; each answers (status, JSON or bytes, headers)."""

    protocol_version = "HTTP/1.1"
    server: LoopbackHub

    def log_message(self, *args):
        """Silent."""

    def handle_any(self):
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status = next((status for part, status in self.server.answers.items() if part in path), None)
        if status is not None:
            return self.send(status, {"error": "the stand-in was told to fail"})
        given = self.headers.get("Authorization")
        if given != f"Bearer {TOKEN}" and (given or self.command == "POST"):
            return self.send(401, {"error": "Invalid credentials in Authorization header"})
        for method, pattern, answer in ROUTES:
            found = re.fullmatch(pattern, path)
            if found and self.command in method:
                return self.send(*answer(self, **found.groupdict()))
        return self.send(404, {"error": f"no route for {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    def send(self, status, content=b"", headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self):
        return json.loads(self.body)

    def repository(self, repo) -> Repository | None:
        found = self.server.repositories.get(repo)
        hidden = found is not None and found.private and self.headers.get("Authorization") != f"Bearer {TOKEN}"
        return None if hidden else found

    def whoami(self):
        return 200, {"type": "user", "name": USER}

    def create(self):
        wanted = self.json()
        repo = f"{wanted['organization'] or USER}/{wanted['name']}"
        if wanted["organization"] not in (None, USER):
            return 403, {"error": f"You don't have the rights to create a model under {wanted['organization']}"}
        if repo in self.server.repositories:
            return 409, {"error": "You already created this model repo", "url": f"{self.server.url}/{repo}"}
        self.server.add(repo, wanted.get("visibility") == "private" or wanted.get("private", False))
        return 200, {"url": f"{self.server.url}/{repo}", "name": repo}

    def info(self, repo, revision="main"):
        repository = self.repository(repo)
        if repository is None:
            return NO_REPOSITORY
        files = repository.files(revision)
        if files is None:
            return NO_REVISION
        sha = repository.branches.get(revision, revision)
        siblings = [{"rfilename": name} for name in files]
        return 200, {"id": repo, "modelId": repo, "sha": sha, "private": repository.private, "siblings": siblings}

    def tree(self, repo, revision):
        files = self.repository(repo).files(revision)
        if files is None:
            return NO_REVISION
        rows = [{"type": "file", "path": name, "size": len(data), "oid": etag(data)} for name, data in files.items()]
        return 200, rows

    def branch(self, repo, revision):
        repository = self.repository(repo)
        if revision in repository.branches:
            return 409, {"error": "Reference already exists"}
        repository.branches[revision] = repository.branches["main"]
        return 200, {}

    def validate(self):
        errors = metadata_errors(self.json()["content"])
        answer = {"errors": [{"message": error} for error in errors], "warnings": []}
        return (400 if errors else 200), answer

    def preupload(self, repo, revision):
        if repo.partition("/")[0] != USER:
            return 403, {"error": "Forbidden: no write access"}
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith((".safetensors", ".png")) else "regular",
                "shouldIgnore": False,
            }
            for file in self.json()["files"]
        ]
        return 200, {"files": files}

    def large_batch(self, repo):
        objects = [
            {
                **wanted,
                "actions": {"upload": {"href": f"{self.server.url}/lfs-store/{wanted['oid']}", "header": {}}},
            }
            for wanted in self.json()["objects"]
        ]
        return 200, {"transfer": "basic", "objects": objects}

    def large_put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return 400, {"error": "sha256 differs"}
        self.server.large_files[oid] = self.body
        return 200, {}

    def commit(self, repo, revision):
        repository = self.repository(repo)
        files, message = dict(repository.files(revision)), ""
        for line in map(json.loads, self.body.splitlines()):
            value = line["value"]
            if line["key"] == "header":
                message = value["summary"]
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.large_files:
                    return 400, {"error": f"{value['path']} was not uploaded"}
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        oid = repository.commit(files, revision, message)
        return 200, {"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"}

    def resolve(self, repo, revision, name):
        repository = self.repository(repo)
        if repository is None:
            return NO_REPOSITORY
        files = repository.files(revision)
        if files is None:
            return NO_REVISION
        if name not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"}
        commit = repository.branches.get(revision, revision)
        return 200, files[name], {"ETag": f'"{etag(files[name])}"', "X-Repo-Commit": commit}


def etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


NO_REPOSITORY = (404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
NO_REVISION = (404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
MODEL = rf"/api/models/{REPO}"
ROUTES = [
    ("GET", r"/api/whoami-v2", Handler.whoami),
    ("POST", r"/api/repos/create", Handler.create),
    ("POST", r"/api/validate-yaml", Handler.validate),
    ("GET", MODEL, Handler.info),
    ("GET", rf"{MODEL}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", rf"{MODEL}/tree/(?P<revision>[^/]+)", Handler.tree),
    ("POST", rf"{MODEL}/branch/(?P<revision>[^/]+)", Handler.branch),
    ("POST", rf"{MODEL}/preupload/(?P<revision>[^/]+)", Handler.preupload),
    ("POST", rf"{MODEL}/commit/(?P<revision>[^/]+)", Handler.commit),
    ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.large_batch),
    ("PUT", r"/lfs-store/(?P<oid>[0-9a-f]+)", Handler.large_put),
    (("GET", "HEAD"), rf"/{REPO}/resolve/(?P<revision>[^/]+)/(?P<name>.+)", Handler.resolve),
]


@contextmanager
def used_by_this_process(cache):
    """A running hub that huggingface_hub, in this process, takes for the real one; downloads go to `cache`."""
    with running() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(constants, "ENDPOINT", hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
        patch.setattr(constants, "HF_HUB_CACHE", str(cache))
        patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        patch.setattr("transformers.utils.hub._hf_api", None)
        for name, value in environment(hub, cache).items():
            patch.setenv(name, value)
        close_session()  # one that was opened before would go by the old environment
        yield hub


def environment(hub, cache) -> dict[str, str]:
    """The variables by which a fresh process finds the stand-in."""
    return {
        "HF_ENDPOINT": hub.url,
        "HF_TOKEN": TOKEN,
        "HF_HOME": str(cache),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "NO_PROXY": "127.0.0.1",
    }
