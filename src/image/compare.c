#include "image/compare.h"

#include <math.h>
#include <stdbool.h>
#include <stdlib.h>
#include <string.h>

#define WINDOW 8
#define C1 (0.01 * 255 * 0.01 * 255)
#define C2 (0.03 * 255 * 0.03 * 255)

static bool same_size(const qie_image *a, const qie_image *b) {
    return qie_image_width(a) == qie_image_width(b) && qie_image_height(a) == qie_image_height(b);
}

double qie_image_psnr(const qie_image *a, const qie_image *b) {
    if (!same_size(a, b))
        return -1;
    size_t n = 3 * (size_t)qie_image_width(a) * (size_t)qie_image_height(a);
    const uint8_t *p = qie_image_pixels_const(a), *q = qie_image_pixels_const(b);
    double sum = 0;
    for (size_t i = 0; i < n; i++) {
        double d = (double)p[i] - q[i];
        sum += d * d;
    }
    return sum > 0 ? 10 * log10(255.0 * 255.0 * (double)n / sum) : INFINITY;
}

/* Sums of a window: of both pictures, their squares and their product. */
enum { SUM_A, SUM_B, SUM_AA, SUM_BB, SUM_AB, SUMS };

static double luma(const uint8_t *p) {
    return 0.299 * p[0] + 0.587 * p[1] + 0.114 * p[2];
}

/* The column sums of one more row (sign 1), or of one less. */
static void add_row(double (*columns)[SUMS], const uint8_t *a, const uint8_t *b, int w,
                    double sign) {
    for (int x = 0; x < w; x++) {
        double p = luma(a + 3 * x), q = luma(b + 3 * x);
        columns[x][SUM_A] += sign * p;
        columns[x][SUM_B] += sign * q;
        columns[x][SUM_AA] += sign * p * p;
        columns[x][SUM_BB] += sign * q * q;
        columns[x][SUM_AB] += sign * p * q;
    }
}

static double similarity(const double s[SUMS], double n) {
    double ma = s[SUM_A] / n, mb = s[SUM_B] / n;
    double va = s[SUM_AA] / n - ma * ma, vb = s[SUM_BB] / n - mb * mb,
           cov = s[SUM_AB] / n - ma * mb;
    return (2 * ma * mb + C1) * (2 * cov + C2) / ((ma * ma + mb * mb + C1) * (va + vb + C2));
}

/* Sum over the windows whose rows are in the column sums. */
static double window_row(double (*columns)[SUMS], int w, int wide, int tall) {
    double sum = 0;
    for (int x = 0; x + wide <= w; x++) {
        double s[SUMS] = {0};
        for (int i = 0; i < wide; i++)
            for (int k = 0; k < SUMS; k++)
                s[k] += columns[x + i][k];
        sum += similarity(s, (double)wide * tall);
    }
    return sum;
}

double qie_image_ssim(const qie_image *a, const qie_image *b) {
    if (!same_size(a, b))
        return -1;
    int w = qie_image_width(a), h = qie_image_height(a);
    int wide = w < WINDOW ? w : WINDOW, tall = h < WINDOW ? h : WINDOW;
    size_t row = 3 * (size_t)w;
    const uint8_t *p = qie_image_pixels_const(a), *q = qie_image_pixels_const(b);
    double(*columns)[SUMS] = calloc((size_t)w, sizeof *columns), sum = 0;
    if (!columns)
        return -1;
    for (int y = 0; y < h; y++) {
        add_row(columns, p + (size_t)y * row, q + (size_t)y * row, w, 1);
        if (y >= tall)
            add_row(columns, p + (size_t)(y - tall) * row, q + (size_t)(y - tall) * row, w, -1);
        if (y >= tall - 1)
            sum += window_row(columns, w, wide, tall);
    }
    free(columns);
    return sum / ((double)(w - wide + 1) * (h - tall + 1));
}
