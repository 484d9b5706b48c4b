"""The cache in both directions with huggingface_hub, and verify, list, rm, prune.

huggingface_hub is looked for in this interpreter, in $QIE_HF_PYTHON and in ../venv beside the source; without it those
tests are skipped."""
import fcntl
import json
import os
import shutil
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fakehub import COMMIT, Entry, FakeHub, Faults, model_files
from hubtest import *

REPO = "test/model"
SOURCE = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DEMO = os.path.join(SOURCE, "demo", "model")
SHARD = "transformer/part-00002-of-00003.safetensors"


def hf_python():
    for p in (os.environ.get("QIE_HF_PYTHON"), sys.executable, os.path.join(SOURCE, "..", "venv", "bin", "python")):
        if p and os.path.exists(p) and subprocess.run([p, "-c", "import huggingface_hub"],
                                                      capture_output=True).returncode == 0:
            return p
    raise Skip("no huggingface_hub here (pip install huggingface_hub, or name a Python that has it in QIE_HF_PYTHON)")


def hf(hub, folder, code):
    e = clean_env(folder, HF_ENDPOINT=hub.url, HF_HUB_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_PROGRESS_BARS="1",
                  HF_HUB_DISABLE_UPDATE_CHECK="1", HF_HUB_DISABLE_XET="1")
    r = subprocess.run([hf_python(), "-c", "from huggingface_hub import *\n" + code], env=e, capture_output=True,
                       text=True, timeout=120)
    equal(r.returncode, 0, r.stderr[-2000:])
    return r.stdout.strip()


def pull(hub, folder, *args, rc=0, **env):
    r = run("pull", REPO, "--endpoint", hub.url, "--json", *args, env=clean_env(folder, **env))
    equal(r.returncode, rc, r.stderr[-1500:])
    return json.loads(r.stdout.strip().splitlines()[-1]) if r.stdout.strip() else None


def ours(folder, *args, rc=0):
    r = run(*args, env=clean_env(folder))
    equal(r.returncode, rc, r.stderr, r.stdout)
    return r


def same(dir_, files):
    for name, e in files.items():
        with open(os.path.join(dir_, name), "rb") as f:
            check(f.read() == e.data, "wrong content:", name)


def repo_dir(folder):
    return os.path.join(folder, "hf", "hub", "models--test--model")


def test_huggingface_hub_finds_what_we_pulled(folder):
    hf_python()
    with FakeHub(model_files(6)) as hub:
        d = pull(hub, folder)["dir"]
        sent = hub.sent
        equal(hf(hub, folder, "print(snapshot_download('test/model', local_files_only=True))"), d)
        equal(hf(hub, folder, "print(snapshot_download('test/model'))"), d)
        equal(hf(hub, folder, "print(hf_hub_download('test/model', 'README.md', local_files_only=True))"), d + "/README.md")
        equal(hub.sent, sent)
        out = hf(hub, folder, "i = scan_cache_dir()\nprint([(r.repo_id, r.size_on_disk, [sorted(v.refs) for v in "
                              "r.revisions]) for r in i.repos], len(i.warnings))")
        size = sum({e.etag: e.size for e in hub.files.values()}.values())
        equal(out, "[('test/model', %d, [['main']])] 0" % size)


def test_hf_cache_lists_ours(folder):
    p = hf_python()
    tool = os.path.join(os.path.dirname(p), "hf")
    if not os.path.exists(tool):
        raise Skip("no hf command")
    with FakeHub(model_files(6)) as hub:
        pull(hub, folder)
        for words in (("cache", "ls"), ("cache", "scan")):
            r = subprocess.run([tool, *words], env=clean_env(folder, HF_HUB_OFFLINE="1"), capture_output=True, text=True)
            if r.returncode == 0:
                check("test/model" in r.stdout, r.stdout)
                return
        raise Skip("this hf has neither cache ls nor cache scan")


def test_partial_of_ours_is_not_complete_for_huggingface_hub(folder):
    hf_python()
    with FakeHub(model_files(6)) as hub:
        pull(hub, folder, "--include", "*.json")
        out = hf(hub, folder, "try:\n  print(snapshot_download('test/model', local_files_only=True))\nexcept Exception as "
                              "e:\n  print(type(e).__name__)")
        check("snapshots" not in out, out)
        d = hf(hub, folder, "print(snapshot_download('test/model'))")
        same(d, hub.files)


def test_what_huggingface_hub_pulled_is_complete_for_us(folder):
    hf_python()
    with FakeHub(model_files(6)) as hub:
        d = hf(hub, folder, "print(snapshot_download('test/model'))")
        sent = hub.sent
        r = pull(hub, folder)
        equal((r["dir"], r["files_fetched"], hub.sent), (d, 0, sent))
        r = pull(hub, folder, HF_HUB_OFFLINE="1")
        equal(r["dir"], d)
        j = json.loads(ours(folder, "list", "--json").stdout)
        equal([(m["repo"], m["revisions"][0]["complete"]) for m in j["models"]], [("test/model", True)])


def test_local_dir_of_huggingface_hub_and_back(folder):
    hf_python()
    with FakeHub(model_files(6)) as hub:
        d = os.path.join(folder, "d")
        hf(hub, folder, "snapshot_download('test/model', local_dir=%r)" % d)
        sent = hub.sent
        equal(pull(hub, folder, "--local-dir", d)["files_fetched"], 0)
        equal(hub.sent, sent)
        b = os.path.join(folder, "b")
        pull(hub, folder, "--local-dir", b)
        sent = hub.sent
        hf(hub, folder, "snapshot_download('test/model', local_dir=%r)" % b)
        equal(hub.sent, sent)


def test_old_incomplete_file_is_gone_on_with(folder):
    """ETAG.incomplete of older versions of huggingface_hub: the beginning of the content."""
    with FakeHub(model_files(6)) as hub:
        e = hub.files[SHARD]
        blobs = os.path.join(repo_dir(folder), "blobs")
        os.makedirs(blobs)
        with open(os.path.join(blobs, e.etag + ".incomplete"), "wb") as f:
            f.write(e.data[:1500000])
        d = pull(hub, folder)["dir"]
        same(d, hub.files)
        ranges = [q[3] for q in hub.requests if q[0] == "cdn" and q[2].startswith("/cdn/" + SHARD)]
        equal(ranges, ["bytes=1500000-1999999"])
        check(not [f for f in os.listdir(blobs) if "incomplete" in f])
        # one whose bytes are wrong costs a second fetch, never a wrong file
        home = os.path.join(folder, "x")
        blobs = os.path.join(repo_dir(home), "blobs")
        os.makedirs(blobs)
        with open(os.path.join(blobs, e.etag + ".incomplete"), "wb") as f:
            f.write(b"?" * 1500000)
        same(pull(hub, home)["dir"], hub.files)


def test_we_wait_for_the_lock_of_another_program(folder):
    with FakeHub(model_files(6)) as hub:
        e = hub.files[SHARD]
        locks = os.path.join(folder, "hf/hub/.locks/models--test--model")
        os.makedirs(locks)
        lock = open(os.path.join(locks, e.etag + ".lock"), "w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        blobs = os.path.join(repo_dir(folder), "blobs")

        def other():
            time.sleep(1)
            os.makedirs(blobs, exist_ok=True)
            with open(os.path.join(blobs, "tmp"), "wb") as f:
                f.write(e.data)
            os.rename(os.path.join(blobs, "tmp"), os.path.join(blobs, e.etag))
            lock.close()
        t = threading.Thread(target=other)
        t.start()
        same(pull(hub, folder)["dir"], hub.files)
        t.join()
        check(not [q for q in hub.requests if SHARD in q[2] and q[0] == "cdn"], "fetched although another did")


def test_new_revision_shares_blobs_and_rm_and_prune(folder):
    files = model_files(6)
    with FakeHub(files) as hub:
        pull(hub, folder)
        # another commit with one file changed
        hub.commit = "f" * 40
        hub.files = dict(hub.files, **{"README.md": Entry(b"new")})
        sent = hub.sent
        pull(hub, folder)
        equal(hub.sent - sent, 3)
        j = json.loads(ours(folder, "list", REPO, "--json").stdout)["models"][0]
        equal(sorted((r["commit"][0], r["refs"], r["complete"]) for r in j["revisions"]),
              [("0", "", True), ("f", "main", True)])
        open(os.path.join(repo_dir(folder), "blobs", "a" * 64), "wb").write(b"nobody links to me")
        open(os.path.join(repo_dir(folder), "blobs", "b" * 64 + ".qwen-edit.incomplete"), "wb").write(b"part")
        text = ours(folder, "list").stdout
        check("begun" in text and "unused" in text and "(detached)" in text, text)
        dry = json.loads(ours(folder, "prune", "--detached", "--dry-run", "--json").stdout)
        equal((dry["revisions"], dry["partial"]), (1, 1))
        check(os.path.exists(os.path.join(repo_dir(folder), "snapshots", COMMIT)))
        ours(folder, "prune", "--detached")
        check(not os.path.exists(os.path.join(repo_dir(folder), "snapshots", COMMIT)))
        left = os.listdir(os.path.join(repo_dir(folder), "blobs"))
        equal(sorted(left), sorted({e.etag for e in hub.files.values()}))
        same(os.path.join(repo_dir(folder), "snapshots", "f" * 40), hub.files)
        equal(run("rm", REPO, env=clean_env(folder)).returncode, 2)  # nobody to ask
        ours(folder, "rm", REPO, "--yes")
        check(not os.path.exists(repo_dir(folder)))
        ours(folder, "rm", REPO, "--yes", rc=3)


def test_rm_and_prune_leave_a_running_pull_alone(folder):
    with FakeHub(model_files(6), rate=1500000) as hub:
        p = subprocess.Popen([PROGRAM, "pull", REPO, "--endpoint", hub.url, "--quiet"], env=clean_env(folder),
                             stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        time.sleep(0.8)
        check("being fetched" in ours(folder, "rm", REPO, "--yes", rc=3).stderr)
        equal(json.loads(ours(folder, "prune", "--json").stdout)["busy"], 1)
        out, err = p.communicate(timeout=60)
        equal(p.returncode, 0, err)
        same(out.strip(), hub.files)


def demo_files():
    files = {}
    for d, _, names in os.walk(DEMO):
        for n in names:
            path = os.path.join(d, n)
            with open(path, "rb") as f:
                files[os.path.relpath(path, DEMO)] = f.read()
    return files


def verify(folder, *args, rc):
    r = run("verify", *args, "--json", env=clean_env(folder))
    equal(r.returncode, rc, r.stdout, r.stderr)
    return json.loads(r.stdout.strip().splitlines()[-1])


def test_verify_names_damage_and_the_command_that_mends_it(folder):
    if not os.path.exists(DEMO):
        raise Skip("no demo model")
    with FakeHub(demo_files()) as hub:
        d = pull(hub, folder)["dir"]
        j = verify(folder, REPO, rc=0)
        check(j["ok"] and j["files_hashed"] == j["files"] and j["tensors"] > 100, j)
        name = "transformer/diffusion_pytorch_model.safetensors"
        blob = os.path.realpath(os.path.join(d, name))
        with open(blob, "r+b") as f:
            f.seek(2000000)
            b = f.read(1)
            f.seek(2000000)
            f.write(bytes([b[0] ^ 1]))
        j = verify(folder, REPO, rc=6)
        p = j["problems"][0]
        equal((p["path"], p["problem"]), (name, "hash"))
        equal(p["remedy"], "qwen-edit pull test/model --recheck --include '%s'" % name)
        verify(folder, REPO, "--no-hash", rc=0)
        # the remedy, as printed
        r = subprocess.run(p["remedy"].replace("qwen-edit", PROGRAM, 1), shell=True, capture_output=True, text=True,
                           env=clean_env(folder, HF_ENDPOINT=hub.url))
        equal(r.returncode, 0, r.stderr)
        verify(folder, REPO, rc=0)
        os.truncate(os.path.realpath(os.path.join(d, name)), 100000)
        kinds = {p["problem"] for p in verify(folder, REPO, rc=6)["problems"]}
        check("size" in kinds, kinds)
        os.unlink(os.path.join(d, "vae/config.json"))
        check(("vae/config.json", "missing") in [(p["path"], p["problem"]) for p in verify(folder, REPO, rc=6)["problems"]])


def test_remedies_of_verify_can_be_typed(folder):
    """Also with quotes in the names, and for another cache than the usual one."""
    if not os.path.exists(DEMO):
        raise Skip("no demo model")
    local, other = os.path.join(folder, "it's \"mine\" $HOME"), os.path.join(folder, "other cache")
    with FakeHub(demo_files()) as hub:
        pull(hub, folder, "--local-dir", local)
        pull(hub, folder, "--cache-dir", other)
        snapshot = os.path.join(other, "models--test--model", "snapshots", hub.commit)
        for name in (local,), (REPO, "--cache-dir", other), (snapshot,):
            os.truncate(os.path.realpath(os.path.join(local if name[0] == local else snapshot, "vae/config.json")), 10)
            p = verify(folder, *name, rc=6)["problems"][0]
            r = subprocess.run(p["remedy"].replace("qwen-edit", PROGRAM, 1), shell=True, capture_output=True, text=True,
                               env=clean_env(folder, HF_ENDPOINT=hub.url))
            equal(r.returncode, 0, p["remedy"], r.stderr)
            verify(folder, *name, rc=0)


def test_verify_plain_folder_headers_and_tensors(folder):
    if not os.path.exists(DEMO):
        raise Skip("no demo model")
    d = os.path.join(folder, "m")
    with FakeHub(demo_files()) as hub:
        pull(hub, folder, "--local-dir", d)
        verify(folder, d, rc=0)
        path = os.path.join(d, "transformer/config.json")
        text = open(path).read()
        open(path, "w").write(text + " ")
        j = verify(folder, d, rc=6)
        p = [p for p in j["problems"] if p["path"] == "transformer/config.json"][0]
        check("--local-dir '%s'" % d in p["remedy"] and p["remedy"].startswith("qwen-edit pull test/model"), p)
    shutil.rmtree(d)
    shutil.copytree(DEMO, d)
    j = verify(folder, d, rc=0)  # no list, no hashes: headers and tensors are still checked
    equal(j["files_hashed"], 0)
    path = os.path.join(d, "transformer/config.json")
    text = open(path).read()
    config = json.loads(text)
    n = config["num_layers"]
    open(path, "w").write(json.dumps(dict(config, num_layers=n + 1)))
    j = verify(folder, d, rc=6)
    check(any(p["problem"] == "tensors" and "transformer_blocks.%d" % n in p["detail"] for p in j["problems"]), j)
    open(path, "w").write(text)
    weights = os.path.join(d, "vae/diffusion_pytorch_model.safetensors")
    with open(weights, "r+b") as f:
        f.write((1 << 40).to_bytes(8, "little"))
    j = verify(folder, d, rc=6)
    check(any(p["problem"] == "header" for p in j["problems"]), j)


def test_places_of_the_cache(folder):
    with FakeHub({"a": b"1"}) as hub:
        for env, place in ((dict(HF_HUB_CACHE=folder + "/c1"), "c1"), (dict(HUGGINGFACE_HUB_CACHE=folder + "/c2"), "c2"),
                           (dict(HF_HOME=folder + "/c3"), "c3/hub"), (dict(HF_HOME="~/c4"), "c4/hub"),
                           (dict(HF_HOME="", XDG_CACHE_HOME=folder + "/c5"), "c5/huggingface/hub"),
                           (dict(HF_HOME=""), ".cache/huggingface/hub")):
            pull(hub, folder, **env)
            check(os.path.exists(os.path.join(folder, place, "models--test--model")), place)


main(sys.modules[__name__])
