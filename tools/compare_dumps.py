#!/usr/bin/env python3
"""Compare two dumps stage by stage, in order of computation.

  tools/compare_dumps.py REF.safetensors GOT.safetensors [--bound 1e-8] [--all]

Prints, for each tensor that both files hold: name, shape, NMSE, largest difference and its index, cosine. Stops at the
first tensor above the bound (--all goes on). Order: that of the first file's data. Exit 0 when all are within the bound,
1 when one is not, 2 on unusable files. Standard library only.
"""
import argparse, array, json, math, struct, sys

KINDS = {"F32": ("f", 4), "F64": ("d", 8), "I64": ("q", 8), "I32": ("i", 4), "U8": ("B", 1), "BOOL": ("B", 1)}


def load(path):
    with open(path, "rb") as f:
        data = f.read()
    (n,) = struct.unpack("<Q", data[:8])
    head = json.loads(data[8:8 + n])
    head.pop("__metadata__", None)
    return {k: (v, data[8 + n + v["data_offsets"][0]:8 + n + v["data_offsets"][1]])
            for k, v in sorted(head.items(), key=lambda kv: kv[1]["data_offsets"][0])}


def values(meta, raw):
    if meta["dtype"] == "BF16":
        a = array.array("H", raw)
        return array.array("f", struct.pack(f"<{len(a)}I", *(x << 16 for x in a)))
    code, _ = KINDS[meta["dtype"]]
    return array.array(code, raw)


def index_of(i, shape):
    out = []
    for d in reversed(shape):
        out.append(i % d)
        i //= d
    return list(reversed(out))


def main():
    ap = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ap.add_argument("ref"); ap.add_argument("got")
    ap.add_argument("--bound", type=float, default=1e-8)
    ap.add_argument("--all", action="store_true", help="do not stop at the first tensor above the bound")
    a = ap.parse_args()
    try:
        ref, got = load(a.ref), load(a.got)
    except (OSError, ValueError, struct.error) as e:
        print(f"cannot read: {e}", file=sys.stderr)
        return 2
    bad = 0
    print(f"{'name':26} {'shape':22} {'NMSE':>10} {'max diff':>10} {'at':18} cosine")
    for name, (meta, raw) in ref.items():
        if name not in got:
            continue
        x, y = values(meta, raw), values(*got[name])
        if len(x) != len(y):
            print(f"{name:26} {meta['shape']} against {got[name][0]['shape']}")
            return 1
        num = den = dot = yy = worst = 0.0
        at = 0
        for i, (p, q) in enumerate(zip(x, y)):
            d = p - q
            num += d * d; den += p * p; dot += p * q; yy += q * q
            if abs(d) > worst or d != d:
                worst, at = abs(d), i
        nmse = num / den if den else num
        cosine = dot / math.sqrt(den * yy) if den and yy else float("nan")
        above = not nmse <= a.bound
        print(f"{name:26} {str(meta['shape']):22} {nmse:10.3g} {worst:10.3g} {str(index_of(at, meta['shape'])):18} "
              f"{cosine:.8f}{'  <-- above the bound' if above else ''}")
        bad += above
        if above and not a.all:
            break
    only = [n for n in ref if n not in got]
    if only:
        print("only in the first file:", ", ".join(only))
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
