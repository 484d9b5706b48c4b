"""A service of the built program for the drivers of this folder: started on a free port, its state thrown away."""
import http.client
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


def sample(name="ball"):
    with open(os.path.join(ROOT, "demo", "samples", name + ".png"), "rb") as f:
        return f.read()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Service:
    """with Service(program, "--queue-size", "2") as s: s.url, s.ask("GET", "/health")"""

    def __init__(self, program, *args, model="demo", key=None):
        self.program, self.args, self.model, self.key = os.path.abspath(program), args, model, key
        self.state, self.port, self.process = tempfile.mkdtemp(prefix="qe-state-"), free_port(), None
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self):
        self.log = open(os.path.join(self.state, "log"), "ab")
        self.process = subprocess.Popen(
            [self.program, "serve", "--model", self.model, "--threads", "1", "--port", str(self.port), "--state-dir",
             self.state, *self.args], stdout=subprocess.DEVNULL, stderr=self.log)
        self.until("the service is ready", lambda: self.ask("GET", "/health/ready")[0] == 200)
        return self

    def ask(self, method, path, body=None, headers=None):
        """(status, answer); JSON is parsed."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=180)
        headers = dict(headers or {})
        if self.key:
            headers.setdefault("Authorization", "Bearer " + self.key)
        if isinstance(body, dict):
            body = json.dumps(body)
            headers.setdefault("Content-Type", "application/json")
        try:
            c.request(method, path, body, headers)
            r = c.getresponse()
            data = r.read()
            return r.status, json.loads(data) if "json" in r.headers.get("Content-Type", "") else data
        finally:
            c.close()

    def until(self, what, look, seconds=120):
        end = time.monotonic() + seconds
        while True:
            try:
                value = look()
                if value:
                    return value
            except OSError:
                pass
            if time.monotonic() > end:
                raise AssertionError(f"waited {seconds} s for: {what}")
            time.sleep(0.05)

    def jobs(self):
        return self.ask("GET", "/v1/jobs")[1]["data"]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def tail(self):
        with open(os.path.join(self.state, "log"), errors="replace") as f:
            return f.read()[-3000:]

    def stop(self):
        if self.process and self.process.poll() is None:
            self.process.terminate()
            self.process.wait(60)
        self.log.close()
        shutil.rmtree(self.state, ignore_errors=True)
        return self.process.returncode

    def __enter__(self):
        return self.start()

    def __exit__(self, kind, *_):
        if kind:
            print(self.tail())
        code = self.stop()
        assert kind or code == 0, f"the service did not stop in order: {code}"
