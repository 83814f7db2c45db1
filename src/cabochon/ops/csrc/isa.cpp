// Compiled once per instruction set with -DISA=name; exports one table.
#include "attend_all.h"
#include "largest.h"
#include "packing.h"

#define TEXT(x) #x
#define NAME(x) TEXT(x)

namespace cabochon {
extern const Ops ISA;
const Ops ISA = {NAME(ISA), linear, gated, experts, norm, rope, store_rows, attend, attend_all, largest, quantize, pack};
}  // namespace cabochon
