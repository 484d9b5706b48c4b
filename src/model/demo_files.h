/* Files of the demo model inside the program; the table is made by the build (CMakeLists.txt). */
#ifndef QIE_MODEL_DEMO_FILES_H
#define QIE_MODEL_DEMO_FILES_H

#include "base/files.h"

typedef qie_builtin_file qie_demo_file;
/* Ended by a NULL name. */
extern const qie_demo_file qie_demo_files[];

#endif
