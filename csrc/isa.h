// Which instruction sets the kernels are built for, and which of them this CPU runs.
//
// Every kernel source is compiled once for each of them, inside a namespace of that name (LATENTKV_ISA). Nothing but
// tables of function pointers leaves these namespaces; LATENTKV_TABLE declares one table for each and picks at run time.
#pragma once

namespace latentkv {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3 };

// Built into this extension and supported by this CPU and operating system.
bool runs(Isa isa);

#if LATENTKV_X86
#define LATENTKV_TABLE(Table, name)                    \
  namespace portable { extern const Table name; }      \
  namespace avx2 { extern const Table name; }          \
  namespace avx512 { extern const Table name; }        \
  namespace avx512bf16 { extern const Table name; }    \
  inline const Table& name(Isa isa) {                  \
    switch (isa) {                                     \
      case Isa::avx512bf16: return avx512bf16::name;   \
      case Isa::avx512: return avx512::name;           \
      case Isa::avx2: return avx2::name;               \
      default: return portable::name;                  \
    }                                                  \
  }
#else
#define LATENTKV_TABLE(Table, name)               \
  namespace portable { extern const Table name; } \
  inline const Table& name(Isa) { return portable::name; }
#endif

}  // namespace latentkv
