// A tile of cached tokens: where its rows lie, and the rows as an arithmetic takes them.
#pragma once

#include "attention.h"
#include "attention_decode.h"
#include "attention_fetch.h"
#include "attention_vectors.h"

namespace latentkv::LATENTKV_ISA {

// Rows of one tile as they are stored. A row that no query reads is null: it may hold anything, even NaN.
template <int TILE>
struct StoredTile {
  const char* keys[TILE];
  const char* values[TILE];
  int tokens;
};

template <int TILE>
LATENTKV_INLINE void locate(const Attention& a, const Group& group, int first, int last, StoredTile<TILE>& tile) {
  const Sequence& sequence = a.sequences[group.sequence];
  const char* keys = a.keys.base + group.kv_head * a.keys.head_bytes;
  const char* values = a.values.base + group.kv_head * a.values.head_bytes;
  tile.tokens = last - first;
  int s = first;
  for (; s < group.first && s < last; s++) tile.keys[s - first] = tile.values[s - first] = nullptr;
  while (s < last) {
    std::int64_t slot = sequence.first_slot + s;
    int run = last - s;
    if (sequence.pages) {
      const int size = sequence.page_size, offset = s % size;
      slot = (std::int64_t)sequence.pages[s / size] * size + offset;
      run = run < size - offset ? run : size - offset;
    }
    for (int i = 0; i < run; i++) {
      tile.keys[s - first + i] = keys + (slot + i) * a.keys.slot_bytes;
      tile.values[s - first + i] = values + (slot + i) * a.values.slot_bytes;
    }
    s += run;
  }
}

// Hides the rows of tokens `first ..` that no row of the group reads: there may be gaps between their ranges.
template <int TILE>
LATENTKV_INLINE void hide_unread(const Attention& a, const Group& group, int first, StoredTile<TILE>& tile) {
  bool read[TILE] = {};
  for (int t = group.row; t < group.row + group.rows; t++) {
    const int from = after(first, a.start ? a.start[t] : 0), stop = after(first, a.stop[t]);
    const int to = stop < tile.tokens ? stop : tile.tokens;
    if (from == 0 && to == tile.tokens) return;
    for (int i = from; i < to; i++) read[i] = true;
  }
  for (int i = 0; i < tile.tokens; i++)
    if (!read[i]) tile.keys[i] = tile.values[i] = nullptr;
}

// The rows of one tile as an arithmetic takes them: in place where they are stored so, else decoded into `scratch`.
//
// A format whose rows are not the arithmetic's elements is decoded a row at a time, and everything after this works on
// elements.
template <class A>
struct Tile {
  using Element = typename A::Element;
  const Element* keys[A::TILE];
  const Element* values[A::TILE];
  int key_width, value_width;  // padded to A::STEP
  bool in_place;
  Element *zeros, *key_scratch, *value_scratch;

  static int padded(int width) { return (width + A::STEP - 1) / A::STEP * A::STEP; }
  static bool reads_in_place(const Attention& a) {
    return a.kv_format == (RowFormat)A::DTYPE && !a.gather && a.keys.width % A::STEP == 0 &&
           (a.values_in_keys || a.values.width % A::STEP == 0);
  }

  // Row i; those after the tile's last token are zeros.
  void take(const Attention& a, const StoredTile<A::TILE>& stored, int i) {
    if (i >= stored.tokens) {
      keys[i] = values[i] = zeros;
      return;
    }
    keys[i] = row(stored.keys[i], a, a.keys.width, key_width, key_scratch + i * key_width);
    values[i] = a.values_in_keys
                    ? keys[i]
                    : row(stored.values[i], a, a.values.width, value_width, value_scratch + i * value_width);
  }

 private:
  const Element* row(const char* stored, const Attention& a, int width, int padded, Element* scratch) {
    if (!stored) return zeros;
    if (in_place) return (const Element*)stored;
    decode_row(stored, a.kv_format, width, a.values_in_keys ? width - a.values.width : 0, padded, scratch);
    return scratch;
  }
};

}  // namespace latentkv::LATENTKV_ISA
