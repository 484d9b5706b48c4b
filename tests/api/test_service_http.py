#!/usr/bin/env python3
"""Hostile clients: broken HTTP, drips, floods, bombs, paths and addresses. The service answers as documented, stays
up for others, and forgets them afterwards.

    test_service_http.py PROGRAM FAKEWORKER [CASE ...]
"""
import base64
import http.server
import json
import os
import re
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib

from servicelib import B64, PICTURE, SANITIZED, Service, run_cases


def raw(s, *pieces, half_close=False, wait=20, pause=0):
    """Bytes out, the whole answer back; "" when the connection was closed without one."""
    with socket.create_connection(("127.0.0.1", s.port), wait) as c:
        got = b""
        try:
            for p in pieces:
                c.sendall(p)
                time.sleep(pause)
            if half_close:
                c.shutdown(socket.SHUT_WR)
            while True:
                piece = c.recv(65536)
                if not piece:
                    break
                got += piece
        except OSError:
            pass
        return got


def status(answer):
    m = re.match(rb"HTTP/1\.[01] (\d+)", answer)
    return int(m.group(1)) if m else 0


def fine(s):
    assert s.call("GET", "/health/live", timeout=5)[0] == 200
    assert s.finished(s.accepted("x"))["status"] == "completed"


def post(body, path=b"/edit", more=b"", type=b"application/json"):
    return b"POST %s HTTP/1.1\r\nHost: a\r\nConnection: close\r\nContent-Type: %s\r\nContent-Length: %d\r\n%s\r\n%s" % (
        path, type, len(body), more, body)


def case_malformed(s):
    good = json.dumps({"prompt": "x", "image_base64": B64}).encode()
    for text, allowed in (
            (b"\x00\x01\x02\r\n\r\n", {0, 400}), (b"\r\n" * 1000, {0, 400}), (b"GET\r\n\r\n", {0, 400}),
            (b"GET / HTTP/9.9\r\nHost: a\r\n\r\n", {0, 400, 505}), (b"GET / HTTP/1.1\r\n\r\n", {0, 400}),
            (b"GET /%00%ff%c0%ae HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {404}),
            (b"GET /v1/models/%ff%fe HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {404}),
            (b"GET /v1/jobs?after=%ff HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {422}),
            (b"GET /v1/jobs?limit=99999999999999999999 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {422}),
            (b"GET /v1/jobs?limit=4294967297 HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {422}),
            (b"GET /../../etc/passwd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {404}),
            (b"GET /assets/..%2f..%2fetc%2fpasswd HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {404}),
            (b"BREW / HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {405, 400, 501}),
            (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"a" * 200000 + b"\r\n\r\n", {0, 400, 413, 431}),
            (b"GET /" + b"a" * 200000 + b" HTTP/1.1\r\nHost: a\r\n\r\n", {0, 414}),
            (b"GET / HTTP/1.1\r\nHost: a\r\n" + b"".join(b"X%d: y\r\n" % i for i in range(20000)) + b"\r\n",
             {0, 400, 413, 431}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n", {411}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nffffffff\r\nx", {0, 400, 411}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
             {0, 400, 411}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999\r\n\r\n", {413}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: 99999999999999999999999\r\n\r\n", {0, 400, 413}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: -1\r\n\r\n", {0, 400}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: 12abc\r\n\r\n", {0, 400}),
            (b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Length: 5\r\nContent-Length: 6\r\n\r\nhello", {0, 400, 415}),
            (post(good, more=b"X-Request-Id: a\x01b\r\n"), {200}),
            (post(good, path=b"/v1/images/edits"), {422}),
            (post(b"", path=b"/v1/jobs/x/cancel"), {404})):
        code = status(raw(s, text, half_close=b"close" not in text))
        assert code in allowed, (code, text[:80])
    answer = raw(s, post(good, path=b"/v1/images/edits").replace(b"Host: a", b"Host: \xff\"<"))
    assert status(answer) in (400, 422), answer[:200]
    two = raw(s, b"GET /health/live HTTP/1.1\r\nHost: a\r\n\r\nGET /health/live HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert two.count(b"HTTP/1.1 200") == 2, "pipelined"
    head = raw(s, b"HEAD /health HTTP/1.1\r\nHost: a\r\nConnection: close\r\n\r\n")
    assert status(head) == 200 and head.endswith(b"\r\n\r\n")
    fine(s)


def case_drips(s):
    """Headers within 10 s in all, whatever the drip; others are served meanwhile; a body that stops is let go."""
    conns = [socket.create_connection(("127.0.0.1", s.port)) for _ in range(50)]
    start, open_ = time.time(), list(conns)
    for c in conns:
        c.sendall(b"GET /health HTTP/1.1\r\nHost: a\r\n")
    while open_ and time.time() - start < 20:
        time.sleep(0.5)
        for c in list(open_):
            try:
                c.sendall(b"X-A: b\r\n")
                c.setblocking(False)
                gone = c.recv(100) == b""
                c.setblocking(True)
            except BlockingIOError:
                gone = False
                c.setblocking(True)
            except OSError:
                gone = True
            if gone:
                open_.remove(c)
        assert s.call("GET", "/health/live", timeout=5)[0] == 200
    assert not open_ and time.time() - start < 14, (len(open_), time.time() - start)
    for c in conns:
        c.close()
    fine(s)


def case_half_closed(s):
    """A request that was sent whole and then half-closed counts as a client that left: nothing hangs."""
    body = json.dumps({"prompt": "sleep 60000", "image_base64": B64}).encode()
    with socket.create_connection(("127.0.0.1", s.port), 20) as c:
        c.sendall(post(body))
        s.until(lambda: s.health()["workers"][0]["current"])
        c.shutdown(socket.SHUT_WR)
        s.until(lambda: not s.health()["workers"][0]["current"])
    with socket.create_connection(("127.0.0.1", s.port), 20) as c:  # reset in the middle of the body
        c.sendall(post(body)[:-1000])
        c.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert status(raw(s, post(body)[:-1000], half_close=True)) in (0, 400)
    fine(s)


def case_multipart(s):
    part = b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n'
    file = b'--b\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n%s\r\n'
    kind = b"multipart/form-data; boundary=b"
    good = part % (b"prompt", b"x") + file % PICTURE + b"--b--\r\n"
    assert status(raw(s, post(good, type=kind))) == 200
    for body, type_, allowed in (
            (good[:-4], kind, {400}), (b"", kind, {400}), (b"--b", kind, {400}), (b"--b--\r\n", kind, {422, 400}),
            (good, b"multipart/form-data", {400}), (good, b"multipart/form-data; boundary=", {400}),
            (good, b"multipart/form-data; boundary=" + b"x" * 500, {400}),
            (good, b"multipart/form-data; boundary=other", {400}),
            (part % (b"", b"x") + good, kind, {400}), (part % (b"a" * 300, b"x") + good, kind, {400, 422}),
            (part % (b"prompt", b"\xff\xfe") + file % PICTURE + b"--b--\r\n", kind, {422}),
            (part % (b"prompt", b"a\x00b") + file % PICTURE + b"--b--\r\n", kind, {422}),
            (part % (b"prompt", b"x" * 500000) + file % PICTURE + b"--b--\r\n", kind, {422}),
            (b"".join(part % (b"user", b"x") for _ in range(200)) + good, kind, {422}),
            (file % b"" + good, kind, {422}), (b"".join(file % PICTURE for _ in range(5)) + good, kind, {413}),
            (part % (b"image", b"no file") + good, kind, {422, 415}),
            (good.replace(b'name="prompt"', b'name="image_url"; filename="x"'), kind, {422}),
            (b"--b\r\n" + b"X: " + b"y" * 10000 + b"\r\n\r\nz\r\n--b--\r\n", kind, {400})):
        code = status(raw(s, post(body, type=type_)))
        assert code in allowed, (code, body[:120], type_)
    fine(s)


def png(width, height, rows=b"", more=b""):
    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)) + more +
            chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b""))


def chunk_of(name, data):
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def case_bombs():
    """Against the real worker: what is refused is refused by its header, and what is decoded stays within its limit."""
    with Service().start() as s:
        def edit(picture, **more):
            return s.call("POST", "/edit", {"prompt": "x", "num_inference_steps": 1,
                                            "image_base64": base64.b64encode(picture).decode(), **more})
        pid = s.worker_pid()
        zeros = zlib.compress(bytes(50 << 20), 9)
        text = chunk_of(b"zTXt", b"bomb\x00\x00" + zeros)
        icc = chunk_of(b"iCCP", b"bomb\x00\x00" + zeros)
        for name, picture, allowed in (
                ("30000 x 30000", png(30000, 30000, bytes(1 << 20)), {413}),
                ("2^31 wide", png(2 ** 31 - 1, 1), {413, 415, 422}), ("0 x 0", png(0, 0), {415, 422}),
                ("too small", png(4, 4, bytes(13 * 4)), {422}),
                ("rows missing", png(2000, 2000, bytes(100)), {422}),
                ("compressed text", png(32, 32, bytes(97 * 32), text), {200}),
                ("compressed profile", png(32, 32, bytes(97 * 32), icc), {200, 422}),
                ("more rows than said", png(32, 32, bytes(40 << 20)), {200, 422}),
                ("cut", PICTURE[:len(PICTURE) // 2], {422}), ("no picture", b"GIF89a" + bytes(50), {415}),
                ("webp without data", b"RIFF\x1a\x00\x00\x00WEBPVP8L\x0e\x00\x00\x00/" + bytes(20), {415, 422}),
                ("jpeg of nothing", b"\xff\xd8\xff\xe0" + bytes(300), {415, 422})):
            start = time.time()
            code, a = edit(picture)
            assert code in allowed, (name, code, a)
            assert code == 200 or a["error"]["param"], (name, a)
            assert time.time() - start < 30, name
        assert s.worker_pid() == pid, "no worker was lost"
        for body in (b'{"prompt":' + b"[" * 500000, b'{"a":[' + b"0," * 5000000 + b"0]}",
                     b'{"prompt":"x","image_base64":"' + b"\\n" * 8000000 + b'"}',
                     b'{"prompt":"x","image_base64":"' + b"A" * 30000000 + b'"}',
                     b'{' + b",".join(b'"k%d":1' % i for i in range(200000)) + b'}', b'{"prompt":1e999999}'):
            code, a = s.call("POST", "/edit", body, {"Content-Type": "application/json"})
            assert code in (400, 413, 415, 422), (code, a, body[:40])
        peak = int(re.search(r"VmHWM:\s+(\d+)", open(f"/proc/{s.process.pid}/status").read()).group(1))
        assert SANITIZED or peak < 400 * 1024, f"{peak} kB at the peak"
        return f"master's peak {peak >> 10} MB"


def case_bodies(s):
    """Bodies in flight have a limit in all; who is over it is told when to come back."""
    with Service("--max-body-memory", "16", fake=True).start() as t:
        head = b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: 12000000\r\n\r\n"
        with socket.create_connection(("127.0.0.1", t.port)) as c:
            c.sendall(head + b"{" * 100000)
            t.until(lambda: status(raw(t, head)) == 503)
            answer = raw(t, head)
            assert b"Retry-After: " in answer, answer
        t.until(lambda: t.call("POST", "/edit", b" " * 12000000, {"Content-Type": "application/json"})[0] == 400)


def case_paths():
    with tempfile.TemporaryDirectory() as d:
        out, outside = os.path.join(d, "out"), os.path.join(d, "outside")
        os.makedirs(out)
        os.makedirs(outside)
        os.symlink(outside, os.path.join(out, "link"))
        os.symlink(os.path.join(outside, "target.png"), os.path.join(out, "alias.png"))
        with Service("--output-dir", out, fake=True).start() as s:
            def edit(path, **more):
                return s.call("POST", "/edit", {"prompt": "x", "image_base64": B64, "response": "path",
                                                "output_path": path, **more})
            assert edit("a.png")[1]["output_path"] == "a.png" and edit("sub/deep/b.png")[0] == 200
            assert open(os.path.join(out, "a.png"), "rb").read() == PICTURE
            for path in ("../x.png", "/etc/x.png", "a/../../x.png", "a/./x.png", "..", ".", "", "/", "a//b.png", ".x.png",
                         "a/.x.png", "x.png/", "a\\..\\x.png", "x\x00.png", "x\n.png", "x.jpg", "x", "x" * 300 + ".png",
                         "~/x.png/..", "a/../x.png"):
                code, a = edit(path)
                assert (code, a["error"]["param"]) == (422, "output_path") or code == 400 and "\0" in path, (path, code, a)
            code, a = edit("link/x.png")
            assert code == 422 and a["error"]["param"] == "output_path", a
            assert edit("alias.png")[0] == 200 and not os.path.islink(os.path.join(out, "alias.png"))
            assert os.listdir(outside) == [], "something left the folder"
            assert not [f for _, _, fs in os.walk(out) for f in fs if f.endswith(".part")]
    with Service(fake=True).start() as s:
        code, a = s.call("POST", "/edit", {"prompt": "x", "image_base64": B64, "response": "path", "output_path": "a.png"})
        assert code == 422 and "--output-dir" in a["error"]["message"], a


class Source(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.server.asked.append(self.path)
        name, _, more = self.path[1:].partition("/")
        if name == "to":
            self.send_response(302)
            self.send_header("Location", more.replace("|", "/"))
            self.end_headers()
        elif name == "again":
            self.send_response(302)
            self.send_header("Location", f"/again/{int(more) + 1}")
            self.end_headers()
        elif name == "endless":
            self.send_response(200)
            self.end_headers()
            try:
                for _ in range(40):
                    self.wfile.write(bytes(1 << 20))
            except OSError:
                pass
        elif name == "status":
            self.send_response(int(more))
            self.end_headers()
        elif name == "empty":
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()
        else:
            self.send_response(200)
            self.send_header("Content-Type", "text/html")  # the bytes decide
            self.send_header("Content-Length", str(len(PICTURE)))
            self.end_headers()
            self.wfile.write(PICTURE)

    def log_message(self, *_):
        pass


def case_addresses():
    source = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Source)
    source.asked = []
    threading.Thread(target=source.serve_forever, daemon=True).start()
    port = source.server_port
    env = {"http_proxy": f"http://127.0.0.1:{port}", "https_proxy": f"http://127.0.0.1:{port}",
           "all_proxy": f"http://127.0.0.1:{port}"}

    def edit(s, url, **more):
        return s.call("POST", "/edit", {"prompt": "x", "image_url": url, **more})

    with Service(fake=True, env=env).start() as s:  # a proxy of the machine must not fetch for strangers either
        host = socket.gethostname()
        for url in (f"http://127.0.0.1:{port}/", f"http://2130706433:{port}/", f"http://0x7f000001:{port}/",
                    f"http://0177.0.0.1:{port}/", f"http://127.1:{port}/", f"http://[::1]:{port}/",
                    f"http://[::ffff:127.0.0.1]:{port}/", f"http://[::ffff:7f00:1]:{port}/", f"http://[::]:{port}/",
                    f"http://[64:ff9b::7f00:1]:{port}/", f"http://[2002:7f00:1::]:{port}/", f"http://0:{port}/",
                    f"http://localhost:{port}/", f"http://LOCALHOST.:{port}/", f"http://{host}:{port}/",
                    f"http://example.com@127.0.0.1:{port}/", f"http://127.0.0.1:{port}#@example.com/",
                    f"http://127.0.0.1:{port}\\@example.com/", "http://169.254.169.254/latest/meta-data/",
                    "http://[fe80::1%25lo]/", "http://[fd00:ec2::254]/", "http://10.0.0.1/", "http://192.168.1.1/",
                    "http://172.16.0.1/", "http://100.64.0.1/", "http://224.0.0.1/", "http://255.255.255.255/",
                    "http://①②⑦.⓪.⓪.①/", "http://127。0。0。1/", "http://nothing.invalid/", "http://", "http:///x", "http://[/",
                    "http://a b/", "http://\r\nHost: x/", "file:///etc/passwd", "gopher://127.0.0.1/", "ftp://127.0.0.1/",
                    "dict://127.0.0.1/", "//127.0.0.1/", "javascript:1", "", " http://127.0.0.1/", "http://" + "a" * 3000):
            code, a = edit(s, url)
            assert code == 422 and a["error"]["param"] == "image_url", (url, code, a)
            assert "root:" not in str(a)
        assert source.asked == [], source.asked
    with Service("--allow-url-cidr", "127.0.0.1/32", fake=True).start() as s:
        base = f"http://127.0.0.1:{port}"
        assert edit(s, base + "/picture")[0] == 200
        assert edit(s, base + f"/to/http:||127.0.0.1:{port}|picture")[0] == 200
        assert edit(s, base + "/to/|picture")[0] == 200
        before = len(source.asked)
        for path, asked in (("/to/http:||127.0.0.2:%d|picture" % port, 1), ("/to/http:||169.254.169.254|", 1),
                            ("/to/http:||[::1]:%d|" % port, 1), ("/to/http:||10.0.0.1|", 1), ("/to/file:|||etc|passwd", 1),
                            ("/to/gopher:||127.0.0.1|", 1), ("/again/0", 4), ("/endless", 1), ("/status/404", 1),
                            ("/status/500", 1), ("/empty", 1)):
            code, a = edit(s, base + path)
            assert code == 422 and a["error"]["param"] == "image_url", (path, code, a)
            assert len(source.asked) - before == asked, (path, source.asked[before:])
            before = len(source.asked)
    with Service("--no-image-url", "--allow-url-cidr", "127.0.0.0/8", fake=True).start() as s:
        code, a = edit(s, f"http://127.0.0.1:{port}/")
        assert code == 422 and a["error"]["param"] == "image_url", a
        assert edit(s, "data:image/png;base64," + B64)[0] == 200
    source.shutdown()


def case_origins():
    with Service("--cors-origin", "https://good.example", fake=True).start() as s:
        assert s.call("GET", "/health", headers={"Origin": "https://good.example"})[0] == 200
        assert s.headers["Access-Control-Allow-Origin"] == "https://good.example"
        assert "Access-Control-Allow-Credentials" not in s.headers
        for origin in ("https://evil.example", "null", "https://good.example.evil", f"http://127.0.0.1:{s.port + 1}"):
            assert s.call("GET", "/health", headers={"Origin": origin})[0] == 403, origin
            assert "Access-Control-Allow-Origin" not in s.headers
        assert s.call("GET", "/health", headers={"Origin": f"http://127.0.0.1:{s.port}"})[0] == 200
        code, _ = s.call("OPTIONS", "/edit", headers={"Origin": "https://good.example",
                                                      "Access-Control-Request-Method": "POST"})
        assert code == 204 and "POST" in s.headers["Access-Control-Allow-Methods"]


def main():
    with Service(fake=True).start() as s:
        before = len(os.listdir(f"/proc/{s.process.pid}/fd"))

        def forgotten():
            s.until(lambda: s.metric("qwen_edit_connections")[0] <= 2)
            after = len(os.listdir(f"/proc/{s.process.pid}/fd"))
            assert after <= before + 2, (before, after)

        shared = [(f.__name__, lambda f=f: f(s)) for f in
                  (case_malformed, case_drips, case_half_closed, case_multipart, case_bodies)]
        failed = run_cases(shared + [("case_forgotten", forgotten)] + [(f.__name__, f) for f in (
            case_bombs, case_paths, case_addresses, case_origins)])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
