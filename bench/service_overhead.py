#!/usr/bin/env python3
"""What the service costs over the engine: time a job, throughput with two clients, first event of a listener.

    bench/service_overhead.py PROGRAM FAKEWORKER [--state DIR] [--jobs 200]

The overhead is the time of an edit whose worker computes nothing; on a disk six of its own fsyncs are allowed for.
The throughput is compared with `edit --batch` on the same model, sizes and threads, alternating, in the same run.
"""
import argparse
import base64
import http.client
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
PICTURE = os.path.join(ROOT, "demo", "samples", "ball.png")
BYTES = open(PICTURE, "rb").read()
EDIT = {"prompt": "turn the subject purple", "image_base64": base64.b64encode(BYTES).decode(), "seed": 1}


class Client:
    """One client that keeps its connection."""

    def __init__(self, port):
        self.c = http.client.HTTPConnection("127.0.0.1", port, timeout=60)

    def edit(self, body):
        self.c.request("POST", "/edit", body, {"Content-Type": "application/json"})
        r = self.c.getresponse()
        data = r.read()
        assert r.status == 200, data[:300]
        return data


class Service:
    def __init__(self, args, *more):
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = s.getsockname()[1]
        self.state = tempfile.mkdtemp(prefix="qe-bench-", dir=args.state)
        self.process = subprocess.Popen([args.program, "serve", "--model", "demo", "--port", str(self.port), "--state-dir",
                                         self.state, *more], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while True:
            try:
                c = http.client.HTTPConnection("127.0.0.1", self.port)
                c.request("GET", "/health/ready")
                if c.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.02)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.terminate()
        self.process.wait()
        shutil.rmtree(self.state, ignore_errors=True)


def fsync_ms(folder, n=60):
    times = []
    path = os.path.join(folder, "qe-fsync")
    with open(path, "wb") as f:
        for _ in range(n):
            f.write(bytes(4096))
            f.flush()
            start = time.perf_counter()
            os.fdatasync(f.fileno())
            times.append(1e3 * (time.perf_counter() - start))
    os.unlink(path)
    return statistics.median(times)


def overhead(args):
    with Service(args, "--worker-program", args.fakeworker) as s:
        client, times = Client(s.port), []
        for i in range(args.jobs + 20):
            body = json.dumps({**EDIT, "seed": i})
            start = time.perf_counter()
            client.edit(body)
            times.append(1e3 * (time.perf_counter() - start))
        times = sorted(times[20:])
        return statistics.median(times), times[int(0.9 * len(times))]


def first_event(args):
    with Service(args, "--worker-program", args.fakeworker) as s:
        c = http.client.HTTPConnection("127.0.0.1", s.port)
        c.request("POST", "/v1/jobs", json.dumps({**EDIT, "prompt": "sleep 20000"}), {"Content-Type": "application/json"})
        job, times = json.loads(c.getresponse().read())["id"], []
        for _ in range(50):
            with socket.create_connection(("127.0.0.1", s.port)) as k:
                start = time.perf_counter()
                k.sendall(f"GET /v1/jobs/{job}/events HTTP/1.1\r\nHost: a\r\n\r\n".encode())
                got = b""
                while b"event: " not in got:
                    got += k.recv(4096)
                times.append(1e3 * (time.perf_counter() - start))
        return statistics.median(times), max(times)


def engine_rate(args, n, steps):
    folder = tempfile.mkdtemp(prefix="qe-bench-")
    jobs = os.path.join(folder, "jobs.jsonl")
    with open(jobs, "w") as f:
        for i in range(n):
            f.write(json.dumps({"image": PICTURE, "prompt": EDIT["prompt"], "seed": i, "num_inference_steps": steps,
                                "output_path": os.path.join(folder, f"{i}.png")}) + "\n")
    start = time.perf_counter()
    r = subprocess.run([args.program, "edit", "--model", "demo", "--threads", "1", "--quiet", "--batch", jobs],
                       capture_output=True, text=True)
    took = time.perf_counter() - start
    made = len([f for f in os.listdir(folder) if f.endswith(".png")])
    shutil.rmtree(folder)
    assert r.returncode == 0 and made == n, r.stderr[-500:]
    return n / took


def service_rate(args, n, steps):
    with Service(args, "--threads", "1") as s:
        Client(s.port).edit(json.dumps({**EDIT, "num_inference_steps": 1}))
        left, lock = list(range(n)), threading.Lock()

        def run():
            client = Client(s.port)
            while True:
                with lock:
                    if not left:
                        return
                    i = left.pop()
                client.edit(json.dumps({**EDIT, "seed": i, "num_inference_steps": steps}))

        threads = [threading.Thread(target=run) for _ in range(2)]
        start = time.perf_counter()
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        return n / (time.perf_counter() - start)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("program")
    p.add_argument("fakeworker")
    p.add_argument("--state", default="/dev/shm")
    p.add_argument("--jobs", type=int, default=200)
    p.add_argument("--edits", type=int, default=24)
    p.add_argument("--steps", type=int, default=4)
    args = p.parse_args()
    args.program, args.fakeworker = os.path.abspath(args.program), os.path.abspath(args.fakeworker)
    sync = fsync_ms(args.state)
    median, p90 = overhead(args)
    allowed = 5 if sync < 0.05 else 5 + 6 * sync
    print(f"overhead a job: median {median:.2f} ms, 90 % below {p90:.2f} ms (fsync median {sync:.2f} ms, allowed "
          f"{allowed:.1f} ms): {'holds' if median <= allowed else 'DOES NOT HOLD'}", flush=True)
    event, worst = first_event(args)
    print(f"first event: median {event:.2f} ms, at most {worst:.2f} ms: {'holds' if worst <= 50 else 'DOES NOT HOLD'}",
          flush=True)
    ratios = []
    for i in range(3):
        engine, service = engine_rate(args, args.edits, args.steps), service_rate(args, args.edits, args.steps)
        ratios.append(service / engine)
        print(f"throughput: engine {engine:.2f}/s, service with two clients {service:.2f}/s, {100 * ratios[-1]:.1f} %",
              flush=True)
    ratio = statistics.median(ratios)
    print(f"throughput: {100 * ratio:.1f} % at the median: {'holds' if ratio >= 0.95 else 'DOES NOT HOLD'}")
    return 0 if median <= allowed and worst <= 50 and ratio >= 0.95 else 1


if __name__ == "__main__":
    sys.exit(main())
