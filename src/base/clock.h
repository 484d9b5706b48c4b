/* Monotonic time, for durations only. */
#ifndef QIE_BASE_CLOCK_H
#define QIE_BASE_CLOCK_H

/* Seconds since an unspecified start. */
double qie_now_s(void);

#endif
