"""A Hub on loopback for the tests: what `huggingface_hub` needs to push and to load by name, kept in memory.

    with LocalHub() as hub:
        subprocess.run(..., env={**os.environ, **hub.environment(tmp_path)})

Large files go by plain Git LFS, as for clients without `hf_xet` (`HF_HUB_DISABLE_XET=1` in `environment`), or, with
`lfs=False`, inline in the commit, which the client never hands to `hf_xet`.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_localtesttoken"
USER = "tester"


@dataclass
class Repository:
    """Branches and commits of one model repository; a commit is path -> (sha256 of the content, is LFS)."""

    private: bool = False
    commits: dict[str, dict[str, tuple[str, bool]]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, tuple[str, bool]], message: str) -> str:
        parent = self.branches.get(branch, "")
        content = json.dumps([parent, sorted(files.items()), message, len(self.commits)])
        oid = hashlib.sha1(content.encode()).hexdigest()
        self.commits[oid] = files
        self.messages[oid] = message
        self.branches[branch] = oid
        return oid

    def resolve(self, revision: str) -> str | None:
        return self.branches.get(revision) or (revision if revision in self.commits else None)


class LocalHub:
    """The server; a context manager that stops it.

    Args:
        lfs: hand large and binary files to LFS; inline otherwise.
        limit: largest request body, in bytes; a larger one is refused, so that a test can't fill the memory.
    """

    def __init__(self, lfs: bool = True, limit: int = 1 << 28) -> None:
        self.lfs = lfs
        self.limit = limit
        self.repositories: dict[str, Repository] = {}
        self.contents: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.lock = threading.Lock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def environment(self, home: str | Path, token: str | None = TOKEN) -> dict[str, str]:
        """Environment variables for a client process with a cache of its own."""
        environment = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "TQDM_DISABLE": "1",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
        }
        return environment | ({"HF_TOKEN": token} if token else {})

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """Path -> content of a revision."""
        repository = self.repositories[repo_id]
        commit = repository.commits[repository.resolve(revision) or ""]
        return {path: self.contents[oid] for path, (oid, _) in commit.items()}

    def store(self, content: bytes) -> str:
        oid = hashlib.sha256(content).hexdigest()
        self.contents[oid] = content
        return oid

    def __enter__(self) -> "LocalHub":
        self._thread.start()
        return self

    def __exit__(self, *_: Any) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(timeout=10)


class _Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"
    timeout = 30  # a client that stops talking does not keep a thread

    ROUTES = (
        ("POST", r"/api/repos/create", "create_repository"),
        ("POST", r"/api/validate-yaml", "validate_yaml"),
        ("GET", r"/api/whoami-v2", "whoami"),
        ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "model_info"),
        ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
        ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
        ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "create_branch"),
        ("POST", r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", "paths_info"),
        ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", "tree"),
        ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "lfs_batch"),
        ("PUT", r"/lfs/([0-9a-f]{64})", "lfs_upload"),
        ("POST", r"/lfs/([0-9a-f]{64})/verify", "lfs_verify"),
        ("GET", r"/lfs/([0-9a-f]{64})", "lfs_download"),
        ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
    )

    # Plumbing

    def log_message(self, *_: Any) -> None:
        pass

    def handle_one(self) -> None:
        path = unquote(urlsplit(self.path).path)
        with self.hub.lock:
            self.hub.requests.append((self.command, path))
        length = int(self.headers.get("Content-Length") or 0)
        if length > self.hub.limit or "chunked" in self.headers.get("Transfer-Encoding", ""):
            self.close_connection = True
            self.error(413, "too large")
            return
        self.body = self.rfile.read(length) if length else b""
        method = "GET" if self.command == "HEAD" else self.command
        for verb, pattern, name in self.ROUTES:
            found = re.fullmatch(pattern, path)
            if verb == method and found:
                with self.hub.lock:
                    getattr(self, name)(*found.groups())
                return
        self.error(404, f"no route {self.command} {path}", "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_one  # noqa: N815

    def reply(self, status: int, body: bytes = b"", headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        headers = {"Content-Length": str(len(body)), **(headers or {})}
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def json(self, value: Any, status: int = 200) -> None:
        self.reply(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def error(self, status: int, message: str, code: str | None = None) -> None:
        headers = {"Content-Type": "application/json", "X-Error-Message": message}
        if code:
            headers["X-Error-Code"] = code
        self.reply(status, json.dumps({"error": message}).encode(), headers)

    @property
    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, repo_id: str, write: bool = False) -> Repository | None:
        """The repository, or None after the answer that the Hub gives where it is missing or not to be seen."""
        repository = self.hub.repositories.get(repo_id)
        if write and not self.authorised:
            self.error(401, "Invalid username or password.")
            return None
        if repository is None or (repository.private and not self.authorised):
            # As on the Hub: nobody learns whether a private repository exists.
            self.error(404 if self.authorised else 401, "Repository not found", "RepoNotFound")
            return None
        return repository

    def revision(self, repository: Repository, name: str) -> str | None:
        oid = repository.resolve(unquote(name))
        if oid is None:
            self.error(404, f"Invalid rev id: {name}", "RevisionNotFound")
        return oid

    # Repositories

    def whoami(self) -> None:
        if not self.authorised:
            return self.error(401, "Invalid username or password.")
        return self.json({"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})

    def create_repository(self) -> None:
        if not self.authorised:
            return self.error(401, "Invalid username or password.")
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
        if asked.get("organization") == "forbidden":
            return self.error(403, "You don't have the rights to create a model under this namespace")
        address = {"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id}
        if repo_id in self.hub.repositories:
            return self.json({"error": "You already created this model repo", **address}, 409)
        self.hub.repositories[repo_id] = Repository(private=asked.get("visibility") == "private")
        return self.json(address)

    def create_branch(self, repo_id: str, branch: str) -> None:
        repository = self.repository(repo_id, write=True)
        if repository is None:
            return None
        if branch in repository.branches:
            return self.error(409, "Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        return self.json({})

    def validate_yaml(self) -> None:
        content = json.loads(self.body)["content"]
        if not content.startswith("---\n"):
            return self.json({"errors": [], "warnings": [{"message": "empty or missing yaml metadata"}]})
        return self.json({"errors": [], "warnings": []})

    def model_info(self, repo_id: str, revision: str | None) -> None:
        repository = self.repository(repo_id)
        oid = repository and self.revision(repository, revision or "main")
        if not oid:
            return None
        files = repository.commits[oid]
        card = self.hub.contents[files["README.md"][0]].decode() if "README.md" in files else ""
        tag = re.search(r"^pipeline_tag: (\S+)$", card, flags=re.MULTILINE)
        return self.json(
            {
                "_id": "0" * 24,
                "id": repo_id,
                "modelId": repo_id,
                "sha": oid,
                "private": repository.private,
                "gated": False,
                "disabled": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "library_name": "transformers",
                "siblings": [{"rfilename": path} for path in sorted(files)],
                **({"pipeline_tag": tag[1]} if tag else {}),
            }
        )

    # Reading

    def entry(self, path: str, oid: str, lfs: bool) -> dict[str, Any]:
        size = len(self.hub.contents[oid])
        entry: dict[str, Any] = {"type": "file", "path": path, "size": size, "oid": self.etag(oid, lfs)}
        if lfs:
            entry["lfs"] = {"oid": oid, "size": size, "pointerSize": 134}
        return entry

    def etag(self, oid: str, lfs: bool) -> str:
        if lfs:
            return oid
        content = self.hub.contents[oid]
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def tree(self, repo_id: str, revision: str, folder: str) -> None:
        repository = self.repository(repo_id)
        oid = repository and self.revision(repository, revision)
        if not oid:
            return None
        inside = {
            path: entry
            for path, entry in sorted(repository.commits[oid].items())
            if not folder or path.startswith(f"{folder}/")
        }
        if folder and not inside:
            return self.error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return self.json([self.entry(path, *entry) for path, entry in inside.items()])

    def paths_info(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id)
        oid = repository and self.revision(repository, revision)
        if not oid:
            return None
        wanted = json.loads(self.body)["paths"]
        files = repository.commits[oid]
        return self.json([self.entry(path, *files[path]) for path in wanted if path in files])

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        repository = self.repository(repo_id)
        oid = repository and self.revision(repository, revision)
        if not oid:
            return None
        found = repository.commits[oid].get(path)
        headers = {"X-Repo-Commit": oid, "Accept-Ranges": "bytes"}
        if found is None:
            headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
            return self.reply(404, b"Entry not found", headers)
        content, lfs = self.hub.contents[found[0]], found[1]
        headers["ETag"] = f'"{self.etag(*found)}"'
        if lfs:
            headers |= {
                "X-Linked-Etag": headers["ETag"],
                "X-Linked-Size": str(len(content)),
                # Another host name, as the Hub's storage has: the client must not follow it when it asks for metadata.
                "Location": f"{self.hub.endpoint}/lfs/{found[0]}".replace("127.0.0.1", "localhost"),
            }
            return self.reply(302, b"", headers)
        return self.send_content(content, headers)

    def send_content(self, content: bytes, headers: dict[str, str]) -> None:
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked and int(asked[1]) < len(content):
            start, end = int(asked[1]), min(int(asked[2] or len(content) - 1), len(content) - 1)
            headers = headers | {"Content-Range": f"bytes {start}-{end}/{len(content)}"}
            return self.reply(206, content[start : end + 1], headers)
        return self.reply(200, content, headers)

    def lfs_download(self, oid: str) -> None:
        if oid not in self.hub.contents:
            return self.error(404, "Object not found")
        return self.send_content(self.hub.contents[oid], {"ETag": f'"{oid}"'})

    # Writing

    def preupload(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        oid = repository and self.revision(repository, revision)
        if not oid:
            return None
        files = repository.commits[oid]
        answers = []
        for file in json.loads(self.body)["files"]:
            large = self.hub.lfs and file["path"].endswith((".safetensors", ".png"))
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if file["path"] in files:
                answer["oid"] = self.etag(*files[file["path"]])
            answers.append(answer)
        return self.json({"files": answers})

    def lfs_batch(self, repo_id: str) -> None:
        if self.repository(repo_id, write=True) is None:
            return None
        objects = []
        for asked in json.loads(self.body)["objects"]:
            address = f"{self.hub.endpoint}/lfs/{asked['oid']}"
            actions = {"upload": {"href": address}, "verify": {"href": f"{address}/verify"}}
            # The Hub names no action for what it already has.
            objects.append(asked if asked["oid"] in self.hub.contents else {**asked, "actions": actions})
        return self.json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, oid: str) -> None:
        if self.hub.store(self.body) != oid:
            return self.error(400, "the content does not have this hash")
        return self.reply(200)

    def lfs_verify(self, oid: str) -> None:
        if json.loads(self.body)["size"] != len(self.hub.contents.get(oid, b"")):
            return self.error(404, "object not found or of another size")
        return self.json({})

    def commit(self, repo_id: str, revision: str) -> None:
        repository = self.repository(repo_id, write=True)
        parent = repository and self.revision(repository, revision)
        if not parent:
            return None
        files = dict(repository.commits[parent])
        message = ""
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "header":
                message = value["summary"]
            elif item["key"] == "file":
                files[value["path"]] = (self.hub.store(base64.b64decode(value["content"])), False)
            elif item["key"] == "lfsFile":
                if value["oid"] not in self.hub.contents:
                    return self.error(400, f"LFS object {value['oid']} was not uploaded")
                files[value["path"]] = (value["oid"], True)
            elif item["key"] == "deletedFile":
                files.pop(value["path"], None)
            else:
                return self.error(400, f"unknown operation {item['key']}")
        oid = repository.commit(unquote(revision), files, message)
        return self.json(
            {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}"}
        )
