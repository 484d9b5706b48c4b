"""A service of the built program for the drivers of this folder: started on a free port, talked to, killed, stopped."""
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
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
    """with Service(program, "--queue-size", "2") as s: s.url, s.ask("GET", "/health"). A state folder that is given is
    kept, one of its own thrown away at the end. model None: whatever the program finds. QIE_TEST_WORKER: the program
    whose worker is used instead, of a build without the thread sanitizer, which does not know libgomp's barriers."""

    def __init__(self, program, *args, model="demo", key=None, state=None, env=None, prefix=()):
        self.program, self.key, self.process = os.path.abspath(program), key, None
        self.args = ("--model", model, "--threads", "1", *args) if model else args
        if os.environ.get("QIE_TEST_WORKER") and "--worker-program" not in self.args:
            self.args += ("--worker-program", os.path.abspath(os.environ["QIE_TEST_WORKER"]))
        self.state, self.own_state = state or tempfile.mkdtemp(prefix="qe-state-"), state is None
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.env, self.prefix = dict(os.environ, **(env or {})), list(prefix)
        self.log_path = tempfile.mktemp(prefix="qe-log-")

    def command(self):
        return [*self.prefix, self.program, "serve", "--port", str(self.port), "--state-dir", self.state, *self.args]

    def start(self, wait=True):
        with open(self.log_path, "ab") as log:
            self.process = subprocess.Popen(self.command(), stdout=subprocess.DEVNULL, stderr=log, env=self.env)
        if wait:
            self.until(lambda: self.ask("GET", "/health/ready")[0] in (200, 401), what="the service is ready")
        return self

    def log(self):
        if not os.path.exists(self.log_path):
            return ""
        with open(self.log_path, errors="replace") as f:
            return f.read()

    def until(self, look, seconds=120, what="something to happen"):
        """The first value of look() that is true; a service that does not answer counts as not yet."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            try:
                value = look()
                if value:
                    return value
            except (OSError, http.client.HTTPException):
                pass
            if self.process and self.process.poll() is not None:
                raise AssertionError(f"the service has ended with {self.process.returncode}: {self.log()[-600:]}")
            time.sleep(0.03)
        raise AssertionError(f"waited {seconds} s for {what}")

    def ask(self, method, path, body=None, headers=None, timeout=180):
        """(status, answer); JSON is parsed. The answer's headers are in self.headers."""
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
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
            self.headers = r.headers
            return r.status, json.loads(data) if "json" in r.headers.get("Content-Type", "") else data
        finally:
            c.close()

    def jobs(self):
        return self.ask("GET", "/v1/jobs")[1]["data"]

    def kill(self):
        self.process.kill()
        self.process.wait()

    def stop(self):
        """Exit status of an orderly stop."""
        if self.process and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.kill()
        if self.own_state:
            shutil.rmtree(self.state, ignore_errors=True)
        if os.path.exists(self.log_path):
            os.unlink(self.log_path)
        return self.process.returncode if self.process else 0

    def __enter__(self):
        return self if self.process else self.start()

    def __exit__(self, kind, *_):
        if kind:
            sys.stderr.write(self.log()[-3000:])
        code = self.stop()
        assert kind or code == 0, f"the service stopped with {code}"
