#!/usr/bin/env python3
"""Workers that misbehave, and what the master makes of it: tests/api/fakeworker.c does what its prompt says.

    test_service_worker.py PROGRAM FAKEWORKER [CASE ...]
"""
import json
import os
import re
import signal
import sys
import tempfile
import time

from servicelib import B64, SANITIZED, Service, run_cases

UUID = "GPU-0000000%d-1111-2222-3333-444444444444"
FAKENVML = os.path.join(os.path.dirname(os.path.abspath(sys.argv[2])), "fakenvml.so")


def descriptors(pid):
    return len(os.listdir(f"/proc/{pid}/fd"))


def case_honest(s):
    job = s.accepted("x")
    end = s.finished(job)
    assert end["status"] == "completed" and end["attempts"] == 0 and end["result"]["model"] == "fake", end
    assert s.call("GET", f"/v1/jobs/{job}/result")[1][:4] == b"\x89PNG"
    code, a = s.call("POST", "/edit", {"prompt": "refuse", "image_base64": B64})
    assert code == 422 and a["error"]["message"] == "this picture is refused", a


def lost(s, prompt, reason, why):
    """A job that loses its worker three times: contained, retried, failed with the reason, and the next one runs."""
    before = s.metric(f'qwen_edit_worker_restarts_total{{gpu_id="-1",worker="0",reason="{reason}"}}')[0]
    job = s.accepted(prompt)
    names = [(e["event"], json.loads(e["data"])) for e in s.events(job)]
    end = s.look(job)
    assert end["status"] == "failed" and end["attempts"] == 3 and why in end["error"]["message"], end
    assert end["error"]["type"] == "INTERNAL", end
    retries = [d["attempt"] for n, d in names if n == "retrying"]
    assert retries == [2, 3] and names[-1][0] == "failed", names
    assert s.metric(f'qwen_edit_worker_restarts_total{{gpu_id="-1",worker="0",reason="{reason}"}}')[0] == before + 3
    w = s.health()["workers"][0]
    assert why in w["last_error"] and abs(time.time() - w["last_error_at"]) < 120, w
    assert s.finished(s.accepted("x"))["status"] == "completed"


def case_garbage(s):
    for how in ("magic", "short", "kind", "token"):
        lost(s, "message-" + how, "garbage", "ended")
    for how in ("result", "size", "count", "picture"):
        lost(s, "garbage-" + how, "garbage", "garbage")


def case_garbage_text(s):
    end = s.finished(s.accepted("message-text"))
    assert end["status"] == "failed" and end["error"]["type"] == "INTERNAL", end
    assert end["error"]["message"].startswith("a?b?[1m??"), end
    assert all(line.startswith("20") for line in s.log().splitlines()), "a line of the log was forged"


def case_leaks(s):
    before = descriptors(s.process.pid)
    for _ in range(3):
        assert s.finished(s.accepted("leak"))["status"] == "completed"
    assert descriptors(s.process.pid) <= before + 2, (before, descriptors(s.process.pid))


def case_deaths(s):
    lost(s, "exit", "died", "exit code 3")
    lost(s, "crash", "died", "signal 11")


def case_memory(s):
    lost(s, "memory", "died", "signal 6")
    filled = [int(n) for n in re.findall(r"fake: filled (\d+) MB", s.log())]
    assert filled and max(filled) < 2048, filled  # 16 MB were planned; the margin is for codecs
    assert re.search(r"output job=job_\w+: worker 0: fake: filled", s.log())


def case_sandbox(s):
    end = s.finished(s.accepted("sandbox"))
    got = dict(p.split("=") for p in end["error"]["message"].split())
    assert all(int(v) in (1, 13) for v in got.values()), got  # EPERM or EACCES
    assert not os.path.exists("/tmp/fakeworker-was-here")


def case_hang():
    with Service("--hang-limit", "1", fake=True).start() as s:
        lost(s, "hang", "hung", "no sign of life")
        job = s.accepted("sleep 3000")  # silent for 0.75 s at most
        assert s.finished(job)["status"] == "completed"
        job = s.accepted("hang")
        s.until(lambda: s.look(job)["status"] == "running")
        start = time.time()
        assert s.call("POST", f"/v1/jobs/{job}/cancel", b"")[0] == 202
        assert s.finished(job)["status"] == "cancelled" and time.time() - start < 10


def case_stopped():
    """A frozen process (SIGSTOP) is a hang too, and a frozen idle one is found with its first job."""
    with Service("--hang-limit", "1", fake=True).start() as s:
        pid = s.worker_pid()
        os.kill(pid, signal.SIGSTOP)
        end = s.finished(s.accepted("x"))
        assert end["status"] == "completed" and end["attempts"] == 1, end
        assert s.worker_pid() != pid


def case_cancel():
    with Service(fake=True).start() as s:
        job, waiting = s.accepted("sleep 60000"), s.accepted("x")
        s.until(lambda: s.look(job)["status"] == "running")
        for j in (waiting, job):
            assert s.call("POST", f"/v1/jobs/{j}/cancel", b"")[0] == 202
            assert s.finished(j)["status"] == "cancelled"
        assert s.call("POST", f"/v1/jobs/{job}/cancel", b"")[0] == 409
        assert s.health()["workers"][0]["restarts"] == 0


def case_start():
    """Dies, refuses, says nonsense or nothing at its start: told in /health, waited longer each time, and jobs go on
    when it works again."""
    with tempfile.TemporaryDirectory() as d:
        mode = os.path.join(d, "mode")
        for how, why in (("die", "exit code 5"), ("refuse", "the model is not what it should be"),
                         ("nonsense", "garbage"), ("silent", "no sign of life")):
            open(mode, "w").write(how)
            with Service("--hang-limit", "1", fake=True, env={"FAKE_START": mode}).start(wait=False) as s:
                w = s.until(lambda: next((w for w in s.health()["workers"] if w["restarts"] > 1), None))
                assert why in w["last_error"] and not w["ready"], w
                code, h = s.call("GET", "/health")
                assert code == 503 and h["status"] == "down" and s.headers["Retry-After"], h
                assert s.call("GET", "/health/live")[0] == 200 and s.call("GET", "/health/ready")[0] == 503
                job = s.accepted("x")
                open(mode, "w").write("")
                assert s.finished(job)["status"] == "completed"
                assert s.health()["status"] == "ok"


def case_hopeless():
    with tempfile.TemporaryDirectory() as d:
        mode = os.path.join(d, "mode")
        open(mode, "w").write("die")
        with Service(fake=True, env={"FAKE_START": mode}).start(wait=False) as s:
            times = []
            def failed():
                w = s.health()["workers"][0]
                if w["restarts"] > len(times):
                    times.append(time.time())
                return w["state"] == "failed"
            s.until(failed)
            gaps = [b - a for a, b in zip(times, times[1:])]
            assert gaps[-1] > gaps[0] and sum(gaps) > 3, gaps  # 0.5 + 1 + 2 + 4 s
            code, a = s.job("x")
            assert code == 503 and "exit code 5" in a["error"]["message"] and int(s.headers["Retry-After"]) > 0, a


def case_loading():
    with tempfile.TemporaryDirectory() as d:
        mode = os.path.join(d, "mode")
        open(mode, "w").write("slow")
        with Service(fake=True, env={"FAKE_START": mode}).start(wait=False) as s:
            s.until(lambda: s.call("GET", "/health/live")[0] == 200)
            code, h = s.call("GET", "/health")
            assert code == 503 and h["status"] == "starting", h
            assert s.finished(s.accepted("x"))["status"] == "completed"
        with Service("--reject-while-loading", fake=True, env={"FAKE_START": mode}).start(wait=False) as s:
            s.until(lambda: s.call("GET", "/health/live")[0] == 200)
            assert s.job("x")[0] == 503 and int(s.headers["Retry-After"]) > 0
            s.until(lambda: s.job("x")[0] == 202)


def started(s, n):
    """What the stand-ins said of their environment."""
    s.until(lambda: s.log().count("fake: gpu=") >= n)
    return [dict(p.split("=", 1) for p in line.split("fake: ")[1].split()) for line in s.log().splitlines()
            if "fake: gpu=" in line]


def case_binding():
    """--gpus: indices and UUIDs within CUDA_VISIBLE_DEVICES; each worker sees its own GPU only, named by UUID."""
    script = tempfile.NamedTemporaryFile("w", suffix=".txt", delete=False)
    script.writelines(f"gpu H20|{UUID % i}|{96 << 30}|{90 << 30}|{6 << 30}|9|0|0|0\n" for i in range(8))
    script.close()
    nvml = {"QIE_NVML": FAKENVML, "FAKE_NVML": script.name}
    try:
        with Service("--gpus", "4,GPU-00000005", fake=True, env=nvml).start() as s:
            got = started(s, 2)
            assert {g["gpu"] for g in got} == {UUID % 4, UUID % 5}, got
            assert all(g["order"] == "PCI_BUS_ID" for g in got), got
            s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
            assert [(w["gpu_id"], w["gpu_name"]) for w in s.health()["workers"]] == [(4, "H20"), (5, "H20")]
            assert s.metric('qwen_edit_worker_up{gpu_id="5"') == [1]
        with Service("--gpus", "auto", fake=True, env={**nvml, "CUDA_VISIBLE_DEVICES": "6,4"}).start() as s:
            assert {g["gpu"] for g in started(s, 2)} == {UUID % 6, UUID % 4}  # who speaks first is chance
            assert [w["gpu_id"] for w in s.health()["workers"]] == [6, 4]
        for gpus, why in (("9", "there is no GPU '9'"), ("5", "CUDA_VISIBLE_DEVICES"), ("4,4", "twice"),
                          ("four", "neither"), ("4,", ""), (",", "none")):
            s = Service("--gpus", gpus, fake=True, env={**nvml, "CUDA_VISIBLE_DEVICES": "6,4"})
            s.start(wait=False)
            if gpus == "4,":
                s.until(lambda: s.call("GET", "/health/ready")[0] == 200)
                assert s.stop() == 0
                continue
            assert s.process.wait(30) == 2 and why in s.log(), (gpus, s.log())
            s.stop()
        s = Service("--gpus", "4")
        s.args = ("--model", "demo", "--gpus", "4")  # another worker's program may do without the driver
        s.start(wait=False)
        assert s.process.wait(30) == 4 and "--device cpu" in s.log(), s.log()
        s.stop()
    finally:
        os.unlink(script.name)


def case_workers():
    with Service("--workers", "3", "--nice", "7", fake=True).start() as s:
        got = started(s, 3)
        assert len(got) == 3 and all(g["gpu"] == "-" and g["args"].endswith("--nice,7") for g in got), got
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        jobs = [s.accepted("sleep 1500") for _ in range(3)]
        s.until(lambda: all(s.look(j)["status"] == "running" for j in jobs))
        busy = [w for w in s.health()["workers"] if w["state"] == "busy"]
        assert len(busy) == 3 and len({w["pid"] for w in busy}) == 3, busy
        os.kill(busy[0]["pid"], signal.SIGKILL)
        s.until(lambda: s.health()["status"] == "degraded" or s.health()["workers"][busy[0]["id"]]["restarts"])
        assert all(s.finished(j)["status"] == "completed" for j in jobs)
    with Service(fake=True, demo=False, env={"QWEN_EDIT_NICE": "5", "QWEN_EDIT_2511_DIR": ""}).start() as s:
        got = started(s, 1)[0]
        threads = got["args"].split(",")[got["args"].split(",").index("--threads") + 1]
        assert got["args"].endswith("--nice,5") and int(threads) == max(1, len(os.sched_getaffinity(0)) // 2), got


def case_limits():
    """The real worker: limits that follow from the plan, and no way to write or to reach a network."""
    with Service("--nice", "3").start() as s:
        pid = s.worker_pid()
        assert s.finished(s.accepted(num_inference_steps=1))["status"] == "completed"
        assert os.getpriority(os.PRIO_PROCESS, pid) == 3
        limits = open(f"/proc/{pid}/limits").read()
        data = re.search(r"Max data size\s+(\S+)", limits).group(1)
        assert SANITIZED or data.isdigit() and 0 < int(data) < 4 << 30, limits
        status = open(f"/proc/{pid}/status").read()
        assert re.search(r"NoNewPrivs:\s+1", status)
        seccomp = re.search(r"Seccomp:\s+(\d)", status)
        return f"seccomp {seccomp.group(1) if seccomp else 'unknown'}"


def main():
    with Service(fake=True).start() as s:
        shared = [(f.__name__, lambda f=f: f(s)) for f in
                  (case_honest, case_garbage, case_garbage_text, case_leaks, case_deaths, case_memory, case_sandbox)]
        failed = run_cases(shared + [(f.__name__, f) for f in
                                     (case_hang, case_stopped, case_cancel, case_start, case_hopeless, case_loading,
                                      case_binding, case_workers, case_limits)])
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
