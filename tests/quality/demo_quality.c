/*
 * Judges the embedded demo model by meaning, on the program's own output: draws held-out scenes whose subject is known
 * pixel by pixel, has `qwen-edit edit --batch` edit them all in one process, and measures whether each instruction was
 * obeyed and the rest of the picture left alone.
 *
 *   demo_quality PROGRAM [--model DIR|demo] [--work DIR] [--sheet FILE.png] [--seed N] [--steps N] [--cfg X]
 *                [--draw-only | --score-only] [--verbose] [-- MORE ARGUMENTS FOR PROGRAM]
 *
 *   --work DIR     pictures and jobs.jsonl are kept there (default: a temporary folder, removed at the end)
 *   --sheet FILE   contact sheet: input, output; one pair a case
 *   --draw-only    draw the scenes and write jobs.jsonl into --work; --score-only: measure the outputs found there.
 *                  Between the two, any other program may make the outputs (the reference implementation, say).
 *
 * Nothing is shared with the training scenes of tools/train_demo.py: other shapes, coverage by supersampling, other
 * shading, backgrounds, random numbers. Bounds are in enum/struct `bounds` below; exit 0 when all hold, else 1.
 * The last line reads "N passed, N failed" (N counts the bounds).
 */
#define _POSIX_C_SOURCE 200809L
#include <errno.h>
#include <math.h>
#include <png.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#define PI 3.14159265358979323846
enum { SUBSAMPLES = 4, MAX_CASES = 128, TOKEN = 16 /* pixels a transformer token covers */ };

static const struct {
	double hue_degrees;      /* largest hue error of a recoloured area */
	double kept;             /* largest mean absolute change, of 255, where nothing was asked to change */
	double subject_hue_rate; /* share of the subject cases within hue_degrees */
	double background_hue_rate;
	double kept_rate;        /* share of the subject and background cases within kept */
	double gray_chroma, whole_error, removed_error, other_rate;
	double same_error, shift_pixels, zoom;
	double two_hue_rate;
	double seams; /* mean step of the error across token borders, over that elsewhere */
} bounds = {20, 8, .90, .80, .80, 14, 16, 24, .75, 8, .5, .01, .75, 1.5};

/* ------------------------------------------------------------------ numbers */

static uint64_t rng_state;

static uint64_t rng_next(void) /* splitmix64 */
{
	uint64_t z = rng_state += 0x9e3779b97f4a7c15u;
	z = (z ^ z >> 30) * 0xbf58476d1ce4e5b9u;
	z = (z ^ z >> 27) * 0x94d049bb133111ebu;
	return z ^ z >> 31;
}

static double uniform(double a, double b) { return a + (b - a) * (double)(rng_next() >> 11) / 9007199254740992.0; }

static double clamp(double x, double a, double b) { return x < a ? a : x > b ? b : x; }

static void *must(void *p)
{
	if (!p) {
		fprintf(stderr, "demo_quality: out of memory\n");
		exit(2);
	}
	return p;
}

/* ------------------------------------------------------------------ colours */

struct color {
	const char *en, *zh;
	double hue; /* degrees; < 0: none, judged by brightness */
	double r, g, b;
};

static const struct color colors[] = {
	{"red", "红色", 0, .84, .16, .16},      {"green", "绿色", 125, .18, .62, .24},  {"blue", "蓝色", 225, .16, .33, .84},
	{"yellow", "黄色", 50, .96, .82, .12},  {"purple", "紫色", 280, .53, .19, .70}, {"orange", "橙色", 30, .94, .51, .08},
	{"cyan", "青色", 184, .13, .75, .78},   {"pink", "粉色", 333, .96, .47, .69},   {"white", "白色", -1, .94, .94, .94},
	{"black", "黑色", -1, .13, .13, .15},
};
enum { COLORS = sizeof colors / sizeof *colors };

static double hue_of(const double c[3])
{
	return atan2(sqrt(3) * (c[1] - c[2]), 2 * c[0] - c[1] - c[2]) * 180 / PI;
}

static double hue_distance(double a, double b)
{
	double d = fmod(fabs(a - b), 360);
	return d > 180 ? 360 - d : d;
}

static double luma_of(const double c[3]) { return .299 * c[0] + .587 * c[1] + .114 * c[2]; }

static double chroma_of(const double c[3]) { return fmax(c[0], fmax(c[1], c[2])) - fmin(c[0], fmin(c[1], c[2])); }

static void hsv(double h, double s, double v, double out[3])
{
	for (int i = 0; i < 3; i++) {
		double k = fmod((i == 0 ? 5 : i == 1 ? 3 : 1) + h / 60, 6);
		out[i] = v - v * s * clamp(fmin(k, 4 - k), 0, 1);
	}
}

/* ------------------------------------------------------------------ pictures */

struct picture {
	int w, h;
	uint8_t *px; /* RGB */
};

static struct picture picture_new(int w, int h)
{
	return (struct picture){w, h, must(calloc((size_t)w * h, 3))};
}

static bool picture_write(const char *path, struct picture p)
{
	png_image im = {.version = PNG_IMAGE_VERSION, .width = (png_uint_32)p.w, .height = (png_uint_32)p.h, .format = PNG_FORMAT_RGB};
	return png_image_write_to_file(&im, path, 0, p.px, 0, NULL);
}

static bool picture_read(const char *path, struct picture *p)
{
	png_image im = {.version = PNG_IMAGE_VERSION};
	if (!png_image_begin_read_from_file(&im, path))
		return false;
	im.format = PNG_FORMAT_RGB;
	*p = picture_new((int)im.width, (int)im.height);
	if (png_image_finish_read(&im, NULL, p->px, 0, NULL))
		return true;
	free(p->px);
	p->px = NULL;
	return false;
}

/* ------------------------------------------------------------------ scenes */

enum shape { DISC, TILE, STAR, HEART, RING, CUP, FISH, TREE, PEAR, BOLT, GEM, SHIRT, SHAPES };

static bool in_convex(double x, double y, const double (*p)[2], int n)
{
	for (int i = 0; i < n; i++) {
		const double *a = p[i], *b = p[(i + 1) % n];
		if ((b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) < 0)
			return false;
	}
	return true;
}

static bool in_polygon(double x, double y, const double (*p)[2], int n) /* even-odd */
{
	bool in = false;
	for (int i = 0, j = n - 1; i < n; j = i++)
		if ((p[i][1] > y) != (p[j][1] > y) && x < (p[j][0] - p[i][0]) * (y - p[i][1]) / (p[j][1] - p[i][1]) + p[i][0])
			in = !in;
	return in;
}

/* Is (x, y), about in [-1, 1] with y downwards, inside the shape? */
static bool inside(enum shape s, double x, double y)
{
	static const double gem[][2] = {{-.5, -.7}, {.5, -.7}, {.95, -.2}, {0, .9}, {-.95, -.2}};
	static const double bolt[][2] = {{.1, -.95}, {-.6, .15}, {-.05, .15}, {-.3, .95}, {.6, -.25}, {.05, -.25}, {.45, -.95}};
	static const double shirt[][2] = {{-.35, -.8}, {-.95, -.45}, {-.75, -.05}, {-.5, -.2}, {-.5, .85}, {.5, .85},
	                                  {.5, -.2},   {.75, -.05},  {.95, -.45},  {.35, -.8}, {.15, -.65}, {-.15, -.65}};
	static const double t1[][2] = {{0, -.95}, {.55, -.2}, {-.55, -.2}}, t2[][2] = {{0, -.55}, {.75, .55}, {-.75, .55}};
	static const double tail[][2] = {{-.95, -.45}, {-.35, 0}, {-.95, .45}};
	double r = hypot(x, y), a = atan2(x, -y);
	switch (s) {
	case DISC:
		return r < .88;
	case TILE:
		return pow(fabs(x), 5) + pow(fabs(y), 5) < pow(.82, 5);
	case STAR: {
		double k = fabs(fmod(a + 9 * PI / 5, 2 * PI / 5) - PI / 5), px = r * cos(k), py = r * sin(k);
		double qx = .46 * cos(PI / 5), qy = .46 * sin(PI / 5);
		return (px - .97) * qy - py * (qx - .97) < 0;
	}
	case HEART: {
		double u = x * 1.2, v = -(y - .05) * 1.2, q = u * u + v * v - .8;
		return q * q * q - u * u * v * v * v < 0;
	}
	case RING:
		return r < .9 && r > .45;
	case CUP: {
		double half = .62 - .12 * (y + .75) / 1.5;
		return (fabs(y) < .75 && fabs(x + .18) < half) || (fabs(hypot(x - .42, y + .05) - .36) < .1 && x > .3);
	}
	case FISH:
		return (x - .12) * (x - .12) / .56 + y * y / .27 < 1 || in_polygon(x, y, tail, 3);
	case TREE:
		return in_convex(x, y, t1, 3) || in_convex(x, y, t2, 3) || (fabs(x) < .13 && y > .5 && y < .92);
	case PEAR:
		return hypot(x / .72, (y - .28) / .62) < 1 || hypot(x / .42, (y + .38) / .52) < 1;
	case BOLT:
		return in_polygon(x, y, bolt, 7);
	case GEM:
		return in_convex(x, y, gem, 5);
	case SHIRT:
		return in_polygon(x, y, shirt, 12);
	default:
		return false;
	}
}

enum ground { FLAT, RAMP, BANDS, CLOUDS, TABLE, GROUNDS };

struct scene {
	int w, h;
	enum shape shape;
	enum ground ground;
	double cx, cy, size, turn, light, gloss, band, phase, ground_turn, cloud[6][4];
};

/* Where the subject is: coverage 0..1 of each pixel. */
static float *scene_mask(const struct scene *s)
{
	float *m = must(malloc(sizeof *m * (size_t)s->w * s->h));
	double c = cos(s->turn), d = sin(s->turn);
	for (int y = 0; y < s->h; y++)
		for (int x = 0; x < s->w; x++) {
			int n = 0;
			for (int k = 0; k < SUBSAMPLES * SUBSAMPLES; k++) {
				double u = (x + (k % SUBSAMPLES + .5) / SUBSAMPLES - s->cx) / s->size;
				double v = (y + (k / SUBSAMPLES + .5) / SUBSAMPLES - s->cy) / s->size;
				n += inside(s->shape, u * c + v * d, v * c - u * d);
			}
			m[y * s->w + x] = (float)n / (SUBSAMPLES * SUBSAMPLES);
		}
	return m;
}

static double ground_light(const struct scene *s, double x, double y)
{
	double u = ((x - s->w * .5) * cos(s->ground_turn) + (y - s->h * .5) * sin(s->ground_turn)) / (s->w > s->h ? s->w : s->h), v = 0;
	switch (s->ground) {
	case RAMP:
		return .95 + .35 * u;
	case BANDS:
		return .9 + .1 * clamp(sin(u * 2 * PI / s->band + s->phase) * s->band * s->w / 6, -1, 1);
	case CLOUDS:
		for (int i = 0; i < 6; i++)
			v += s->cloud[i][0] * cos(s->cloud[i][1] * x / s->w + s->cloud[i][2] * y / s->h + s->cloud[i][3]);
		return .9 + v;
	case TABLE:
		return y < s->h * s->band ? 1 : .84;
	default:
		return 1;
	}
}

static struct picture scene_paint(const struct scene *s, const float *mask, const double subject[3], const double ground[3])
{
	struct picture p = picture_new(s->w, s->h);
	for (int y = 0; y < s->h; y++)
		for (int x = 0; x < s->w; x++) {
			double u = (x + .5 - s->cx) / s->size, v = (y + .5 - s->cy) / s->size, m = mask ? mask[y * s->w + x] : 0;
			double lit = 1 - .2 * s->light * (u * .6 + v * .8), gl = s->gloss * exp(-((u + .3) * (u + .3) + (v + .35) * (v + .35)) / .05);
			double g = ground_light(s, x + .5, y + .5);
			for (int c = 0; c < 3; c++) {
				double a = clamp(ground[c] * g, 0, 1), b = m > 0 ? clamp(subject[c] * lit + gl, 0, 1) : 0;
				p.px[(y * s->w + x) * 3 + c] = (uint8_t)lrint(255 * (a + m * (b - a)));
			}
		}
	return p;
}

/* ------------------------------------------------------------------ cases */

enum op { SUBJECT, GROUND, GRAY, INVERT, REMOVE, SAME, TWO, OPS };
static const char *const op_name[OPS] = {"subject", "background", "grey", "invert", "remove", "keep as it is", "two pictures"};

static const char *const texts[OPS][10] = {
	[SUBJECT] = {"把图片里的主体颜色改成%s，并保持整体风格一致。", "Change the main subject's color to %s and keep the overall style consistent.",
                 "Make the subject %s.", "把主体改成%s。", "Recolor the main object to %s.", "将图中的主体变成%s。", "Turn the object %s.",
                 "把主要物体的颜色改成%s。", "Change the color of the subject to %s.", NULL},
	[GROUND] = {"Change the background to %s.", "把背景改成%s。", "Make the background %s.", "将背景颜色改成%s。", NULL},
	[GRAY] = {"Make it grayscale.", "把图片变成黑白。", "Convert the image to black and white.", "将图片转换为灰度图。", NULL},
	[INVERT] = {"Invert the colors.", "将图片反色。", "Make it a negative image.", "反转图片的颜色。", NULL},
	[REMOVE] = {"Remove the subject.", "移除主体。", "Erase the object and keep the background.", "去掉图片里的主体，保留背景。", NULL},
	[SAME] = {"Keep the picture as it is.", "保持图片不变。", "Do not change anything.", "不要改变图片。", NULL},
	[TWO] = {"Give Picture 1's subject the colour of Picture 2.", "把图1主体的颜色改成图2的颜色。",
             "Make the subject of Picture 1 the color of Picture 2.", "将图1中主体的颜色换成图2的颜色。", NULL},
};

static const int sizes[][2] = {{128, 128}, {96, 160}, {64, 64}, {192, 192}, {160, 96}, {256, 256}, {100, 100}, {128, 192},
                               {96, 96}, {144, 112}, {192, 128}, {64, 128}, {200, 150}, {110, 170}, {256, 160}, {128, 128}};

struct job {
	enum op op;
	const struct color *color;
	struct scene scene;
	float *mask;
	double want_hue;
	struct picture in, second, want, out;
	char text[256];
	/* results */
	double hue, kept, error, chroma, shift[2], zoom;
	double seam[2]; /* sum of error steps and count: across token borders */
	double rest[2]; /* elsewhere */
	bool obeyed, left_alone;
};

static void scene_random(struct scene *s, int w, int h, enum shape shape)
{
	s->w = w, s->h = h, s->shape = shape;
	s->ground = (enum ground)(rng_next() % GROUNDS);
	s->size = uniform(.3, .44) * (w < h ? w : h);
	double mx = w - 2.1 * s->size, my = h - 2.1 * s->size;
	s->cx = w * .5 + uniform(-.5, .5) * (mx > 0 ? mx : 0), s->cy = h * .5 + uniform(-.5, .5) * (my > 0 ? my : 0);
	s->turn = uniform(-.35, .35), s->light = uniform(0, 1), s->gloss = rng_next() % 2 ? uniform(.1, .35) : 0;
	s->ground_turn = uniform(0, 2 * PI), s->phase = uniform(0, 2 * PI);
	s->band = s->ground == TABLE ? uniform(.55, .8) : uniform(.2, .4);
	for (int i = 0; i < 6; i++)
		s->cloud[i][0] = uniform(.01, .04), s->cloud[i][1] = uniform(-14, 14), s->cloud[i][2] = uniform(-14, 14), s->cloud[i][3] = uniform(0, 6.3);
}

static void any_color(double c[3]) { hsv(uniform(0, 360), uniform(.45, .9), uniform(.45, .95), c); }

static double apart(const double *a, const double *b) { return fabs(a[0] - b[0]) + fabs(a[1] - b[1]) + fabs(a[2] - b[2]); }

/* A colour clearly different from the two given. */
static void other_color(double c[3], const double *a, const double *b)
{
	do
		any_color(c);
	while (apart(c, a) < .5 || apart(c, b) < .5);
}

static struct picture mapped(struct picture p, enum op op)
{
	struct picture q = picture_new(p.w, p.h);
	for (size_t i = 0; i < (size_t)p.w * p.h; i++) {
		double c[3] = {p.px[i * 3], p.px[i * 3 + 1], p.px[i * 3 + 2]}, y = luma_of(c);
		for (int k = 0; k < 3; k++)
			q.px[i * 3 + k] = (uint8_t)lrint(op == GRAY ? y : op == INVERT ? 255 - c[k] : c[k]);
	}
	return q;
}

static void job_draw(struct job *j, enum op op, int n, uint64_t seed)
{
	rng_state = seed * 1000003u + (uint64_t)op * 7919 + (uint64_t)n;
	for (int i = 0; i < 4; i++)
		rng_next();
	memset(j, 0, sizeof *j);
	j->op = op;
	const int *size = sizes[(n * 5 + (int)op * 3) % (int)(sizeof sizes / sizeof *sizes)];
	if (op == SUBJECT)
		size = sizes[n % (int)(sizeof sizes / sizeof *sizes)];
	scene_random(&j->scene, size[0], size[1], (enum shape)((n * 7 + (int)op) % SHAPES));
	j->mask = scene_mask(&j->scene);
	j->color = &colors[n % COLORS];
	double target[3] = {j->color->r, j->color->g, j->color->b}, subject[3], ground[3], gray[3] = {.5, .5, .5};
	if (op == TWO)
		hsv(uniform(0, 360), uniform(.6, .9), uniform(.6, .95), target), j->color = NULL;
	if (op == GRAY || op == INVERT || op == REMOVE || op == SAME)
		j->color = NULL, memcpy(target, gray, sizeof target);
	other_color(subject, target, target);
	other_color(ground, target, subject);
	j->in = scene_paint(&j->scene, j->mask, subject, ground);
	j->want_hue = j->color && j->color->hue >= 0 ? j->color->hue : hue_of(target);
	switch (op) {
	case SUBJECT:
	case TWO:
		j->want = scene_paint(&j->scene, j->mask, target, ground);
		break;
	case GROUND:
		j->want = scene_paint(&j->scene, j->mask, subject, target);
		break;
	case REMOVE:
		j->want = scene_paint(&j->scene, NULL, subject, ground);
		break;
	default:
		j->want = mapped(j->in, op);
	}
	if (op == TWO) {
		struct scene s; /* a picture of little more than a colour */
		scene_random(&s, size[0], size[1], DISC);
		s.ground = n % 2 ? RAMP : CLOUDS;
		j->second = scene_paint(&s, NULL, subject, target);
	}
	int count = 0;
	while (texts[op][count])
		count++;
	const char *t = texts[op][n % count];
	const char *name = !j->color ? "" : (unsigned char)t[0] >= 0x80 ? j->color->zh : j->color->en;
	const char *at = strstr(t, "%s");
	if (at)
		snprintf(j->text, sizeof j->text, "%.*s%s%s", (int)(at - t), t, name, at + 2);
	else
		snprintf(j->text, sizeof j->text, "%s", t);
}

/* ------------------------------------------------------------------ measuring */

/* Shift (pixels) and zoom (relative) that best explain b as a moved copy of a: Gauss-Newton on the luma. */
static void drift(struct picture a, struct picture b, double shift[2], double *zoom)
{
	double p[3] = {0, 0, 0};
	for (int it = 0; it < 6; it++) {
		double A[3][4] = {{0}};
		for (int y = 2; y < a.h - 2; y++)
			for (int x = 2; x < a.w - 2; x++) {
				double dx = x - a.w * .5, dy = y - a.h * .5, sx = x + p[0] + p[2] * dx, sy = y + p[1] + p[2] * dy;
				if (sx < 1 || sy < 1 || sx >= a.w - 2 || sy >= a.h - 2)
					continue;
				double v[3][3];
				int ix = (int)sx, iy = (int)sy;
				double fx = sx - ix, fy = sy - iy;
				for (int k = 0; k < 3; k++) { /* the value, and one pixel to the right and below */
					double corner[4];
					for (int c = 0; c < 4; c++) {
						const uint8_t *q = a.px + 3 * ((size_t)(iy + c / 2 + (k == 2)) * a.w + ix + c % 2 + (k == 1));
						corner[c] = luma_of((double[]){q[0], q[1], q[2]});
					}
					v[k][0] = (corner[0] * (1 - fx) + corner[1] * fx) * (1 - fy) + (corner[2] * (1 - fx) + corner[3] * fx) * fy;
				}
				const uint8_t *q = b.px + 3 * ((size_t)y * b.w + x);
				double gx = v[1][0] - v[0][0], gy = v[2][0] - v[0][0], e = luma_of((double[]){q[0], q[1], q[2]}) - v[0][0];
				double J[4] = {gx, gy, gx * dx + gy * dy, e};
				for (int i = 0; i < 3; i++)
					for (int k = 0; k < 4; k++)
						A[i][k] += J[i] * J[k];
			}
		for (int i = 0; i < 3; i++) {
			A[i][i] += 1e-3 + A[i][i] * 1e-6;
			for (int r = 0; r < 3; r++)
				if (r != i) {
					double f = A[r][i] / A[i][i];
					for (int k = 0; k < 4; k++)
						A[r][k] -= f * A[i][k];
				}
		}
		for (int i = 0; i < 3; i++)
			p[i] += A[i][3] / A[i][i];
	}
	shift[0] = p[0], shift[1] = p[1], *zoom = p[2];
}

/* Grows the mask's support by n pixels in both directions. */
static bool near_mask(const struct job *j, int x, int y, int n)
{
	for (int v = y - n; v <= y + n; v++)
		for (int u = x - n; u <= x + n; u++)
			if (u >= 0 && v >= 0 && u < j->scene.w && v < j->scene.h && j->mask[v * j->scene.w + u] > 0)
				return true;
	return false;
}

static void job_measure(struct job *j)
{
	int w = j->scene.w, h = j->scene.h;
	double edit[4] = {0}, kept = 0, kept_n = 0, error = 0, whole = 0, chroma = 0, deep_n = 0;
	for (int y = 0; y < h; y++)
		for (int x = 0; x < w; x++) {
			const uint8_t *o = j->out.px + 3 * ((size_t)y * w + x), *i = j->in.px + 3 * ((size_t)y * w + x), *t = j->want.px + 3 * ((size_t)y * w + x);
			bool subject = j->mask[y * w + x] >= 1, outside = !near_mask(j, x, y, 3);
			double c[3] = {o[0], o[1], o[2]}, change = 0, miss = 0;
			for (int k = 0; k < 3; k++)
				change += abs(o[k] - i[k]) / 3., miss += abs(o[k] - t[k]) / 3.;
			whole += miss;
			chroma += chroma_of(c);
			if (j->op == GROUND ? outside : subject) {
				for (int k = 0; k < 3; k++)
					edit[k] += c[k];
				edit[3]++;
			}
			if (subject)
				error += miss, deep_n++;
			if (j->op == GROUND ? subject : outside)
				kept += change, kept_n++;
		}
	for (int k = 0; k < 3; k++)
		edit[k] /= edit[3] > 0 ? edit[3] : 1;
	j->kept = kept_n > 0 ? kept / kept_n : 0;
	j->error = j->op == REMOVE ? error / (deep_n > 0 ? deep_n : 1) : whole / (w * h);
	j->chroma = chroma / (w * h);
	j->left_alone = j->kept <= bounds.kept;
	j->hue = hue_distance(hue_of(edit), j->want_hue);
	switch (j->op) {
	case SUBJECT:
	case GROUND:
	case TWO:
		if (j->color && j->color->hue < 0) {
			bool white = !strcmp(j->color->en, "white");
			j->hue = NAN;
			j->obeyed = chroma_of(edit) < 45 && (white ? luma_of(edit) > 180 : luma_of(edit) < 80);
		} else
			j->obeyed = j->hue <= bounds.hue_degrees && chroma_of(edit) > 40;
		break;
	case GRAY:
		j->obeyed = j->chroma <= bounds.gray_chroma && j->error <= bounds.whole_error;
		break;
	case INVERT:
		j->obeyed = j->error <= bounds.whole_error;
		break;
	case REMOVE:
		j->obeyed = j->error <= bounds.removed_error;
		break;
	default:
		drift(j->in, j->out, j->shift, &j->zoom);
		j->obeyed = j->error <= bounds.same_error && hypot(j->shift[0], j->shift[1]) <= bounds.shift_pixels && fabs(j->zoom) <= bounds.zoom;
	}
	/* Blockiness: how the error jumps from pixel to pixel, across token borders and elsewhere. */
	for (int y = 0; y < h; y++)
		for (int x = 0; x < w; x++)
			for (int dir = 0; dir < 2; dir++) {
				int u = x + !dir, v = y + dir;
				if (u >= w || v >= h)
					continue;
				double step = 0;
				for (int k = 0; k < 3; k++) {
					size_t a = 3 * ((size_t)y * w + x) + k, b = 3 * ((size_t)v * w + u) + k;
					step += abs((j->out.px[a] - j->want.px[a]) - (j->out.px[b] - j->want.px[b])) / 3.;
				}
				double *sum = (dir ? v : u) % TOKEN == 0 ? j->seam : j->rest;
				sum[0] += step, sum[1]++;
			}
}

/* ------------------------------------------------------------------ running */

static void json_text(FILE *f, const char *s)
{
	fputc('"', f);
	for (; *s; s++) {
		if (*s == '"' || *s == '\\')
			fputc('\\', f);
		fputc(*s, f);
	}
	fputc('"', f);
}

static const char *path_of(const char *dir, int i, const char *what)
{
	static char buf[4][1200];
	static int turn;
	char *b = buf[turn++ & 3];
	snprintf(b, sizeof buf[0], "%s/%03d-%s.png", dir, i, what);
	return b;
}

static bool write_jobs(const char *dir, const struct job *jobs, int n)
{
	char path[1200];
	snprintf(path, sizeof path, "%s/jobs.jsonl", dir);
	FILE *f = fopen(path, "w");
	if (!f)
		return false;
	for (int i = 0; i < n; i++) {
		remove(path_of(dir, i, "out"));
		if (!picture_write(path_of(dir, i, "in"), jobs[i].in) || !picture_write(path_of(dir, i, "want"), jobs[i].want) ||
		    (jobs[i].second.px && !picture_write(path_of(dir, i, "second"), jobs[i].second)))
			return fclose(f), false;
		fputs("{\"prompt\":", f);
		json_text(f, jobs[i].text);
		fputs(",\"images\":[", f);
		json_text(f, path_of(dir, i, "in"));
		if (jobs[i].second.px) {
			fputc(',', f);
			json_text(f, path_of(dir, i, "second"));
		}
		fputs("],\"output_path\":", f);
		json_text(f, path_of(dir, i, "out"));
		fprintf(f, ",\"seed\":%d}\n", i);
	}
	return !fclose(f);
}

static int run(char *const argv[])
{
	pid_t pid = fork();
	if (pid < 0)
		return -1;
	if (!pid) {
		execvp(argv[0], argv);
		fprintf(stderr, "demo_quality: %s: %s\n", argv[0], strerror(errno));
		_exit(127);
	}
	int status;
	while (waitpid(pid, &status, 0) < 0)
		if (errno != EINTR)
			return -1;
	return WIFEXITED(status) ? WEXITSTATUS(status) : 128 + WTERMSIG(status);
}

/* Pairs (input, output) of the same height class side by side, in cells of 128 pixels. */
static bool write_sheet(const char *path, const struct job *jobs, int n)
{
	enum { CELL = 128, GAP = 6, COLUMNS = 5 };
	int pair = 2 * CELL + GAP, rows = (n + COLUMNS - 1) / COLUMNS;
	struct picture s = picture_new(COLUMNS * (pair + 3 * GAP), rows * (CELL + 2 * GAP));
	memset(s.px, 255, (size_t)s.w * s.h * 3);
	for (int i = 0; i < n; i++)
		for (int k = 0; k < 2; k++) {
			struct picture p = k ? jobs[i].out : jobs[i].in;
			double z = (double)CELL / (p.w > p.h ? p.w : p.h);
			z = z > 1 ? 1 : z;
			int w = (int)(p.w * z), h = (int)(p.h * z);
			int x0 = i % COLUMNS * (pair + 3 * GAP) + GAP + k * (CELL + GAP) + (CELL - w) / 2, y0 = i / COLUMNS * (CELL + 2 * GAP) + GAP + (CELL - h) / 2;
			for (int y = 0; y < h; y++)
				for (int x = 0; x < w; x++)
					for (int c = 0; c < 3; c++) { /* mean over the pixels that fall into this one */
						int xa = (int)(x / z), xb = (int)((x + 1) / z), ya = (int)(y / z), yb = (int)((y + 1) / z), sum = 0, m = 0;
						for (int v = ya; v < yb || v == ya; v++)
							for (int u = xa; u < xb || u == xa; u++)
								sum += p.px[3 * ((size_t)v * p.w + u) + c], m++;
						s.px[3 * ((size_t)(y0 + y) * s.w + x0 + x) + c] = (uint8_t)(sum / m);
					}
		}
	bool ok = picture_write(path, s);
	free(s.px);
	return ok;
}

static int passed, failed;

static void judge(bool ok, const char *what, double value, const char *relation, double bound)
{
	printf("  %s  %-52s %8.3f  %s %g\n", ok ? "PASS" : "FAIL", what, value, relation, bound);
	ok ? passed++ : failed++;
}

int main(int argc, char **argv)
{
	static const int count[OPS] = {40, 12, 6, 6, 8, 8, 10};
	static struct job jobs[MAX_CASES];
	const char *program = NULL, *model = "demo", *dir = NULL, *sheet = NULL, *steps = NULL, *cfg = NULL;
	bool draw_only = false, score_only = false, verbose = false;
	uint64_t seed = 1;
	int more = argc;
	for (int i = 1; i < argc; i++) {
		const char *a = argv[i], *next = i + 1 < argc ? argv[i + 1] : NULL;
		if (!strcmp(a, "--")) {
			more = i + 1;
			break;
		}
		if (!strcmp(a, "--draw-only"))
			draw_only = true;
		else if (!strcmp(a, "--score-only"))
			score_only = true;
		else if (!strcmp(a, "--verbose"))
			verbose = true;
		else if (a[0] == '-' && !next)
			return fprintf(stderr, "demo_quality: %s needs a value\n", a), 2;
		else if (!strcmp(a, "--model"))
			model = argv[++i];
		else if (!strcmp(a, "--work"))
			dir = argv[++i];
		else if (!strcmp(a, "--sheet"))
			sheet = argv[++i];
		else if (!strcmp(a, "--seed"))
			seed = strtoull(argv[++i], NULL, 10);
		else if (!strcmp(a, "--steps"))
			steps = argv[++i];
		else if (!strcmp(a, "--cfg"))
			cfg = argv[++i];
		else if (a[0] != '-' && !program)
			program = a;
		else
			return fprintf(stderr, "demo_quality: what is %s?\n", a), 2;
	}
	if ((!program && !draw_only && !score_only) || ((draw_only || score_only) && !dir))
		return fprintf(stderr, "usage: demo_quality PROGRAM [--work DIR] [--sheet FILE.png] [--model DIR] [--verbose]\n"), 2;
	char temporary[] = "/tmp/demo_quality.XXXXXX";
	if (!dir && !(dir = mkdtemp(temporary)))
		return perror("demo_quality: mkdtemp"), 2;
	if (mkdir(dir, 0777) && errno != EEXIST)
		return perror(dir), 2;

	int n = 0;
	for (int op = 0; op < OPS; op++)
		for (int i = 0; i < count[op]; i++)
			job_draw(&jobs[n++], (enum op)op, i, seed);
	if (!score_only && !write_jobs(dir, jobs, n))
		return fprintf(stderr, "demo_quality: cannot write into %s\n", dir), 2;
	if (draw_only)
		return 0;
	if (!score_only) {
		char list[1200];
		snprintf(list, sizeof list, "%s/jobs.jsonl", dir);
		char *args[64] = {(char *)program, "edit", "--model", (char *)model, "--batch", list};
		int k = 6;
		if (steps)
			args[k++] = "--steps", args[k++] = (char *)steps;
		if (cfg)
			args[k++] = "--true-cfg-scale", args[k++] = (char *)cfg;
		for (int i = more; i < argc && k < 63; i++)
			args[k++] = argv[i];
		int rc = run(args);
		if (rc)
			printf("  the program ended with exit code %d\n", rc), failed++;
	}

	double sum[OPS][4] = {{0}}; /* obeyed, left alone, hue, kept */
	double hues[OPS] = {0}, seam[4] = {0}, worst_shift = 0, worst_zoom = 0;
	int missing = 0;
	for (int i = 0; i < n; i++) {
		struct job *j = &jobs[i];
		if (!picture_read(path_of(dir, i, "out"), &j->out) || j->out.w != j->in.w || j->out.h != j->in.h) {
			printf("  case %d (%s): %s\n", i, j->text, j->out.px ? "output of another size" : "no output");
			missing++;
			free(j->out.px);
			j->out = mapped(j->in, SAME);
			memset(j->out.px, 127, (size_t)j->out.w * j->out.h * 3);
		}
		job_measure(j);
		double *s = sum[j->op];
		s[0] += j->obeyed, s[1] += j->left_alone, s[3] += j->kept;
		if (isfinite(j->hue))
			s[2] += j->hue, hues[j->op]++;
		seam[0] += j->seam[0], seam[1] += j->seam[1], seam[2] += j->rest[0], seam[3] += j->rest[1];
		if (j->op == SAME)
			worst_shift = fmax(worst_shift, hypot(j->shift[0], j->shift[1])), worst_zoom = fmax(worst_zoom, fabs(j->zoom));
		if (verbose)
			printf("  %3d %s%s %3dx%-3d hue %5.1f kept %5.1f error %5.1f  %s\n", i, j->obeyed ? "+" : "-",
			       j->op <= GROUND || j->op == TWO ? (j->left_alone ? "+" : "-") : " ", j->in.w, j->in.h, j->hue, j->kept, j->error, j->text);
	}
	printf("  %-14s %6s %8s %11s %9s %12s\n", "instruction", "cases", "obeyed", "left alone", "hue err", "mean change");
	for (int op = 0; op < OPS; op++) {
		double c = count[op];
		bool local = op == SUBJECT || op == GROUND || op == TWO, with_hue = local;
		printf("  %-14s %6d %7.0f%%", op_name[op], count[op], 100 * sum[op][0] / c);
		if (local || op == REMOVE)
			printf(" %10.0f%%", 100 * sum[op][1] / c);
		else
			printf(" %11s", "");
		if (with_hue)
			printf(" %8.1f°", sum[op][2] / hues[op]);
		else
			printf(" %9s", "");
		if (local || op == REMOVE)
			printf(" %8.1f/255", sum[op][3] / c);
		printf("\n");
	}
	double left = (sum[SUBJECT][1] + sum[GROUND][1]) / (count[SUBJECT] + count[GROUND]);
	double seams = (seam[0] / seam[1]) / fmax(1e-9, seam[2] / seam[3]);
	judge(!missing, "outputs missing or of another size", missing, "=", 0);
	judge(sum[SUBJECT][0] / count[SUBJECT] >= bounds.subject_hue_rate, "subject has the asked colour (hue within 20 degrees)",
	      sum[SUBJECT][0] / count[SUBJECT], ">=", bounds.subject_hue_rate);
	judge(sum[GROUND][0] / count[GROUND] >= bounds.background_hue_rate, "background has the asked colour", sum[GROUND][0] / count[GROUND], ">=",
	      bounds.background_hue_rate);
	judge(left >= bounds.kept_rate, "the rest changed by at most 8/255 on the mean", left, ">=", bounds.kept_rate);
	judge(sum[GRAY][0] / count[GRAY] >= bounds.other_rate, "grey", sum[GRAY][0] / count[GRAY], ">=", bounds.other_rate);
	judge(sum[INVERT][0] / count[INVERT] >= bounds.other_rate, "invert", sum[INVERT][0] / count[INVERT], ">=", bounds.other_rate);
	judge(sum[REMOVE][0] / count[REMOVE] >= bounds.other_rate, "remove", sum[REMOVE][0] / count[REMOVE], ">=", bounds.other_rate);
	judge(sum[SAME][0] / count[SAME] >= bounds.other_rate, "keep as it is: change <= 8/255, no shift, no zoom", sum[SAME][0] / count[SAME], ">=",
	      bounds.other_rate);
	judge(worst_shift <= bounds.shift_pixels, "drift: largest shift in pixels", worst_shift, "<=", bounds.shift_pixels);
	judge(worst_zoom <= bounds.zoom, "drift: largest zoom", worst_zoom, "<=", bounds.zoom);
	judge(sum[TWO][0] / count[TWO] >= bounds.two_hue_rate, "Picture 1's subject has the colour of Picture 2", sum[TWO][0] / count[TWO], ">=",
	      bounds.two_hue_rate);
	judge(seams <= bounds.seams, "error steps at token borders, over elsewhere", seams, "<=", bounds.seams);
	if (sheet && !write_sheet(sheet, jobs, n))
		fprintf(stderr, "demo_quality: cannot write %s\n", sheet), failed++;

	for (int i = 0; i < n; i++) {
		struct job *j = &jobs[i];
		if (dir == temporary)
			remove(path_of(dir, i, "in")), remove(path_of(dir, i, "want")), remove(path_of(dir, i, "second")), remove(path_of(dir, i, "out"));
		free(j->mask), free(j->in.px), free(j->want.px), free(j->second.px), free(j->out.px);
	}
	if (dir == temporary) {
		char list[1200];
		snprintf(list, sizeof list, "%s/jobs.jsonl", dir);
		remove(list);
		rmdir(dir);
	}
	printf("%d passed, %d failed\n", passed, failed);
	return failed ? 1 : 0;
}
