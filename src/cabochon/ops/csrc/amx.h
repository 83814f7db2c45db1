// May this process multiply by AMX tiles?
#pragma once

#include <string>

#include "ops.h"

namespace cabochon {

// Has the CPU tiles of bytes and bfloat16 numbers? The compiler's own question knows none.
bool has_tiles();

// Asks the system for the CPU's tiles and tries them. Empty when all is well, or why they are left alone.
std::string refuse_tiles();

// Do both tables give the same bits for integer products of one row, of some and of many?
bool same_products(const Ops& a, const Ops& b);

}  // namespace cabochon
