// SPDX-License-Identifier: Apache-2.0
// From a DType to the template that is compiled for it.
#pragma once

#include "../params.h"
#include "common/platform.h"

namespace fastproto::cuda {

template <class T>
struct TypeTag {
  using type = T;
};

template <class T>
constexpr DType kDTypeOf = DType::kFloat64;  // which no kernel takes
#define FP_ROW(name, torch_name, python_name, bytes, type) \
  template <>                                              \
  constexpr DType kDTypeOf<type> = DType::name;
FP_DTYPES(FP_ROW)
#undef FP_ROW

// launch(TypeTag<T>()) of the one of Ts that `dtype` is: an error text, or null.
template <class... Ts, class Launch>
const char* with_type(DType dtype, const Launch& launch) {
  const char* error = "found a type that is not compiled";
  (void)((dtype == kDTypeOf<Ts> ? (error = launch(TypeTag<Ts>()), true) : false) || ...);
  return error;
}

}  // namespace fastproto::cuda
