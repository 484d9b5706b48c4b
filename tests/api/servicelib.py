"""A running service for tests: start, talk to it, kill it, stop it; and a runner of cases.

A driver is called as DRIVER.py PROGRAM FAKEWORKER [CASE ...]: only the cases whose name contains one of the words run.
QIE_TEST_LONG=1 asks for the large rounds. Nothing here depends on how fast the machine is.
"""
import base64
import http.client
import os
import sys
import time
import traceback
import uuid

from service import ROOT, free_port, sample
from service import Service as Base

PROGRAM = os.path.abspath(sys.argv[1])
FAKE = os.path.abspath(sys.argv[2]) if len(sys.argv) > 2 else None
PICTURE = sample()
B64 = base64.b64encode(PICTURE).decode()
LONG = bool(os.environ.get("QIE_TEST_LONG"))
with open(PROGRAM, "rb") as program:
    # memory means nothing in these builds
    code = program.read()
    SANITIZED = b"__asan_init" in code or b"__tsan_init" in code


class Service(Base):
    """One service of PROGRAM. fake=True: the stand-in computes nothing; its prompt says what it does."""

    def __init__(self, *args, state=None, fake=False, env=None, prefix=(), demo=True):
        args = ("--worker-program", FAKE, *args) if fake else args
        super().__init__(PROGRAM, *args, model="demo" if demo else None, state=state, env=env, prefix=prefix)

    call = Base.ask

    def form(self, path, fields, files, headers=None):
        boundary = uuid.uuid4().hex
        out = b""
        for k, v in fields.items():
            out += f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n'.encode()
        for k, v in files:
            out += f'--{boundary}\r\nContent-Disposition: form-data; name="{k}"; filename="a.png"\r\n\r\n'.encode()
            out += v + b"\r\n"
        out += f"--{boundary}--\r\n".encode()
        return self.call("POST", path, out, {"Content-Type": f"multipart/form-data; boundary={boundary}",
                                             **(headers or {})})

    def job(self, prompt="turn the subject purple", headers=None, **more):
        return self.call("POST", "/v1/jobs", {"prompt": prompt, "image_base64": B64, **more}, headers)

    def accepted(self, *args, **more):
        code, j = self.job(*args, **more)
        assert code == 202, (code, j)
        return j["id"]

    def look(self, job, headers=None):
        code, j = self.call("GET", "/v1/jobs/" + job, headers=headers)
        assert code == 200, (code, j)
        return j

    def finished(self, job, seconds=180, headers=None):
        def ended():
            j = self.look(job, headers)
            return j if j["status"] not in ("queued", "running") else None
        return self.until(ended, seconds)

    def events(self, job, last=None, timeout=180):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        c.request("GET", f"/v1/jobs/{job}/events", headers={"Last-Event-ID": last} if last else {})
        r = c.getresponse()
        out, event = [], {}
        for line in r:
            line = line.decode().rstrip("\n")
            if not line and "event" in event:
                out.append(event)
                event = {}
            elif line and not line.startswith(":"):
                k, v = line.split(": ", 1)
                event[k] = v
        c.close()
        return out

    def health(self):
        return self.call("GET", "/health")[1]

    def metric(self, line_start):
        text = self.call("GET", "/metrics")[1].decode()
        return [float(li.rsplit(" ", 1)[1]) for li in text.splitlines() if li.startswith(line_start)]

    def worker_pid(self):
        return self.until(lambda: [w["pid"] for w in self.health()["workers"] if w["ready"] and w["pid"]])[0]


def run_cases(cases):
    """Runs (name, function) pairs; returns how many failed."""
    wanted = [a for a in sys.argv[3:] if not a.startswith("-")]
    failed = 0
    for name, run in cases:
        if wanted and not any(w in name for w in wanted):
            continue
        start = time.time()
        try:
            note = run()
            print(f"ok   {name} ({time.time() - start:.1f} s){': ' + note if note else ''}", flush=True)
        except Exception as e:
            failed += 1
            print(f"FAIL {name}: {type(e).__name__}: {str(e)[:600]}", flush=True)
            traceback.print_exc()
    print(f"{os.path.basename(sys.argv[0])}: {failed} failed")
    return failed
