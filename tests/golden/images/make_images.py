"""Makes the small pictures of this folder and what Pillow sees in them.

  python make_images.py OUT_DIR

manifest.txt  NAME WIDTH HEIGHT FNV1A64 of the RGB bytes, after EXIF transpose and convert("RGB"); 16-bit grey by
              its high byte, which Pillow clips instead.
resample.txt  W_IN H_IN W_OUT H_OUT FILTER(0 lanczos, 1 bicubic) ORDER(0 Pillow 13, 1 horizontal first) SEED FNV1A64
              of Image.resize on a picture of a linear congruential generator (see lcg).
Needs: Pillow 13.0.0, numpy.
"""
import io, pathlib, random, struct, sys, warnings, zlib
import numpy as np
from PIL import Image, ImageOps, PngImagePlugin

warnings.simplefilter("ignore")
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY = 1 << 28  # the bombs are read here
out = pathlib.Path(sys.argv[1])
rng, rnd = np.random.default_rng(5), random.Random(5)
files = {}


def fnv(data):
    h = 1469598103934665603
    for x in data:
        h = ((h ^ x) * 1099511628211) & (2**64 - 1)
    return h


def lcg(seed, n):
    a = bytearray(n)
    for i in range(n):
        seed = (seed * 1664525 + 1013904223) & 0xFFFFFFFF
        a[i] = seed >> 24
    return np.frombuffer(bytes(a), np.uint8)


def photo(w, h, c=3):
    y, x = np.mgrid[0:h, 0:w].astype(float)
    a = np.stack([128 + 100 * np.sin(x / (5 + 3 * i) + i) * np.cos(y / (7 + 2 * i)) for i in range(c)], -1)
    return (a + rng.normal(0, 12, (h, w, c))).clip(0, 255).astype(np.uint8)


def save(array, fmt, mode=None, **options):
    b = io.BytesIO()
    im = array if isinstance(array, Image.Image) else Image.fromarray(array, mode) if mode else Image.fromarray(array)
    im.save(b, fmt, **options)
    return b.getvalue()


# ---- PNG written by hand: Pillow cannot write interlaced or 16-bit colour files
def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def pack(row, depth):
    if depth == 16:
        return row.astype(">u2").tobytes()
    if depth == 8:
        return row.astype(np.uint8).tobytes()
    per = 8 // depth
    r = np.concatenate([row, np.zeros(-len(row) % per, row.dtype)]).astype(int).reshape(-1, per)
    return sum(r[:, i] << (8 - depth * (i + 1)) for i in range(per)).astype(np.uint8).tobytes()


ADAM7 = [(0, 0, 8, 8), (4, 0, 8, 8), (0, 4, 4, 8), (2, 0, 4, 4), (0, 2, 2, 4), (1, 0, 2, 2), (0, 1, 1, 2)]


def png(w, h, depth, colour, interlaced=False, plte=b"", trns=b"", before=b"", after=b"", tail=b"", entries=None):
    channels = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    a = rng.integers(0, 2**depth, (h, w, channels))
    if colour == 3:
        a %= entries or len(plte) // 3
    raw = b""
    for x0, y0, dx, dy in ADAM7 if interlaced else [(0, 0, 1, 1)]:
        for r in a[y0::dy, x0::dx]:
            raw += b"\0" + pack(r.reshape(-1), depth) if r.size else b""
    z = zlib.compress(raw, 9)
    b = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", w, h, depth, colour, 0, 0, interlaced)) + before
    b += chunk(b"PLTE", plte) if plte else b""
    b += chunk(b"tRNS", trns) if trns else b""
    return b + chunk(b"IDAT", z[:20]) + chunk(b"IDAT", z[20:]) + after + chunk(b"IEND", b"") + tail


for colour, depths in {0: [1, 2, 4, 8, 16], 2: [8, 16], 3: [1, 2, 4, 8], 4: [8, 16], 6: [8, 16]}.items():
    for depth in depths:
        plte = bytes(rng.integers(0, 256, 3 * min(2**depth, 200)).tolist()) if colour == 3 else b""
        for i in (0, 1):
            files[f"c{colour}d{depth}i{i}.png"] = png(17, 19, depth, colour, i, plte)
        if colour in (0, 2, 3):
            trns = {0: b"\0\1", 2: b"\0\1\0\2\0\3", 3: b"\0\x80"}[colour]
            files[f"c{colour}d{depth}t.png"] = png(16, 17, depth, colour, 0, plte, trns, tail=b"garbage")
files["gamma.png"] = png(16, 16, 8, 2, before=chunk(b"gAMA", struct.pack(">I", 100000)))
files["palette_short.png"] = png(16, 16, 8, 3, 0, bytes(range(30)), entries=256)
files["profile_damaged.png"] = png(16, 16, 8, 2, before=chunk(b"iCCP", b"x\0\0not zlib"))
frames = [Image.fromarray(photo(20, 18, 4), "RGBA") for _ in range(3)]
files["animated.png"] = save(frames[0], "PNG", save_all=True, append_images=frames[1:])
files["animated_default.png"] = save(frames[0], "PNG", save_all=True, append_images=frames[1:], default_image=True)


# ---- orientation
def exif(o, big, kind=3):
    e = ">" if big else "<"
    value = struct.pack(e + "HH", o, 0) if kind == 3 else struct.pack(e + "I", o)
    return ((b"MM\0*" if big else b"II*\0") + struct.pack(e + "IH", 8, 2) + struct.pack(e + "HHII", 0x0100, 4, 1, 7)
            + struct.pack(e + "HHI", 0x0112, kind, 1) + value + struct.pack(e + "I", 0))


turned = photo(24, 17)
for o in range(1, 9):
    big, kind = o % 2, 3 if o % 3 else 4
    block = exif(o, big, kind)
    files[f"exif{o}.jpg"] = save(turned, "JPEG", quality=90, exif=b"Exif\0\0" + block)
    files[f"exif{o}.webp"] = save(turned, "WEBP", lossless=True, exif=b"Exif\0\0" * (o % 2) + block)
    files[f"exif{o}.png"] = png(24, 17, 8, 2, **{"before" if big else "after": chunk(b"eXIf", block)})
xmp = b'<x:xmpmeta tiff:Orientation="6"/>'
files["xmp6.jpg"] = save(turned, "JPEG", quality=90, xmp=xmp)
files["xmp6.webp"] = save(turned, "WEBP", lossless=True, xmp=xmp)
files["xmp6.png"] = png(24, 17, 8, 2, after=chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp)))
raw = b"Exif\0\0" + exif(8, 1)
raw = f"\nexif\n{len(raw):8}\n{raw.hex()}\n".encode()
files["raw8.png"] = png(24, 17, 8, 2, before=chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(raw)))
files["exif_damaged.png"] = png(24, 17, 8, 2, before=chunk(b"eXIf", exif(6, 0)[:20]))

# ---- JPEG
for s, name in enumerate(("444", "422", "420")):
    for progressive in (0, 1):
        files[f"{name}p{progressive}.jpg"] = save(photo(33, 47), "JPEG", quality=85, subsampling=s, progressive=bool(progressive))
files["grey.jpg"] = save(photo(33, 17, 1)[..., 0], "JPEG", quality=85)
cmyk = save(photo(33, 17, 4), "JPEG", "CMYK", quality=85)
at = cmyk.index(b"Adobe")
files["cmyk.jpg"] = cmyk
files["ycck.jpg"] = cmyk[:at + 11] + b"\2" + cmyk[at + 12:]
files["cmyk_unmarked.jpg"] = cmyk[:at] + b"X" + cmyk[at + 1:]
files["rgb.jpg"] = save(photo(33, 17), "JPEG", quality=85, keep_rgb=True)
files["restart.jpg"] = save(photo(33, 17), "JPEG", quality=85, restart_marker_blocks=2)
files["padded.jpg"] = files["restart.jpg"][:-2] + b"\0" * 16 + b"\xff\xd9trailing"

# ---- WebP
files["lossy.webp"] = save(photo(33, 47), "WEBP", quality=80) + b"trailing"
files["lossy_alpha.webp"] = save(photo(33, 47, 4), "WEBP", "RGBA", quality=80, exact=True)
files["lossless.webp"] = save(photo(17, 19), "WEBP", lossless=True)
files["lossless_alpha.webp"] = save(photo(17, 19, 4), "WEBP", "RGBA", lossless=True, exact=True)
part = np.zeros((18, 20, 4), np.uint8)
part[4:12, 6:14] = photo(8, 8, 4)
files["animated.webp"] = save(Image.fromarray(part, "RGBA"), "WEBP", save_all=True, append_images=frames, lossless=True,
                              minimize_size=True, background=(255, 0, 0, 255))

# ---- files that the damage tests cut and flip, with metadata of every kind
text = b'{"prompt":"a <b> & c"}'
files["damage.png"] = png(16, 16, 8, 3, 0, bytes(range(48)), before=chunk(b"eXIf", exif(6, 0)),
                          after=chunk(b"iTXt", b"qwen-edit\0\0\0\0\0" + text))
files["damage.jpg"] = save(photo(16, 17), "JPEG", quality=20, exif=b"Exif\0\0" + exif(6, 0), comment=b"qwen-edit " + text)
files["damage_progressive.jpg"] = save(photo(16, 17), "JPEG", quality=20, progressive=True)
files["damage.webp"] = save(photo(16, 17), "WEBP", quality=20, exif=exif(6, 0), xmp=xmp)
files["damage_lossless.webp"] = save(photo(16, 17, 4)[:, :, :] // 64 * 64, "WEBP", "RGBA", lossless=True)
# ---- texts that grow a thousandfold
bomb = zlib.compress(b"0" * (8 << 20), 9)
files["bomb_profile.png"] = png(16, 16, 8, 2, before=chunk(b"zTXt", b"Raw profile type exif\0\0" + bomb))
files["bomb_parameters.png"] = png(16, 16, 8, 2, after=chunk(b"iTXt", b"qwen-edit\0\1\0\0\0" + bomb))
# ---- parameters as other programs may rewrite them
files["parameters_compressed.png"] = png(16, 16, 8, 2, before=chunk(b"tEXt", b"Title\0other"), after=chunk(
    b"iTXt", b"qwen-edit\0\1\0en\0\0" + zlib.compress(text)) + chunk(b"tEXt", b"Software\0x"))
files["parameters_other.png"] = png(16, 16, 8, 2, before=chunk(b"tEXt", b"parameters\0other"))
files["parameters.jpg"] = save(photo(16, 16), "JPEG", quality=20, comment=b"qwen-edit " + text, xmp=xmp)
files["parameters_other.jpg"] = save(photo(16, 16), "JPEG", quality=20, comment=b"made by hand")

lines = []
for name, data in sorted(files.items()):
    (out / name).write_bytes(data)
    im = Image.open(io.BytesIO(data))
    im.load()
    sixteen = im.mode == "I;16"
    try:
        im = ImageOps.exif_transpose(im)
    except Exception:
        assert name.startswith(("exif_damaged", "bomb")), name
    rgb = np.repeat((np.asarray(im) >> 8).astype(np.uint8)[..., None], 3, 2) if sixteen else np.asarray(im.convert("RGB"))
    lines.append(f"{name} {rgb.shape[1]} {rgb.shape[0]} {fnv(rgb.tobytes()):016x}")
(out / "manifest.txt").write_text("\n".join(lines) + "\n")

lines = []
for i in range(240):
    size = lambda lo, hi: rnd.randint(lo, hi)
    if i % 4 == 0:
        c = [size(1, 90) for _ in range(4)]
    elif i % 4 == 1:  # tall
        c = [size(1, 9), size(50, 700), size(1, 12), size(1, 300)]
    elif i % 4 == 2:  # wide
        c = [size(50, 700), size(1, 9), size(1, 300), size(1, 12)]
    else:  # condition sizes to multiples of 28, both sides near each other: here the rule of the order decides
        c = [32 * size(2, 7) for _ in range(2)]
        c += [28 * max(1, round(v / 28)) for v in c]
    f, order, seed = i // 2 % 2, int(i % 5 == 0), rnd.getrandbits(32)
    im, filt = Image.fromarray(lcg(seed, c[0] * c[1] * 3).reshape(c[1], c[0], 3)), (Image.LANCZOS, Image.BICUBIC)[f]
    im = im.resize((c[2], c[1]), filt).resize((c[2], c[3]), filt) if order else im.resize((c[2], c[3]), filt)
    lines.append(" ".join(map(str, c + [f, order, seed])) + f" {fnv(im.tobytes()):016x}")
(out / "resample.txt").write_text("\n".join(lines) + "\n")
