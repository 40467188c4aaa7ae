"""A small Hugging Face Hub on loopback: as much of its HTTP API as huggingface_hub needs to push, look up and fetch.

Repositories are lists of commits, each a whole tree {path: bytes}, so that what is not committed cannot be fetched.
Files that end in .safetensors or .gguf are large ones, sent apart by the LFS protocol; the rest come inside the commit.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_test"
ROUTES = []


def route(method, pattern):
    """Marks a handler's method as the answer to requests whose path matches wholly."""

    def mark(answer):
        ROUTES.append((method, re.compile(pattern), answer))
        return answer

    return mark


class Hub(ThreadingHTTPServer):
    """`repos` by id; `objects` are large files by their SHA-256; `stalled` is set once an upload has been held up."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos, self.objects, self.requests = {}, {}, []
        self.stall_at, self.stalled, self.num_puts = None, threading.Event(), 0

    def add(self, repo_id, files, private=False):
        """A repository with one commit of these files."""
        self.repos[repo_id] = {"private": private, "commits": []}
        return self.commit(repo_id, files)

    def commit(self, repo_id, tree):
        """The id of a new commit."""
        commits = self.repos[repo_id]["commits"]
        oid = hashlib.sha1(f"{repo_id}:{len(commits)}".encode()).hexdigest()
        commits.append((oid, tree))
        return oid

    def tree(self, repo_id, revision="main"):
        """(id, files) of a commit."""
        commits = self.repos[repo_id]["commits"]
        return commits[-1] if revision == "main" else next(c for c in commits if c[0] == revision)


class Handler(BaseHTTPRequestHandler):
    """Answers one request."""

    protocol_version = "HTTP/1.1"

    def answer(self):
        self.server.requests.append((self.command, self.path))
        size = int(self.headers.get("Content-Length") or 0)
        chunked = self.headers.get("Transfer-Encoding") == "chunked"
        self.body = b"".join(self.chunks()) if chunked else self.rfile.read(size)
        path = self.path.partition("?")[0]
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, handler in ROUTES:
            if wanted == method and (found := pattern.fullmatch(path)):
                repo = found.groupdict().get("repo")
                if repo is not None and repo not in self.server.repos:
                    return self.refuse(404, "RepoNotFound")
                if method == "POST" and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                    return self.refuse(401, None, "Invalid credentials in Authorization header")
                return handler(self, **found.groupdict())
        return self.refuse(404, "EntryNotFound")

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def chunks(self):
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def log_message(self, *args):
        pass

    def send(self, data, status=200, **headers):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def json(self, value, status=200, **headers):
        self.send(json.dumps(value).encode(), status, Content_Type="application/json", **headers)

    def refuse(self, status, code=None, message=None):
        told = {"X_Error_Code": code, "X_Error_Message": message}
        self.json({"error": code or message}, status, **{key: value for key, value in told.items() if value})

    @route("POST", "/api/repos/create")
    def create(self):
        asked = json.loads(self.body)
        repo = f"{asked['organization'] or 'me'}/{asked['name']}"
        if repo in self.server.repos:
            return self.json({"url": f"{self.server.url}/{repo}", "error": "You already created this repo"}, 409)
        self.server.add(repo, {".gitattributes": b"*.safetensors filter=lfs\n"}, asked.get("visibility") == "private")
        return self.json({"url": f"{self.server.url}/{repo}", "id": repo})

    @route("POST", "/api/validate-yaml")
    def validate(self):
        self.json({"errors": [], "warnings": []})

    @route("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)(/revision/(?P<revision>\w+))?")
    def info(self, repo, revision=None):
        oid, tree = self.server.tree(repo, revision or "main")
        head = re.match(r"---\n(.*?)\n---", tree.get("README.md", b"").decode(), re.DOTALL)
        told = {"id": repo, "sha": oid, "private": self.server.repos[repo]["private"], "tags": []}
        told["siblings"] = [{"rfilename": path} for path in sorted(tree)]
        if head:
            import yaml

            told["cardData"] = yaml.safe_load(head[1])
        self.json(told)

    @route("GET", r"/api/models/(?P<repo>[^/]+/[^/]+)/tree/(?P<revision>\w+)")
    def list_tree(self, repo, revision):
        _, tree = self.server.tree(repo, revision)
        self.json([entry(path, data) for path, data in sorted(tree.items())])

    @route("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/preupload/(?P<revision>\w+)")
    def preupload(self, repo, revision):
        modes = [
            {"path": f["path"], "uploadMode": "lfs" if large(f["path"]) else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self.json({"files": modes})

    @route("POST", r"/(?P<repo>[^/]+/[^/]+)\.git/info/lfs/objects/batch")
    def batch(self, repo):
        objects = json.loads(self.body)["objects"]
        for each in objects:
            if each["oid"] not in self.server.objects:
                each["actions"] = {"upload": {"href": f"{self.server.url}/lfs/{each['oid']}"}}
        self.json({"transfer": "basic", "objects": objects})

    @route("PUT", r"/lfs/(?P<oid>\w+)")
    def put(self, oid):
        self.server.num_puts += 1
        if self.server.num_puts == self.server.stall_at:
            self.server.stalled.set()
            threading.Event().wait(60)
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.refuse(400)
        self.server.objects[oid] = self.body
        return self.send(b"")

    @route("POST", r"/api/models/(?P<repo>[^/]+/[^/]+)/commit/(?P<revision>\w+)")
    def make_commit(self, repo, revision):
        tree = dict(self.server.tree(repo)[1])
        for line in self.body.splitlines():
            key, value = (told := json.loads(line))["key"], told["value"]
            if key == "file":
                tree[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                tree[value["path"]] = self.server.objects[value["oid"]]
            elif key == "deletedFile":
                del tree[value["path"]]
        oid = self.server.commit(repo, tree)
        self.json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.url}/{repo}/commit/{oid}"})

    @route("GET", r"/(?P<repo>[^/]+/[^/]+)/resolve/(?P<revision>\w+)/(?P<path>.+)")
    def resolve(self, repo, revision, path):
        oid, tree = self.server.tree(repo, revision)
        if path not in tree:
            return self.refuse(404, "EntryNotFound")
        return self.send(tree[path], X_Repo_Commit=oid, ETag=f'"{entry(path, tree[path])["oid"]}"')


def large(path):
    """Whether a file is sent apart."""
    return path.endswith((".safetensors", ".gguf"))


def entry(path, data):
    """A file as the listing of a tree has it."""
    told = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if large(path):
        sha256 = hashlib.sha256(data).hexdigest()
        told |= {"oid": sha256, "lfs": {"oid": sha256, "size": len(data), "pointerSize": 134}}
    return told


@contextmanager
def serving():
    """A Hub that answers while the context is open."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
