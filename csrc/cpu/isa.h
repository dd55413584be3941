// The seam between kernels (csrc/cpu/kernels/*.cpp, built once per instruction set, no torch headers) and the
// dispatch layer (csrc/cpu/*.cpp, built once). A kernel lives in namespace gfast::GFAST_ISA_NS; the dispatch layer
// declares it with GFAST_DECLARE_KERNEL and gets the function for this CPU with GFAST_KERNEL.
#pragma once

#define GFAST_CONCAT_IMPL(a, b) a##b
#define GFAST_CONCAT(a, b) GFAST_CONCAT_IMPL(a, b)
#ifdef GFAST_ISA
#define GFAST_ISA_NS GFAST_CONCAT(isa_, GFAST_ISA)
#endif

#if defined(GFAST_HAVE_AVX2) && defined(GFAST_HAVE_AVX512)
#define GFAST_DECLARE_KERNEL(ret, name, args) \
  namespace isa_default {                     \
  ret name args;                              \
  }                                           \
  namespace isa_avx2 {                        \
  ret name args;                              \
  }                                           \
  namespace isa_avx512 {                      \
  ret name args;                              \
  }
#define GFAST_KERNEL(name)                                                       \
  (::gfast::isa() == ::gfast::Isa::avx512 ? &::gfast::isa_avx512::name           \
   : ::gfast::isa() == ::gfast::Isa::avx2 ? &::gfast::isa_avx2::name             \
                                          : &::gfast::isa_default::name)
#else
#define GFAST_DECLARE_KERNEL(ret, name, args) \
  namespace isa_default {                     \
  ret name args;                              \
  }
#define GFAST_KERNEL(name) (&::gfast::isa_default::name)
#endif

namespace gfast {

enum class Isa { baseline, avx2, avx512 };

// The best set that was built and that this CPU has; GFAST_CPU_ISA=default|avx2|avx512 lowers it. Fixed at first use.
Isa isa();
const char* isa_name();

}  // namespace gfast
