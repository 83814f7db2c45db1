// The Python face: addresses and sizes in, nothing out. `ops/cpu.py` checks shapes, types and devices; nothing is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "ops.h"
#include "pool.h"

namespace nb = nanobind;
using namespace cabochon;

namespace {

struct Isa {
    const Ops* ops;
    bool supported;
};

// Best first.
std::vector<Isa> isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    return {{&avx512_bf16, wide && __builtin_cpu_supports("avx512bf16")}, {&avx512, wide}, {&avx2, half}, {&plain, true}};
#else
    return {{&plain, true}};
#endif
}

const Ops* active = [] {
    for (const Isa& isa : isas())
        if (isa.supported) return isa.ops;
    return &plain;
}();

std::vector<std::string> supported() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        if (isa.supported) names.push_back(isa.ops->name);
    return names;
}

void use(const std::string& name) {
    for (const Isa& isa : isas())
        if (isa.supported && name == isa.ops->name) {
            active = isa.ops;
            return;
        }
    throw nb::value_error("this CPU has no such instruction set, see supported()");
}

using Address = uintptr_t;

Rows rows(Address data, int dtype, long count, long width, long stride) {
    return {reinterpret_cast<void*>(data), Dtype(dtype), count, width, stride};
}

// A weight as Python hands it over: (format, dtype, codes, scales, rows, cols).
Matrix matrix(const nb::tuple& w) {
    return {Format(nb::cast<int>(w[0])),
            Dtype(nb::cast<int>(w[1])),
            reinterpret_cast<const void*>(nb::cast<Address>(w[2])),
            reinterpret_cast<const void*>(nb::cast<Address>(w[3])),
            nb::cast<long>(w[4]),
            nb::cast<long>(w[5])};
}

// Other Python threads run meanwhile, unless the op is over before one could.
template <class Op>
void call(void (*function)(const Op&), const Op& op, double work) {
    if (work < 1e6) return function(op);
    nb::gil_scoped_release release;
    function(op);
}

void linear(Address x, int x_dtype, long count, long stride, nb::tuple weight, Address y, int y_dtype, float softcap) {
    const Matrix w = matrix(weight);
    const Linear op{rows(x, x_dtype, count, w.cols, stride), w, rows(y, y_dtype, count, w.rows, w.rows), softcap};
    call(active->linear, op, double(count) * w.rows * w.cols);
}

void gated(Address x, int dtype, long count, long stride, nb::tuple gate, nb::tuple up, nb::tuple down, Address y) {
    const Matrix g = matrix(gate), d = matrix(down);
    const Gated op{rows(x, dtype, count, g.cols, stride), g, matrix(up), d, rows(y, dtype, count, d.rows, d.rows)};
    call(active->gated, op, double(count) * g.rows * g.cols);
}

void experts(Address x, int dtype, long count, long stride, Address chosen, Address weights, long per_token, long experts,
             nb::tuple gate_up, nb::tuple down, long gate_up_codes, long gate_up_scales, long down_codes, long down_scales,
             Address y) {
    const Matrix g = matrix(gate_up), d = matrix(down);
    const Experts op{rows(x, dtype, count, g.cols, stride),
                     reinterpret_cast<const int64_t*>(chosen),
                     reinterpret_cast<const void*>(weights),
                     per_token,
                     experts,
                     g,
                     d,
                     gate_up_codes,
                     gate_up_scales,
                     down_codes,
                     down_scales,
                     rows(y, dtype, count, d.rows, d.rows)};
    call(active->experts, op, double(count) * per_token * g.rows * g.cols);
}

void norm(Address x, int dtype, long count, long width, long stride, Address weight, float eps, Address y) {
    const Norm op{rows(x, dtype, count, width, stride), reinterpret_cast<const void*>(weight), eps, rows(y, dtype, count, width, width)};
    call(active->norm, op, double(count) * width);
}

void rope(Address x, Address cos, Address sin, Address y, int dtype, long tokens, long heads, long head, long half_rotated) {
    const Rope op{reinterpret_cast<const void*>(x), reinterpret_cast<const void*>(cos), reinterpret_cast<const void*>(sin),
                  reinterpret_cast<void*>(y), Dtype(dtype), tokens, heads, head, half_rotated};
    call(active->rope, op, double(tokens) * heads * head);
}

void store(Address pages, Address rows, Address slots, long tokens, long bytes) {
    const Store op{reinterpret_cast<void*>(pages), reinterpret_cast<const void*>(rows), reinterpret_cast<const int64_t*>(slots), tokens, bytes};
    call(active->store, op, double(tokens) * bytes);
}

const int32_t* ints(Address a) { return reinterpret_cast<const int32_t*>(a); }

void attend(Address q, Address step, Address pages, Address scales, Address out, int dtype, Address row_start, Address position, Address see_until,
            Address start, Address context, Address table, Address first, long requests, long heads, long kv_heads, long head,
            long width, long key_offset, long value_offset, long window, long table_width, long slots, long split) {
    const Attend op{reinterpret_cast<const void*>(q),
                    reinterpret_cast<const void*>(step),
                    reinterpret_cast<const void*>(pages),
                    reinterpret_cast<const float*>(scales),
                    reinterpret_cast<void*>(out),
                    Dtype(dtype),
                    ints(row_start),
                    ints(position),
                    ints(see_until),
                    ints(start),
                    ints(context),
                    ints(table),
                    ints(first),
                    requests,
                    heads,
                    kv_heads,
                    head,
                    width,
                    key_offset,
                    value_offset,
                    window,
                    table_width,
                    slots,
                    split};
    call(active->attend, op, 1e9);
}

void attend_all(Address q, Address k, Address v, Address out, int dtype, long batch, long count, long heads, long head) {
    const AttendAll op{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v),
                       reinterpret_cast<void*>(out), Dtype(dtype), batch, count, heads, head};
    call(active->attend_all, op, 1e9);
}

void largest(Address x, long count, long width, long stride, long k, Address values, Address places) {
    const Largest op{rows(x, FLOAT32, count, width, stride), k, reinterpret_cast<float*>(values), reinterpret_cast<int64_t*>(places)};
    call(active->largest, op, double(count) * width);
}

void quantize(Address x, int dtype, long count, long width, long stride, int format, bool panels, Address codes, Address scales) {
    const Packing op{rows(x, dtype, count, width, stride), nullptr, Format(format), panels,
                     reinterpret_cast<void*>(codes), reinterpret_cast<void*>(scales)};
    call(active->quantize, op, double(count) * width);
}

void pack(Address codes, Address scales, long count, long width, int format, Address to_codes, Address to_scales) {
    const Packing op{rows(codes, 0, count, width, 0), reinterpret_cast<const void*>(scales), Format(format), true,
                     reinterpret_cast<void*>(to_codes), reinterpret_cast<void*>(to_scales)};
    call(active->pack, op, double(count) * width);
}

void huge_pages(Address data, long bytes) { prefer_huge_pages(reinterpret_cast<void*>(data), bytes); }

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "The CPU kernels. Arguments are addresses and sizes; `cabochon.ops.cpu` is the face.";
    m.def("supported", supported, "Names of the instruction sets that this CPU can run, best first.");
    m.def("active", [] { return active->name; }, "Name of the instruction set in use.");
    m.def("use", use, "Use an instruction set by name.");
    m.def("threads", threads, "How many threads share the work.");
    m.def("set_threads", set_threads);
    m.def("linear", linear);
    m.def("gated", gated);
    m.def("experts", experts);
    m.def("norm", norm);
    m.def("rope", rope);
    m.def("store", store);
    m.def("attend", attend);
    m.def("attend_all", attend_all);
    m.def("largest", largest);
    m.def("quantize", quantize);
    m.def("pack", pack);
    m.def("huge_pages", huge_pages);
}
