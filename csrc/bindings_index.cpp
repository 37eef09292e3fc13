// Python's way to the indexer of sparse attention. ValueError is raised with what the lengths or pages do wrong.
#include <nanobind/nanobind.h>

#include "attention_plan.h"
#include "cache_write.h"
#include "index.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {
namespace {

using Address = std::uintptr_t;

template <class T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

Matrix matrix(Address data, std::ptrdiff_t stride, int dtype) {
  return {reinterpret_cast<void*>(data), stride, static_cast<DType>(dtype)};
}

}  // namespace

void bind_index(nb::module_& m) {
  m.def(
      "write_index_keys",
      recordable(+[](Isa isa, Address pages, Address slots, std::ptrdiff_t row_bytes, std::int64_t num_slots, int format,
         int tokens, int dim, int rope_dim, Address k, std::ptrdiff_t stride, int dtype, Address weight, Address bias,
         int weight_dtype, double eps, Address cos, Address sin, bool interleaved) {
        const KeyRows to = {reinterpret_cast<unsigned char*>(pages), at<std::int64_t>(slots), row_bytes, num_slots,
                            static_cast<RowFormat>(format), tokens, dim, rope_dim};
        return (Status)cache_write(isa).write_index_keys(
            to, matrix(k, stride, dtype), at<void>(weight), at<void>(bias), static_cast<DType>(weight_dtype), (float)eps,
            {at<float>(cos), at<float>(sin), interleaved});
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first token whose slot is not in the cache, or -1.");
  m.def(
      "write_pooled_keys",
      recordable(+[](Isa isa, Address pages, Address rings, int ring_dtype, int ring, Address slots,
         std::ptrdiff_t row_bytes, std::int64_t num_slots, int page_size, int pool, int format, int tokens, int dim,
         Address k, std::ptrdiff_t k_stride, Address gate, std::ptrdiff_t gate_stride, int dtype, Address weight,
         Address bias, int weight_dtype, double eps, Address ape) {
        const KeyRows keys = {reinterpret_cast<unsigned char*>(pages), at<std::int64_t>(slots), row_bytes, num_slots,
                              static_cast<RowFormat>(format), tokens, dim, 0};
        const PoolRows to = {keys, reinterpret_cast<unsigned char*>(rings), static_cast<DType>(ring_dtype), ring,
                             page_size, pool, at<float>(ape)};
        return (Status)cache_write(isa).write_pooled_keys(to, matrix(k, k_stride, dtype), matrix(gate, gate_stride, dtype),
                                                          at<void>(weight), at<void>(bias),
                                                          static_cast<DType>(weight_dtype), (float)eps);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The first token whose slot is not in the cache, or -1.");
  m.def(
      "weigh_heads",
      recordable(+[](Isa isa, Address x, std::ptrdiff_t stride, int dtype, Address weight, double scale, Address out,
         int tokens, int dim, int heads) {
        index(isa).weigh_heads(matrix(x, stride, dtype), at<float>(weight), (float)scale,
                               reinterpret_cast<float*>(out), tokens, dim, heads);
      }),
      nb::call_guard<nb::gil_scoped_release>(), "x [tokens, dim], weight [heads, dim] -> out [tokens, heads], float32.");
  m.def(
      "select_slots",
      recordable(+[](Isa isa, Address q, std::ptrdiff_t q_row, std::ptrdiff_t q_head, int q_dtype, Address weights,
         std::ptrdiff_t weights_row, Address keys, int key_format, std::int64_t key_bytes, int num_pages, int page_size,
         Address table, std::int64_t table_row, int table_pages, int sequences, Address q_start, Address start,
         Address stop, int rows, int heads, int dim, int count, int pool, bool open_pool, Address slots) {
        check_ranges({sequences, rows, heads, 1, at<std::int32_t>(q_start), at<std::int32_t>(start),
                      at<std::int32_t>(stop), 1},
                     {at<std::int32_t>(table), table_row, table_pages, page_size, num_pages});
        index(isa).choose({{reinterpret_cast<void*>(q), q_row, q_head, static_cast<DType>(q_dtype)},
                           matrix(weights, weights_row, 0), at<char>(keys), static_cast<RowFormat>(key_format),
                           key_bytes, at<std::int32_t>(table), table_row, page_size / pool, sequences, at<std::int32_t>(q_start),
                           at<std::int32_t>(start), at<std::int32_t>(stop), rows, heads, dim, count, pool, open_pool,
                           reinterpret_cast<std::int32_t*>(slots)});
      }),
      nb::call_guard<nb::gil_scoped_release>(), "The slots of the tokens of the best scores, int32.");
}

}  // namespace latentkv
