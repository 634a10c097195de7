// The functions of the driver that listing cards takes, with answers chosen when it is compiled: no machine that runs the tests
// has a card.
#include <stddef.h>
#include <string.h>

int cuInit(unsigned flags) { return flags ? 1 : INIT; }
int cuGetErrorString(int code, const char **text) {
    *text = code == 802 ? "system not yet initialized" : NULL;
    return 0;
}
int cuDriverGetVersion(int *version) { *version = VERSION; return 0; }
int cuDeviceGetCount(int *count) { *count = COUNT; return 0; }
int cuDeviceGet(int *device, int ordinal) { *device = 40 + ordinal; return ordinal >= COUNT; }
int cuDeviceGetName(char *name, int length, int device) { strncpy(name, device == 40 ? "Card A" : "Card B", length); return 0; }
int cuDeviceGetAttribute(int *value, int attribute, int device) {
    if (attribute == 75) *value = device == 40 ? 9 : 7;
    else if (attribute == 76) *value = device == 40 ? 0 : 5;
    else return 1;
    return 0;
}
int cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = (size_t)device << 30; return 0; }
static int held;
// The second card is in exclusive mode.
int cuDevicePrimaryCtxRetain(void **context, int device) { *context = &held; held++; return device == 40 ? 0 : 46; }
int cuDevicePrimaryCtxRelease_v2(int device) { held--; return device != 40; }
int cuCtxPushCurrent_v2(void *context) { return context != &held; }
int cuCtxPopCurrent_v2(void **context) { return *context != &held; }
#ifndef FOREIGN
int cuMemGetInfo_v2(size_t *free, size_t *total) { *free = 5, *total = 9; return held != 1; }
#endif
