// Which instruction sets the kernels are built for, and which of them this CPU runs.
//
// Every kernel source is compiled once for each of them, inside a namespace of that name (LATENTKV_ISA). Nothing but
// tables of function pointers leaves these namespaces; LATENTKV_TABLE declares one table for each and picks at run time.
#pragma once

namespace latentkv {

enum class Isa : int { portable = 0, avx2 = 1, avx512 = 2, avx512bf16 = 3, amx = 4 };

// Built into this extension and supported by this CPU and operating system.
bool runs(Isa isa);

// LATENTKV_AMX_TABLE is of kernels that are compiled for amx, too; the others' are avx512bf16's there.
#if LATENTKV_X86
#define LATENTKV_TABLES(Table, name, of_amx)           \
  namespace portable { extern const Table name; }      \
  namespace avx2 { extern const Table name; }          \
  namespace avx512 { extern const Table name; }        \
  namespace avx512bf16 { extern const Table name; }    \
  namespace of_amx { extern const Table name; }        \
  inline const Table& name(Isa isa) {                  \
    switch (isa) {                                     \
      case Isa::amx: return of_amx::name;              \
      case Isa::avx512bf16: return avx512bf16::name;   \
      case Isa::avx512: return avx512::name;           \
      case Isa::avx2: return avx2::name;               \
      default: return portable::name;                  \
    }                                                  \
  }
#define LATENTKV_TABLE(Table, name) LATENTKV_TABLES(Table, name, avx512bf16)
#define LATENTKV_AMX_TABLE(Table, name) LATENTKV_TABLES(Table, name, amx)
#else
#define LATENTKV_TABLE(Table, name)               \
  namespace portable { extern const Table name; } \
  inline const Table& name(Isa) { return portable::name; }
#define LATENTKV_AMX_TABLE LATENTKV_TABLE
#endif

}  // namespace latentkv
