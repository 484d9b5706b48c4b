"""doctor against recorded situations of the NVIDIA driver, of /proc and of control groups."""
import json
import os
import socket
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fakehub import FakeHub
from hubtest import *

G = 1 << 30
LIB = os.path.join(os.path.dirname(PROGRAM or ""), "tests", "fakenvml.so")
CONTAINER = "3f2a9b1c" * 8


def gpu(i, total, used, name="NVIDIA A100-SXM4-80GB", memory_code=0, mig=0):
    return "gpu %s|GPU-%08d-aaaa-bbbb-cccc-dddddddddddd|%d|%d|%d|8|0|%d|%d\n" % (
        name, i, total * G, int((total - used) * G), int(used * G), memory_code, mig)


def process(root, pid, comm, cmdline, uid=0, container=None, v1=False):
    d = os.path.join(root, "proc", str(pid))
    os.makedirs(d)
    open(d + "/comm", "w").write(comm + "\n")
    open(d + "/cmdline", "wb").write(b"\0".join(c.encode() for c in cmdline) + b"\0")
    open(d + "/status", "w").write("Name:\t%s\nUid:\t%d\t%d\t%d\t%d\n" % (comm, uid, uid, uid, uid))
    group = "/" if not container else (
        "/docker/" + container if v1 else "/system.slice/docker-%s.scope" % container)
    open(d + "/cgroup", "w").write(("12:memory:%s\n" if v1 else "0::%s\n") % group)


def machine(root, total_gib=256, available_gib=200, limit=None, v1=False):
    for d in ("proc/self", "etc", "sys/fs/cgroup/memory"):
        os.makedirs(os.path.join(root, d), exist_ok=True)
    open(root + "/proc/meminfo", "w").write("MemTotal: %d kB\nMemAvailable: %d kB\n" % (
        total_gib << 20, available_gib << 20))
    open(root + "/proc/cpuinfo", "w").write("".join("processor\t: %d\nmodel name\t: Test CPU\n" % i for i in range(8)))
    open(root + "/etc/passwd", "w").write("root:x:0:0::/root:/bin/sh\nalice:x:1000:1000::/home/alice:/bin/sh\n")
    open(root + "/proc/self/cgroup", "w").write("4:memory:/docker/x\n" if v1 else "0::/\n")
    if limit:
        if v1:
            open(root + "/sys/fs/cgroup/memory/memory.limit_in_bytes", "w").write("%d\n" % limit)
            open(root + "/sys/fs/cgroup/memory/memory.usage_in_bytes", "w").write("%d\n" % G)
        else:
            open(root + "/sys/fs/cgroup/memory.max", "w").write("%d\n" % limit)
            open(root + "/sys/fs/cgroup/memory.current", "w").write("%d\n" % G)


def model(folder):
    """A folder with every file that a model needs, all empty: complete, and sized as the released one."""
    d = os.path.join(folder, "model")
    for n in ("model_index.json", "scheduler/scheduler_config.json", "transformer/config.json", "vae/config.json",
              "transformer/diffusion_pytorch_model.safetensors", "text_encoder/config.json",
              "text_encoder/model.safetensors", "vae/diffusion_pytorch_model.safetensors", "tokenizer/tokenizer.json"):
        os.makedirs(os.path.dirname(os.path.join(d, n)), exist_ok=True)
        open(os.path.join(d, n), "w").close()
    return d


def doctor(folder, nvml, lang="C.UTF-8", args=(), setup=None, limit=None, v1=False, rc=None, **env):
    """Runs it and returns (json, text); checks what holds in every situation."""
    if not os.path.exists(LIB):
        raise Skip("no " + LIB)
    root = os.path.join(folder, "root")
    if not os.path.exists(root):
        machine(root, limit=limit, v1=v1)
        if setup:
            setup(root)
    path = os.path.join(folder, "nvml.txt")
    open(path, "w").write(nvml)
    with FakeHub({"a": b"x"}) as hub:
        e = clean_env(folder, QIE_NVML=LIB, FAKE_NVML=path, QIE_ROOT=root, LANG=lang, HF_ENDPOINT=hub.url,
                      QWEN_EDIT_2511_DIR=model(folder))
        e.update(env)
        t = time.time()
        r = run("doctor", "--json", *args, env=e)
        took = time.time() - t
        check(took < 5, "took", took)
        j = json.loads(r.stdout)
        equal(r.returncode, 7 if j["failed"] else 0, r.stderr)
        if rc is not None:
            equal(r.returncode, rc, r.stdout)
        e["LANG"] = lang
        text = run("doctor", *args, env=e).stdout
    for c in j["checks"]:
        check(c["level"] != "fail" or c["remedy"], "a failure without a remedy:", c)
        check(c["id"] in ("network", "model", "disk") or c["text"] in text, "not in the text:", c["text"])
    check(j["next"] in text)
    return j, text


def levels(j, id_):
    return [c["level"] for c in j["checks"] if c["id"] == id_]


def test_four_free_cards_a_pass_on_each_of_two(folder):
    j, text = doctor(folder, "".join(gpu(i, 80, 0.5) for i in range(4)), rc=0)
    equal(j["placement"]["best"], "parallel")
    equal(j["placement"]["used"]["gpus"], [0, 1])
    equal(len(j["gpus"]["cards"]), 4)
    check("GPUs 0,1 hold a whole model for each guidance pass" in text, text)
    check("parallel, GPU 0 (" in text and "GPU 2 (" not in text, text)


def test_one_free_card_resident(folder):
    j, text = doctor(folder, gpu(0, 80, 0.5) + gpu(1, 80, 70), rc=0)
    equal(j["placement"]["best"], "resident")
    check("fits on GPU 0" in text, text)
    check("head-room" in text)


def test_vllm_on_all_cards_names_worker_container_and_command(folder):
    def setup(root):
        for i in range(4):
            process(root, 4711 + i, "VLLM::Worker_TP", ["python3", "-m", "vllm.entrypoints.openai.api_server", "--model",
                                                        "x"], 0, CONTAINER)
    j, text = doctor(folder, "".join(gpu(i, 80, 75) + "proc %d %d %d 0\n" % (i, 4711 + i, 74 * G) for i in range(4)),
                     setup=setup, rc=7)
    equal(j["placement"]["best"], "none")
    check("a vLLM worker (pid 4711, container 3f2a9b1c3f2a..., user root) holds 74.0 GiB of GPU 0" in text, text)
    check("docker stop 3f2a9b1c3f2a" in j["next"], j["next"])
    check("--device cpu" in j["next"])
    p = j["gpus"]["cards"][0]["processes"][0]
    equal((p["pid"], p["kind"], p["container"]), (4711, "vLLM", CONTAINER))


def test_mixed_one_card_streams(folder):
    def setup(root):
        process(root, 900, "python", ["python", "train.py"], 1000)
    j, text = doctor(folder, gpu(0, 80, 78) + gpu(1, 24, 0.3, "NVIDIA RTX 4090", mig=2) + "proc 0 900 %d 0\n" % (77 * G),
                     setup=setup, rc=0)
    equal(j["placement"]["best"], "streamed")
    check("GPU 1 can run it streamed" in text, text)
    check("python (pid 900, user alice) holds 77.0 GiB of GPU 0: python train.py" in text, text)
    check("kill 900" in text)


def test_two_cards_shard(folder):
    j, text = doctor(folder, gpu(0, 48, 0.5) + gpu(1, 48, 0.5) + gpu(2, 48, 40), rc=0)
    equal(j["placement"]["best"], "sharded")
    equal(j["placement"]["sharded"]["gpus"], [0, 1])


def test_mig_only_instances_count(folder):
    j, text = doctor(folder, gpu(0, 80, 1, mig=1) + "mig 0 MIG-11111111-2222 %d %d\n" % (20 * G, 19 * G), rc=0)
    equal(j["placement"]["best"], "streamed")
    equal(j["gpus"]["cards"][0]["instances"], [{"uuid": "MIG-11111111-2222", "bytes_total": 20 * G, "bytes_free": 19 * G}])
    check("MIG mode" in text and "CUDA_VISIBLE_DEVICES=MIG-11111111-2222" in text, text)


def test_unknown_process_is_told_as_such(folder):
    j, text = doctor(folder, gpu(0, 80, 78) + "proc 0 31337 -1 0\n", rc=7)
    check("not visible from here (pid 31337" in text and "nvidia-smi on the host" in text, text)
    check("does not name" not in text, "the same memory is told twice:", text)


def test_memory_held_by_nobody_listed(folder):
    j, text = doctor(folder, gpu(0, 80, 60), rc=0)
    check("60.0 GiB of GPU 0 are held by processes that the driver does not name" in text, text)
    check("fuser -v /dev/nvidia0" in text)


def test_driver_mismatch_says_reboot(folder):
    j, text = doctor(folder, "init 18\n", rc=7)
    equal(j["gpus"]["state"], "mismatch")
    check("reboot" in j["next"], j["next"])


def test_no_permission(folder):
    j, text = doctor(folder, "init 4\n", rc=7)
    check("ls -l /dev/nvidia*" in j["next"])


def test_not_loaded_and_lost(folder):
    j, _ = doctor(folder, "init 9\n", rc=7)
    check("modprobe nvidia" in j["next"])
    j, _ = doctor(folder, "init 15\n", rc=7)
    check("reboot" in j["next"])


def test_process_list_denied_card_still_counts(folder):
    j, text = doctor(folder, gpu(0, 80, 0.4) + "procrc 0 4\n", rc=0)
    equal(j["placement"]["best"], "resident")


def test_memory_of_a_card_not_told(folder):
    j, text = doctor(folder, gpu(0, 80, 0, memory_code=4))
    check("does not tell its memory" in text, text)


def test_driver_hangs_ends_in_time(folder):
    j, text = doctor(folder, "hang 20\n", rc=7)
    equal(j["gpus"]["state"], "hung")


def test_busy_machine_is_no_driver_that_hangs(folder):
    j, text = doctor(folder, gpu(0, 80, 1), FAKE_NVML_LATE="3", rc=0)
    equal(j["gpus"]["state"], "ok")


def test_driver_library_crashes(folder):
    j, text = doctor(folder, "crash 1\n", rc=7)
    equal(j["gpus"]["state"], "error")
    check("the driver does not work: its library crashed" in text, text)
    check("until then run on the CPU: qwen-edit edit" in j["next"], j["next"])


def test_no_driver_one_line(folder):
    j, text = doctor(folder, "", QIE_NVML="/nonexistent/libnvidia-ml.so.1", rc=0)
    equal(j["gpus"]["state"], "no_driver")
    equal(len([c for c in j["checks"] if "NVIDIA" in c["text"]]), 1)
    equal(j["placement"]["best"], "cpu")


def test_visible_devices_map_and_are_checked(folder):
    cards = gpu(0, 80, 79) + gpu(1, 80, 0.5)
    j, text = doctor(folder, cards, CUDA_VISIBLE_DEVICES="0", rc=7)
    equal([c["visible"] for c in j["gpus"]["cards"]], [True, False])
    j, text = doctor(folder, cards, CUDA_VISIBLE_DEVICES="GPU-00000001", rc=0)
    equal(j["placement"]["resident"]["gpus"], [1])
    j, text = doctor(folder, cards, CUDA_VISIBLE_DEVICES="1,7,0")
    check("names no GPU from '7,0' on" in text, text)
    j, text = doctor(folder, cards, CUDA_VISIBLE_DEVICES="")
    check("hides all GPUs" in text)


def test_headroom_from_environment_and_flag(folder):
    j, text = doctor(folder, gpu(0, 64, 2), rc=0, QWEN_EDIT_GPU_HEADROOM_GIB="0")
    equal(j["placement"]["best"], "resident")
    j, text = doctor(folder, gpu(0, 64, 2), rc=0, QWEN_EDIT_GPU_HEADROOM_GIB="12")
    equal(j["placement"]["best"], "streamed")
    j, text = doctor(folder, gpu(0, 64, 2), rc=7, args=("--headroom-gib", "60"))
    row = [s for s in j["settings"] if s["name"] == "headroom"][0]
    equal((row["value"], row["origin"]), ("60 GiB", "flag"))


def test_container_limits_of_both_kinds(folder):
    for v1 in (False, True):
        sub = os.path.join(folder, "v%d" % v1)
        os.makedirs(sub)
        j, text = doctor(sub, "", limit=3 * G, v1=v1, QIE_NVML="/nonexistent", rc=7)
        equal(j["machine"]["limit_bytes"], 3 * G)
        equal(j["machine"]["bytes_free"], 2 * G)
        equal(j["machine"]["cgroup_version"], 1 if v1 else 2)
        check("container's limit" in text)


def test_chinese(folder):
    def setup(root):
        process(root, 4711, "VLLM::Worker", ["vllm"], 0, CONTAINER, v1=True)
    j, text = doctor(folder, gpu(5, 80, 75) + "proc 0 4711 %d 0\n" % (21 * G), lang="zh_CN.UTF-8", setup=setup, rc=7)
    check("vLLM 进程（pid 4711，容器 3f2a9b1c3f2a…，用户 root）占用 GPU 0 的 21.0 GiB 显存" in text, text)
    check("没有一张 GPU 放得下" in text and "下一步：停止" in text, text)


def test_chinese_has_no_english_of_the_driver(folder):
    for nvml, words in (("init 18\n", "版本不同（升级后未重启）（NVML 错误 18）"), ("init 17\n", "被操作系统或控制组阻止（NVML 错误 17）"),
                        ("crash 1\n", "驱动无法工作：其库崩溃了")):
        j, text = doctor(folder, nvml, lang="zh_CN.UTF-8", rc=7)
        check(words in text, text)
        check("在此之前可在 CPU 上运行" in j["next"], j["next"])
    j, text = doctor(folder, gpu(0, 80, 0, memory_code=4), lang="zh_CN.UTF-8")
    check("驱动不告知其显存：权限不足（NVML 错误 4）" in text, text)


def test_everything_silent_ends_in_time(folder):
    """Neither the driver nor any hub answers: doctor() checks the five seconds."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        s.listen(50)
        url = "http://127.0.0.1:%d" % s.getsockname()[1]
        j, text = doctor(folder, "hang 20\n", HF_ENDPOINT=url + "," + url + "/other", rc=7)
        equal([n["reachable"] for n in j["network"]], [False])
        check(url + "/other was not asked: no time left" in text, text)


def test_offline_and_unreachable(folder):
    j, text = doctor(folder, "", QIE_NVML="/nonexistent", HF_HUB_OFFLINE="1", rc=0)
    check("HF_HUB_OFFLINE=1: no connection is made" in text)
    j, text = doctor(folder, "", QIE_NVML="/nonexistent", HF_ENDPOINT="http://127.0.0.1:9", QWEN_EDIT_2511_DIR="",
                     rc=7)
    check("cannot be reached" in text and "export HF_ENDPOINT=" in text, text)
    check("qwen-edit pull" in text and "the model takes 57.7 GB" in text, text)
    j, text = doctor(folder, "", QIE_NVML="/nonexistent", HF_ENDPOINT="http://127.0.0.1:9", rc=0)
    check("the model is complete, so no network is needed" in text, text)


def test_incomplete_model_names_the_command(folder):
    m = os.path.join(folder, "m")
    os.makedirs(m + "/transformer")
    j, text = doctor(folder, "", QIE_NVML="/nonexistent", QWEN_EDIT_2511_DIR=m, rc=7)
    check("is not complete" in text and "qwen-edit pull --local-dir '%s'" % m in text, text)
    j, text = doctor(folder, "", QIE_NVML="/nonexistent", args=("--model", "/nonexistent/x"), rc=7)
    check("cannot be used" in text, text)


def test_token_and_proxy_password_never_shown(folder):
    j, text = doctor(folder, "", QIE_NVML="/nonexistent", HF_TOKEN="hf_SECRET123",
                     http_proxy="http://user:PASSWORD@127.0.0.1:9")
    check("SECRET" not in text + json.dumps(j) and "PASSWORD" not in text + json.dumps(j))
    check("127.0.0.1:9" in text)


main(sys.modules[__name__])
