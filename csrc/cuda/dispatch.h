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
template <>
constexpr DType kDTypeOf<float> = DType::kFloat32;
template <>
constexpr DType kDTypeOf<bf16> = DType::kBFloat16;
template <>
constexpr DType kDTypeOf<half> = DType::kFloat16;

// launch(TypeTag<T>()) of the one of Ts that `dtype` is: an error text, or null.
template <class... Ts, class Launch>
const char* with_type(DType dtype, const Launch& launch) {
  const char* error = "found a type that is not compiled";
  (void)((dtype == kDTypeOf<Ts> ? (error = launch(TypeTag<Ts>()), true) : false) || ...);
  return error;
}

}  // namespace fastproto::cuda
