#!/usr/bin/env python3
"""LoRAs by request, with the demo model and files made here: `lora` in every route, presets, bad names, bad files.

    test_service_lora.py PROGRAM FAKEWORKER [CASE ...]
"""
import base64
import json
import os
import subprocess
import sys
import tempfile

import lora_files
from servicelib import B64, PICTURE, PROGRAM, ROOT, Service, run_cases

sys.path.insert(0, os.path.join(ROOT, "python"))
from qwen_edit_client import Client, EditError  # noqa: E402

EDIT = {"prompt": "turn the subject purple", "image_base64": B64, "seed": 5, "metadata": False}


def fill(folder):
    lora_files.lora(os.path.join(folder, "one.safetensors"), 1)
    lora_files.lora(os.path.join(folder, "two.safetensors"), 2, prefix="diffusion_model.")
    lora_files.lora(os.path.join(folder, "a:b.safetensors"), 3)
    lora_files.lora(os.path.join(folder, "Test-Lightning-8steps.safetensors"), 4, size=0.02)
    lora_files.lora(os.path.join(folder, "distilled.safetensors"), 4, size=0.02, metadata={"title": "Some Lightning, 6 steps"})
    lora_files.lightning_shaped(os.path.join(folder, "fast.safetensors"))
    lora_files.lora(os.path.join(folder, "wrong shape.safetensors"), 5, inner=64)
    lora_files.lora(os.path.join(folder, "other model.safetensors"), 6, blocks=9)
    whole = open(os.path.join(folder, "one.safetensors"), "rb").read()
    for name, data in (("cut", whole[:5000]), ("empty", b""), ("noise", bytes(range(256)) * 40),
                       ("endless", b"\xff" * 8 + whole[8:])):
        with open(os.path.join(folder, name + ".safetensors"), "wb") as f:
            f.write(data)
    lora_files.write(os.path.join(folder, "infinite.safetensors"), {
        f"transformer_blocks.0.attn.to_v.lora_{k}.weight": (shape, [3e38] * 512) for k, shape in (("A", (4, 128)), ("B", (128, 4)))})
    os.mkdir(os.path.join(folder, "folder.safetensors"))
    with open(os.path.join(folder, "readme.txt"), "w") as f:
        f.write("not a LoRA\n")
    with open(os.path.join(folder, ".hidden.safetensors"), "wb") as f:
        f.write(whole)
    with open(os.path.join(os.path.dirname(folder), "outside.safetensors"), "wb") as f:
        f.write(whole)


def edit(s, lora=None, code=200, **more):
    got, r = s.call("POST", "/edit", {**EDIT, **({} if lora is None else {"lora": lora}), **more})
    assert got == code, (lora, got, r)
    return r


def picture(s, lora=None, **more):
    return base64.b64decode(edit(s, lora, **more)["image_base64"])


def case_with_and_without(s, folder):
    plain = picture(s)
    one, two = picture(s, [{"name": "one"}]), picture(s, [{"name": "two"}])
    both = picture(s, [{"name": "one", "weight": 0.5}, {"name": "two", "weight": -0.25}])
    assert len({plain, one, two, both, picture(s, [{"name": "one", "weight": 0.5}])}) == 5
    assert picture(s) == plain and picture(s, []) == plain and picture(s, [{"name": "one", "weight": 0}]) == plain
    for same in ("one", "one:1", ["one"], ["one:1.0"], {"name": "one", "weight": 1}, [{"name": "one.safetensors"}], "one.safetensors"):
        assert picture(s, same) == one, same
    assert picture(s, ["one:0.5", "two:-0.25"]) == both
    assert picture(s, "a:b") == picture(s, "a:b:1") != plain
    r = edit(s, ["one:0.5", "two"], metadata=True)
    assert r["loras"] == [{"name": "one", "weight": 0.5}, {"name": "two", "weight": 1}], r["loras"]
    png = base64.b64decode(r["image_base64"])
    assert b'"loras":[{"name":"one","weight":0.5},{"name":"two","weight":1.0}]' in png and folder.encode() not in png
    assert edit(s)["loras"] == []
    # The same files by hand.
    out = os.path.join(folder, "out.png")
    with open(out + ".in.png", "wb") as f:
        f.write(PICTURE)
    subprocess.run([PROGRAM, "edit", "--model", "demo", "-i", out + ".in.png", "-p", EDIT["prompt"], "-S", "5", "-o", out, "--no-metadata",
                    "--threads", "1", "--lora", folder + "/one.safetensors:0.5", "--lora", folder + "/two.safetensors:-0.25"],
                   check=True, capture_output=True)
    assert open(out, "rb").read() == both
    os.unlink(out)
    os.unlink(out + ".in.png")


def case_every_route(s, folder):
    one = picture(s, "one:0.5")
    fields = {"prompt": EDIT["prompt"], "seed": 5, "metadata": "false"}
    for text in ("one:0.5", '[{"name":"one","weight":0.5}]', '["one:0.5"]'):
        code, r = s.form("/edit", {**fields, "lora": text}, [("image", PICTURE)])
        assert code == 200 and base64.b64decode(r["image_base64"]) == one, (text, code, r)
    parts = b"".join(b'--b\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (k, v) for k, v in (
        (b"prompt", EDIT["prompt"].encode()), (b"seed", b"5"), (b"metadata", b"false"), (b"lora", b"one:0.25"), (b"lora", b"one:0.25")))
    body = parts + b'--b\r\nContent-Disposition: form-data; name="image"; filename="a"\r\n\r\n' + PICTURE + b"\r\n--b--\r\n"
    code, r = s.call("POST", "/edit", body, {"Content-Type": "multipart/form-data; boundary=b"})
    assert code == 200 and [x["weight"] for x in r["loras"]] == [0.25, 0.25], r
    code, r = s.form("/v1/images/edits", {**fields, "lora": "one:0.5"}, [("image", PICTURE)])
    assert code == 200 and base64.b64decode(r["data"][0]["b64_json"]) == one, r
    job = s.accepted(EDIT["prompt"], seed=5, metadata=False, lora=["one:0.5"])
    assert s.finished(job)["result"]["loras"] == [{"name": "one", "weight": 0.5}]
    assert s.call("GET", f"/v1/jobs/{job}/result")[1] == one


def refused(s, lora, says):
    code, r = s.call("POST", "/edit", {**EDIT, "lora": lora})
    assert code == 422 and r["error"]["param"] == "lora", (lora, code, r)
    for text in [says] if isinstance(says, str) else says:
        assert text in r["error"]["message"], (lora, r)
    assert "/" not in r["error"]["message"], r


def case_bad_names(s, folder):
    refused(s, "three", ["there is no LoRA 'three'", "Test-Lightning-8steps, a:b, ", "one, ", "two, "])
    for name in ("../outside", "/etc/passwd", "..", ".", ".hidden", "", "a/../one", "x" * 128, "a\\b", "folder/one", os.path.join(folder, "one")):
        refused(s, [{"name": name}], "names")
    refused(s, "folder", "there is no LoRA 'folder'")
    refused(s, "readme.txt", "there is no LoRA 'readme.txt'")
    for wrong, says in (([{"name": "one", "weight": 101}], "-100..100"), ([{"name": "one", "weight": "1"}], "number"),
                        ([{"name": 3}], "text"), ([{"weight": 1}], "without a name"), ([{"name": "one", "scale": 1}], "scale"),
                        ([3], "names"), (True, "names"), (["one"] * 9, "more than 8"), ([["one"]], "names")):
        refused(s, wrong, says)
    code, r = s.form("/edit", {"prompt": "x", "lora": "[{"}, [("image", PICTURE)])
    assert code == 422 and r["error"]["param"] == "lora", r


def case_bad_files(s, folder):
    plain, restarts = picture(s), s.health()["workers"][0]["restarts"]
    for name, says in (("cut", "cut"), ("empty", "empty"), ("noise", "noise"), ("endless", "endless"),
                       ("wrong shape", "64"), ("other model", "transformer_blocks.8")):
        job = s.finished(s.accepted(EDIT["prompt"], seed=5, metadata=False, lora=[{"name": name}]))
        assert job["status"] == "failed", job
        e = job["error"]
        assert e["param"] == "lora" and says in e["message"] and name in e["message"] and folder not in e["message"], e
        assert picture(s) == plain, "the next edit knows nothing of it"
    job = s.finished(s.accepted(EDIT["prompt"], lora="infinite"))
    assert job["status"] == "failed" and "no numbers" in job["error"]["message"], job
    assert picture(s) == plain and s.health()["workers"][0]["restarts"] == restarts


def case_cut_while_used(s, folder):
    """The worker dies at the missing page; the second attempt finds the file damaged and names it."""
    path = os.path.join(folder, "shrinking.safetensors")
    lora_files.lora(path, 9, rank=64)
    job = s.accepted(EDIT["prompt"], lora="shrinking", num_inference_steps=200)
    s.until(lambda: s.look(job)["status"] == "running" and s.look(job)["progress"]["step"] > 0)
    os.truncate(path, 8192)
    job = s.finished(job)
    e, worker = job["error"], s.health()["workers"][0]
    assert job["status"] == "failed" and job["attempts"] == 1 and e["param"] == "lora", job
    assert "'shrinking.safetensors' is damaged" in e["message"] and "is the file complete?" in e["message"], e
    assert "signal 7" in worker["last_error"] and "cut while in use" in worker["last_error"], worker
    os.unlink(path)
    assert edit(s)["loras"] == []


def case_folder_changes(s, folder):
    def names():
        return [x["name"] for x in s.call("GET", "/v1/models")[1]["data"][0]["loras"]]
    before = names()
    assert "one" in before and not {"readme.txt", "folder", ".hidden", "hidden"} & set(before) and before == sorted(before), before
    path = os.path.join(folder, "new.safetensors")
    lora_files.lora(path, 7)
    assert "new" in names() and s.call("GET", "/v1/models/demo")[1]["loras"][0]["bytes"] > 0
    first = picture(s, "new")
    lora_files.lora(path + ".part", 8)
    os.replace(path + ".part", path)
    assert picture(s, "new") != first, "a replaced file is read again"
    long = s.accepted(EDIT["prompt"], num_inference_steps=60)
    job = s.accepted(EDIT["prompt"], lora="new")
    os.unlink(path)
    s.finished(long)
    job = s.finished(job)
    assert job["status"] == "failed" and job["error"]["param"] == "lora" and "no longer" in job["error"]["message"], job
    assert names() == before
    refused(s, "new", "there is no LoRA 'new'")


def case_lightning(s, folder):
    r = edit(s, "Test-Lightning-8steps")
    assert (r["num_inference_steps"], r["true_cfg_scale"], r["cfg"]) == (8, 1, False), r
    assert any("Lightning, LoRA 'Test-Lightning-8steps' by its name: 8 steps" in w for w in r["warnings"]), r["warnings"]
    r = edit(s, "Test-Lightning-8steps", num_inference_steps=3, true_cfg_scale=2)
    assert (r["num_inference_steps"], r["true_cfg_scale"], r["cfg"]) == (3, 2, True), r
    assert edit(s, "one")["num_inference_steps"] == 4 and edit(s, "Test-Lightning-8steps:0")["num_inference_steps"] == 4
    code, r = s.call("POST", "/edit", {**EDIT, "lora": "Test-Lightning-8steps", "dry_run": True})
    assert code == 200 and r["num_inference_steps"] == 8 and r["cfg"] is False, r
    listed = {x["name"]: x for x in s.call("GET", "/v1/models")[1]["data"][0]["loras"]}
    assert listed["Test-Lightning-8steps"]["num_inference_steps"] == 8 and "num_inference_steps" not in listed["one"]
    # By metadata and by shape: what is said before the edit is what the edit does.
    for name, steps, how in (("distilled", 6, "metadata"), ("fast", 8, "shape")):
        r = edit(s, name)
        assert (r["num_inference_steps"], r["cfg"]) == (steps, False) and any(how in w for w in r["warnings"]), (name, r)
        assert listed[name]["num_inference_steps"] == steps and listed[name]["true_cfg_scale"] == 1, listed[name]
        code, r = s.call("POST", "/edit", {**EDIT, "lora": name, "dry_run": True})
        assert code == 200 and (r["num_inference_steps"], r["cfg"]) == (steps, False), (name, r)


def case_replaced(s, folder):
    """What was found in a file does not outlive the file."""
    path = os.path.join(folder, "replaced.safetensors")
    for steps in (None, 6, 8, None):
        new = path + ".new"
        lora_files.lora(new, 4, size=0.02, metadata={"title": "Some Lightning, %d steps" % steps} if steps else None)
        os.rename(new, path)
        listed = {x["name"]: x for x in s.call("GET", "/v1/models")[1]["data"][0]["loras"]}
        assert listed["replaced"].get("num_inference_steps") == steps, (steps, listed["replaced"])
    os.unlink(path)
    assert "replaced" not in {x["name"] for x in s.call("GET", "/v1/models")[1]["data"][0]["loras"]}


def case_cache(s, folder):
    plain, few = edit(s, num_inference_steps=20), edit(s, cache="fast")
    assert plain["cache"] == "off" and "skipped_forwards" not in plain
    assert few["cache"] == "off" and any("cache 'fast' does nothing in 4 steps" in w for w in few["warnings"]), few["warnings"]
    fast = edit(s, num_inference_steps=20, cache="fast", metadata=True)
    assert fast["cache"] == "fast" and fast["skipped_forwards"] > 0, fast["skipped_forwards"]
    assert b'"cache":"fast"' in base64.b64decode(fast["image_base64"])
    assert picture(s, num_inference_steps=20, cache="off") == base64.b64decode(plain["image_base64"])
    code, r = s.call("POST", "/edit", {**EDIT, "cache": "slow"})
    assert code == 422 and r["error"]["param"] == "cache", r
    assert s.call("GET", "/v1/models")[1]["data"][0]["defaults"]["cache"] == "off"


def case_clients(s, folder):
    one = picture(s, "one:0.5")
    client, where = Client(f"http://127.0.0.1:{s.port}"), os.path.join(os.path.dirname(folder), "client")
    os.mkdir(where)
    for lora in ("one:0.5", [{"name": "one", "weight": 0.5}], {"name": "one", "weight": 0.5}):
        result = client.edit([PICTURE], EDIT["prompt"], seed=5, metadata=False, lora=lora)
        assert bytes(result) == one and result.loras == [{"name": "one", "weight": 0.5}]
    try:
        client.edit([PICTURE], EDIT["prompt"], lora="three")
        raise AssertionError("not refused")
    except EditError as e:
        assert e.status == 422 and e.param == "lora"

    def run(*args, text=None):
        with open(where + "/in.png", "wb") as f:
            f.write(PICTURE)
        return subprocess.run([PROGRAM, "edit", "--server", client.url, *args], cwd=where, capture_output=True, text=True, input=text,
                              env={k: v for k, v in os.environ.items() if not k.startswith("QWEN_EDIT_")})
    at = ("-i", "in.png", "-p", EDIT["prompt"], "-S", "5", "--no-metadata", "-o", "out.png")
    done = run(*at, "--lora", "one:0.5", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["loras"] == [{"name": "one", "weight": 0.5}], done
    assert open(where + "/out.png", "rb").read() == one
    line = {"image": "in.png", "prompt": EDIT["prompt"], "seed": 5, "metadata": False, "output_path": "line.png", "lora": ["one:0.5"]}
    done = run("--batch", "-", text=json.dumps(line) + "\n")
    assert done.returncode == 0 and open(where + "/line.png", "rb").read() == one, done
    done = run(*at, "--lora", "three")
    assert done.returncode == 2 and "there is no LoRA 'three'" in done.stderr, done


def case_restart(s, folder):
    one = picture(s, "one:0.5")
    s.accepted(EDIT["prompt"], num_inference_steps=100)
    job = s.accepted(EDIT["prompt"], seed=5, metadata=False, lora="one:0.5")
    s.kill()
    s.start()
    assert s.finished(job)["result"]["loras"] == [{"name": "one", "weight": 0.5}]
    assert s.call("GET", f"/v1/jobs/{job}/result")[1] == one


def case_idempotent(s, folder):
    a = s.accepted(EDIT["prompt"], seed=5, lora="one", idempotency_key="k")
    assert s.accepted(EDIT["prompt"], seed=5, lora=[{"name": "one", "weight": 1}], idempotency_key="k") == a
    code, r = s.job(EDIT["prompt"], seed=5, lora="two", idempotency_key="k")
    assert code == 409, r
    s.finished(a)


def case_start(folder):
    with Service("--lora", os.path.join(folder, "one.safetensors:0.5"), "--cache", "balanced", env={"QWEN_EDIT_LORA_DIR": folder}).start() as s:
        one = edit(s)
        assert one["loras"] == [{"name": "one", "weight": 0.5}]
        assert picture(s, "one:0.5") == base64.b64decode(one["image_base64"]) != picture(s, [])
        assert edit(s, num_inference_steps=12)["cache"] == "balanced" and edit(s, num_inference_steps=12, cache="off")["cache"] == "off"
        assert edit(s, "two")["loras"] == [{"name": "two", "weight": 1}] and edit(s, [])["loras"] == []
    with Service().start() as s:
        refused(s, "one", "--lora-dir")
        assert s.call("GET", "/v1/models")[1]["data"][0]["loras"] == [] and edit(s, [])["loras"] == []
    here = os.getcwd()
    os.chdir(os.path.dirname(folder))
    try:  # a folder with a short name: what is hidden of it in a message takes no letters from the rest
        os.rename(folder, "e")
        with Service("--lora-dir", "e").start() as s:
            error = s.finished(s.accepted(EDIT["prompt"], lora="other model"))["error"]
            assert "transformer.transformer_blocks.8" in error["message"] and "other model" in error["message"], error
            error = s.finished(s.accepted(EDIT["prompt"], lora="noise"))["error"]
            assert "'noise.safetensors'" in error["message"] and "e/" not in error["message"], error
    finally:
        os.rename("e", folder)
        os.chdir(here)
    p = subprocess.run([PROGRAM, "serve", "--model", "demo", "--port", "1", "--state-dir", folder + "/state", "--lora-dir", folder + "/none"],
                       capture_output=True, text=True, timeout=60)
    assert p.returncode == 3 and "--lora-dir" in p.stderr + "--lora-dir" and "none" in p.stderr, p


def main():
    with tempfile.TemporaryDirectory() as top:
        folder = os.path.join(top, "loras")
        os.mkdir(folder)
        fill(folder)
        with Service("--lora-dir", folder).start() as s:
            cases = [(k, v) for k, v in globals().items() if k.startswith("case_") and k != "case_start"]
            failed = run_cases([(k, lambda v=v: v(s, folder)) for k, v in cases])
        return 1 if failed + run_cases([("case_start", lambda: case_start(folder))]) else 0


if __name__ == "__main__":
    sys.exit(main())
