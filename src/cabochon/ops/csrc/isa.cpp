// Compiled once per instruction set with -DISA=name; exports one table.
#include "conformer_layer.h"
#include "draw.h"
#include "head_at.h"
#include "layer.h"
#include "lookup.h"
#include "subsample.h"

#define TEXT(x) #x
#define NAME(x) TEXT(x)

namespace cabochon {
extern const Ops ISA;
const Ops ISA = {NAME(ISA), linear, head_at, gated, experts, norm, per_layer, rope, store_rows, attend, attend_all, largest, draw, log_sum, quantize, pack, lookup, layer, product, settle, turn, recent, blend, subsample, conformer, spin};
}  // namespace cabochon
