"""Small harness of the drivers: functions named test_*, run in a folder of their own; the last line counts them."""
import os
import shutil
import subprocess
import sys
import tempfile
import time
import traceback

PROGRAM = os.path.abspath(sys.argv[1]) if len(sys.argv) > 1 and not sys.argv[1].startswith("-") else None
LONG = "--long" in sys.argv
ONLY = [a for a in sys.argv[2:] if not a.startswith("-")]


class Skip(Exception):
    pass


def clean_env(home, **extra):
    """The environment without anything that could lead a test out of this machine or into the user's cache."""
    env = {k: v for k, v in os.environ.items()
           if not k.upper().endswith("_PROXY") and not k.startswith(("HF_", "HUGGING", "QWEN_EDIT", "QIE_", "LC_"))
           and k not in ("XDG_CACHE_HOME", "TRANSFORMERS_OFFLINE", "CUDA_VISIBLE_DEVICES", "LANG", "OMP_NUM_THREADS",
                         "SSL_CERT_FILE", "SSL_CERT_DIR", "CURL_CA_BUNDLE", "REQUESTS_CA_BUNDLE")}
    env.update(HOME=home, HF_HOME=os.path.join(home, "hf"), LANG="C.UTF-8", XDG_CONFIG_HOME=os.path.join(home, "cfg"))
    env.update(extra)
    return env


def run(*args, env, timeout=120, cwd=None):
    return subprocess.run([PROGRAM, *args], env=env, capture_output=True, text=True, timeout=timeout, cwd=cwd)


def check(cond, *what):
    if not cond:
        raise AssertionError(" ".join(str(w) for w in what))


def equal(a, b, *what):
    check(a == b, *what, "got", repr(a)[:500], "expected", repr(b)[:500])


def main(module):
    passed = failed = skipped = 0
    t0 = time.time()
    for name in [n for n in vars(module) if n.startswith("test_") or (LONG and n.startswith("long_"))]:
        if ONLY and not any(o in name for o in ONLY):
            continue
        folder = tempfile.mkdtemp(prefix="qwen-edit-test-")
        try:
            t = time.time()
            vars(module)[name](folder)
            passed += 1
            print("%-60s %.1f s" % (name, time.time() - t), flush=True)
        except Skip as e:
            skipped += 1
            print("%-60s skip: %s" % (name, e), flush=True)
        except Exception:
            failed += 1
            print("%-60s FAILED" % name)
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    print("%d passed, %d failed, %d skipped (%.0f s)" % (passed, failed, skipped, time.time() - t0))
    sys.exit(1 if failed or not passed + skipped else 0 if passed else 77)
