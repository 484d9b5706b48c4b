/* How much two pictures of one size differ. */
#ifndef QIE_IMAGE_COMPARE_H
#define QIE_IMAGE_COMPARE_H

#include "qie/image.h"

/* Peak signal-to-noise ratio over all 8-bit values, in dB; INFINITY for equal pictures; -1 when the
 * sizes differ. */
double qie_image_psnr(const qie_image *a, const qie_image *b);
/* Mean structural similarity (Wang, Bovik, Sheikh, Simoncelli 2004) of the luma (BT.601): windows
 * of 8 x 8 pixels at every place with equal weights, K1 = 0.01, K2 = 0.03; 1 for equal pictures. A
 * picture smaller than a window is one window. -1 when the sizes differ or memory is short. */
double qie_image_ssim(const qie_image *a, const qie_image *b);

#endif
