/* The part of libnvidia-ml that a reader calls, two cards. What a card answers is in the environment, so
 * that a test can change it while a program runs: NVML_<QUERY>=<return code>[@<card>], as in
 * NVML_POWER=15@1 for a card that is lost. NVML_SLEEP_MS stands for a driver that is slow or hangs.
 * Signatures as in NVIDIA's NVML API reference, constants as in pynvml. */
#define _GNU_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

enum { SUCCESS = 0, NOT_SUPPORTED = 3, NOT_FOUND = 6, TIMEOUT = 10 };
enum { CARDS = 2, SLOTS = 3 };
typedef struct { int card, slot; } device_t;
typedef struct { unsigned long long total, free, used; } memory_t;
typedef struct { unsigned gpu, memory; } utilization_t;
typedef struct { unsigned version, sensor; int degrees; } temperature_t;
typedef struct {
    device_t *device;
    unsigned long long type, data;
    unsigned gpu_instance, compute_instance;
} event_t;

static device_t gpus[CARDS] = {{0, -1}, {1, -1}};
static device_t instances[CARDS][SLOTS] = {{{0, 0}, {0, 1}, {0, 2}}, {{1, 0}, {1, 1}, {1, 2}}};
static int watched[CARDS];

static int number(const char *name, int otherwise) {
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

static int answer(const char *query, const device_t *device) {
    char name[64];
    snprintf(name, sizeof name, "NVML_%s", query);
    const char *text = getenv(name), *card = text ? strchr(text, '@') : NULL;
    if (!text || (card && device && atoi(card + 1) != device->card)) return SUCCESS;
    return atoi(text);
}

static void sleep_ms(const char *name) { usleep(1000 * number(name, 0)); }
static int mig_is_on(const device_t *d) { return number("NVML_MIG", -1) == d->card; }

int nvmlInitWithFlags(unsigned flags) { (void)flags; sleep_ms("NVML_INIT_SLEEP_MS"); return answer("INIT", NULL); }
int nvmlShutdown(void) { return SUCCESS; }
const char *nvmlErrorString(int code) { (void)code; return "text of the library"; }

int nvmlSystemGetDriverVersion(char *text, unsigned size) { strncpy(text, "999.1", size); return SUCCESS; }
int nvmlDeviceGetCount_v2(unsigned *count) { *count = number("NVML_COUNT", CARDS); return SUCCESS; }

int nvmlDeviceGetHandleByIndex_v2(unsigned i, device_t **d) { *d = &gpus[i]; return answer("HANDLE", *d); }

int nvmlDeviceGetName(device_t *d, char *text, unsigned size) {
    const char *name = number("NVML_ALIKE", 0) || !d->card ? "Large" : "Small";
    snprintf(text, size, "%s%s", name, d->slot < 0 ? "" : " MIG 1g.10gb");
    return SUCCESS;
}

int nvmlDeviceGetUUID(device_t *d, char *text, unsigned size) {
    if (d->slot < 0) snprintf(text, size, "GPU-%d0000000-aaaa", d->card);
    else snprintf(text, size, "MIG-%d%d000000-bbbb", d->card, d->slot);
    return SUCCESS;
}

int nvmlDeviceGetMemoryInfo(device_t *d, memory_t *m) {
    m->total = (d->slot < 0 ? 80ull : 10ull) << 30;
    m->used = (d->slot < 0 ? 60ull : 5ull) << 30;
    m->free = m->total - m->used;
    return answer("MEMORY", d);
}

int nvmlDeviceGetUtilizationRates(device_t *d, utilization_t *u) {
    sleep_ms("NVML_SLEEP_MS");
    u->gpu = 97; u->memory = 40;
    return mig_is_on(d) ? NOT_SUPPORTED : answer("UTILIZATION", d);
}

int nvmlDeviceGetPowerUsage(device_t *d, unsigned *mw) { *mw = 300500; return answer("POWER", d); }
int nvmlDeviceGetClockInfo(device_t *d, int type, unsigned *mhz) { *mhz = 1000 + type; return answer("CLOCK", d); }

#if FUNCTIONS != NEW_ONLY
int nvmlDeviceGetTemperature(device_t *d, int sensor, unsigned *c) { (void)sensor; *c = 55; return answer("TEMPERATURE", d); }
int nvmlDeviceGetCurrentClocksThrottleReasons(device_t *d, unsigned long long *b) { *b = 0x4; return answer("REASONS", d); }
#endif
#if FUNCTIONS != OLD_ONLY
int nvmlDeviceGetTemperatureV(device_t *d, temperature_t *t) {
    t->degrees = t->version == (sizeof *t | 1u << 24) ? 61 : -1;
    return answer("TEMPERATURE", d);
}
int nvmlDeviceGetCurrentClocksEventReasons(device_t *d, unsigned long long *b) { *b = 0x4 | 0x40; return answer("REASONS", d); }
#endif

int nvmlDeviceGetTotalEccErrors(device_t *d, int uncorrected, int counter, unsigned long long *count) {
    *count = uncorrected ? number("NVML_UNCORRECTED", 0) : 7;
    if (counter != 0) *count = 1000; /* aggregate: over the card's life */
    return mig_is_on(d) ? NOT_SUPPORTED : answer("ECC", d);
}

int nvmlDeviceGetMigMode(device_t *d, unsigned *current, unsigned *pending) {
    *current = *pending = mig_is_on(d);
    return answer("MIG_MODE", d);
}
int nvmlDeviceGetMaxMigDeviceCount(device_t *d, unsigned *count) { (void)d; *count = SLOTS; return SUCCESS; }
int nvmlDeviceGetMigDeviceHandleByIndex(device_t *d, unsigned slot, device_t **instance) {
    *instance = &instances[d->card][slot];
    return slot == 1 ? NOT_FOUND : SUCCESS;
}

int nvmlEventSetCreate(void **set) { *set = watched; return answer("EVENTS", NULL); }
int nvmlEventSetFree(void *set) { return set == watched ? SUCCESS : NOT_FOUND; }
int nvmlDeviceRegisterEvents(device_t *d, unsigned long long types, void *set) {
    (void)set;
    watched[d->card] = types == 8; /* XID errors alone */
    return answer("REGISTER", d);
}
int nvmlEventSetWait_v2(void *set, event_t *event, unsigned timeout_ms) {
    static int given;
    (void)set;
    int card = number("NVML_XID_CARD", 0);
    if (given >= number("NVML_XIDS", 0) || !watched[card]) {
        usleep(1000 * timeout_ms);
        return TIMEOUT;
    }
    given++;
    *event = (event_t){&gpus[card], 8, 79, ~0u, ~0u};
    return answer("WAIT", NULL);
}
