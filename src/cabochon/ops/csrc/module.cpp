// The Python face: addresses and sizes in, nothing out. `ops/cpu.py` checks shapes, types and devices; nothing is checked here.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <cstring>
#ifdef __GLIBC__
#include <malloc.h>
#endif

#include "amx.h"
#include "pool.h"

namespace nb = nanobind;
using namespace cabochon;

namespace {

struct Isa {
    const Ops* ops;
    bool supported;
};

bool tiles_admitted = false;

// Best first; the emulated one, which tests compare with, last.
std::vector<Isa> isas() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    const bool wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
                      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
    const bool half = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool wide_bf16 = wide && __builtin_cpu_supports("avx512bf16");
    return {
#if CABOCHON_HAS_AMX
        {&amx, wide_bf16 && tiles_admitted},
#endif
        {&avx512_bf16, wide_bf16}, {&avx512, wide}, {&avx2, half}, {&plain, true},
#if CABOCHON_EMULATED_AMX
        {&amx_emulated, wide_bf16},
#endif
    };
#else
    return {{&plain, true}};
#endif
}

const Ops* best() {
    for (const Isa& isa : isas())
        if (isa.supported) return isa.ops;
    return &plain;
}

const Ops* active = best();

std::vector<std::string> supported() {
    std::vector<std::string> names;
    for (const Isa& isa : isas())
        if (isa.supported) names.push_back(isa.ops->name);
    return names;
}

const Ops& named(const std::string& name) {
    for (const Isa& isa : isas())
        if (isa.supported && name == isa.ops->name) return *isa.ops;
    throw nb::value_error("this CPU has no such instruction set, see supported()");
}

void use(const std::string& name) { active = &named(name); }

std::string admit_tiles() {
    if (!has_tiles()) return "";
    const std::string refusal = refuse_tiles();
    tiles_admitted = refusal.empty();
    active = best();
    return refusal;
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

// Numbers of rows, all of which the table has.
const int64_t* checked(Address numbers, long count, const Matrix& table) {
    const auto* ids = reinterpret_cast<const int64_t*>(numbers);
    for (long i = 0; i < count; ++i)
        if (ids[i] < 0 || ids[i] >= table.rows) throw nb::index_error("no such row in the table");
    return ids;
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

void head_at(Address x, int dtype, long count, long some, long stride, nb::tuple table, Address ids, Address y) {
    const Matrix w = matrix(table);
    const HeadAt op{rows(x, dtype, count, w.cols, stride), w, checked(ids, count * some, w), some, reinterpret_cast<float*>(y)};
    call(active->head_at, op, double(count) * some * w.cols);
}

void gated(Address x, int dtype, long count, long stride, nb::tuple gate, nb::tuple up, nb::tuple down, Address y) {
    const Matrix g = matrix(gate), d = matrix(down);
    const Gated op{rows(x, dtype, count, g.cols, stride), g, matrix(up), d, rows(y, FLOAT32, count, d.rows, d.rows)};
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
                     rows(y, FLOAT32, count, d.rows, d.rows)};
    call(active->experts, op, double(count) * per_token * g.rows * g.cols);
}

void norm(Address x, int dtype, long count, long width, long stride, Address weight, float eps, Address y, int to) {
    const Norm op{rows(x, dtype, count, width, stride), reinterpret_cast<const void*>(weight), eps, rows(y, to, count, width, width)};
    call(active->norm, op, double(count) * width);
}

void per_layer(Address x, long count, long width, Address onto, Address weight, float eps, float scale, Address y, int dtype) {
    const PerLayer op{reinterpret_cast<const float*>(x), count, width, reinterpret_cast<const void*>(onto),
                      reinterpret_cast<const void*>(weight), eps, scale, reinterpret_cast<void*>(y), Dtype(dtype)};
    call(active->per_layer, op, double(count) * width);
}

// Torch's own wake a team of threads for any number of angles, who then stay awake and hold up ours.
void cos_sin(Address positions, long count, Address frequencies, long width, Address cos, Address sin) {
    const auto* position = reinterpret_cast<const int32_t*>(positions);
    const auto* frequency = reinterpret_cast<const float*>(frequencies);
    for (long i = 0; i < count * width; ++i) {
        const float angle = float(position[i / width]) * frequency[i % width];
        reinterpret_cast<float*>(cos)[i] = std::cos(angle);
        reinterpret_cast<float*>(sin)[i] = std::sin(angle);
    }
}

void rope(Address x, Address cos, Address sin, Address y, int dtype, long tokens, long heads, long head, long half_rotated) {
    const Rope op{reinterpret_cast<const float*>(x), reinterpret_cast<const float*>(cos), reinterpret_cast<const float*>(sin),
                  reinterpret_cast<void*>(y), Dtype(dtype), tokens, heads, head, half_rotated};
    call(active->rope, op, double(tokens) * heads * head);
}

void store(Address pages, Address scales, Address rows, Address slots, int dtype, long tokens, long kv_heads, long width, long split) {
    const Store op{reinterpret_cast<void*>(pages), reinterpret_cast<float*>(scales), reinterpret_cast<const void*>(rows),
                   reinterpret_cast<const int64_t*>(slots), Dtype(dtype), tokens, kv_heads, width, split};
    call(active->store, op, double(tokens) * kv_heads * width);
}

// Are modules and weights still where they were found? Links are (dictionary, key, value, address of a tensor's numbers or 0).
bool unchanged(const nb::list& links) {
    for (const nb::handle link : links) {
        PyObject* const* part = &PyTuple_GET_ITEM(link.ptr(), 0);
        if (PyDict_GetItemWithError(part[0], part[1]) != part[2]) return false;
        const auto address = nb::cast<Address>(nb::handle(part[3]));
        if (address && nb::cast<Address>(nb::handle(part[2]).attr("data_ptr")()) != address) return false;
    }
    return true;
}

const int32_t* ints(Address a) { return reinterpret_cast<const int32_t*>(a); }

// Who asks, and where the past of each request lies: (table, table_width, first, row_start, position, see_until, start,
// context, requests).
void ask(Attend& op, const nb::tuple& a) {
    op.table = ints(nb::cast<Address>(a[0])), op.table_width = nb::cast<long>(a[1]), op.first = ints(nb::cast<Address>(a[2]));
    op.row_start = ints(nb::cast<Address>(a[3])), op.position = ints(nb::cast<Address>(a[4]));
    op.see_until = ints(nb::cast<Address>(a[5])), op.start = ints(nb::cast<Address>(a[6]));
    op.context = ints(nb::cast<Address>(a[7])), op.requests = nb::cast<long>(a[8]);
}

// The rows of the step and the pages of what came before: (step, pages, scales, slots, split); without pages there is no past.
void look_in(Attend& op, const nb::tuple& a) {
    op.step = reinterpret_cast<const void*>(nb::cast<Address>(a[0]));
    op.pages = reinterpret_cast<const void*>(nb::cast<Address>(a[1]));
    op.scales = reinterpret_cast<const float*>(nb::cast<Address>(a[2]));
    op.slots = nb::cast<long>(a[3]), op.split = nb::cast<long>(a[4]);
    if (!op.pages) op.table = op.first = nullptr, op.table_width = 0;
}

// The shape of stored rows: (kv_heads, width, key_offset, value_offset, window).
void shape_rows(Attend& op, const nb::tuple& shape) {
    op.kv_heads = nb::cast<long>(shape[0]), op.width = nb::cast<long>(shape[1]);
    op.key_offset = nb::cast<long>(shape[2]), op.value_offset = nb::cast<long>(shape[3]);
    op.window = nb::cast<long>(shape[4]);
}

void attend(Address q, nb::tuple asking, nb::tuple rows, nb::tuple shape, Address out, int dtype, long heads, long head) {
    Attend op{};
    ask(op, asking), look_in(op, rows), shape_rows(op, shape);
    op.q = reinterpret_cast<const void*>(q);
    op.out = reinterpret_cast<void*>(out), op.dtype = Dtype(dtype), op.heads = heads, op.head = head;
    call(active->attend, op, 1e9);
}

// Layers whose weights were read once, to run one after the other.
class PreparedLayers {
public:
    // Of each layer (dtype, eps, heads, head), addresses of eight vectors, nine matrices, the shape of rows, and (kind, source,
    // stores): which of a step's kinds and sources it reads, and whether it is the last to read the source.
    explicit PreparedLayers(const std::vector<nb::tuple>& layers) {
        for (const nb::tuple& layer : layers) parts.push_back(part(layer));
    }

    // `x` [count, width] through all of them into `y`. `kinds`: (cos, sin, half_rotated, slots, asking), `sources`: what `look_in`
    // reads, and where value = key the key norm's weight of the layer whose rows these are. Nothing of the interpreter is in the caches between two layers.
    void run(Address x, long count, Address y, Address ple, long ple_stride, long tokens, const std::vector<nb::tuple>& kinds,
             const std::vector<nb::tuple>& sources) const {
        std::vector<Layer> ops;
        std::vector<Store> stores;
        for (const Part& part : parts) {
            const LayerWeights& w = part.weights;
            const nb::tuple& kind = kinds[part.kind];
            const auto at = [&](int i) { return reinterpret_cast<const void*>(nb::cast<Address>(kind[i])); };
            Attend seen = part.shape;
            ask(seen, nb::cast<nb::tuple>(kind[4])), look_in(seen, sources[part.source]);
            const long width = w.q.cols, before = ops.size();
            ops.push_back({&w, rows(before ? y : x, FLOAT32, count, width, width), reinterpret_cast<float*>(y), static_cast<const float*>(at(0)),
                           static_cast<const float*>(at(1)), nb::cast<long>(kind[2]), reinterpret_cast<const void*>(nb::cast<Address>(sources[part.source][5])),
                           reinterpret_cast<const void*>(ple), ple_stride, seen});
            ple += ple ? w.ple_gate.rows * (w.dtype == FLOAT32 ? 4 : 2) : 0;
            const auto* slots = static_cast<const int64_t*>(at(3));
            const bool kept = part.stores && slots && seen.pages;
            stores.push_back({const_cast<void*>(seen.pages), const_cast<float*>(seen.scales), seen.step, kept ? slots : nullptr,
                              w.dtype, tokens, w.kv_heads, seen.width, seen.split});
        }
        nb::gil_scoped_release release;
        for (size_t i = 0; i < ops.size(); ++i) {
            active->layer(ops[i]);
            // Only now: new rows may lie in the slots of rows that leave the window, which every reader had to see first.
            if (stores[i].slots) active->store(stores[i]);
        }
    }

private:
    struct Part {
        LayerWeights weights;
        Attend shape;
        int kind, source;
        bool stores;
    };
    std::vector<Part> parts;

    static Part part(const nb::tuple& layer) {
        const auto head = nb::cast<nb::tuple>(layer[0]), vectors = nb::cast<nb::tuple>(layer[1]), matrices = nb::cast<nb::tuple>(layer[2]);
        const auto place = nb::cast<nb::tuple>(layer[4]);
        Part p{{}, {}, nb::cast<int>(place[0]), nb::cast<int>(place[1]), nb::cast<bool>(place[2])};
        LayerWeights& w = p.weights;
        const void** norms[] = {&w.input_norm, &w.q_norm, &w.k_norm, &w.post_attention_norm, &w.pre_feedforward_norm,
                                &w.post_feedforward_norm, &w.post_ple_norm, &w.scalar};
        for (size_t i = 0; i < std::size(norms); ++i) *norms[i] = reinterpret_cast<const void*>(nb::cast<Address>(vectors[i]));
        Matrix* products[] = {&w.q, &w.k, &w.v, &w.o, &w.gate, &w.up, &w.down, &w.ple_gate, &w.ple_projection};
        for (size_t i = 0; i < std::size(products); ++i) *products[i] = matrix(nb::cast<nb::tuple>(matrices[i]));
        shape_rows(p.shape, nb::cast<nb::tuple>(layer[3]));
        w.dtype = p.shape.dtype = Dtype(nb::cast<int>(head[0]));
        w.eps = nb::cast<float>(head[1]);
        w.heads = p.shape.heads = nb::cast<long>(head[2]);
        w.head = p.shape.head = nb::cast<long>(head[3]);
        w.kv_heads = p.shape.kv_heads;
        return p;
    }
};

void attend_all(Address q, Address k, Address v, Address out, int dtype, long batch, long count, long heads, long head) {
    const AttendAll op{reinterpret_cast<const void*>(q), reinterpret_cast<const void*>(k), reinterpret_cast<const void*>(v),
                       reinterpret_cast<void*>(out), Dtype(dtype), batch, count, heads, head};
    call(active->attend_all, op, 1e9);
}

void largest(Address x, long count, long width, long stride, long k, Address values, Address places) {
    const Largest op{rows(x, FLOAT32, count, width, stride), k, reinterpret_cast<float*>(values), reinterpret_cast<int64_t*>(places)};
    call(active->largest, op, double(count) * width);
}

void draw(Address x, long count, long width, long stride, Address settings, Address tokens, Address best) {
    const Draw op{rows(x, FLOAT32, count, width, stride), reinterpret_cast<const double*>(settings), reinterpret_cast<int64_t*>(tokens),
                  reinterpret_cast<float*>(best)};
    call(active->draw, op, double(count) * width);
}

void log_sum(Address x, long count, long width, long stride, Address y) {
    const LogSum op{rows(x, FLOAT32, count, width, stride), reinterpret_cast<float*>(y)};
    call(active->log_sum, op, double(count) * width);
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

void lookup(Address ids, long count, nb::tuple table, bool panels, float scale, Address y, int dtype) {
    const Matrix w = matrix(table);
    const Lookup op{checked(ids, count, w), count, w, panels, scale, reinterpret_cast<void*>(y), Dtype(dtype)};
    call(active->lookup, op, double(count) * op.table.cols);
}

uint64_t read_memory(Address data, long bytes) {
    nb::gil_scoped_release release;
    return read_through(reinterpret_cast<const void*>(data), bytes);
}

double spin(long rounds) {
    nb::gil_scoped_release release;
    return active->spin(rounds);
}

void huge_pages(Address data, long bytes) { prefer_huge_pages(reinterpret_cast<void*>(data), bytes); }

// What was freed goes back to the system, as far as the C library knows how.
void give_back() {
#ifdef __GLIBC__
    malloc_trim(0);
#endif
}

const void* at(Address a) { return reinterpret_cast<const void*>(a); }

// Where the ranges of a clipped matrix lie, as Python hands them over: dtypes and addresses of four numbers, or nothing.
struct Ends {
    Dtype dtype[4];
    const void* place[4];
    size_t count;

    explicit Ends(const nb::tuple& clip) : count(clip.size() / 2) {
        for (size_t i = 0; i < count; ++i) dtype[i] = Dtype(nb::cast<int>(clip[2 * i])), place[i] = at(nb::cast<Address>(clip[2 * i + 1]));
    }
};

// The ranges in and out of a clipped matrix.
struct Clip {
    Range in, out;

    explicit Clip(const Ends& ends) {
        float* const numbers[] = {&in.low, &in.high, &out.low, &out.high};
        for (size_t i = 0; i < ends.count; ++i) *numbers[i] = bfloat16(ends.dtype[i], ends.place[i]);
    }

    // A number of either type, rounded to nearest even as `torch.clamp` rounds it.
    static float bfloat16(Dtype dtype, const void* from) {
        uint32_t bits = 0;
        memcpy(&bits, from, dtype == BFLOAT16 ? 2 : 4);
        bits = dtype == BFLOAT16 ? bits << 16 : (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000;
        float value;
        memcpy(&value, &bits, 4);
        return value;
    }
};

// Whether it was done: not if the second matrix cuts x to another range than the first.
bool product(Address x, long count, long cols, long stride, Address first, Address second, long outputs, nb::tuple clip,
             nb::tuple second_clip, int how, Address onto, long onto_stride, Address y) {
    const auto weight = [&](Address w) { return Matrix{DENSE, BFLOAT16, at(w), nullptr, outputs, cols}; };
    const Clip one{Ends(clip)}, other{Ends(second_clip)};
    if (how >= GELU_TIMES && (one.in.low != other.in.low || one.in.high != other.in.high)) return false;
    const Product op{rows(x, BFLOAT16, count, cols, stride), {weight(first), weight(second)}, one.in, {one.out, other.out},
                     How(how), rows(y, BFLOAT16, count, outputs, outputs), at(onto), onto_stride};
    call(active->product, op, 1e9);
    return true;
}

void settle(Address x, int dtype, long count, long width, long stride, Address weight, int weight_dtype, Address onto, float eps,
            float bound, float share, Address y) {
    const Settle op{rows(x, dtype, count, width, stride), at(weight), at(onto), eps, bound, share, reinterpret_cast<void*>(y), width,
                    {}, Dtype(weight_dtype)};
    call(active->settle, op, double(count) * width);
}

void turn(Address x, Address weight, Address cos, Address sin, Address y, int dtype, float eps, long tokens, long places, long heads,
          long head) {
    const Turn op{at(x), at(weight), at(cos), at(sin), reinterpret_cast<void*>(y), Dtype(dtype), eps, tokens, places, heads, head};
    call(active->turn, op, double(tokens) * heads * head);
}

void recent(Address q, Address k, Address v, Address relative, Address scale, Address out, int dtype, float key_scale, float cap,
            long tokens, long heads, long head, long reach) {
    const Recent op{at(q), at(k), at(v), at(relative), reinterpret_cast<const float*>(scale), reinterpret_cast<void*>(out),
                    Dtype(dtype), key_scale, cap, tokens, heads, head, reach, heads * head};
    call(active->recent, op, double(tokens) * heads * head * reach);
}

void blend(Address x, int dtype, long count, long width, long stride, Address taps, Address weight, long tap_count, float eps,
           float bound, Address y) {
    const Blend op{rows(x, dtype, count, width, stride), at(taps), at(weight), tap_count, eps, bound, reinterpret_cast<void*>(y), width};
    call(active->blend, op, double(count) * width * tap_count);
}

void subsample(Address mel, long count, long width, long stride, Address taps, Address norm, Address second_taps, Address second_norm,
               long channels, long outputs, float eps, Address y) {
    const Subsample op{rows(mel, BFLOAT16, count, width, stride), at(taps), at(norm), at(second_taps), at(second_norm),
                       reinterpret_cast<void*>(y), eps, channels, outputs};
    call(active->subsample, op, 1e9);
}

// A conformer's layer whose weights were looked up once. Ranges are read at every run: they are few numbers.
struct PreparedConformer {
    ConformerWeights weights;
    std::vector<Ends> ends;  // in the order of `matrices`

    // `numbers`: heads, taps, eps, share, key_scale, cap. `vectors`: norms in the order of the network, and the taps.
    // `matrices`: (address, rows, columns, ranges) of up, down, q, k, v, post, relative, start, end, up, down.
    PreparedConformer(nb::tuple numbers, nb::tuple vectors, nb::tuple matrices) : weights{} {
        ConformerWeights& w = weights;
        w.heads = nb::cast<long>(numbers[0]), w.tap_count = nb::cast<long>(numbers[1]);
        float* const floats[] = {&w.eps, &w.share, &w.key_scale, &w.cap};
        for (int i = 0; i < 4; ++i) *floats[i] = nb::cast<float>(numbers[i + 2]);
        const void** const norms[] = {&w.before_first, &w.after_first, &w.before_attention, &w.after_attention, &w.before_convolution,
                                      &w.in_convolution, &w.before_second, &w.after_second, &w.last, &w.taps};
        for (size_t i = 0; i < vectors.size(); ++i) *norms[i] = at(nb::cast<Address>(vectors[i]));
        for (size_t i = 0; i < matrices.size(); ++i) {
            const auto m = nb::cast<nb::tuple>(matrices[i]);
            clipped(w, i).matrix = {DENSE, BFLOAT16, at(nb::cast<Address>(m[0])), nullptr, nb::cast<long>(m[1]), nb::cast<long>(m[2])};
            ends.emplace_back(nb::cast<nb::tuple>(m[3]));
        }
    }

    static Clipped& clipped(ConformerWeights& w, size_t i) {
        Clipped* const all[] = {&w.up[0], &w.down[0], &w.q, &w.k, &w.v, &w.post, &w.relative, &w.start, &w.end, &w.up[1], &w.down[1]};
        return *all[i];
    }

    void run(Address x, long count, Address distance, long reach, Address scale, float bound, Address y, const PreparedConformer* after) const {
        ConformerWeights w = weights;
        for (size_t i = 0; i < ends.size(); ++i) {
            const Clip clip(ends[i]);
            clipped(w, i).in = clip.in, clipped(w, i).out = clip.out;
        }
        const long width = w.q.matrix.cols;
        const Conformer op{&w, rows(x, BFLOAT16, count, width, width), at(distance), reach, reinterpret_cast<const float*>(scale), bound,
                           reinterpret_cast<void*>(y), after ? &after->weights.up[0].matrix : nullptr};
        call(active->conformer, op, 1e9);
    }
};

}  // namespace

NB_MODULE(_cpu, m) {
    m.doc() = "The CPU kernels. Arguments are addresses and sizes; `cabochon.ops.cpu` is the face.";
    m.def("supported", supported, "Names of the instruction sets that this CPU can run, best first.");
    m.def("active", [] { return active->name; }, "Name of the instruction set in use.");
    m.def("use", use, "Use an instruction set by name.");
    m.def("matrix_tiles", has_tiles, "Whether this CPU multiplies tiles.");
    m.def("admit_tiles", admit_tiles, "Take AMX tiles where there are any that work; else why not.");
    m.def("same_products", [](const std::string& a, const std::string& b) { return same_products(named(a), named(b)); },
          "Whether two instruction sets give the same bits for integer products.");
    m.def("threads", threads, "How many threads share the work.");
    m.def("set_threads", set_threads);
    m.def("set_team", set_team);
    m.def("linear", linear);
    m.def("head_at", head_at);
    m.def("gated", gated);
    m.def("experts", experts);
    m.def("norm", norm);
    m.def("per_layer", per_layer);
    m.def("cos_sin", cos_sin);
    m.def("rope", rope);
    m.def("store", store);
    m.def("attend", attend);
    nb::class_<PreparedLayers>(m, "Layers", "Decoder layers whose weights were looked up once.")
        .def(nb::init<const std::vector<nb::tuple>&>())
        .def("run", &PreparedLayers::run);
    m.def("unchanged", unchanged);
    nb::class_<PreparedConformer>(m, "Conformer", "A conformer's layer whose weights were looked up once.")
        .def(nb::init<nb::tuple, nb::tuple, nb::tuple>())
        .def("run", &PreparedConformer::run, nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg(), nb::arg().none());
    m.def("attend_all", attend_all);
    m.def("product", product);
    m.def("settle", settle);
    m.def("turn", turn);
    m.def("recent", recent);
    m.def("blend", blend);
    m.def("subsample", subsample);
    m.def("largest", largest);
    m.def("draw", draw);
    m.def("log_sum", log_sum);
    m.def("quantize", quantize);
    m.def("pack", pack);
    m.def("spin", spin, "Multiplies in registers only, on all threads; how many operations those were.");
    m.def("lookup", lookup);
    m.def("huge_pages", huge_pages);
    m.def("give_back", give_back);
    m.def("read", read_memory);
}
