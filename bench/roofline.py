#!/usr/bin/env python3
"""Arithmetic of one transformer forward on GPUs, from the model's config: operations, the bytes that our kernels move for
them, the time that either bounds it to, and what streaming the weights over PCIe adds. Nothing here is measured.

    roofline.py [--config transformer/config.json] [--size 1024x1024] [--reference 1024x1024] [--text 300] [--weights bf16]
                [--attention own|cudnn]
"""
import argparse
import json

# Dense peaks with f32 sums and memory bandwidth from the makers' data sheets (NVIDIA H100 SXM, Ada and Ampere GA102 white
# papers); PCIe: the bus's nominal rate times 0.8, what pinned copies usually reach. `reached`: the share of the peak that a
# product or attention kernel is taken to reach (assumption, to be replaced by measurements): cuBLASLt's products 0.75 on
# the H100 (its clock falls under this load), 0.85 elsewhere; our attention kernel issues mma.sync, which has about 0.62 of
# the H100's wgmma peak, and is taken at 0.6 of that. cuDNN's attention is taken at 0.6 of the full peak on the H100, near what
# published comparisons show for it without a mask at head dimension 128 and many keys; elsewhere as ours. `scales`: cuBLASLt
# multiplies fp8 by a scale for each row of both operands there (compute capability 9.0), bias and GELU included.
CUDNN = {"H100 SXM": 0.6}
MACHINES = {
    "H100 SXM": dict(bf16=989e12, fp8=1979e12, memory=3.35e12, gemm=0.75, attention=0.62 * 0.6, pcie=64e9,
                     scales=True),
    "RTX 4090": dict(bf16=165.2e12, fp8=330.3e12, memory=1.008e12, gemm=0.85, attention=0.6, pcie=32e9),
    "RTX 3090": dict(bf16=71e12, fp8=None, memory=0.936e12, gemm=0.85, attention=0.6, pcie=32e9),
}
STREAM = 0.8  # share of the memory's bandwidth that kernels of one pass over their data reach
BYTES = {"bf16": 2.0, "fp8": 1.0, "int8": 1.0, "q8_0": 34 / 32, "q4_k": 144 / 256}
RELEASED = dict(num_layers=60, num_attention_heads=24, attention_head_dim=128, joint_attention_dim=3584, in_channels=64,
                out_channels=16, patch_size=2)


class Op:
    def __init__(self, name, count, flops, weights, moved, kind, fp8=False):
        self.name, self.count, self.flops, self.weights, self.moved, self.kind = name, count, flops, weights, moved, kind
        self.fp8 = fp8  # multiplied in fp8 where the weights are that

    def bound(self, m, peak):
        return max(self.flops / peak, (self.weights + self.moved) / m["memory"])

    def expected(self, m, peak):
        reached = {"gemm": m["gemm"], "attention": m["attention"], "rows": 1, "scales": 1}[self.kind]
        return max(self.flops / (peak * reached), (self.weights + self.moved) / (m["memory"] * STREAM))


def operations(c, n_image, n_target, n_text, weight, fp8):
    """Of one forward. Activations are bf16 (2 bytes), the residual streams f32 (4). A product reads x and W and writes y.
    Where it joins the residual, a kernel reads y and the residual, writes the residual, and in the same pass the norm behind
    it; only the last block's way out has none, and the first block's norm no product before it. In fp8, x is read and
    written as bytes once for all products that read it, and what is not joined is read and written again for its scales,
    bias and GELU where the library does not know these."""
    d, blocks = c["num_attention_heads"] * c["attention_head_dim"], c["num_layers"]
    n = n_image + n_text
    ops, low_in, low_out = [], 0, 0

    def linear(name, rows, out, inner, count, low=True, joined=False, readers=1):
        nonlocal low_in, low_out
        low = low and fp8
        low_in += rows * inner * count * low / readers
        low_out += rows * out * count * (low and not joined)
        ops.append(Op(name, count, 2 * rows * out * inner * count, out * inner * weight * count,
                      (rows * inner * (1 if low else 2) + rows * out * 2) * count, "gemm", low))

    for who, rows in (("picture", n_image), ("text", n_text)):
        linear(f"q, k, v of the {who}", rows, d, d, 3 * blocks, readers=3)
        linear(f"attention's output of the {who}", rows, d, d, blocks, joined=True)
        linear(f"MLP up and GELU of the {who}", rows, 4 * d, d, blocks)
        # in bf16 whatever the weights are: src/model/transformer.c, bind_stream
        linear(f"MLP down of the {who}", rows, d, 4 * d, blocks, who == "text", joined=True)
    joins = 2 * blocks - 1
    ops.append(Op("gate, sum, norm and modulation", 2 * joins, 12 * n * d * joins, 0, n * d * (2 + 4 + 4 + 2) * joins, "rows"))
    ops.append(Op("the first norm, the last sum", 4, 12 * n * d, 0, n * d * (4 + 2 + 2 + 4 + 4), "rows"))
    ops.append(Op("attention", blocks, 4 * n * n * d * blocks, 0, 4 * n * d * 2 * blocks, "attention"))
    if fp8:
        ops.append(Op("x to bytes", (2 * 3 + 1) * blocks, 2 * low_in, 0, low_in * (2 + 1), "rows"))
        ops.append(Op("scales, bias and GELU after products", 2 * 4 * blocks, 3 * low_out, 0, low_out * (2 + 2), "scales"))
    half = c["attention_head_dim"] // 2
    ops.append(Op("q, k norm and rotation", 2 * 2 * blocks, 10 * 2 * n * d * blocks, 0,
                  2 * (n * d * 2 * 2 + n * half * 4 * 2) * blocks, "rows"))
    inp, out = c["in_channels"], c["patch_size"] ** 2 * c["out_channels"]
    ops.append(Op("input, output, sampler, guidance", 1, 2 * n_target * d * (inp + out), d * (inp + out) * weight,
                  n_image * d * 4 * 3 + n_target * d * 4 * 3 + n_target * out * 4 * 6, "gemm"))
    return ops


def ms(s):
    return f"{s * 1e3:.1f}" if s < 0.1 else f"{s * 1e3:.0f}"


def tokens(size):
    w, h = (int(x) for x in size.split("x"))
    return (w // 16) * (h // 16)


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--config")
    p.add_argument("--size", default="1024x1024")
    p.add_argument("--reference", default="1024x1024")
    p.add_argument("--text", type=int, default=300)
    p.add_argument("--weights", default="bf16", choices=sorted(BYTES))
    p.add_argument("--steps", type=int, default=40)
    p.add_argument("--attention", default="own", choices=["own", "cudnn"])
    a = p.parse_args()
    if a.attention == "cudnn":
        for name, share in CUDNN.items():
            MACHINES[name]["attention"] = share
    c = dict(RELEASED, **(json.load(open(a.config)) if a.config else {}))
    target = tokens(a.size)
    n_image = target + sum(tokens(r) for r in a.reference.split(",") if r)
    fp8 = a.weights == "fp8"
    ops = operations(c, n_image, target, a.text, BYTES[a.weights], fp8)
    ops.sort(key=lambda o: -o.flops)
    total = sum(o.flops for o in ops)
    print(f"{a.size} from {a.reference}: {n_image} rows of pictures, {a.text} of text, {c['num_layers']} blocks, weights in "
          f"{a.weights}, attention: {a.attention}; {total / 1e12:.1f} TFLOP a forward. Milliseconds, bound / expected.\n")
    print("| operation | times | TFLOP | weights, MB | moved, MB | " + " | ".join(MACHINES) + " |")
    print("| --- | --- | --- | --- | --- |" + " --- |" * len(MACHINES))
    sums = {}
    for o in ops:
        cells = []
        for name, m in MACHINES.items():
            peak = m["fp8"] if fp8 and m["fp8"] and o.fp8 else m["bf16"]
            done = o.kind == "scales" and m.get("scales")
            b, e = (0, 0) if done else (o.bound(m, peak), o.expected(m, peak))
            s = sums.setdefault(name, [0, 0])
            s[0] += b
            s[1] += e
            cells.append(f"{ms(b)} / {ms(e)}")
        print(f"| {o.name} | {o.count} | {o.flops / 1e12:.3g} | {o.weights / 1e6:.0f} | {o.moved / 1e6:.0f} | " +
              " | ".join(cells) + " |")
    weights, moved = sum(o.weights for o in ops), sum(o.moved for o in ops)
    print(f"| **all** | | {total / 1e12:.1f} | {weights / 1e6:.0f} | {moved / 1e6:.0f} | " +
          " | ".join(f"**{ms(b)} / {ms(e)}**" for b, e in sums.values()) + " |")
    print(f"\nStreamed: the blocks' {weights / 1e9:.1f} GB pass over the bus once a forward, while the block before computes.\n")
    print("| machine | compute, s | copy at PCIe 4 x16, s | copy at PCIe 5 x16, s | a forward streamed, s | an edit of "
          f"{a.steps} steps with guidance, resident / streamed, s |")
    print("| --- | --- | --- | --- | --- | --- |")
    for name, m in MACHINES.items():
        copy4, copy5, e = weights / (32e9 * STREAM), weights / (64e9 * STREAM), sums[name][1]
        own = copy5 if m["pcie"] > 32e9 else copy4
        print(f"| {name} | {e:.2f} | {copy4:.2f} | {copy5:.2f} | {max(e, own):.2f} ({'bus' if own > e else 'compute'}) | "
              f"{2 * a.steps * e:.0f} / {2 * a.steps * max(e, own):.0f} |")


if __name__ == "__main__":
    main()
