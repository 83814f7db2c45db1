// Tiles are taken only where the CPU has them, the system lends this process the registers, and a product comes out as
// it does on AVX-512, bit by bit: nobody who built this could look at every machine that it runs on.
#include "amx.h"

#include <cstdint>
#include <cstring>
#include <vector>

#if defined(__x86_64__)
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace cabochon {
namespace {

// Random bytes that are the same everywhere.
struct Bytes {
    uint64_t state = 1;
    uint8_t next() {
        state = state * 6364136223846793005u + 1442695040888963407u;
        return state >> 56;
    }
};

std::vector<float> product(const Ops& ops, Format format, long count, long outputs, long inputs) {
    const long panels = (outputs + 15) / 16, groups = (inputs + 31) / 32;
    Bytes random;
    std::vector<float> x(count * inputs), y(count * outputs), wide(panels * 16);
    std::vector<uint8_t> codes(panels * groups * 16 * (format == INT8 ? 32 : 16));
    std::vector<uint16_t> halves(panels * groups * 16);
    for (float& v : x) v = random.next() - 127.5f;
    for (uint8_t& v : codes) v = random.next();
    for (float& v : wide) v = random.next() / 512.0f;
    for (uint16_t& v : halves) v = 0x1c00 + random.next();  // a few thousandths
    const void* scales = format == INT8 ? static_cast<const void*>(wide.data()) : halves.data();
    ops.linear({{x.data(), FLOAT32, count, inputs, inputs},
                {format, FLOAT32, codes.data(), scales, outputs, inputs},
                {y.data(), FLOAT32, count, outputs, outputs},
                0.0f});
    return y;
}

#if defined(__x86_64__)
constexpr unsigned BFLOAT16_TILES = 1u << 22, TILES = 1u << 24, BYTE_TILES = 1u << 25;  // CPUID 7, edx

// Does the system save the tiles' configuration and contents (bits 17 and 18 of XCR0) when it switches threads?
bool system_knows_tiles() {
    unsigned a, b, c, d;
    if (!__get_cpuid(1, &a, &b, &c, &d) || !(c >> 27 & 1)) return false;
    asm("xgetbv" : "=a"(a), "=d"(d) : "c"(0));
    return (a >> 17 & 3) == 3;
}
#endif

// Linux lends the registers to a process that asks.
bool system_lends_tiles() {
#if defined(__x86_64__) && defined(__linux__)
    constexpr long ASK = 0x1023, CONTENTS = 18;
    return syscall(SYS_arch_prctl, ASK, CONTENTS) == 0;
#else
    return false;
#endif
}

}  // namespace

bool has_tiles() {
#if defined(__x86_64__)
    constexpr unsigned all = BFLOAT16_TILES | TILES | BYTE_TILES;
    unsigned a, b, c, d;
    return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & all) == all;
#else
    return false;
#endif
}

bool same_products(const Ops& a, const Ops& b) {
    for (const Format format : {INT8, INT4})
        for (const long count : {1, 12, 29}) {  // 1,000 inputs are more groups than tiles take at a time
            const std::vector<float> left = product(a, format, count, 70, 1000), right = product(b, format, count, 70, 1000);
            if (memcmp(left.data(), right.data(), left.size() * sizeof(float))) return false;
        }
    return true;
}

std::string refuse_tiles() {
#if CABOCHON_HAS_AMX
    if (!system_knows_tiles()) return "the system does not save them when it switches threads";
    if (!system_lends_tiles()) return "the system does not lend them to this process";
    if (!same_products(amx, avx512_bf16)) return "their products differ from AVX-512's";
    return "";
#else
    return "the compiler that built the kernels knew none";
#endif
}

}  // namespace cabochon
