#!/usr/bin/env python3
"""Workers on GPUs: the service, the real worker and the CUDA back end on the double of the runtime (tests/cuda).

    test_service_gpu.py PROGRAM FAKEWORKER [CASE ...]
"""
import os
import sys
import tempfile

from servicelib import Service, run_cases

TESTS = os.path.dirname(os.path.abspath(sys.argv[2]))
UUID = "GPU-0000000%d-0000-0000-0000-000000000000"
GIB = 1 << 30


def on_double(n, double="", *args):
    """A service on n cards of 2 GiB, as driver and double tell of them."""
    script = tempfile.NamedTemporaryFile("w", suffix=".txt")
    for i in range(n):
        script.write("gpu Double %d|%s|%d|%d|0|8|0|0|0\n" % (i, UUID % i, 2 * GIB, 2 * GIB))
    script.flush()
    env = {"QIE_NVML": os.path.join(TESTS, "fakenvml.so"), "FAKE_NVML": script.name,
           "QIE_CUDA_PLUGIN": os.path.join(TESTS, "qie_cuda_double.so"),
           "QIE_CUDA_DOUBLE": "devices=%d,memory=2048%s" % (n, double)}
    s = Service("--headroom-gib", "0.5", *args, env=env)
    s.script = script  # lives as long as the service
    return s


def case_a_worker_on_each_card():
    with on_double(2, "", "--gpus", "1,0").start() as s:
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert [(w["gpu_id"], w["gpu_name"]) for w in s.health()["workers"]] == [(1, "Double 1"), (0, "Double 0")]
        jobs = [s.accepted(num_inference_steps=1, max_side=64) for _ in range(2)]
        ends = [s.finished(j) for j in jobs]
        assert all(e["status"] == "completed" for e in ends), ends
        assert {e["result"]["gpu_id"] for e in ends} == {0, 1}, ends
        assert "files: " in s.log() and "calls: seccomp" in s.log(), s.log()


def case_a_lost_card_ends_its_worker():
    with on_double(1, ",lose_at=300", "--gpus", "0").start() as s:
        first = s.worker_pid()
        end = s.finished(s.accepted(num_inference_steps=1, max_side=64))
        assert end["status"] == "failed" and end["attempts"] == 3, end
        assert "lost" in end["error"]["message"] and "GPU 0" in end["error"]["message"], end
        w = s.health()["workers"][0]
        assert "lost" in w["last_error"] and w["restarts"] >= 3, w
        assert s.worker_pid() != first


def main():
    return 1 if run_cases([(f.__name__, f) for f in
                           (case_a_worker_on_each_card, case_a_lost_card_ends_its_worker)]) else 0


if __name__ == "__main__":
    sys.exit(main())
