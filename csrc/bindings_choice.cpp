// Python's way to the choice of tokens.
#include <nanobind/nanobind.h>

#include "choice.h"

namespace nb = nanobind;

namespace latentkv {

void bind_choice(nb::module_& m) {
  m.def(
      "choose_tokens",
      [](std::uintptr_t logits, std::int64_t rows, std::int64_t vocabulary, std::uintptr_t rules, std::uintptr_t tokens) {
        choose_tokens({reinterpret_cast<const float*>(logits), rows, vocabulary, reinterpret_cast<const ChoiceRule*>(rules),
                       reinterpret_cast<std::int64_t*>(tokens)});
      },
      nb::call_guard<nb::gil_scoped_release>(), "logits [rows, vocabulary] f32, a rule each -> tokens [rows] i64.");
}

}  // namespace latentkv
