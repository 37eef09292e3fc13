// The Python module `latentkv._native`. Tensors cross as addresses: `ops/native` has checked what lies behind them.
#include <nanobind/nanobind.h>

#include "isa.h"
#include "recording.h"
#include "team.h"

namespace nb = nanobind;

namespace latentkv {
void bind_attention(nb::module_& m);
void bind_choice(nb::module_& m);
void bind_hyper(nb::module_& m);
void bind_index(nb::module_& m);
void bind_linear(nb::module_& m);
void bind_moe(nb::module_& m);
void bind_recurrent(nb::module_& m);
void bind_shared(nb::module_& m);
void bind_small(nb::module_& m);
}  // namespace latentkv

NB_MODULE(_native, m) {
  nb::set_leak_warnings(false);  // a program may hold a model until its end
  using latentkv::Isa;
  nb::enum_<Isa>(m, "Isa")
      .value("portable", Isa::portable)
      .value("avx2", Isa::avx2)
      .value("avx512", Isa::avx512)
      .value("avx512bf16", Isa::avx512bf16)
      .value("amx", Isa::amx);
  m.def("runs", &latentkv::runs, "Whether this CPU runs kernels of the instruction set.");
  using latentkv::Recording;
  nb::class_<Recording>(m, "Recording", "Native calls of one thread, to be run again.")
      .def(nb::init<>())
      .def("start", &Recording::start, "Add what this thread calls from here on.")
      .def("stop", [](Recording&) { Recording::stop(); }, "Add no more.")
      .def("run", &Recording::run, nb::call_guard<nb::gil_scoped_release>(),
           "Run all calls; the number of the first that something was wrong with, or -1.")
      .def("__len__", &Recording::size);
  m.def("kernel_seconds", [] { return latentkv::kernel_seconds(); }, "Seconds that this thread has spent in kernels.");
  m.def("live_teams", &latentkv::live_teams, "Threads that have a team of OpenMP threads.");
  m.def("release_team", &latentkv::release_team, nb::call_guard<nb::gil_scoped_release>(),
        "End the calling thread's team of OpenMP threads.");
  latentkv::bind_attention(m);
  latentkv::bind_choice(m);
  latentkv::bind_hyper(m);
  latentkv::bind_index(m);
  latentkv::bind_linear(m);
  latentkv::bind_moe(m);
  latentkv::bind_recurrent(m);
  latentkv::bind_shared(m);
  latentkv::bind_small(m);
}
