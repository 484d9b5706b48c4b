"""pull against a hub that misbehaves: complete and right, or refused with words; never done with a wrong byte.

--long: 100 pulls of 300 MB with every fault, 200 kills, throughput against curl (sizes may be given as
QIE_PULLS, QIE_PULL_MB, QIE_KILLS)."""
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from fakehub import COMMIT, Entry, FakeHub, Faults, model_files
from hubtest import *

REPO = "test/model"
SMALL = model_files(6)


def pull(hub, folder, *args, timeout=120, rc=0, endpoint=None, **env):
    e = clean_env(folder, HF_HUB_DOWNLOAD_TIMEOUT=env.pop("stall", "2"), **env)
    urls = endpoint if endpoint is not None else [hub.url]
    flags = [x for u in urls for x in ("--endpoint", u)]
    r = run("pull", REPO, *flags, "--json", *args, env=e, timeout=timeout)
    if rc is not None:
        equal(r.returncode, rc, r.stderr[-1500:], r.stdout[-500:])
    r.json = json.loads(r.stdout.strip().splitlines()[-1]) if r.stdout.strip() else {}
    return r


def same(dir_, files):
    for name, e in files.items():
        data = e.data if isinstance(e, Entry) else e
        with open(os.path.join(dir_, name), "rb") as f:
            check(f.read() == data, "wrong content:", name)


# Temporary names of notes: refs/main.a1B2c3
UNNAMED = re.compile(r"(main|json|metadata|\.TAG|\.gitignore)\.[A-Za-z0-9]{6}$")


def leftovers(folder):
    return [os.path.join(d, f) for d, _, fs in os.walk(folder) for f in fs
            if "incomplete" in f or f.endswith((".link", ".copy", ".tmp")) or UNNAMED.search(f)]


def message(r):
    return r.json.get("error", {}).get("message", "")


def test_clean_pull_into_cache_and_again(folder):
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder)
        same(r.json["dir"], hub.files)
        equal(leftovers(folder), [])
        sent = hub.sent
        check(sent <= 1.02 * sum(e.size for e in hub.files.values()), sent)
        r = pull(hub, folder)
        equal((hub.sent, r.json["files_fetched"]), (sent, 0))
        check(any(p.startswith("/api/models/test/model/tree") and "cursor=3" in p for _, _, p, _, _ in hub.requests))


def test_local_dir(folder):
    d = os.path.join(folder, "out dir")
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder, "--local-dir", d)
        same(d, hub.files)
        equal(leftovers(folder), [])
        sent = hub.sent
        pull(hub, folder, "--local-dir", d)
        equal(hub.sent, sent)
        name = "transformer/part-00001-of-00003.safetensors"
        with open(os.path.join(d, name), "r+b") as f:
            f.seek(1000)
            f.write(b"damage")
        time.sleep(1.2)  # notes vouch for a file up to a second
        pull(hub, folder, "--local-dir", d, "--recheck")
        same(d, hub.files)


def test_local_dir_takes_what_the_cache_has(folder):
    with FakeHub(SMALL) as hub:
        pull(hub, folder)
        sent = hub.sent
        d = os.path.join(folder, "d")
        pull(hub, folder, "--local-dir", d)
        same(d, hub.files)
        equal(hub.sent, sent)


def fault_test(**p):
    def test(folder):
        limit = p.pop("limit", 12)
        with FakeHub(SMALL, faults=Faults(seed=5, stall_s=4, limit=limit, sure=True, **p)) as hub:
            r = pull(hub, folder)
            check(hub.faults.count > 0, "no fault happened")
            same(r.json["dir"], hub.files)
            equal(leftovers(folder), [])
        p["limit"] = limit
    return test


test_cut = fault_test(cut=0.7)
test_status_408_429_5xx = fault_test(status=0.5)
test_stall_before_the_answer = fault_test(stall=0.3, limit=2)
test_stall_inside_the_body = fault_test(slow=0.6, limit=2)
test_200_instead_of_206 = fault_test(whole=0.8, cut=0.5)
test_no_length = fault_test(nolength=0.7, cut=0.3)
test_chunked = fault_test(chunked=0.8, cut=0.3)
test_wrong_size = fault_test(wrong_size=0.7, cut=0.5)
test_wrong_range = fault_test(wrong_range=0.7, cut=0.5)
test_damaged_content_is_fetched_again = fault_test(flip=0.5, limit=3)
test_416 = fault_test(e416=0.6, cut=0.6)
test_etag_changes = fault_test(etag=0.5)
test_truncated = fault_test(truncate=0.6)
test_redirect_loop = fault_test(loop=0.5)
test_garbage = fault_test(garbage=0.3, limit=4)
test_longer_than_said = fault_test(longer=0.6)
test_list_cut_on_the_way = fault_test(bad_json=0.5, limit=4)


class Scripted(Faults):
    """Every answer as its name's list says, cut in the middle."""

    def __init__(self, **lists):
        super().__init__()
        self.lists = lists

    def draw(self, name):
        return bool(self.lists.get(name)) and self.lists[name].pop(0)

    def between(self, a, b):
        return (a + b) // 2


def test_a_hub_that_has_answered_ranges_is_asked_again(folder):
    """Whichever file it was: four answers with the whole in a row do not make the second file start again."""
    files = {n: Entry(random.Random(size).randbytes(size), lfs=True) for n, size in (("a", 2000000), ("b", 3000000))}
    # both are cut; then a's range comes, and b's is answered with the whole four times
    faults = Scripted(cut=[True, True], whole=[False] + [True] * 4)
    with FakeHub(files, faults=faults) as hub:
        r = pull(hub, folder, "--jobs", "1")
        same(r.json["dir"], hub.files)
        equal(faults.lists["whole"], [])
        equal(r.json["bytes_fetched"], 5000000)


def test_ranges_that_fail_now_and_then_cost_nothing(folder):
    """Refused ranges are asked again, in any order of refusals: what is there is not fetched a second time."""
    files = {"a.bin": Entry(random.Random(1).randbytes(30000000), lfs=True)}
    hits = 0
    for seed in range(3):
        faults = Faults(seed=seed, cut=0.8, whole=0.35, e416=0.2, limit=40)
        with FakeHub(files, faults=faults) as hub:
            r = pull(hub, os.path.join(folder, str(seed)), "--retries", "50")
            same(r.json["dir"], hub.files)
            hits += faults.count
            check(r.json["bytes_fetched"] <= 1.02 * 30000000, r.json["bytes_fetched"])
    check(hits > 6, hits)


def test_all_faults_at_once(folder):
    for seed in range(2):
        home = os.path.join(folder, str(seed))
        faults = Faults(seed=seed, stall_s=4, cut=.3, stall=.01, status=.1, whole=.1, nolength=.05, chunked=.1,
                        wrong_size=.05, wrong_range=.05, flip=.02, e416=.03, etag=.05, truncate=.1, loop=.02,
                        garbage=.02, slow=.01, longer=.05)
        with FakeHub(SMALL, faults=faults) as hub:
            same(pull(hub, home).json["dir"], hub.files)
            equal(leftovers(home), [])


def test_always_damaged_is_refused_with_words(folder):
    with FakeHub({"a.bin": Entry(b"x" * 50000, lfs=True)}, faults=Faults(flip=1)) as hub:
        r = pull(hub, folder, rc=6)
        check("has not the hash" in message(r) and "--endpoint" in message(r), message(r))
        check(not os.path.exists(os.path.join(folder, "hf/hub/models--test--model/snapshots", COMMIT, "a.bin")))
        equal(len([1 for q in hub.requests if q[0] == "cdn"]), 5)


def test_always_wrong_size_is_refused(folder):
    with FakeHub({"a.bin": b"x" * 5000}) as hub:
        hub.tree_override = lambda t: [dict(e, size=4000) for e in t]
        r = pull(hub, folder, "--retries", "3", rc=6)
        check("5000" in message(r) and "4000" in message(r), message(r))


def test_token_only_to_its_own_host(folder):
    with FakeHub(SMALL, token="hf_TEST") as hub:
        r = pull(hub, folder, HF_TOKEN="hf_TEST")
        same(r.json["dir"], hub.files)
        for host, _, path, _, auth in hub.requests:
            equal(auth, "Bearer hf_TEST" if host == "hub" else None, path)
        check("hf_TEST" not in r.stderr + r.stdout)
        check(any("files come from http://127.0.0.1:%d" % hub.cdn_port in l for l in r.stderr.splitlines()))
        r = pull(hub, os.path.join(folder, "b"), rc=1)
        check("HF_TOKEN" in message(r), message(r))
        r = pull(hub, os.path.join(folder, "c"), rc=1, HF_TOKEN="hf_WRONG", QIE_LOG="trace")
        check("refused" in message(r) and "hf_WRONG" not in r.stderr + r.stdout, message(r))


def test_names_that_leave_the_folder_are_refused(folder):
    for bad in ("../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "a/.", "C:evil", "a\\..\\b", "a\nb", "x" * 300,
                ".cache/huggingface/x", ""):
        with FakeHub({"ok": b"1"}) as hub:
            hub.tree_override = lambda t: t + [dict(t[0], path=bad)]
            for args in ((), ("--local-dir", os.path.join(folder, "d"))):
                r = pull(hub, folder, *args, rc=6)
                check("refused" in message(r), bad, message(r))
    equal([f for f in os.listdir(folder) if "evil" in f], [])


def test_bad_hashes_sizes_commits_are_refused(folder):
    changes = [lambda e: dict(e, oid="../../x"), lambda e: dict(e, size=-5), lambda e: dict(e, size=1 << 60),
               lambda e: dict(e, size="7"), lambda e: dict(e, lfs={"oid": "zz", "size": 1}),
               lambda e: dict(e, lfs={"oid": "0" * 64, "size": 99}), lambda e: "text", lambda e: dict(e, path=5)]
    for i, change in enumerate(changes):
        with FakeHub({"ok": b"1"}) as hub:
            hub.tree_override = lambda t: [change(e) for e in t]
            pull(hub, folder, rc=6)
    for sha in ("../../x", "main", None, 5, "F" * 40):
        with FakeHub({"ok": b"1"}) as hub:
            hub.revision_override = lambda i: dict(i, sha=sha)
            pull(hub, folder, rc=6)
    with FakeHub({"a": b"1", "b": b"2"}) as hub:
        hub.tree_override = lambda t: t + [dict(t[0], path="a/b")]
        check("file and as a folder" in message(pull(hub, folder, rc=6)))


def test_link_inside_local_dir_is_not_followed(folder):
    d, outside = os.path.join(folder, "d"), os.path.join(folder, "outside")
    os.makedirs(d)
    os.makedirs(outside)
    os.symlink(outside, os.path.join(d, "transformer"))
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder, "--local-dir", d, rc=6)
        check("is a link" in message(r), message(r))
    equal(os.listdir(outside), [])


def test_second_endpoint_takes_over(folder):
    with FakeHub(SMALL) as good, FakeHub(SMALL) as bad:
        bad.down = True
        r = pull(good, folder, "--retries", "2", endpoint=["http://127.0.0.1:9", bad.url, good.url])
        same(r.json["dir"], good.files)
        # lists, but damages every large file
        bad.down = False
        bad.faults = Faults(flip=1)
        r = pull(good, os.path.join(folder, "b"), endpoint=[bad.url + "," + good.url])
        same(r.json["dir"], good.files)


def test_unreachable_says_what_to_set(folder):
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder, endpoint=["http://127.0.0.1:9"], rc=6)
        check("HF_ENDPOINT" in message(r) and "HTTPS_PROXY" in message(r), message(r))


def test_modelscope(folder):
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder, endpoint=["modelscope:" + hub.url])
        same(r.json["dir"], hub.files)
        check(any("Revision=master" in q[2] for q in hub.requests))


def test_hub_without_tree_route(folder):
    with FakeHub(SMALL, tree=False) as hub:
        r = pull(hub, folder)
        same(r.json["dir"], hub.files)
        check(any(q[1] == "HEAD" for q in hub.requests))


def test_dry_run_and_patterns(folder):
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder, "--dry-run", "--include", "transformer/*", "--exclude", "*00002*")
        equal([m["path"] for m in r.json["missing"]],
              ["transformer/part-00001-of-00003.safetensors", "transformer/part-00003-of-00003.safetensors"])
        check(not os.path.exists(os.path.join(folder, "hf")))
        equal(hub.sent, 0)
        pull(hub, folder, "--include", "transformer/*00001*")
        r = pull(hub, folder, "--dry-run")
        check("transformer/part-00001-of-00003.safetensors" not in [m["path"] for m in r.json["missing"]])


def test_offline_makes_no_connection(folder):
    with FakeHub(SMALL) as hub:
        r = pull(hub, folder, rc=3, HF_HUB_OFFLINE="1")
        check("HF_HUB_OFFLINE" in message(r), message(r))
        pull(hub, folder, "--include", "*.json")
        n = len(hub.requests)
        r = pull(hub, folder, rc=3, HF_HUB_OFFLINE="1")
        check("README.md" in r.stdout + r.stderr, r.stdout)
        pull(hub, folder, "--include", "*.json", HF_HUB_OFFLINE="1")
        equal(len(hub.requests), n)


def test_full_disk_is_told_before(folder):
    with FakeHub({"a.bin": Entry(b"1" * 2000000, lfs=True)}) as hub:
        hub.tree_override = lambda t: [dict(e, size=1 << 43, lfs=dict(e["lfs"], size=1 << 43)) for e in t]
        r = pull(hub, folder, rc=6)
        check("not enough room" in message(r) and "HF_HOME" in message(r), message(r))
        equal(hub.sent, 0)


def test_revision_and_bad_names(folder):
    with FakeHub(SMALL) as hub:
        pull(hub, folder, "--revision", COMMIT)
        check(not os.path.exists(os.path.join(folder, "hf/hub/models--test--model/refs")))
        check("no revision 'nope'" in message(pull(hub, folder, "--revision", "nope", rc=3)))
        pull(hub, folder, "--revision", "../x", rc=2)
        e = clean_env(folder)
        equal(run("pull", "a/b/c", env=e).returncode, 2)
        equal(run("pull", "..", env=e).returncode, 2)
        r = run("pull", "other/model", "--endpoint", hub.url, env=e)
        equal(r.returncode, 3)


def start(hub, home, *args):
    return subprocess.Popen([PROGRAM, "pull", REPO, "--endpoint", hub.url, "--quiet", *args], env=clean_env(home),
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_two_pulls_share_the_work(folder):
    with FakeHub(SMALL, rate=4000000) as hub:
        a, b = start(hub, folder), start(hub, folder)
        for p in (a, b):
            out, err = p.communicate(timeout=60)
            equal(p.returncode, 0, err)
        same(out.strip(), hub.files)
        total = sum(e.size for e in hub.files.values())
        check(hub.sent <= 1.05 * total, hub.sent / total)
        equal(leftovers(folder), [])


def kills(folder, n, megabytes, rate):
    files = model_files(megabytes)
    r = random.Random(3)
    with FakeHub(files, rate=rate) as hub:
        total = sum(e.size for e in hub.files.values())
        seconds = total / rate / 3
        done, k, sent = 0, 0, 0
        while k < n:
            home = os.path.join(folder, "h%d" % done)
            hub.sent = 0
            here = 0
            while k < n and here < 12:
                p = start(hub, home)
                time.sleep(r.uniform(0.005, seconds / 4))
                p.send_signal(signal.SIGKILL if r.random() < .8 else signal.SIGINT)
                p.communicate()
                k += 1
                here += 1
                if p.returncode == 0:
                    break
            p = start(hub, home)
            out, err = p.communicate(timeout=120)
            equal(p.returncode, 0, err)
            same(out.strip(), hub.files)
            equal(leftovers(home), [])
            sent += hub.sent
            shutil.rmtree(home)
            done += 1
        print("  %d kills over %d pulls of %.0f MB: every one ended complete; fetched %.3f times the size" % (
            k, done, total / 1e6, sent / done / total))


def test_kill_at_any_moment_goes_on(folder):
    kills(folder, 15, 8, 20000000)


def test_resumed_bytes_are_not_fetched_again(folder):
    files = model_files(60, shards=1)
    with FakeHub(files, rate=60000000) as hub:
        total = sum(e.size for e in hub.files.values())
        for _ in range(3):
            p = start(hub, folder)
            time.sleep(0.35)
            p.kill()
            p.communicate()
        before = hub.sent
        check(before > 0.1 * total, before)
        p = start(hub, folder)
        out, err = p.communicate(timeout=60)
        equal(p.returncode, 0, err)
        same(out.strip(), hub.files)
        # what the sockets held at each kill is lost: sent by the hub, never read
        check(hub.sent < 1.15 * total, "sent %.3f" % (hub.sent / total))


def test_interrupt_says_that_it_goes_on(folder):
    with FakeHub(SMALL, rate=1000000) as hub:
        p = start(hub, folder)
        time.sleep(0.6)
        p.send_signal(signal.SIGINT)
        out, err = p.communicate(timeout=10)
        equal(p.returncode, 130)
        check("what is there is kept" in err, err)


def test_disk_that_fails_is_told(folder):
    with FakeHub(SMALL) as hub:
        home = os.path.join(folder, "x")
        open(home, "w").close()
        r = pull(hub, folder, HF_HOME=home, rc=6)
        check(home in message(r), message(r))


def test_finished_pull_writes_nothing(folder):
    """The same command on a finished model also succeeds where nothing may be written."""
    with FakeHub(SMALL) as hub:
        for args in ((), ("--local-dir", os.path.join(folder, "d"))):
            pull(hub, folder, *args)
            before = {os.path.join(d, f): os.lstat(os.path.join(d, f)).st_ino
                      for d, _, fs in os.walk(folder) for f in fs}
            pull(hub, folder, *args)
            after = {os.path.join(d, f): os.lstat(os.path.join(d, f)).st_ino
                     for d, _, fs in os.walk(folder) for f in fs}
            equal(after, before)


def curl_seconds(hub, names):
    args = ["curl", "-s"]
    for n in names:
        args += ["-L", "-o", "/dev/shm/qie-curl-out", "%s/%s/resolve/main/%s" % (hub.url, REPO, n)]
    t = time.time()
    subprocess.run(args, check=True)
    os.unlink("/dev/shm/qie-curl-out")
    return time.time() - t


def long_throughput_against_curl(folder):
    mb = float(os.environ.get("QIE_PULL_MB", "300"))
    files = model_files(mb)
    home = "/dev/shm/qie-pull-home"
    env = clean_env(folder)
    server = subprocess.Popen([sys.executable, "-c", """
import sys; sys.path.insert(0, %r)
from fakehub import *
hub = FakeHub(model_files(%f), redirect=False)
with hub:
    print(hub.url, flush=True); sys.stdin.read()
""" % (os.path.dirname(os.path.abspath(__file__)), mb)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        url = server.stdout.readline().strip()

        class Hub:
            pass
        hub = Hub()
        hub.url = url
        big = [n for n in files if n.startswith("transformer")]
        curl = sorted(curl_seconds(hub, big) for _ in range(3))[1]
        ours = []
        for _ in range(3):
            shutil.rmtree(home, ignore_errors=True)
            t = time.time()
            r = subprocess.run([PROGRAM, "pull", REPO, "--endpoint", url, "--quiet"],
                               env=dict(env, HF_HOME=home), capture_output=True, text=True)
            equal(r.returncode, 0, r.stderr)
            ours.append(time.time() - t)
        print("  curl %.2f s, pull %.2f s (hashed): %.0f %%" % (curl, sorted(ours)[1], 100 * curl / sorted(ours)[1]))
    finally:
        shutil.rmtree(home, ignore_errors=True)
        server.stdin.close()
        server.wait()


def long_many_pulls(folder):
    n, mb = int(os.environ.get("QIE_PULLS", "100")), float(os.environ.get("QIE_PULL_MB", "300"))
    files = model_files(mb)
    excess, sent, t0, damaged = [], [], time.time(), 0
    for i in range(n):
        home = os.path.join(folder, "h")
        faults = Faults(seed=100 + i, stall_s=4, cut=.3, stall=.01, status=.1, whole=.05, nolength=.03, chunked=.05,
                        wrong_size=.03, wrong_range=.03, flip=.01 if i % 2 else 0, e416=.02, etag=.05, truncate=.1,
                        loop=.02, garbage=.02, slow=.01, longer=.03)
        with FakeHub(files, faults=faults) as hub:
            r = pull(hub, home, timeout=600)
            same(r.json["dir"], hub.files)
            equal(leftovers(home), [])
            size = sum(e.size for e in hub.files.values())
            hits = r.stderr.count("arrived damaged")
            damaged += hits
            if not hits:
                excess.append(r.json["bytes_fetched"] / size)
                sent.append(hub.sent / size)
        shutil.rmtree(home)
    print("  %d pulls of %.0f MB complete and right in %.0f s; %d files came damaged and were fetched again; without "
          "those %.4f times the size was received on average, %.4f at most (the hub wrote %.4f, %.4f into sockets)" % (
              n, mb, time.time() - t0, damaged, sum(excess) / max(1, len(excess)), max(excess, default=0),
              sum(sent) / max(1, len(sent)), max(sent, default=0)))


def long_kills(folder):
    kills(folder, int(os.environ.get("QIE_KILLS", "200")), 30, 60000000)


main(sys.modules[__name__])
