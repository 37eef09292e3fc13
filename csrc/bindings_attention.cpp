// Python's way to the attention kernels. ValueError is raised with what the lengths or pages do wrong.
#include <nanobind/nanobind.h>
#include <omp.h>

#include "attention_plan.h"
#include "recording.h"

namespace nb = nanobind;

namespace latentkv {
namespace {

using Address = std::uintptr_t;

template <class T>
const T* at(Address address) {
  return reinterpret_cast<const T*>(address);
}

AttentionPlan& plan() {
  static thread_local AttentionPlan plan;
  return plan;
}

struct Vectors {
  Address q;
  int q_dtype;
  std::int64_t q_row, q_head;
  Address out;
  int out_dtype;
  std::int64_t out_row, out_head;
  Address lse;
};

Attention start_call(const Vectors& v, int heads, int kv_format, float scale) {
  Attention a{};
  a.q = at<char>(v.q);
  a.q_dtype = static_cast<DType>(v.q_dtype);
  a.q_row = v.q_row;
  a.q_head = v.q_head;
  a.out = reinterpret_cast<char*>(v.out);
  a.out_dtype = static_cast<DType>(v.out_dtype);
  a.out_row = v.out_row;
  a.out_head = v.out_head;
  a.lse = reinterpret_cast<float*>(v.lse);
  a.heads = heads;
  a.kv_format = static_cast<RowFormat>(kv_format);
  a.scale = scale;
  return a;
}

}  // namespace

void bind_attention(nb::module_& m) {
  m.def(
      "attend_pages",
      recordable(+[](Isa isa, Address q, int q_dtype, std::int64_t q_row, std::int64_t q_head, Address out, int out_dtype,
         std::int64_t out_row, std::int64_t out_head, Address lse, int rows, int heads, int kv_heads, Address pages,
         int kv_format, std::int64_t slot_bytes, std::int64_t head_bytes, std::int64_t value_offset, int key_width,
         int key_bytes, int value_width, int value_bytes, int num_pages, int page_size, Address table, std::int64_t table_row, int table_pages,
         int sequences, Address q_start, Address start, Address stop, Address slots, int slots_per_row, bool longer_ranges,
         float scale, bool int8_products) {
        Attention a = start_call({q, q_dtype, q_row, q_head, out, out_dtype, out_row, out_head, lse}, heads, kv_format,
                                 scale);
        a.keys = {at<char>(pages), slot_bytes, head_bytes, key_width, key_bytes};
        a.values = {at<char>(pages) + value_offset, slot_bytes, head_bytes, value_width, value_bytes};
        a.values_in_keys = value_offset == 0;
        a.int8_products = int8_products;
        const RaggedRows ragged = {sequences, rows, heads, kv_heads, at<std::int32_t>(q_start), at<std::int32_t>(start),
                                   at<std::int32_t>(stop), omp_get_max_threads()};
        const PageTable pages_of = {at<std::int32_t>(table), table_row, table_pages, page_size, num_pages};
        if (!slots) {
          plan().of_pages(ragged, pages_of);
        } else if (longer_ranges) {
          plan().of_longer_ranges(ragged, pages_of, at<std::int32_t>(slots), slots_per_row);
        } else {
          plan().of_slots(ragged, at<std::int32_t>(slots), slots_per_row, (std::int64_t)num_pages * page_size);
        }
        plan().fill(a);
        attention(isa).attend(a);
      }),
      nb::call_guard<nb::gil_scoped_release>(),
      "Attention over paged rows: absorbed MLA (value_offset 0: values begin their keys' rows) or grouped-query.");
  m.def(
      "attend_new_tokens",
      recordable(+[](Isa isa, Address q, int q_dtype, std::int64_t q_row, std::int64_t q_head, Address out, int out_dtype,
         std::int64_t out_row, std::int64_t out_head, Address lse, int rows, int heads, Address keys, Address values,
         int kv_dtype, std::int64_t key_row_bytes, std::int64_t key_head_bytes, std::int64_t value_row_bytes,
         std::int64_t value_head_bytes, int key_width, int value_width, int sequences, Address q_start,
         Address kv_start, bool causal, float scale) {
        Attention a = start_call({q, q_dtype, q_row, q_head, out, out_dtype, out_row, out_head, lse}, heads, kv_dtype,
                                 scale);
        const int size = sizeof_dtype(static_cast<DType>(kv_dtype));
        a.keys = {at<char>(keys), key_row_bytes, key_head_bytes, key_width, key_width * size};
        a.values = {at<char>(values), value_row_bytes, value_head_bytes, value_width, value_width * size};
        a.gather = true;  // up to 128 query vectors read each tile
        plan().of_new_tokens({sequences, rows, heads, heads, at<std::int32_t>(q_start), nullptr, nullptr,
                              omp_get_max_threads()},
                             at<std::int32_t>(kv_start), causal);
        plan().fill(a);
        attention(isa).attend(a);
      }),
      nb::call_guard<nb::gil_scoped_release>(),
      "Attention over keys and values of each head that lie in rows; causal rows end with the last key.");
}

}  // namespace latentkv
