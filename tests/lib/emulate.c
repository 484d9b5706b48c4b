/* For the tests that run emulated kernels: the tiles of each thread, and a processor that claims
 * every level (the linker puts this in the place of qie_cpu_level_hardware). */
#include "base/cpu.h"
#include "compute/cpu/x86/amx.h"

_Thread_local qie_tile qie_emulated_tiles[8];
_Thread_local int qie_emulated_tiles_ready;

qie_cpu_level __wrap_qie_cpu_level_hardware(void);
qie_cpu_level __wrap_qie_cpu_level_hardware(void) {
    return QIE_CPU_AMX;
}
