#!/usr/bin/env python3
"""Workers on GPUs: the service, the real worker and the CUDA back end on the double of the runtime (tests/cuda).

    test_service_gpu.py PROGRAM FAKEWORKER [CASE ...]
"""
import os
import signal
import subprocess
import sys
import tempfile

from servicelib import Service, run_cases

TESTS = os.path.dirname(os.path.abspath(sys.argv[2]))
UUID = "GPU-0000000%d-0000-0000-0000-000000000000"
GIB = 1 << 30


def on_double(n, double="", *args, mib=2048):
    """A service on n cards, as driver and double tell of them."""
    script = tempfile.NamedTemporaryFile("w", suffix=".txt")
    for i in range(n):
        script.write("gpu Double %d|%s|%d|%d|0|8|0|0|0\n" % (i, UUID % i, mib << 20, mib << 20))
    script.flush()
    env = {"QIE_NVML": os.path.join(TESTS, "fakenvml.so"), "FAKE_NVML": script.name,
           "QIE_CUDA_PLUGIN": os.path.join(TESTS, "qie_cuda_double.so"),
           "QIE_CUDA_DOUBLE": "devices=%d,memory=%d%s" % (n, mib, double)}
    s = Service("--headroom-gib", "0", *args, env=env)
    s.script = script  # lives as long as the service
    return s


def refused(gpus):
    """What the service says to this list instead of starting."""
    s = on_double(2, "", "--gpus", gpus)
    r = subprocess.run(s.command(), capture_output=True, text=True, env=s.env, timeout=60)
    s.stop()
    assert r.returncode, r
    return r.stderr


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


def case_a_group_of_cards_is_one_worker():
    """Killed at work, it comes back with both of its cards and the job is done; the other group works on."""
    with on_double(4, "", "--gpus", "2+0,1+3").start() as s:
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert [w["gpu_id"] for w in s.health()["workers"]] == [2, 1], s.health()
        with open("/proc/%d/environ" % s.worker_pid()) as f:
            cards = [x[len("CUDA_VISIBLE_DEVICES="):] for x in f.read().split("\0") if x.startswith("CUDA_VISIBLE_DEVICES=")]
        assert cards == ["%s,%s" % (UUID % 2, UUID % 0)], cards
        job = s.accepted(num_inference_steps=8, max_side=64)
        before = s.until(lambda: [w["pid"] for w in s.health()["workers"] if w["current"] and w["current"]["step"] > 0])[0]
        os.kill(before, signal.SIGKILL)
        end = s.finished(job)
        assert end["status"] == "completed" and end["attempts"] == 1, end  # that were lost
        assert "retry" in s.log(), s.log()
        s.until(lambda: all(w["ready"] for w in s.health()["workers"]))
        assert before not in [w["pid"] for w in s.health()["workers"]], s.health()
        assert [w["gpu_id"] for w in s.health()["workers"]] == [2, 1], s.health()


def case_a_group_that_loses_a_card():
    with on_double(2, ",lose_at=300", "--gpus", "0+1").start() as s:
        end = s.finished(s.accepted(num_inference_steps=1, max_side=64))
        assert end["status"] == "failed" and "lost" in end["error"]["message"], end
        assert len(s.health()["workers"]) == 1 and s.health()["workers"][0]["restarts"] >= 3, s.health()


def case_bad_cards_are_named():
    assert "'7'" in refused("0+7"), refused("0+7")
    assert "'GPU-ffff'" in refused("1,GPU-ffff+0"), refused("1,GPU-ffff+0")
    assert "--gpus" in refused("0+"), refused("0+")
    assert "0" in refused("0+0"), refused("0+0")


def main():
    return 1 if run_cases([(f.__name__, f) for f in
                           (case_a_worker_on_each_card, case_a_lost_card_ends_its_worker, case_a_group_of_cards_is_one_worker,
                            case_a_group_that_loses_a_card, case_bad_cards_are_named)]) else 0


if __name__ == "__main__":
    sys.exit(main())
