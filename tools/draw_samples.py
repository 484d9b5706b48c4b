"""Draws the sample pictures of demo/samples: python3 tools/draw_samples.py [FOLDER]. Needs Pillow only."""
import math, pathlib, sys
from PIL import Image, ImageChops, ImageDraw, ImageFilter

S = 4                                                 # drawn that much larger, then reduced


def backdrop(w, h, top, bottom, table=None, at=0.7):
    """A wall that goes from one colour to another, and a table."""
    im = Image.new("RGB", (1, h * S))
    for y in range(h * S):
        t = y / (h * S)
        c = table if table and t > at else [a + (b - a) * t for a, b in zip(top, bottom)]
        im.putpixel((0, y), tuple(int(v) for v in c))
    return im.resize((w * S, h * S))


def put(im, mask, color, light=0.25, gloss=None, shadow=0.25, offset=0.03):
    """Lays a shape of one colour on the picture: lit from the upper left, with a soft shadow and a highlight."""
    w, h = im.size
    if shadow:
        d = int(offset * min(w, h))
        dark = ImageChops.offset(mask, d, d).filter(ImageFilter.GaussianBlur(d * 0.9)).point(lambda v: int(v * shadow))
        im.paste((0, 0, 0), mask=dark)
    x0, y0, x1, y1 = mask.getbbox()
    ramp = Image.linear_gradient("L").resize((512, 512)).rotate(35, resample=Image.BICUBIC).crop((90, 90, 422, 422))
    ramp = ramp.resize((x1 - x0, y1 - y0), Image.BICUBIC)
    shade = Image.new("L", im.size)
    shade.paste(ramp, (x0, y0))
    lit = tuple(int(min(255, v * (1 + light * 0.4))) for v in color)
    dim = tuple(int(v * (1 - light)) for v in color)
    body = Image.composite(Image.new("RGB", im.size, dim), Image.new("RGB", im.size, lit), shade)
    if gloss:
        gx, gy, r = gloss
        spot = Image.new("L", im.size)
        ImageDraw.Draw(spot).ellipse([(gx - r) * w, gy * h - r * w, (gx + r) * w, gy * h + r * w], fill=170)
        body.paste((255, 255, 255), mask=spot.filter(ImageFilter.GaussianBlur(r * w * 0.55)))
    im.paste(body, mask=mask)


def shape(w, h, draw):
    m = Image.new("L", (w * S, h * S))
    draw(ImageDraw.Draw(m), lambda *p: [(x * w * S, y * h * S) for x, y in p])
    return m


def star_points(cx, cy, r, ratio, n=5, inner=0.46):
    return [(cx + (r if k % 2 == 0 else r * inner) * math.sin(k * math.pi / n) * ratio,
             cy - (r if k % 2 == 0 else r * inner) * math.cos(k * math.pi / n)) for k in range(2 * n)]


def heart_points(cx, cy, r, ratio):
    out = []
    for k in range(240):
        t = k * math.pi / 120
        x, y = 16 * math.sin(t) ** 3, 13 * math.cos(t) - 5 * math.cos(2 * t) - 2 * math.cos(3 * t) - math.cos(4 * t)
        out.append((cx + x / 17 * r * ratio, cy - (y + 2) / 17 * r))
    return out


def mug(w=192, h=192):
    im = backdrop(w, h, (236, 226, 204), (214, 196, 164), (150, 108, 74), 0.74)

    def draw(d, p):
        (a, b), (c, e) = p((0.56, 0.36), (0.84, 0.66))
        d.ellipse([a, b, c, e], fill=255)
        (a, b), (c, e) = p((0.605, 0.415), (0.785, 0.605))
        d.ellipse([a, b, c, e], fill=0)
        d.polygon(p((0.22, 0.28), (0.68, 0.28), (0.645, 0.79), (0.255, 0.79)), fill=255)
        (a, b), (c, e) = p((0.255, 0.755), (0.645, 0.825))
        d.ellipse([a, b, c, e], fill=255)
        (a, b), (c, e) = p((0.22, 0.235), (0.68, 0.325))
        d.ellipse([a, b, c, e], fill=255)
    put(im, shape(w, h, draw), (204, 52, 46), 0.3, (0.33, 0.42, 0.045), 0.3)
    return im


def heart(w=128, h=128):
    im = backdrop(w, h, (60, 74, 110), (36, 44, 74))
    put(im, shape(w, h, lambda d, p: d.polygon(p(*heart_points(0.5, 0.5, 0.38, h / w)), fill=255)), (222, 66, 92), 0.25, (0.36, 0.36, 0.05))
    return im


def star(w=160, h=96):
    im = backdrop(w, h, (24, 92, 120), (14, 58, 84))
    put(im, shape(w, h, lambda d, p: d.polygon(p(*star_points(0.5, 0.53, 0.42, h / w)), fill=255)), (240, 196, 48), 0.2)
    return im


def tree(w=128, h=192):
    im = backdrop(w, h, (176, 210, 236), (214, 232, 240), (226, 232, 238), 0.8)

    def draw(d, p):
        d.polygon(p((0.5, 0.14), (0.72, 0.40), (0.28, 0.40)), fill=255)
        d.polygon(p((0.5, 0.27), (0.80, 0.58), (0.20, 0.58)), fill=255)
        d.polygon(p((0.5, 0.41), (0.88, 0.77), (0.12, 0.77)), fill=255)
        d.polygon(p((0.45, 0.76), (0.55, 0.76), (0.55, 0.86), (0.45, 0.86)), fill=255)
    put(im, shape(w, h, draw), (44, 124, 70), 0.3)
    return im


def ball(w=256, h=256):
    im = backdrop(w, h, (226, 230, 232), (196, 204, 210), (168, 178, 188), 0.68)
    put(im, shape(w, h, lambda d, p: d.ellipse([*p((0.26, 0.3))[0], *p((0.74, 0.78))[0]], fill=255)), (52, 116, 204), 0.4, (0.41, 0.44, 0.05), 0.35, 0.04)
    return im


def fish(w=200, h=120):
    im = backdrop(w, h, (120, 200, 206), (44, 130, 160))

    def draw(d, p):
        d.ellipse([*p((0.2, 0.26))[0], *p((0.7, 0.78))[0]], fill=255)
        d.polygon(p((0.64, 0.52), (0.86, 0.28), (0.81, 0.52), (0.86, 0.76)), fill=255)
        d.polygon(p((0.38, 0.3), (0.5, 0.16), (0.58, 0.34)), fill=255)
    put(im, shape(w, h, draw), (238, 128, 42), 0.25, shadow=0.12)
    eye = shape(w, h, lambda d, p: d.ellipse([*p((0.275, 0.42))[0], *p((0.315, 0.487))[0]], fill=255))
    im.paste((26, 26, 30), mask=eye)
    return im


if __name__ == "__main__":
    out = pathlib.Path(sys.argv[1] if len(sys.argv) > 1 else pathlib.Path(__file__).parent.parent / "demo/samples")
    out.mkdir(parents=True, exist_ok=True)
    for f in (mug, heart, star, tree, ball, fish):
        im = f()
        im.resize((im.width // S, im.height // S), Image.LANCZOS).save(out / f"{f.__name__}.png", optimize=True)
