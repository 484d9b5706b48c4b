"""pull over TLS and through proxies: with the certificates and proxies that the environment names, and the token to
nobody but its hub."""
import base64
import json
import os
import select
import shutil
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fakehub import Entry, FakeHub
from hubtest import *

REPO, TOKEN = "test/model", "hf_SECRET"
FILES = {"a.json": b"{}", "big.bin": Entry(b"0123456789abcdef" * 200000, lfs=True)}
NAME = "hub.test"  # no name server knows it: only a proxy gets there


def pull(folder, endpoint, *args, rc=0, **env):
    r = run("pull", REPO, "--endpoint", endpoint, "--json", "--retries", "2", *args,
            env=clean_env(folder, HF_HUB_DOWNLOAD_TIMEOUT="5", HF_TOKEN=TOKEN, **env), timeout=60)
    equal(r.returncode, rc, r.stderr[-1500:], r.stdout[-500:])
    check(TOKEN not in r.stdout + r.stderr, "the token is shown:", r.stderr)
    r.json = json.loads(r.stdout.strip().splitlines()[-1]) if r.stdout.strip() else {}
    r.message = r.json.get("error", {}).get("message", "")
    if rc == 0:
        for name, e in FILES.items():
            with open(os.path.join(r.json["dir"], name), "rb") as f:
                check(f.read() == (e.data if isinstance(e, Entry) else e), name)
    return r


class Certificates:
    """A certificate authority that only these tests know, and a server's certificate signed by it."""

    def __init__(self, folder):
        self.folder = folder
        self.ca, other = self.path("ca.pem"), self.path("other.pem")
        for name in self.ca, other:
            self.openssl("-subj", "/CN=test authority", "-addext", "keyUsage=critical,keyCertSign", "-keyout", name + ".key",
                         "-out", name)
        self.other = other
        self.right = self.leaf("right", f"IP:127.0.0.1,DNS:{NAME}")
        self.wrong = self.leaf("wrong", "DNS:somebody.else")

    def path(self, name):
        return os.path.join(self.folder, name)

    def openssl(self, *args):
        r = subprocess.run(["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes",
                            "-days", "2", *args], capture_output=True, text=True)
        check(r.returncode == 0, r.stderr)

    def leaf(self, name, names):
        key, cert = self.path(name + ".key"), self.path(name + ".pem")
        self.openssl("-CA", self.ca, "-CAkey", self.ca + ".key", "-subj", "/CN=hub", "-addext", "subjectAltName=" + names,
                     "-addext", "basicConstraints=critical,CA:FALSE", "-keyout", key, "-out", cert)
        c = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        c.load_cert_chain(cert, key)
        return c


class Proxy:
    """An HTTP proxy: tunnels (CONNECT) and plain requests (GET http://...). Every name leads to this machine."""

    def __init__(self, password=None, refuse=None):
        self.password, self.refuse = password, refuse
        self.tunnels, self.plain, self.text = [], [], b""

    def __enter__(self):
        proxy = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self):
                try:
                    proxy.serve(self.request)
                except OSError:
                    pass

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self.server = Server(("127.0.0.1", 0), Handler)
        self.url = "http://127.0.0.1:%d" % self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *a):
        self.server.shutdown()
        self.server.server_close()

    def head(self, s):
        data = b""
        while b"\r\n\r\n" not in data:
            more = s.recv(65536)
            if not more:
                return None
            data += more
        self.text += data
        return data

    def serve(self, s):
        data = self.head(s)
        if not data:
            return
        first, rest = data.split(b"\r\n", 1)
        method, target, _ = first.decode().split(" ")
        if self.password and b"Proxy-Authorization: Basic " + base64.b64encode(self.password) not in rest:
            s.sendall(b"HTTP/1.1 407 No\r\nProxy-Authenticate: Basic realm=x\r\nContent-Length: 0\r\n\r\n")
            return
        if self.refuse:
            s.sendall(b"HTTP/1.1 %d No\r\nContent-Length: 0\r\n\r\n" % self.refuse)
            return
        if method == "CONNECT":
            self.tunnels.append(target)
            out = socket.create_connection(("127.0.0.1", int(target.rsplit(":", 1)[1])))
            s.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        else:
            self.plain.append(target)
            host, path = target[len("http://"):].split("/", 1)
            out = socket.create_connection(("127.0.0.1", int(host.rsplit(":", 1)[1])))
            lines = [li for li in rest.split(b"\r\n\r\n", 1)[0].split(b"\r\n")
                     if not li.lower().startswith((b"proxy-", b"connection"))]
            out.sendall(b"\r\n".join([f"{method} /{path} HTTP/1.1".encode(), *lines, b"Connection: close", b"", b""]))
        with out:
            while True:
                for r in select.select([s, out], [], [])[0]:
                    data = r.recv(1 << 18)
                    if not data:
                        return
                    (out if r is s else s).sendall(data)


HOME = tempfile.mkdtemp(prefix="qwen-edit-ca-")
CERTS = Certificates(HOME) if shutil.which("openssl") else None


def needs_certificates():
    if not CERTS:
        raise Skip("no openssl to make certificates with")


def secure(**more):
    needs_certificates()
    return FakeHub(FILES, token=TOKEN, tls=CERTS.right, **more)


def only_the_hub_saw_the_token(hub):
    for host, _, path, _, auth in hub.requests:
        equal(auth, "Bearer " + TOKEN if host == "hub" else None, host, path)


def test_tls_with_the_authority_that_the_environment_names(folder):
    with secure() as hub:
        for i, variable in enumerate(("SSL_CERT_FILE", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")):
            pull(os.path.join(folder, str(i)), hub.url, **{variable: CERTS.ca})
        only_the_hub_saw_the_token(hub)
        check(any(q[0] == "cdn" for q in hub.requests))


def test_tls_that_nobody_vouches_for_is_refused(folder):
    with secure() as hub:
        for env in {}, {"SSL_CERT_FILE": CERTS.other}:
            r = pull(folder, hub.url, rc=6, **env)
            check("no secure connection" in r.message and "SSL_CERT_FILE" in r.message, r.message)
        equal(hub.requests, [])
    hub = FakeHub(FILES, token=TOKEN, tls=CERTS.wrong)
    with hub:
        r = pull(folder, hub.url, rc=6, SSL_CERT_FILE=CERTS.ca)
        check("no secure connection" in r.message, r.message)
        equal(hub.requests, [])


def test_redirect_from_https_to_http_is_refused(folder):
    with secure(cdn_tls=False) as hub:
        r = pull(folder, hub.url, rc=6, SSL_CERT_FILE=CERTS.ca)
        check("unencrypted" in r.message and f"http://127.0.0.1:{hub.cdn_port}" in r.message, r.message)
        only_the_hub_saw_the_token(hub)
        equal([q for q in hub.requests if q[0] == "cdn"], [])


def test_token_stays_when_the_scheme_changes(folder):
    """The same host and name, but encrypted: another origin, and the token is not sent there."""
    with secure() as hub, FakeHub(FILES) as front:
        front.cdn = hub.cdn
        pull(folder, front.url, SSL_CERT_FILE=CERTS.ca)
        only_the_hub_saw_the_token(front)
        check(all(q[4] is None for q in hub.requests) and hub.requests, hub.requests)


def test_tunnel_through_a_proxy(folder):
    with secure(host=NAME) as hub, Proxy() as proxy:
        for i, variable in enumerate(("HTTPS_PROXY", "https_proxy", "ALL_PROXY")):
            proxy.tunnels.clear()
            pull(os.path.join(folder, str(i)), hub.url, SSL_CERT_FILE=CERTS.ca, **{variable: proxy.url})
            equal(set(proxy.tunnels), {f"{NAME}:{hub.port}", f"{NAME}:{hub.cdn_port}"})
        equal(proxy.plain, [])
        check(TOKEN.encode() not in proxy.text and b"Authorization" not in proxy.text, proxy.text)
        only_the_hub_saw_the_token(hub)


def test_proxy_for_plain_http(folder):
    with FakeHub(FILES, token=TOKEN, host=NAME) as hub, Proxy() as proxy:
        for i, variable in enumerate(("http_proxy", "HTTP_PROXY", "all_proxy")):
            proxy.plain.clear()
            pull(os.path.join(folder, str(i)), hub.url, **{variable: proxy.url})
            check(any(t.startswith(hub.url) for t in proxy.plain), proxy.plain)
            check(any(t.startswith(hub.cdn) for t in proxy.plain), proxy.plain)
        equal(proxy.tunnels, [])
        only_the_hub_saw_the_token(hub)


def test_no_proxy_goes_directly(folder):
    with FakeHub(FILES, token=TOKEN) as hub, Proxy() as proxy:
        for i, value in enumerate(("127.0.0.1", "example.org, 127.0.0.1", "*")):
            for variable in "NO_PROXY", "no_proxy":
                pull(os.path.join(folder, variable, str(i)), hub.url, http_proxy=proxy.url, **{variable: value})
        equal(proxy.plain + proxy.tunnels, [])
        pull(folder, hub.url, http_proxy=proxy.url, NO_PROXY="example.org")
        check(proxy.plain)


def test_proxy_that_wants_a_password(folder):
    with secure(host=NAME) as hub, Proxy(password=b"me:s3cret") as proxy:
        r = pull(folder, hub.url, rc=6, SSL_CERT_FILE=CERTS.ca, HTTPS_PROXY=proxy.url)
        check("password" in r.message and proxy.url in r.message, r.message)
        with_name = proxy.url.replace("//", "//me:s3cret@")
        r = pull(folder, hub.url, SSL_CERT_FILE=CERTS.ca, HTTPS_PROXY=with_name)
        check("s3cret" not in r.stdout + r.stderr, r.stderr)
        r = pull(os.path.join(folder, "b"), hub.url, rc=6, SSL_CERT_FILE=CERTS.ca,
                 HTTPS_PROXY=with_name.replace("s3cret", "wr0ng"))
        check("wr0ng" not in r.stdout + r.stderr, r.stderr)


def test_proxy_that_refuses_or_is_not_there(folder):
    with secure(host=NAME) as hub, Proxy(refuse=403) as proxy:
        r = pull(folder, hub.url, rc=6, SSL_CERT_FILE=CERTS.ca, HTTPS_PROXY=proxy.url)
        check("through the proxy " + proxy.url in r.message, r.message)
        r = pull(folder, hub.url, rc=6, SSL_CERT_FILE=CERTS.ca, HTTPS_PROXY="http://127.0.0.1:9")
        check("through the proxy http://127.0.0.1:9" in r.message, r.message)
        equal(hub.requests, [])


if __name__ == "__main__":
    try:
        main(sys.modules[__name__])
    finally:
        shutil.rmtree(HOME, ignore_errors=True)
