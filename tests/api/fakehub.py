"""A hub on the loopback that misbehaves as told: for tests of `qwen-edit pull`, stdlib only.

    hub = FakeHub(files={"a/b.bin": bytes, ...}, faults=Faults(cut=0.1, ...))
    with hub: ... hub.url ...

Speaks the Hugging Face routes (revision, tree with paging, resolve with redirects to a second host:port that plays
the CDN) and ModelScope's (repo/files, repo). Counts what it sends, remembers what it was asked and with which
headers. Faults are drawn from one seeded generator, so a run can be repeated.
"""
import hashlib
import http.server
import json
import os
import random
import socket
import socketserver
import threading
import time
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Faults:
    """Probability of each fault per answer (0..1)."""

    NAMES = ("cut", "stall", "status", "whole", "nolength", "chunked", "wrong_size", "wrong_range", "flip",
             "e416", "etag", "truncate", "loop", "garbage", "slow", "longer", "bad_json")

    def __init__(self, seed=1, stall_s=2.0, limit=None, sure=False, **p):
        self.p = {n: p.pop(n, 0.0) for n in self.NAMES}
        assert not p, p
        self.random = random.Random(seed)
        self.stall_s = stall_s
        self.limit = limit  # at most so many faults in all
        self.sure = sure    # at least one
        self.count = 0
        self.lock = threading.Lock()

    def draw(self, name):
        with self.lock:
            if self.p[name] <= 0 or (self.limit is not None and self.count >= self.limit):
                return False
            hit = self.random.random() < self.p[name] or (self.sure and self.count == 0)
            self.count += hit
            return hit

    def between(self, a, b):
        with self.lock:
            return self.random.randint(a, b) if b > a else a


class Entry:
    def __init__(self, data, lfs=None):
        self.data = data
        self.size = len(data)
        self.sha256 = hashlib.sha256(data).hexdigest()
        self.sha1 = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
        self.lfs = len(data) > 1000000 if lfs is None else lfs
        # git's id of an LFS file is that of its pointer
        pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(), self.size)
        self.oid = hashlib.sha1(b"blob %d\0" % len(pointer) + pointer).hexdigest() if self.lfs else self.sha1
        self.etag = self.sha256 if self.lfs else self.sha1


class FakeHub:
    def __init__(self, files, repo="test/model", faults=None, page=3, commit=COMMIT, token=None, redirect=True,
                 tree=True, rate=0, tls=None, cdn_tls=True, host="127.0.0.1"):
        self.repo, self.commit, self.page, self.token = repo, commit, page, token
        self.files = {k: v if isinstance(v, Entry) else Entry(v) for k, v in files.items()}
        self.faults = faults or Faults()
        self.redirect, self.tree, self.rate = redirect, tree, rate
        self.tls, self.cdn_tls, self.host = tls, cdn_tls, host  # an ssl.SSLContext; the name in the addresses
        self.sent = 0          # body bytes of files that went into the socket
        self.requests = []     # (host, method, path, range, authorization)
        self.lock = threading.Lock()
        self.tree_override = None  # a function that may change the parsed tree
        self.revision_override = None
        self.extra_headers = []
        self.down = False

    # ---- life

    def __enter__(self):
        hub = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, *a):
                pass

            def do_HEAD(self):
                hub.handle(self)

            def do_GET(self):
                hub.handle(self)

        class Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def handle_error(self, request, client_address):
                pass

        self.servers = [Server(("127.0.0.1", 0), Handler), Server(("127.0.0.1", 0), Handler)]
        self.port, self.cdn_port = (s.server_address[1] for s in self.servers)
        for s, secret in zip(self.servers, (self.tls, self.tls if self.cdn_tls else None)):
            if secret:  # the handshake belongs to the thread of its connection
                s.socket = secret.wrap_socket(s.socket, server_side=True, do_handshake_on_connect=False)
        self.url = "http%s://%s:%d" % ("s" if self.tls else "", self.host, self.port)
        self.cdn = "http%s://%s:%d" % ("s" if self.tls and self.cdn_tls else "", self.host, self.cdn_port)
        for s in self.servers:
            threading.Thread(target=s.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *a):
        for s in self.servers:
            s.shutdown()
            s.server_close()

    # ---- answers

    def handle(self, h):
        host = "cdn" if h.server is self.servers[1] else "hub"
        with self.lock:
            self.requests.append((host, h.command, h.path, h.headers.get("Range"), h.headers.get("Authorization")))
        try:
            self.answer(h, host)
        except (BrokenPipeError, ConnectionResetError, ConnectionAbortedError, socket.timeout):
            h.close_connection = True

    def simple(self, h, status, body=b"", headers=(), type_="application/json"):
        h.send_response(status)
        for k, v in list(headers) + self.extra_headers:
            h.send_header(k, v)
        h.send_header("Content-Type", type_)
        h.send_header("Content-Length", str(len(body)))
        h.end_headers()
        if h.command != "HEAD":
            h.wfile.write(body)

    def answer(self, h, host):
        url = urllib.parse.urlsplit(h.path)
        path = urllib.parse.unquote(url.path)
        query = urllib.parse.parse_qs(url.query)
        if self.down:
            return self.simple(h, 503)
        f = self.faults
        if f.draw("garbage"):
            h.wfile.write(b"\x00\xffnot http at all\r\n\r\n")
            h.close_connection = True
            return
        if f.draw("status"):
            status = [408, 429, 500, 502, 503, 504][f.between(0, 5)]
            return self.simple(h, status, b"no", [("Retry-After", "0")] if status in (429, 503) else [])
        if f.draw("stall"):
            time.sleep(f.stall_s)
            h.close_connection = True
            return
        if host == "cdn":
            name = path[len("/cdn/"):]
            return self.send_file(h, self.files[name], True) if name in self.files else self.simple(h, 404)
        if self.token and h.headers.get("Authorization") != "Bearer " + self.token:
            return self.simple(h, 401, b"{}", [("X-Error-Code", "RepoNotFound")])
        api = "/api/models/%s/" % self.repo
        if path.startswith(api + "revision/"):
            rev = path[len(api + "revision/"):]
            if rev not in ("main", self.commit):
                return self.simple(h, 404, b"{}", [("X-Error-Code", "RevisionNotFound")])
            info = {"id": self.repo, "modelId": self.repo, "sha": self.commit,
                    "siblings": [{"rfilename": n} for n in self.files],
                    "private": False, "tags": [], "downloads": 0, "likes": 0}
            if self.revision_override:
                info = self.revision_override(info)
            return self.simple(h, 200, self.maybe_cut(json.dumps(info).encode()))
        if path.startswith(api + "tree/") and self.tree:
            entries = []
            for n, e in self.files.items():
                d = {"type": "file", "oid": e.oid, "size": e.size, "path": n}
                if e.lfs:
                    d["lfs"] = {"oid": e.sha256, "size": e.size, "pointerSize": 134}
                entries.append(d)
            for d in sorted({n.rsplit("/", 1)[0] for n in self.files if "/" in n}):
                entries.insert(0, {"type": "directory", "oid": "0" * 40, "size": 0, "path": d})
            if self.tree_override:
                entries = self.tree_override(entries)
            at = int(query.get("cursor", ["0"])[0])
            headers = []
            if at + self.page < len(entries):
                headers = [("Link", '<%s%s?recursive=true&cursor=%d>; rel="next"' % (self.url, url.path, at + self.page))]
            return self.simple(h, 200, self.maybe_cut(json.dumps(entries[at:at + self.page]).encode()), headers)
        ms = "/api/v1/models/%s/repo" % self.repo
        if path == ms + "/files":
            files = [{"Name": n.rsplit("/", 1)[-1], "Path": n, "Size": e.size, "Sha256": e.sha256, "Type": "blob",
                      "Revision": self.commit} for n, e in self.files.items()]
            return self.simple(h, 200, json.dumps({"Code": 200, "Success": True, "Data": {"Files": files}}).encode())
        if path == ms:
            e = self.files.get(query.get("FilePath", [""])[0])
            return self.send_file(h, e, False) if e else self.simple(h, 404)
        for rev in ("main", self.commit):
            prefix = "/%s/resolve/%s/" % (self.repo, rev)
            if path.startswith(prefix):
                return self.resolve(h, path[len(prefix):])
        self.simple(h, 404, b"{}", [("X-Error-Code", "RepoNotFound")])

    def maybe_cut(self, body):
        return body[:len(body) // 2] if self.faults.draw("bad_json") else body

    def hub_headers(self, e):
        etag = e.etag
        if self.faults.draw("etag"):
            etag = hashlib.sha256(etag.encode()).hexdigest()[:len(etag)]
        return [("X-Repo-Commit", self.commit), ("X-Linked-Etag", '"%s"' % etag), ("X-Linked-Size", str(e.size))], etag

    def resolve(self, h, name):
        e = self.files.get(name)
        if e is None:
            return self.simple(h, 404, b"", [("X-Error-Code", "EntryNotFound")])
        headers, etag = self.hub_headers(e)
        if self.faults.draw("loop"):
            return self.simple(h, 302, b"", headers + [("Location", h.path)])
        if self.redirect and e.lfs:
            return self.simple(h, 302, b"Found. Redirecting", headers + [
                ("Location", "%s/cdn/%s?sig=%d" % (self.cdn, urllib.parse.quote(name), time.time())),
                ("ETag", 'W/"redirect-text"')])
        return self.send_file(h, e, False, headers[:1] + [("ETag", '"%s"' % etag)])

    def send_file(self, h, e, cdn, headers=()):
        f = self.faults
        first, last, status = 0, e.size - 1, 200
        rng = h.headers.get("Range")
        if rng and e.size and not f.draw("whole"):
            a, b = rng[len("bytes="):].split("-")
            first, last, status = int(a), int(b) if b else e.size - 1, 206
            if first >= e.size or f.draw("e416"):
                return self.simple(h, 416, b"", [("Content-Range", "bytes */%d" % e.size)])
            last = min(last, e.size - 1)
        n = last - first + 1
        h.send_response(status)
        for k, v in headers:
            h.send_header(k, v)
        if cdn:
            h.send_header("ETag", '"cdn-%d"' % f.between(1, 3))
        h.send_header("Accept-Ranges", "bytes")
        if status == 206:
            shift = f.between(1, 1000) if f.draw("wrong_range") else 0
            total = e.size + (f.between(1, 9) if f.draw("wrong_size") else 0)
            h.send_header("Content-Range", "bytes %d-%d/%d" % (first + shift, last + shift, total))
        body = memoryview(e.data)[first:last + 1]
        if f.draw("flip") and n:
            damaged = bytearray(body)
            damaged[f.between(0, n - 1)] ^= 0x40
            body = memoryview(damaged)
        if h.command == "HEAD":
            h.send_header("Content-Length", str(n))
            h.end_headers()
            return
        stop = f.between(0, n) if f.draw("cut") else None
        hang = f.between(0, n) if f.draw("slow") else None
        if f.draw("chunked"):
            h.send_header("Transfer-Encoding", "chunked")
            h.end_headers()
            at = 0
            while at < n:
                piece = body[at:at + 50000]
                if stop is not None and at + len(piece) > stop:
                    h.close_connection = True
                    h.connection.close()
                    return
                h.wfile.write(b"%x\r\n" % len(piece) + bytes(piece) + b"\r\n")
                self.add(len(piece))
                at += len(piece)
            h.wfile.write(b"0\r\n\r\n")
            return
        if f.draw("nolength"):
            h.send_header("Connection", "close")
            h.close_connection = True
            h.end_headers()
            if stop is not None:
                body = body[:stop]
            self.write(h, body, None)
            return
        length = n
        if f.draw("longer"):
            length = n + 100
        h.send_header("Content-Length", str(length))
        h.end_headers()
        if f.draw("truncate"):
            body = body[:f.between(0, n)]
            stop = len(body)
        self.write(h, body if stop is None else body[:stop], hang)
        if stop is not None or length != n:
            h.close_connection = True
            h.wfile.flush()

    def add(self, n):
        with self.lock:
            self.sent += n

    def write(self, h, body, hang):
        step = 1 << 18 if not self.rate else max(4096, self.rate // 50)
        at = 0
        while at < len(body):
            piece = body[at:at + step]
            if hang is not None and at >= hang:
                hang = None
                time.sleep(self.faults.stall_s)
            h.wfile.write(piece)
            self.add(len(piece))
            at += len(piece)
            if self.rate:
                time.sleep(len(piece) / self.rate)


def model_files(megabytes, seed=7, shards=3):
    """Names and contents like a model's: a few small files and some large ones of pseudo-random bytes."""
    r = random.Random(seed)
    total = int(megabytes * 1e6)
    files = {
        "model_index.json": b'{"_class_name": "QwenImageEditPlusPipeline"}\n',
        "README.md": b"# a model\n" * 200,
        ".gitattributes": b"*.safetensors filter=lfs\n",
        "scheduler/scheduler_config.json": b'{"a": 1}',
        "tokenizer/tokenizer.json": b"[" + b"1," * 40000 + b"1]",
        "processor/tokenizer.json": b"[" + b"1," * 40000 + b"1]",  # the same content twice
        "tokenizer/empty.txt": b"",
    }
    for i in range(shards):
        share = total // shards if i else total - (shards - 1) * (total // shards)
        files["transformer/part-%05d-of-%05d.safetensors" % (i + 1, shards)] = Entry(r.randbytes(share), lfs=True)
    return files
