#!/usr/bin/env python3
"""Running it: systemd's notifications and watchdog, orderly stop, keys reloaded, the log, the metrics.

    test_service_ops.py PROGRAM FAKEWORKER [CASE ...]
"""
import concurrent.futures
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time

from servicelib import B64, Service, run_cases


def case_systemd():
    with tempfile.TemporaryDirectory() as d:
        box = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        box.bind(os.path.join(d, "notify"))
        box.settimeout(20)
        env = {"NOTIFY_SOCKET": os.path.join(d, "notify"), "WATCHDOG_USEC": "600000"}
        env.pop("WATCHDOG_PID", None)
        with Service(fake=True, env=env).start() as s:
            assert box.recv(100) == b"READY=1"
            times = []
            for _ in range(4):
                assert box.recv(100) == b"WATCHDOG=1"
                times.append(time.monotonic())
            assert max(b - a for a, b in zip(times, times[1:])) < 0.6, "as often as the watchdog asks"
            os.kill(s.process.pid, signal.SIGSTOP)  # a loop that does not run gives no sign
            box.settimeout(0.5)
            time.sleep(0.5)
            try:
                while True:
                    box.recv(100)
            except socket.timeout:
                pass
            os.kill(s.process.pid, signal.SIGCONT)
            box.settimeout(20)
            s.process.terminate()
            while box.recv(100) != b"STOPPING=1":
                pass


def case_stop():
    """SIGTERM: running edits end, who waits is told, waiting jobs go on at the next start, nothing new is taken."""
    with tempfile.TemporaryDirectory() as d:
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            s = Service(state=d, fake=True).start()
            edit = lambda p: s.call("POST", "/edit", {"prompt": p, "image_base64": B64})
            running = pool.submit(edit, "sleep 1500")
            s.until(lambda: s.health()["workers"][0]["current"])
            waiting = pool.submit(edit, "x")
            s.until(lambda: s.health()["queue"]["depth"] == 1)
            job = s.accepted("x")
            stream = pool.submit(s.events, job)
            time.sleep(0.2)
            s.process.terminate()
            time.sleep(0.3)
            try:
                code = s.job("x")[0]
            except OSError:
                code = "refused"
            assert code in (503, "refused"), code
            assert running.result()[0] == 200
            code, a = waiting.result()
            assert code == 503 and "goes on as job job_" in a["error"]["message"], (code, a)
            assert stream.result()[-1]["event"] == "queued"
            assert s.process.wait(20) == 0
            again = Service(state=d, fake=True).start()
            assert again.finished(job)["status"] == "completed"
            told = re.search(r"job_\w+", a["error"]["message"]).group(0)
            assert again.finished(told)["attempts"] == 0
            assert again.stop() == 0
            s.stop()


def case_stop_long():
    """What does not end in time waits for the next start, without blame; a second signal does not wait."""
    with tempfile.TemporaryDirectory() as d:
        s = Service(state=d, fake=True).start()
        job = s.accepted("sleep 60000")
        s.until(lambda: s.look(job)["status"] == "running")
        s.process.terminate()
        time.sleep(0.3)
        start = time.monotonic()
        s.process.send_signal(signal.SIGINT)
        assert s.process.wait(10) == 0 and time.monotonic() - start < 5
        again = Service(state=d, fake=True).start()
        again.until(lambda: again.look(job)["status"] == "running")
        assert again.look(job)["attempts"] == 0
        assert again.call("POST", f"/v1/jobs/{job}/cancel", b"")[0] == 202 and again.finished(job)
        assert again.stop() == 0
        s.stop()


def case_keys():
    with tempfile.NamedTemporaryFile("w", delete=False) as f:
        f.write("# keys\nfirst-key-1\nsecond-key-2\n")
    s = Service("--api-key-file", f.name, fake=True).start()
    try:
        key = lambda k: {"Authorization": "Bearer " + k}
        job = s.accepted("x", headers=key("first-key-1"))
        ask = lambda k: s.call("GET", "/v1/jobs/" + job, headers=key(k))[0]
        assert [ask("first-key-1"), ask("second-key-2"), ask("third-key-3")] == [200, 403, 401]
        for path, code in (("/health/live", 200), ("/openapi.json", 200), ("/", 200), ("/health", 401),
                           ("/metrics", 401), ("/v1/models", 401), ("/v1/jobs", 401)):
            assert s.call("GET", path)[0] == code, path
        open(f.name, "w").write("third-key-3\nfirst-key-1\n")
        s.process.send_signal(signal.SIGHUP)
        s.until(lambda: ask("third-key-3") == 403)
        assert [ask("first-key-1"), ask("second-key-2")] == [200, 401]
        for bad in ("", "# none\n", "short\n"):
            open(f.name, "w").write(bad)
            s.process.send_signal(signal.SIGHUP)
            s.until(lambda: s.log().count("the old keys stay") >= 1)
            assert [ask("first-key-1"), ask("second-key-2")] == [200, 401], bad
        os.unlink(f.name)
        s.process.send_signal(signal.SIGHUP)
        s.until(lambda: s.log().count("the old keys stay") >= 4)
        assert ask("first-key-1") == 200 and s.call("GET", "/v1/jobs/" + job)[0] == 401
        assert "first-key-1" not in s.log(), "a secret in the log"
    finally:
        assert s.stop() == 0


def case_log():
    with Service("--log-format", "json", fake=True).start() as s:
        jobs = [s.accepted(p) for p in ("x", "refuse", "message-text", "exit")]
        for j in jobs:
            s.finished(j)
        lines = [json.loads(line) for line in s.log().splitlines()]
        for line in lines:
            assert {"time", "level", "event", "message"} <= set(line), line
            assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", line["time"]), line
        told = {(line["job_id"], line["event"]) for line in lines if "job_id" in line}
        for j, end in zip(jobs, ("completed", "failed", "failed", "failed")):
            assert {(j, "accepted"), (j, end)} <= told, (j, told)
        assert (jobs[3], "retry") in told and (jobs[3], "worker") in told, told
    with Service(fake=True).start() as s:
        job = s.accepted("x")
        s.finished(job)
        assert re.search(rf"^\d{{4}}-\S+Z info  completed job={job}: ", s.log(), re.M), s.log()
        assert all(re.match(r"\d{4}-\S+Z (info|warn|error) ", line) for line in s.log().splitlines()), s.log()


def case_metrics():
    with Service(fake=True).start() as s:
        s.finished(s.accepted("x"))
        s.finished(s.accepted("refuse"))
        s.call("GET", "/nowhere")
        s.job("")
        text = s.call("GET", "/metrics")[1].decode()
        assert s.headers["Content-Type"].startswith("text/plain")
        types = dict(re.findall(r"^# TYPE (\S+) (\S+)$", text, re.M))
        names = {"requests_total": "counter", "jobs_total": "counter", "queue_depth": "gauge",
                 "queue_wait_seconds": "histogram", "job_duration_seconds": "histogram",
                 "denoise_step_seconds": "histogram", "worker_up": "gauge", "worker_restarts_total": "counter",
                 "gpu_memory_bytes": "gauge", "build_info": "gauge"}
        for name, kind in names.items():
            assert types.get("qwen_edit_" + name) == kind, (name, types)
        sample = re.compile(r'qwen_edit_[a-z_]+(\{[a-z_]+="[^"]*"(,[a-z_]+="[^"]*")*\})? [-+0-9.e]+(Inf)?$')
        for line in text.splitlines():
            assert line.startswith("#") or sample.match(line), line
        assert s.metric('qwen_edit_jobs_total{status="completed"}') == [1]
        assert s.metric('qwen_edit_jobs_total{status="failed"}') == [1]
        assert s.metric('qwen_edit_requests_total{route="/v1/jobs",code="202"}') == [2]
        assert s.metric('qwen_edit_requests_total{route="/v1/jobs",code="422"}') == [1]
        assert s.metric('qwen_edit_requests_total{route="other",code="404"}') == [1]
        assert s.metric("qwen_edit_queue_wait_seconds_count") == [2]
        assert s.metric('qwen_edit_job_duration_seconds_bucket{stage="total",le="+Inf"}') == [1]
        assert s.metric('qwen_edit_worker_up{gpu_id="-1"') == [1]


def case_warning():
    """On every network without a key: said once, at the start."""
    with Service("--host", "0.0.0.0", fake=True).start() as s:
        assert "everybody who reaches 0.0.0.0" in s.log()
    with Service("--host", "0.0.0.0", "--api-key", "a-long-key", fake=True).start() as s:
        assert "everybody who reaches" not in s.log()


def main():
    cases = (case_systemd, case_stop, case_stop_long, case_keys, case_log, case_metrics, case_warning)
    return 1 if run_cases([(f.__name__, f) for f in cases]) else 0


if __name__ == "__main__":
    sys.exit(main())
