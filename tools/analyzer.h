/* Read in front of every file by tools/check_tidy.sh: the analyzer sees one file at a time and must be told that a
 * failure is never QIE_OK, else it follows paths on which *out is NULL after success. Not part of the program. */
#include "base/error.h"
#define qie_fail(err, status, ...) ((void)qie_fail((err), (status), __VA_ARGS__), (status))
