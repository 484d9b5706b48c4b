#!/usr/bin/env python3
"""`qwen-edit edit --server URL` against a real service with the demo model, and against a server that misbehaves.

    test_remote.py PROGRAM
Prints one line a case; exit status 1 if any failed.
"""
import base64
import http.server
import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

from service import Service, free_port, sample

PROGRAM = os.path.abspath(sys.argv[1])
PURPLE = "turn the subject purple"
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith("QWEN_EDIT_") and not k.lower().endswith("_proxy")}


def start(*args, **environment):
    return subprocess.Popen([PROGRAM, "edit", *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            env={**ENVIRONMENT, "HOME": os.getcwd(), **environment})


def edit(*args, code=0, **environment):
    p = start(*args, **environment)
    out, err = p.communicate(timeout=170)
    assert p.returncode == code, (args, p.returncode, out, err)
    return out, err


def refused(*args, code, says, **environment):
    before = sorted(os.listdir("."))
    out, err = edit(*args, code=code, **environment)
    for text in [says] if isinstance(says, str) else says:
        assert text in err, (text, err)
    assert "qwen-edit: error: " in err and out == "" and sorted(os.listdir(".")) == before, (out, err)
    return err


def read(path):
    with open(path, "rb") as f:
        return f.read()


def case_same_files_as_a_local_edit(s):
    at = ("--server", s.url)
    for name, more in (("a.png", ()), ("b.jpg", ("--quality", "70")), ("c.webp", ("--no-metadata",)),
                       ("d.png", ("-i", "mug.png", "-s", "2", "-n", "red", "--true-cfg-scale", "2")),
                       ("e.png", ("--no-keep-size", "--max-side", "64", "-s", "1")), ("f.png", ("-W", "80", "--max-side", "64", "-s", "1"))):
        args = ("-i", "ball.png", *more, "-p", PURPLE, "-S", "7", "-o")
        assert edit(*args, name, *at)[0] == name + "\n"
        edit(*args, "local-" + name, "--threads", "1")
        assert read(name) == read("local-" + name), name
    assert b"seed" not in read("c.webp") and b"seed" in read("a.png")


def case_several_results(s):
    out, err = edit("--server", s.url + "/", "-i", "ball.png", "-p", PURPLE, "-o", "n.png", "--num-images", "3", "-s", "1")
    assert out == "n-1.png\nn-2.png\nn-3.png\n" and "picture 3/3, step 1/1" in err, (out, err)
    assert len({read(f"n-{i}.png") for i in (1, 2, 3)}) == 3


def case_progress_as_lines_events_and_nothing(s):
    args = ("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "p.png", "-s", "3")
    out, err = edit(*args)
    for line in ("step 1/3", "step 3/3", "decoding", "wrote p.png (256x256)", "seed "):
        assert line in err, (line, err)
    assert edit(*args, "--quiet")[1] == ""
    out, err = edit(*args, "--json", "-S", "9")
    events, last = [json.loads(line) for line in err.splitlines()], json.loads(out.splitlines()[-1])
    assert [e["step"] for e in events if e.get("stage") == "denoise"] == [0, 1, 2, 3], events
    assert events[0]["event"] == "start" and events[0]["start"]["job_id"] == last["job_id"], events
    assert last["output_path"] == "p.png" and last["seed"] == 9 and last["width"] == 256 and last["warnings"] == [], last
    assert set(last["timings"]) == {"queued_s", "encode_s", "denoise_s", "decode_s", "total_s"}, last
    master, slave = pty.openpty()
    p = subprocess.Popen([PROGRAM, "edit", *args], stdout=subprocess.DEVNULL, stderr=slave,
                         env={**ENVIRONMENT, "HOME": os.getcwd(), "TERM": "xterm", "NO_COLOR": "1"})
    os.close(slave)
    shown = b""
    try:
        while piece := os.read(master, 65536):
            shown += piece
    except OSError:  # the other end is closed
        pass
    os.close(master)
    assert p.wait(60) == 0 and b"\r[" in shown and b"step 2/3" in shown, shown


def case_preview_and_plan(s):
    edit("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "v.png", "--preview", "now.webp", "-s", "6")
    assert read("now.webp")[8:12] == b"WEBP"
    n = len(s.jobs())
    out, _ = edit("--server", s.url, "-i", "ball.png", "-p", PURPLE, "--dry-run")
    assert "result     256x256" in out and "steps      4" in out, out
    plan = json.loads(edit("--server", s.url, "-i", "ball.png", "-p", PURPLE, "--dry-run", "--json", "-W", "96")[0])
    assert plan["width"] == 96 and plan["working_bytes"] > 1 << 20 and not os.path.exists("dry.png"), plan
    assert len(s.jobs()) == n, "a plan is no job"


def case_interrupt_cancels_the_job(s):
    p = start("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "x.png", "-s", "200")
    for line in p.stderr:
        if "step 1/200" in line:
            break
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and out == "" and not os.path.exists("x.png"), (p.returncode, out, err)
    s.until(what="cancelled", look=lambda: s.jobs()[0]["status"] == "cancelled")


def case_place_in_the_queue(s):
    first = start("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "q1.png", "-s", "200", "-q")
    s.until(what="running", look=lambda: s.jobs()[0]["status"] == "running")
    waiting, said = [], ""
    for i in (2, 3):
        waiting.append(start("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", f"q{i}.png", "-s", "1"))
        s.until(what="it waits", look=lambda: s.ask("GET", "/health")[1]["queue"]["depth"] == i - 1)
    while "waiting in the queue, 1 before this edit" not in said:
        line = waiting[1].stderr.readline()
        assert line, said
        said += line
    first.send_signal(signal.SIGINT)
    said += "".join(p.communicate(timeout=60)[1] for p in waiting)
    assert first.wait(60) == 130 and [p.returncode for p in waiting] == [0, 0], said


def case_cancelled_by_somebody_else(s):
    p = start("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "x.png", "-s", "200")
    for line in p.stderr:
        if "step 1/200" in line:
            break
    assert s.ask("POST", f"/v1/jobs/{s.jobs()[0]['id']}/cancel", b"")[0] == 202
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130 and "cancelled" in err and out == "", (p.returncode, err)


def case_refused_with_the_field(s):
    at = ("--server", s.url, "-p", PURPLE, "-o", "x.png")
    refused(*at, "-i", "ball.png", "-W", "40", code=2, says=["'width'", "64..4096"])
    refused(*at, *["-i", "ball.png"] * 4, code=2, says="more than 3 pictures")
    refused(*at, "-i", "notes.png", code=2, says="PNG, JPEG")
    refused(*at, "-i", "none.png", code=3, says="none.png")
    refused(*at, "-i", "ball.png", "--threads", "2", code=2, says="--threads has no place beside --server")
    refused("-p", PURPLE, "-o", "x.png", "-i", "ball.png", "--api-key", "12345678", code=2, says="without --server")
    refused("--server", "ftp://a", "-p", PURPLE, "-o", "x.png", "-i", "ball.png", code=2, says="is not an http or https address")
    # Variables of a local edit do not get in the way.
    edit(*at[:-1], "env.png", "-i", "ball.png", "-s", "1", QWEN_EDIT_MAX_CPU_THREADS="3", QWEN_EDIT_2511_DIR="/nonexistent")


def case_same_seed_twice(s):
    at = ("--server", s.url, "-p", PURPLE, "-s", "1", "-S", "5", "-o")
    edit(*at, "s1.png", "-i", "ball.png")
    assert "seed 5" in edit(*at, "s2.png", "-i", "s1.png")[1]
    out, err = edit(*at, "s3.png", "-i", "s1.png", "--force-seed", "--json")
    assert json.loads(out)["seed"] == 5, out


def case_batch(s):
    with open("jobs.jsonl", "w") as f:
        f.write('{"image": "ball.png", "prompt": "x", "output_path": "b1.png", "num_inference_steps": 1}\n'
                '{"image": "none.png", "prompt": "x", "output_path": "b2.png"}\n\n'
                '{"image": "ball.png", "prompt": "x", "output_path": "b3.png", "width": 32}\n'
                '{"images": ["ball.png", "mug.png"], "prompt": "x", "output_path": "b4.webp", "num_inference_steps": 1}\n')
    out, err = edit("--server", s.url, "--batch", "jobs.jsonl", code=3)
    assert out == "b1.png\nb4.webp\n" and "line 2: error: " in err and "line 4: error: " in err, (out, err)
    assert "2 edits done, 2 failed" in err and "line 5: step 1/1" in err, err


def case_batch_with_the_fields_of_the_service(s):
    b64 = base64.b64encode(read("ball.png")).decode()
    lines = [{"image_base64": b64, "output_path": "f1.png", "response": "path", "priority": 3, "preview": True, "metadata": False},
             {"images": [{"base64": "data:image/png;base64," + b64}, "mug.png"], "output_path": "f2.png", "idempotency_key": "k"},
             {"image_base64": [b64, b64], "output_path": "f3.webp", "max_side": None},
             {"image_base64": "%%%", "output_path": "f4.png"}, {"image_url": "http://a/b.png", "output_path": "f5.png"},
             {"images": [{"path": "x"}], "output_path": "f6.png"}]
    text = "".join(json.dumps({"prompt": "x", "num_inference_steps": 1, "seed": 4, **line}) + "\n" for line in lines)
    for where in ((), ("--server", s.url)):
        with open("fields.jsonl", "w") as f:
            f.write(text)
        out, err = edit("--batch", "fields.jsonl", *where, code=2)
        assert out == "f1.png\nf2.png\nf3.webp\n", (out, err)
        for n, what in ((4, "'image_base64' is not base64"), (5, "by address"), (6, "must hold paths")):
            assert f"line {n}: error: " in err and what in err, (what, err)
        assert b"seed" not in read("f1.png") and b"seed" in read("f2.png")


def case_restart_of_the_service(s):
    p = start("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "r.png", "-s", "60", "-S", "3")
    for line in p.stderr:
        if "step 3/60" in line:
            break
    s.kill()
    s.start()
    out, err = p.communicate(timeout=120)
    assert p.returncode == 0 and out == "r.png\n" and "connection to the service is lost" in err, (p.returncode, err)
    assert len([j for j in s.jobs() if j["status"] == "completed" and j["attempts"] == 0]) > 0


def case_keys():
    with Service(PROGRAM, "--api-key", "first-key-1", key="first-key-1") as s:
        at = ("--server", s.url, "-i", "ball.png", "-p", PURPLE, "-o", "x.png", "-s", "1")
        refused(*at, code=1, says=["asks for a key", "--api-key", "QWEN_EDIT_API_KEY"])
        err = refused(*at, "--api-key", "wrong-key-1", code=1, says="does not know this API key")
        assert "wrong-key-1" not in err, "a key is never printed"
        with open("keys", "w") as f:
            f.write("# of the service\n\nfirst-key-1\n")
        edit(*at[:-3], "k1.png", "-s", "1", "--api-key", "first-key-1")
        edit(*at[:-3], "k2.png", "-s", "1", QWEN_EDIT_API_KEY="first-key-1")
        edit(*at[:-3], "k3.png", "-s", "1", "--api-key-file", "keys", QWEN_EDIT_API_KEY="wrong-key-1")


class Strange(http.server.BaseHTTPRequestHandler):
    """Answers what the test put into `plan`: (status, headers, body) one by one, the last one again and again."""
    protocol_version = "HTTP/1.1"

    def answer(self):
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        plan = self.server.plan
        status, headers, body = plan.pop(0) if len(plan) > 1 else plan[0]
        self.server.seen.append((self.command, self.path, dict(self.headers)))
        self.send_response(status)
        for k, v in headers.items():
            self.send_header(k, v)
        if "Content-Length" not in headers:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        self.close_connection = "close" in headers.get("Connection", "")

    do_GET = do_POST = answer

    def log_message(self, *_):
        pass


def refusal(status, kind, message, param=None, **headers):
    body = json.dumps({"error": {"message": message, "type": kind, "param": param, "code": status}}).encode()
    return status, {"Content-Type": "application/json", **headers}, body


def case_strange_servers():
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Strange)
    server.daemon_threads, server.seen = True, []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    at = ("--server", url, "-i", "ball.png", "-p", PURPLE, "-o", "x.png")

    def play(*plan):
        server.plan, server.seen = list(plan), []

    refused("--server", f"http://127.0.0.1:{free_port()}", *at[2:], code=6, says="is 'qwen-edit serve' running there?")
    play((200, {}, b"<html>hello</html>"))
    refused(*at, code=6, says="no JSON")
    play((404, {}, b"<html>not here</html>"))
    refused(*at, code=6, says="is no qwen-edit service")
    play((302, {"Location": "http://example.com/"}, b""))
    refused(*at, code=6, says="HTTP 302")
    assert len(server.seen) == 1, "a form is not sent elsewhere"
    play(refusal(422, "INVALID", "'prompt' is too long for the model: 5000 of 4096 positions", "prompt"))
    refused(*at, code=2, says="5000 of 4096 positions")
    play(refusal(507, "IO", "the state folder is full"))
    refused(*at, code=6, says="the state folder is full")
    play(refusal(503, "NO_MEMORY", "not enough memory at this moment", **{"Retry-After": "3600"}))
    refused(*at, code=5, says="not enough memory")
    play(refusal(503, "UNAVAILABLE", "the service is stopping"))
    refused(*at, code=4, says="the service is stopping")
    # Busy: waits as long as it is told to, and says so; the same key each time, so nothing runs twice.
    play(refusal(429, "BUSY", "the queue is full (64 jobs)", **{"Retry-After": "1"}),
         refusal(429, "BUSY", "the queue is full (64 jobs)", **{"Retry-After": "1"}),
         refusal(413, "TOO_LARGE", "now it is something else"))
    begin = time.monotonic()
    refused(*at, code=2, says=["the queue is full (64 jobs); asking again in 1 s", "now it is something else"])
    assert time.monotonic() - begin >= 2 and len(server.seen) == 3, server.seen
    # An accepted job: a stream that is cut and one that ends it.
    accepted = (202, {"Content-Type": "application/json"}, b'{"id":"job_1","status":"queued"}')
    stream = {"Content-Type": "text/event-stream", "Connection": "close"}
    failed = b'id: 5\nevent: failed\ndata: {"error":{"message":"values were not finite","type":"INTERNAL","param":null}}\n\n'
    play(accepted, (200, stream, b'id: 4\nevent: progress\ndata: {"stage":"denoise","step":1,"total":9}\n\nid: 5\nev'),
         (502, {}, b""), (200, stream, failed))
    refused(*at, code=1, says=["step 1/9", "connection to the service is lost", "values were not finite"])
    assert [h.get("Last-Event-ID") for _, _, h in server.seen] == [None, None, "4", "4"], server.seen
    play(accepted, refusal(404, "NOT_FOUND", "there is no job 'job_1'"))
    refused(*at, code=3, says="there is no job 'job_1'")
    play(accepted, (200, stream, b'event: completed\ndata: {"result":{"seed":1}}\n\n'), (200, {}, b"no picture"))
    refused(*at, code=6, says="no png picture")
    play((202, {}, b'{"id":"../../x"}'))
    refused(*at, code=6, says="without naming a job")
    server.shutdown()


def main():
    folder, failed = tempfile.mkdtemp(prefix="qe-remote-"), 0
    os.chdir(folder)
    for name in ("ball", "mug"):
        with open(name + ".png", "wb") as f:
            f.write(sample(name))
    with open("notes.png", "w") as f:
        f.write("this is no picture")
    cases = [value for name, value in globals().items() if name.startswith("case_")]
    s = Service(PROGRAM).start()
    try:
        for case in cases:
            begin = time.monotonic()
            try:
                case(s) if case.__code__.co_argcount else case()
                print(f"ok   {case.__name__} ({time.monotonic() - begin:.1f} s)", flush=True)
            except Exception as e:
                failed += 1
                print(f"FAIL {case.__name__}: {type(e).__name__}: {str(e)[:1500]}", flush=True)
        if failed:
            print(s.log()[-3000:])
    finally:
        if s.stop() != 0:
            failed += 1
            print("FAIL the service did not stop in order")
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)
    print(f"test_remote: {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
