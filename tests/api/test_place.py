"""edit and serve on machines with GPUs (replayed, see test_doctor.py): refused early, in doctor's words."""
import json
import os
import shutil
import signal
import subprocess
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from hubtest import *
import hubtest

G = 1 << 30
BUILD = os.path.dirname(PROGRAM or "")
LIB = os.path.join(BUILD, "tests", "fakenvml.so")
SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
PICTURE = os.path.join(SOURCE, "demo", "samples", "mug.png")
CPU = "--device cpu --max-side 512 -s 10"


def gpu(i, total, used, mig=0):
    return "gpu NVIDIA A100|GPU-%08d-aaaa-bbbb-cccc-dddddddddddd|%d|%d|%d|8|0|0|%d\n" % (
        i, total * G, int((total - used) * G), int(used * G), mig)


def model(folder):
    """The demo's files under the released one's sizes: sparse weights, so that the arithmetic has its numbers."""
    d = os.path.join(folder, "model")
    if not os.path.exists(d):
        shutil.copytree(os.path.join(SOURCE, "demo", "model"), d)
        for component, layers, n in (("transformer", "num_layers", 60), ("text_encoder", "num_hidden_layers", 28)):
            path = os.path.join(d, component, "config.json")
            config = json.load(open(path))
            for c in (config, config.get("text_config", {})):
                if layers in c:
                    c[layers] = n
            json.dump(config, open(path, "w"))
        for component, size in (("transformer", 40), ("text_encoder", 16)):
            for n in os.listdir(os.path.join(d, component)):
                if n.endswith(".safetensors"):
                    os.truncate(os.path.join(d, component, n), size * G)
    return d


def without_plugin(folder):
    """A copy of the program alone: a build with the CUDA toolkit has the real plugin beside it."""
    d = os.path.join(folder, "alone", "bin")
    os.makedirs(d, exist_ok=True)
    program = os.path.join(d, "qwen-edit")
    shutil.copy(PROGRAM, program)
    return program


def with_plugin(folder):
    """A copy of the program beside something called qie_cuda.so."""
    d = os.path.join(folder, "bin")
    os.makedirs(d, exist_ok=True)
    program = os.path.join(d, "qwen-edit")
    shutil.copy(PROGRAM, program)
    open(os.path.join(d, "qie_cuda.so"), "w").close()
    return program


def call(folder, nvml, *args, program=None, **env):
    if not os.path.exists(LIB):
        raise Skip("no " + LIB)
    path = os.path.join(folder, "nvml.txt")
    open(path, "w").write(nvml)
    e = clean_env(folder, QIE_NVML=LIB, FAKE_NVML=path, QWEN_EDIT_2511_DIR=model(folder), HF_HUB_OFFLINE="1")
    e.update(env)
    return subprocess.run([program or PROGRAM, *args], env=e, capture_output=True, text=True, timeout=60)


def edit(folder, nvml, *args, program=None, **env):
    return call(folder, nvml, "edit", "-i", PICTURE, "-p", "make it red", "-o", os.path.join(folder, "o.png"), *args,
                program=program, **env)


def serve(folder, nvml, *args, program=None, **env):
    return call(folder, nvml, "serve", "--port", "1", "--state-dir", os.path.join(folder, "state"), *args,
                program=program, **env)


def doctor(folder, nvml, *args, **env):
    return json.loads(call(folder, nvml, "doctor", "--json", *args, **env).stdout)


def said_by_doctor(j, id_, level):
    return [c["text"] for c in j["checks"] if c["id"] == id_ and c["level"] == level][0]


def both(folder, nvml, rc, *args, **env):
    """The two refusals, each with doctor's text and remedy in it."""
    for command in (edit, serve):
        r = command(folder, nvml, *args, **env)
        equal(r.returncode, rc, command.__name__, r.stderr)
        check(CPU in r.stderr, r.stderr)
        yield r.stderr


def test_no_room_refuses_in_doctors_words(folder):
    nvml = "".join(gpu(i, 80, 78) + "proc %d %d %d 0\n" % (i, 990000 + i, 77 * G) for i in range(2))
    j = doctor(folder, nvml)
    for text in both(folder, nvml, 5):
        check(said_by_doctor(j, "placement", "fail") in text, text)
        check(j["next"] in text, text, j["next"])
    zh = doctor(folder, nvml, LANG="zh_CN.UTF-8")
    for text in both(folder, nvml, 5, LANG="zh_CN.UTF-8"):
        check(said_by_doctor(zh, "placement", "fail") in text and "没有一张 GPU" in text, text)


def test_cards_too_small_when_empty(folder):
    for text in both(folder, gpu(0, 2, 0.2), 2):
        check("too small even when empty" in text, text)


def test_headroom_decides_and_the_advice_works(folder):
    nvml = gpu(0, 80, 72)
    j = doctor(folder, nvml)
    advice = j["next"].split("--headroom-gib ")[1].split()[0]
    for text in both(folder, nvml, 5):
        check("--headroom-gib " + advice in text, text)
    equal(doctor(folder, nvml, "--headroom-gib", advice)["placement"]["best"], "streamed")
    equal(doctor(folder, nvml, "--headroom-gib", str(float(advice) + 0.2))["placement"]["best"], "none")
    r = edit(folder, nvml, "--headroom-gib", advice)
    check("no GPU has room" not in r.stderr, r.stderr)


def test_the_cpu_is_one_flag_away(folder):
    nvml = gpu(0, 80, 79)
    for args, env in ((("--device", "cpu"), {}), ((), {"QWEN_EDIT_FORCE_CPU": "1"}), (("--backend", "ref"), {})):
        r = edit(folder, nvml, *args, **env)
        check("GPU" not in r.stderr, r.stderr)  # it goes on to the (made up) weights


def test_without_gpu_nothing_is_said(folder):
    for nvml, env in (("", {"QIE_NVML": "/nonexistent/lib.so"}), ("driver 550\n", {})):
        r = edit(folder, nvml, **env)
        check("GPU" not in r.stderr, r.stderr)
        r = edit(folder, nvml, "--device", "cuda", **env)
        equal(r.returncode, 4, r.stderr)
        check(CPU in r.stderr and "NVIDIA driver" in r.stderr, r.stderr)


def test_hidden_gpus_mean_the_cpu(folder):
    for value in ("", "-1"):
        r = edit(folder, gpu(0, 80, 79), CUDA_VISIBLE_DEVICES=value)
        check("hides all GPUs" in r.stderr and "room" not in r.stderr, r.stderr)


def test_sick_driver_refuses(folder):
    for code, word in ((18, "reboot"), (4, "ls -l /dev/nvidia"), (15, "reboot")):
        for text in both(folder, "init %d\n" % code, 4):
            check(word in text, text)


def test_room_but_no_plugin_is_said(folder):
    nvml, alone = gpu(0, 80, 0.5), without_plugin(folder)
    r = edit(folder, nvml, program=alone)
    check("has no GPU plugin" in r.stderr and "fits on GPU 0" in r.stderr, r.stderr)
    r = edit(folder, nvml, "--device", "cuda", program=alone)
    equal(r.returncode, 4, r.stderr)
    check("has no GPU plugin" in r.stderr and CPU in r.stderr, r.stderr)
    r = serve(folder, nvml, "--gpus", "0", program=alone)
    equal(r.returncode, 4, r.stderr)


def test_with_the_plugin_the_placement_is_told(folder):
    program = with_plugin(folder)
    r = edit(folder, gpu(0, 80, 79) + gpu(1, 80, 0.5), program=program)
    check("fits on GPU 1" in r.stderr and "plugin" not in r.stderr.split("\n")[0], r.stderr)
    r = edit(folder, gpu(0, 24, 0.5), program=program)
    check("streamed" in r.stderr, r.stderr)


def test_demo_does_not_ask_for_a_gpu(folder):
    r = edit(folder, "hang 20\n", QWEN_EDIT_2511_DIR="demo")
    equal(r.returncode, 0, r.stderr)


def test_list_of_gpus_is_checked(folder):
    cards = gpu(0, 80, 0.5) + gpu(1, 80, 0.5)
    r = serve(folder, cards, "--gpus", "0,7")
    equal(r.returncode, 2, r.stderr)
    check("'7' names no GPU" in r.stderr, r.stderr)
    r = serve(folder, cards, "--gpus", "1", CUDA_VISIBLE_DEVICES="0")
    equal(r.returncode, 2, r.stderr)
    check("GPU 1 is hidden by CUDA_VISIBLE_DEVICES=0" in r.stderr, r.stderr)


def workers(folder, nvml, *args):
    """CUDA_VISIBLE_DEVICES of the workers that serve starts."""
    program, e = with_plugin(folder), None
    path = os.path.join(folder, "nvml.txt")
    open(path, "w").write(nvml)
    e = clean_env(folder, QIE_NVML=LIB, FAKE_NVML=path, QWEN_EDIT_2511_DIR=model(folder))
    p = subprocess.Popen([program, "serve", "--port", str(22000 + os.getpid() % 9000), "--state-dir",
                          os.path.join(folder, "state"), *args], env=e, stdout=subprocess.PIPE,
                         stderr=subprocess.PIPE, text=True)
    seen = set()
    until = time.time() + 10
    # The placeholder for the plugin cannot compute: workers end and are started again. They are caught alive.
    while time.time() < until and p.poll() is None:
        for pid in os.listdir("/proc"):
            try:
                if not pid.isdigit() or "PPid:\t%d\n" % p.pid not in open("/proc/%s/status" % pid).read():
                    continue
                env = dict(x.split("=", 1) for x in open("/proc/%s/environ" % pid).read().split("\0") if "=" in x)
                if "worker" in open("/proc/%s/cmdline" % pid).read().split("\0"):
                    seen |= {env["CUDA_VISIBLE_DEVICES"]} if "CUDA_VISIBLE_DEVICES" in env else set()
            except OSError:
                pass
        if len(seen) >= 2 or (seen and time.time() > until - 7):
            break
    p.send_signal(signal.SIGTERM)
    _, err = p.communicate(timeout=30)
    return seen, err


def test_a_worker_on_every_card_with_room(folder):
    if not os.path.exists(LIB):
        raise Skip("no " + LIB)
    seen, err = workers(folder, gpu(0, 80, 0.5) + gpu(1, 80, 79) + gpu(2, 24, 0.5))
    equal(seen, {"GPU-0000000%d-aaaa-bbbb-cccc-dddddddddddd" % i for i in (0, 2)}, err)
    check("GPU 1 is left out" in err, err)


main(sys.modules[__name__])
