#!/usr/bin/env python3
"""A long mixed load on a running service: edits, jobs, listeners, cancels, departures, wrong requests, killed workers.

    bench/soak.py PROGRAM [--minutes 30] [--warm-up 5] [--worker-program FILE] [--pause 0.3] [--port N]

All the time the master's memory is looked at, and once a minute, with the load at rest, its descriptors. What is resident in
the mean of the last minute may be less than 1 % above the mean of the minute that ends the warm-up, descriptors stay the same.
Prints a line a minute and a verdict; exit status 1 when it does not hold.
"""
import argparse
import base64
import collections
import http.client
import json
import os
import random
import re
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PICTURES = [open(os.path.join(ROOT, "demo", "samples", f), "rb").read()
            for f in sorted(os.listdir(os.path.join(ROOT, "demo", "samples"))) if f.endswith(".png")]

KINDS = ("VmRSS", "RssAnon", "RssFile", "RssShmem")


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Soak:
    def __init__(self, args):
        self.args, self.counts, self.jobs = args, collections.Counter(), collections.deque(maxlen=50)
        self.resting, self.ended, self.seen = threading.Event(), False, []
        self.state, self.port = tempfile.mkdtemp(prefix="qe-soak-"), args.port or free_port()
        command = [args.program, "serve", "--model", "demo", "--threads", "1", "--nice", "10", "--port", str(self.port),
                   "--state-dir", self.state, "--keep", "0.02", "--sync-timeout", "20"]
        if args.worker_program:
            command += ["--worker-program", args.worker_program]
        self.log = open(os.path.join(self.state, "log"), "wb")
        self.process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=self.log)

    def call(self, method, path, body=None, headers=None):
        c = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            c.request(method, path, json.dumps(body) if body is not None else None,
                      {"Content-Type": "application/json", **(headers or {})})
            r = c.getresponse()
            data = r.read()
            return r.status, json.loads(data) if "json" in r.headers.get("Content-Type", "") else data
        finally:
            c.close()

    def body(self):
        b = {"prompt": random.choice(["turn the subject purple", "make the background blue", "x"]),
             "image_base64": base64.b64encode(random.choice(PICTURES)).decode(), "num_inference_steps": 1,
             "max_side": random.choice([64, 96, 128])}
        if self.args.worker_program:
            b["prompt"] = random.choice(["x", "sleep 300", "refuse", "x", "x", "message-magic", "exit", "garbage-picture"])
        return b

    # what clients do -----------------------------------------------------------------------------
    def do_edit(self):
        return self.call("POST", "/edit", self.body())[0]

    def do_job(self):
        code, j = self.call("POST", "/v1/jobs", self.body())
        if code == 202:
            self.jobs.append(j["id"])
        return code

    def do_cancel(self):
        code, j = self.call("POST", "/v1/jobs", self.body())
        return self.call("POST", f"/v1/jobs/{j['id']}/cancel", None)[0] if code == 202 else code

    def do_listen(self):
        if not self.jobs:
            return 0
        c = socket.create_connection(("127.0.0.1", self.port), 30)
        c.sendall(f"GET /v1/jobs/{random.choice(self.jobs)}/events HTTP/1.1\r\nHost: a\r\n\r\n".encode())
        c.settimeout(random.random() * 2 + 0.1)
        try:
            while c.recv(4096):
                pass
        except OSError:  # leaves in the middle
            pass
        c.close()
        return 200

    def do_leave(self):
        body = json.dumps(self.body()).encode()
        c = socket.create_connection(("127.0.0.1", self.port), 30)
        c.sendall(b"POST /edit HTTP/1.1\r\nHost: a\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
                  % len(body) + body[:random.choice([len(body), len(body) // 2])])
        time.sleep(random.random() * 0.3)
        c.close()
        return "left"

    def do_look(self):
        path = random.choice(["/health", "/metrics", "/v1/jobs", "/", "/openapi.json", "/v1/models", "/nothing"])
        if self.jobs and random.random() < 0.6:
            path = random.choice(["/v1/jobs/%s", "/v1/jobs/%s/result", "/v1/jobs/%s/inputs/0"]) % random.choice(self.jobs)
        return self.call("GET", path)[0]

    def do_wrong(self):
        return self.call("POST", "/edit", random.choice([{}, {"prompt": "x"}, {"prompt": 1}, {"x": "y" * 2000000},
                                                         {"prompt": "x", "image_base64": "AAAA"},
                                                         {**self.body(), "prompt": "紫" * 9000}]))[0]

    def do_delete(self):
        return self.call("DELETE", "/v1/jobs/" + self.jobs.popleft())[0] if self.jobs else 0

    def client(self):
        acts = [self.do_edit, self.do_job, self.do_job, self.do_cancel, self.do_listen, self.do_leave, self.do_look,
                self.do_look, self.do_wrong, self.do_delete]
        while not self.ended:
            if self.resting.is_set():
                time.sleep(0.05)
                continue
            act = random.choice(acts)
            try:
                self.counts[(act.__name__[3:], act())] += 1
            except OSError as e:
                self.counts[(act.__name__[3:], type(e).__name__)] += 1
            time.sleep(random.random() * 2 * self.args.pause)

    def killer(self):
        while not self.ended:
            time.sleep(random.random() * 40)
            try:
                pid = self.call("GET", "/health")[1]["workers"][0]["pid"]
                if pid:  # 0 while it waits for its start: that would be this process' own group
                    os.kill(pid, signal.SIGKILL)
                    self.counts["killed"] += 1
            except (OSError, KeyError, http.client.HTTPException):
                pass

    # what is measured ----------------------------------------------------------------------------
    def watcher(self):
        """resident memory, in kB and by kind, twenty times a second, whatever the load does."""
        while not self.ended:
            with open(f"/proc/{self.process.pid}/status") as f:
                status = f.read()
            self.seen.append([int(re.search(rf"{k}:\s+(\d+)", status).group(1)) for k in KINDS])
            time.sleep(0.05)

    def rest(self):
        """Descriptors and threads when the queue is empty, connections are closed and rows are swept."""
        self.resting.set()
        end = time.time() + 60
        while time.time() < end:
            time.sleep(1)
            text = self.call("GET", "/metrics")[1].decode()
            if "qwen_edit_queue_depth 0\n" in text and "qwen_edit_connections 1\n" in text and \
                    self.call("GET", "/health")[1]["workers"][0]["state"] == "ready":
                break
        time.sleep(1)
        counts = [len(os.listdir(f"/proc/{self.process.pid}/{what}")) for what in ("fd", "task")]
        self.resting.clear()
        return counts

    def run(self):
        end = time.time() + 60
        while time.time() < end:
            try:
                if self.call("GET", "/health/ready")[0] == 200:
                    break
            except OSError:
                time.sleep(0.1)
        for target in [self.client] * 6 + [self.killer, self.watcher]:
            threading.Thread(target=target, daemon=True).start()
        means, descriptors, next_minute = [], [], time.time()
        for minute in range(1, self.args.minutes + 1):
            next_minute += 60
            time.sleep(max(0, next_minute - time.time() - 3))
            n_descriptors, n_threads = self.rest()
            kinds = [list(c) for c in zip(*self.seen)]
            self.seen.clear()
            means.append(statistics.mean(kinds[0]))
            descriptors.append(n_descriptors)
            parts = ", ".join(f"{k} {statistics.mean(v):.0f}" for k, v in zip(KINDS, kinds))
            print(f"minute {minute}: {parts} kB in the mean (resident {min(kinds[0])} to {max(kinds[0])}), {n_descriptors} "
                  f"descriptors, {n_threads} threads, {sum(self.counts.values())} requests", flush=True)
        self.ended = True
        base = min(self.args.warm_up, self.args.minutes) - 1
        growth = 100 * (means[-1] / means[base] - 1)
        print(f"{dict(sorted(((str(k), v) for k, v in self.counts.items())))}")
        ok = growth < 1 and len(set(descriptors[base:])) == 1
        print(f"soak: resident memory {growth:+.2f} % from minute {base + 1} to minute {len(means)}, descriptors "
              f"{sorted(set(descriptors[base:]))}, {'holds' if ok else 'DOES NOT HOLD'}")
        self.process.terminate()
        code = self.process.wait(60)
        shutil.rmtree(self.state, ignore_errors=True)
        return 0 if ok and code == 0 else 1


def main():
    p = argparse.ArgumentParser()
    p.add_argument("program")
    p.add_argument("--minutes", type=int, default=30)
    p.add_argument("--warm-up", type=int, default=5)
    p.add_argument("--worker-program")
    p.add_argument("--pause", type=float, default=0.3)
    p.add_argument("--port", type=int)
    return Soak(p.parse_args()).run()


if __name__ == "__main__":
    sys.exit(main())
