// Python's way to sums of several processes.
#include <nanobind/nanobind.h>
#include <nanobind/stl/vector.h>

#include "recording.h"
#include "shared_sum.h"

namespace nb = nanobind;

namespace latentkv {

using Address = std::uintptr_t;

static void shared_sum(Address group, Address part, std::int64_t n, Address residual, int residual_dtype, Address out,
                       int out_dtype) {
  ((SharedSum*)group)
      ->sum((const float*)part, n, (const void*)residual, (DType)residual_dtype, (void*)out, (DType)out_dtype);
}

void bind_shared(nb::module_& m) {
  nb::exception<ProcessLost>(m, "ProcessLost", PyExc_RuntimeError);
  nb::exception<ProcessFailed>(m, "ProcessFailed", PyExc_RuntimeError);
  nb::class_<SharedSum>(m, "SharedSum", "One of several processes that add up what each has, see csrc/shared_sum.h.")
      .def(nb::init<int, int, int, std::int64_t, std::vector<int>>())
      .def_static("bytes", &SharedSum::bytes, "Of memory that so many processes share, with places of so many floats.")
      .def_prop_ro("address", [](const SharedSum& group) { return (Address)&group; }, "For `shared_sum`.")
      .def_prop_ro("culprit", &SharedSum::culprit, "The process that an error was last raised about.")
      .def("begin", &SharedSum::begin, nb::call_guard<nb::gil_scoped_release>(), "Begin the next step with the others.")
      .def("end", &SharedSum::end, nb::call_guard<nb::gil_scoped_release>(), "End the step with the others.")
      .def(
          "broadcast",
          [](SharedSum& group, Address bytes, std::int64_t n) {
            nb::gil_scoped_release release;
            group.broadcast((void*)bytes, n);
          },
          "The others' bytes become those of the first process.")
      .def(
          "gather",
          [](SharedSum& group, Address own, std::int64_t rows, const std::vector<std::int64_t>& widths, Address out) {
            nb::gil_scoped_release release;
            group.gather((const float*)own, rows, widths, (float*)out);
          },
          "The processes' own [rows, width] side by side.")
      .def("fail", &SharedSum::fail, "Do no more of this step because of a process; the others will know.")
      .def("abandon", &SharedSum::abandon, "Have all that wait wait no more.");
  m.def("shared_sum", recordable(&shared_sum), nb::call_guard<nb::gil_scoped_release>(),
        "out = the sum of all processes' parts, and of a residual.");
}

}  // namespace latentkv
