#!/usr/bin/env python3
"""python/qwen_edit_client.py against a real service with the demo model: test_client.py PROGRAM"""
import io
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time

from service import ROOT, Service, free_port, sample

sys.path.insert(0, os.path.join(ROOT, "python"))
from qwen_edit_client import Client, EditError  # noqa: E402

PROGRAM, PURPLE = os.path.abspath(sys.argv[1]), "turn the subject purple"
SCRIPT = os.path.join(ROOT, "python", "qwen_edit_client.py")


def refused(call, status, param=None, says=""):
    try:
        call()
    except EditError as e:
        assert e.status == status and e.param == param and says in str(e), (e.status, e.param, str(e))
        return e
    raise AssertionError("not refused")


def size(png):
    return int.from_bytes(png[16:20], "big"), int.from_bytes(png[20:24], "big")


def case_edit(c, s):
    seen = []
    result = c.edit(["ball.png"], PURPLE, lambda name, data: seen.append((name, data)), seed=7)
    assert bytes(result)[:4] == b"\x89PNG" and result.seed == 7 and result.width == 256 and result.warnings == [], result.info
    assert seen[0][0] == "queued" and seen[-1][0] == "completed", seen
    assert [d["step"] for n, d in seen if n == "progress" and d["stage"] == "denoise"] == [0, 1, 2, 3, 4], seen
    assert bytes(c.edit("ball.png", PURPLE, seed=7)) == bytes(result), "one path is as good as a list"
    with open("ball.png", "rb") as f:
        assert bytes(c.edit([f], PURPLE, seed=7)) == bytes(result)
    assert result.save("out.png") == ["out.png"] and open("out.png", "rb").read() == bytes(result)


def case_every_field(c, s):
    result = c.edit([sample("ball"), io.BytesIO(sample("mug"))], PURPLE, negative_prompt="red", seed=3, force_seed=True,
                    num_inference_steps=2, true_cfg_scale=2.5, guidance_scale=1.5, max_side=64, keep_size=False, ref_area=4096,
                    num_images=2, output_format="webp", output_compression=60, metadata=False, lora=[], priority=9,
                    preview=True, response="base64", idempotency_key="all-of-them")
    assert len(result.pictures) == 2 and all(p[8:12] == b"WEBP" and b"seed" not in p for p in result.pictures)
    assert result.num_inference_steps == 2 and result.true_cfg_scale == 2.5 and result.cfg and result.seed == 3, result.info
    assert any("guidance" in w for w in result.warnings), result.warnings
    assert result.save("many.webp") == ["many-1.webp", "many-2.webp"]
    assert size(bytes(c.edit("ball.png", PURPLE, width=64, height=96, ref_area=4096, num_inference_steps=1))) == (64, 96)
    plan = c.plan("ball.png", PURPLE, width=64, height=96)
    assert (plan["width"], plan["height"]) == (64, 96) and plan["working_bytes"] > 0, plan


def case_previews(c, s):
    names = [e.name for e in c.submit("ball.png", PURPLE, preview=True, num_inference_steps=8).events()]
    assert "preview" in names, names


def case_jobs(c, s):
    job = c.submit("ball.png", PURPLE, num_inference_steps=1)
    job.wait()
    assert job.status()["status"] == "completed" and c.jobs(limit=1)[0]["id"] == job.id
    assert job.id in [j["id"] for j in c.jobs("completed")]
    job.delete()
    refused(job.status, 404)
    assert c.health()["status"] == "ok" and c.models()[0]["defaults"]["num_inference_steps"] == 4


def case_cancel(c, s):
    job = c.submit("ball.png", PURPLE, num_inference_steps=200)
    events = job.events()
    next(e for e in events if e.name == "progress")
    job.cancel()
    assert [e.name for e in events][-1] == "cancelled"
    refused(job.cancel, 409)

    def leave(name, data):
        if name == "progress":
            raise KeyboardInterrupt
    try:
        c.edit("ball.png", PURPLE, leave, num_inference_steps=200)
        raise AssertionError("an exception of the callback passes through")
    except KeyboardInterrupt:
        pass
    s.until(what="cancelled", look=lambda: s.jobs()[0]["status"] == "cancelled")
    job = c.submit("ball.png", PURPLE, num_inference_steps=200)
    threading.Timer(0.5, job.cancel).start()
    refused(job.wait, 409, says="cancelled")


def case_errors(c, s):
    e = refused(lambda: c.edit("ball.png", PURPLE, num_inference_steps=0), 422, "num_inference_steps", "1..200")
    assert e.type == "INVALID"
    refused(lambda: c.edit("ball.png", ""), 422, "prompt")
    refused(lambda: c.edit("ball.png", PURPLE, nonsense=1), 422, "nonsense")
    refused(lambda: c.edit([], PURPLE), 422, "image_base64")
    refused(lambda: c.edit([b"no picture"], PURPLE), 415, "image")
    refused(lambda: c.edit(["ball.png"] * 4, PURPLE), 413, "image")
    refused(lambda: c.edit(["http://127.0.0.1/a.png"], PURPLE), 422, "image_url")
    assert refused(lambda: Client("http://127.0.0.1:%d" % free_port()).health(), 0).type == "NETWORK"


def case_restart(c, s):
    result, job = [], c.submit("ball.png", PURPLE, num_inference_steps=40, seed=1)
    thread = threading.Thread(target=lambda: result.append(job.wait()))
    thread.start()
    s.until(what="running", look=lambda: s.jobs()[0]["status"] == "running")
    s.kill()
    s.start()
    thread.join(120)
    assert result and result[0].seed == 1


def case_key_and_full_queue():
    with Service(PROGRAM, "--api-key", "sesame-open", "--queue-size", "1", key="sesame-open") as s:
        refused(lambda: Client(s.url).edit("ball.png", PURPLE), 401, "Authorization")
        c = Client(s.url, "sesame-open", patience=0)
        running = c.submit("ball.png", PURPLE, num_inference_steps=200)
        s.until(what="running", look=lambda: running.status()["status"] == "running")
        waiting = c.submit("ball.png", PURPLE, num_inference_steps=1)
        assert refused(lambda: c.submit("ball.png", PURPLE), 429).retry_after > 0
        threading.Timer(0.5, lambda: (running.cancel(), waiting.cancel())).start()
        begin = time.monotonic()
        Client(s.url, "sesame-open").edit("ball.png", PURPLE, num_inference_steps=1)
        assert time.monotonic() - begin > 0.5, "a full queue is waited for"


def case_command_line(c, s):
    done = subprocess.run([sys.executable, SCRIPT, s.url, "ball.png", "mug.png", PURPLE, "cli.webp", "seed=5",
                           "num_inference_steps=2"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0 and done.stdout == "cli.webp\n" and "denoise 2/2" in done.stderr, done
    assert open("cli.webp", "rb").read()[8:12] == b"WEBP"
    done = subprocess.run([sys.executable, SCRIPT, s.url, "ball.png", PURPLE, "cli.png", "max_side=3"], capture_output=True,
                          text=True, timeout=120)
    assert done.returncode == 1 and done.stderr.startswith("error: 'max_side' must be within"), done
    p = subprocess.Popen([sys.executable, SCRIPT, s.url, "ball.png", PURPLE, "no.png", "num_inference_steps=200"],
                         stderr=subprocess.PIPE, text=True)
    next(line for line in p.stderr if "denoise 1/" in line)
    p.send_signal(signal.SIGINT)
    p.communicate(timeout=60)
    assert p.returncode == 130 and not os.path.exists("no.png")
    s.until(what="cancelled", look=lambda: s.jobs()[0]["status"] == "cancelled")


def main():
    failed = 0
    os.environ.pop("QWEN_EDIT_API_KEY", None)
    with tempfile.TemporaryDirectory() as folder, Service(PROGRAM) as s:
        os.chdir(folder)
        for name in ("ball", "mug"):
            with open(name + ".png", "wb") as f:
                f.write(sample(name))
        for case in [v for k, v in globals().items() if k.startswith("case_")]:
            begin = time.monotonic()
            try:
                case(*(Client(s.url), s)[:case.__code__.co_argcount])
                print(f"ok   {case.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
            except Exception as e:
                failed += 1
                print(f"FAIL {case.__name__}: {type(e).__name__}: {str(e)[:1500]}", flush=True)
        if failed:
            print(s.log()[-3000:])
        os.chdir("/")
    print(f"test_client: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
